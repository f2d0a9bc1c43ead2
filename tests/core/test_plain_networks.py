"""The plain networks against numbers that the published code computed (../shared/reference, where it is present)."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mdm_core.apple_config import config_from_apple
from tests.core.plain_networks import plain_forward
from tests.core.reference_forward import build_case, call_arguments

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference numbers (../shared/reference) are absent")

CASES: dict[str, Any] = (
    json.loads((REFERENCE / "index_forward.json").read_text())["cases"] if REFERENCE.is_dir() else {}
)
OUTPUTS = {
    "a_unet": ["default", "micros", "nomask"],
    "b_nested": ["default", "micros", "nomask", "mixed"],
    "c_nested2": ["default", "micros", "nomask", "mixed"],
    "d_temporal": ["default", "micros"],
    "d2_temporal_rope": ["default"],
    "d4_spatial_ds": ["default"],
    "e_unet_reallayout": ["default", "micros", "nomask"],
    "e3_unet_uncond": ["default"],
}


def recipe_state(case: dict[str, Any]) -> dict[str, Tensor]:
    """The weights, rebuilt from each key's name; rotary frequencies keep their default, 10000^(-i/16)."""
    state = {}
    for key, shape in case["state_shapes"].items():
        a = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
        value = torch.from_numpy((1 + 0.1 * a if key in case["norm_weight_keys"] else 0.05 * a).astype(np.float32))
        state[key] = (10000.0 ** -(torch.arange(16) / 16) if "pos_emb" in key else value).double()
    return state


def run_case(name: str, output: str, state: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The plain network's outputs in one of a case's settings, and the case's numbers."""
    case = CASES[name]
    width = case["conditioning_feature_dim_passed"]
    data = load_file(REFERENCE / case["file"])
    x_t = [data[key].double() for key in sorted(key for key in data if key.startswith("in.x"))]
    if output == "mixed":
        x_t = [x[:rows] for x, rows in zip(x_t, data["in.mixed_batches"].tolist(), strict=True)]
    text_emb, text_mask = data.get("in.cond"), data.get("in.mask")
    outputs = plain_forward(
        config_from_apple(case["unet_config"], text_dim=width if width > 0 else None, resolution=x_t[0].shape[-1]),
        state,
        x_t,
        data["in.times"],
        text_emb.double() if text_emb is not None else None,
        text_mask.bool() if text_mask is not None and output != "nomask" else None,
        micros={"scale": data["in.micro.scale"]} if output == "micros" else None,
    )
    return outputs, data


@pytest.mark.parametrize(("name", "output"), [(name, output) for name in OUTPUTS for output in OUTPUTS[name]])
def test_plain_network_computes_what_the_published_code_does(name: str, output: str) -> None:
    outputs, data = run_case(name, output, recipe_state(CASES[name]))
    for level, y in enumerate(outputs):
        torch.testing.assert_close(y.float(), data[f"out.{output}.y{level}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "output"), [(name, output) for name in OUTPUTS for output in OUTPUTS[name]])
def test_both_implementations_agree_on_the_case_in_float64(name: str, output: str) -> None:
    network = build_case(REFERENCE, CASES[name]).double()
    outputs, data = run_case(name, output, network.state_dict())
    x_t, arguments = call_arguments(network, data, output)
    if "text_emb" in arguments:
        arguments["text_emb"] = arguments["text_emb"].double()
    if "micros" in arguments:
        arguments["micros"] = {key: value.double() for key, value in arguments["micros"].items()}
    with torch.no_grad():
        ours = network([x.double() for x in x_t], **arguments)
    for got, wanted in zip(ours, outputs, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", OUTPUTS)
def test_plain_gradients_are_those_of_the_published_code(name: str) -> None:
    state = {key: value.requires_grad_("pos_emb" not in key) for key, value in recipe_state(CASES[name]).items()}
    outputs, data = run_case(name, "default", state)
    loss = torch.stack([y.square().mean() for y in outputs]).sum()
    loss.backward()
    norms = {key: float(value.grad.norm()) for key, value in state.items() if value.grad is not None}
    assert loss.item() == pytest.approx(data["grad.loss"].item(), rel=1e-6)
    assert math.hypot(*norms.values()) == pytest.approx(data["grad.total_norm"].item(), rel=1e-6)
    for key, norm in (CASES[name]["grad_norms"] or {}).items():
        assert norms[key] == pytest.approx(norm, rel=1e-4, abs=1e-6), key


def test_every_output_of_the_reference_is_compared() -> None:
    for name, case in CASES.items():
        stored = {key.split(".")[1] for key in load_file(REFERENCE / case["file"]) if key.startswith("out.")}
        assert stored == set(OUTPUTS[name]), name
