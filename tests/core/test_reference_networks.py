"""The networks against numbers that the published code computed (../shared/reference, where it is present)."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mdm_core.apple_config import config_from_apple
from mdm_core.config import MatryoshkaConfig
from mdm_core.nested_unet import build_network

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference numbers (../shared/reference) are absent")

CASES = ["a_unet", "b_nested", "c_nested2", "e_unet_reallayout", "e3_unet_uncond"]


def matryoshka_config(case: dict[str, Any], inputs: dict[str, torch.Tensor]) -> MatryoshkaConfig:
    """All networks of a case, finest first."""
    width = case["conditioning_feature_dim_passed"]
    return config_from_apple(
        case["unet_config"], text_dim=width if width > 0 else None, resolution=inputs["in.x0"].shape[-1]
    )


def recipe_state(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights, rebuilt from each key's name, and checked against the recorded hash."""
    state = {}
    for key, shape in case["state_shapes"].items():
        a = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
        norm = key in case["norm_weight_keys"]
        state[key] = torch.from_numpy((1 + 0.1 * a if norm else 0.05 * a).astype(np.float32))
    return state


@pytest.mark.parametrize("name", CASES)
def test_network_computes_what_the_published_code_does(name: str) -> None:
    case = json.loads((REFERENCE / "index_forward.json").read_text())["cases"][name]
    data = load_file(REFERENCE / case["file"])
    network = build_network(matryoshka_config(case, data)).eval()
    network.load_state_dict(recipe_state(case), strict=True)
    x_t = [data[f"in.x{level}"] for level in range(len(network.resolutions))]
    with torch.no_grad():
        outputs = network(x_t, data["in.times"], data.get("in.cond"), data.get("in.mask"))
    for level, output in enumerate(outputs):
        torch.testing.assert_close(output, data[f"out.default.y{level}"], atol=2e-5, rtol=0)
