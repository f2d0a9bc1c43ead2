"""Replays the forward cases of a folder laid out like `shared/reference`: what the published code computed."""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mdm_core.apple_config import config_from_apple
from mdm_core.apple_weights import load_apple_checkpoint
from mdm_core.nested_unet import build_network
from mdm_core.unet import UNet

TOLERANCE = 2e-5
"""Largest absolute error in float32."""


@dataclass(frozen=True)
class CaseResult:
    """How far a case was from what is recorded."""

    name: str
    error: float
    tolerance: float


def forward_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """The forward cases of a folder, by name."""
    cases: dict[str, dict[str, Any]] = json.loads((folder / "index_forward.json").read_text())["cases"]
    return cases


def build_case(folder: Path, case: dict[str, Any]) -> UNet:
    """The network of a case, with the weights of its recipe, in evaluation mode."""
    inputs = load_file(folder / case["file"])
    width = case["conditioning_feature_dim_passed"]
    config = config_from_apple(
        case["unet_config"], text_dim=width if width > 0 else None, resolution=inputs["in.x0"].shape[-1]
    )
    network = build_network(config).eval()
    state = recipe_state(case, network.state_dict())
    # The published code builds a few layers that it never runs; they had no gradient there, and are not ours.
    unused = state.keys() - network.state_dict().keys()
    if odd := sorted(unused - set(case["params_without_grad"])):
        raise ValueError(f"the network lacks {odd[0]!r} and {len(odd) - 1} other keys of the case")
    ours = {key: value for key, value in state.items() if key not in unused}
    if list(ours) != list(network.state_dict()):
        raise ValueError("the network's keys are not those of the case, or in another order")
    network.load_state_dict(ours)
    if not unused and sum(parameter.numel() for parameter in network.parameters()) != case["n_params"]:
        raise ValueError(f"the network has not the {case['n_params']} parameters of the case")
    return network


def recipe_state(case: dict[str, Any], defaults: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, rebuilt from each key's name (`defaults` for positions), and checked against the recorded hash."""
    norms = set(case["norm_weight_keys"])
    state = {}
    for key, shape in case["state_shapes"].items():
        draw = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
        value = (1 + 0.1 * draw if key in norms else 0.05 * draw).astype(np.float32)
        state[key] = defaults[key] if "pos_emb" in key else torch.from_numpy(value)
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].numpy().tobytes())
    if digest.hexdigest() != case["state_sha256"]:
        raise ValueError(f"the rebuilt weights have the hash {digest.hexdigest()}, recorded is {case['state_sha256']}")
    return state


def replay_forward_case(folder: Path, name: str) -> CaseResult:
    """How far the network of a forward case is from its recorded outputs and gradients."""
    case = forward_cases(folder)[name]
    return CaseResult(name, _case_error(build_case(folder, case), load_file(folder / case["file"]), case), TOLERANCE)


def replay_checkpoint(folder: Path, name: str) -> CaseResult:
    """How far the case's checkpoint in the published layout is from the weights of its recipe: not at all."""
    case = forward_cases(folder)[name]
    state = load_apple_checkpoint(folder / case["pth"]).state_dict
    errors = [largest(state[key], value) for key, value in build_case(folder, case).state_dict().items()]
    return CaseResult(case["pth"], max(errors), 0.0)


def call_arguments(network: UNet, data: dict[str, Tensor], kind: str) -> tuple[list[Tensor], dict[str, Any]]:
    """The pictures and the other arguments of one of a case's calls: default, micros, nomask or mixed.

    What a network has no use for, the published code takes and ignores; it is left out here.
    """
    x_t = [data[f"in.x{level}"] for level in range(sum(key.startswith("in.x") for key in data))]
    if kind == "mixed":
        x_t = [x[: int(rows)] for x, rows in zip(x_t, data["in.mixed_batches"], strict=True)]
    arguments: dict[str, Any] = {"timestep": data["in.times"]}
    if any(key.endswith("cond_emb.weight") for key in network.state_dict()):
        arguments["text_emb"] = data["in.cond"]
        if "in.mask" in data and kind != "nomask":
            arguments["text_mask"] = data["in.mask"].bool()
    if kind == "micros":
        arguments["micros"] = {
            name: data[f"in.micro.{name}"] for name in network.micro_conditions if f"in.micro.{name}" in data
        }
    return x_t, arguments


def _case_error(network: UNet, data: dict[str, Tensor], case: dict[str, Any]) -> float:
    errors = []
    for kind in sorted({key.split(".")[1] for key in data if key.startswith("out.")}):
        if kind not in ("default", "micros", "nomask", "mixed"):
            raise ValueError(f"the case has outputs of an unknown kind, {kind!r}")
        x_t, arguments = call_arguments(network, data, kind)
        outputs = network(x_t, **arguments)
        errors += [largest(output, data[f"out.{kind}.y{level}"]) for level, output in enumerate(outputs)]
        if kind == "default" and "grad.loss" in data:
            errors += _gradient_errors(network, outputs, case, data)
    return max(errors)


def _gradient_errors(
    network: UNet, outputs: list[Tensor], case: dict[str, Any], data: dict[str, Tensor]
) -> Iterator[float]:
    """Of the loss Σ mean(y²), its gradients' norms, each parameter's where they are recorded, and the total."""
    loss = torch.stack([output.square().mean() for output in outputs]).sum()
    yield largest(loss, data["grad.loss"])
    network.zero_grad()
    loss.backward()
    norms = {name: p.grad.norm() for name, p in network.named_parameters() if p.grad is not None}
    yield largest(torch.stack(list(norms.values())).norm(), data["grad.total_norm"])
    for name, recorded in (case["grad_norms"] or {}).items():
        yield largest(norms[name], torch.tensor(recorded))


def largest(ours: Tensor, recorded: Tensor) -> float:
    """The largest absolute difference; shapes must be equal.

    NaN of ours is infinitely far; where NaN is recorded (a fault of the published code, whose captions without a token
    give it) there is nothing to compare.
    """
    if ours.shape != recorded.shape:
        raise ValueError(f"got a tensor of shape {tuple(ours.shape)}, recorded is {tuple(recorded.shape)}")
    error = (ours.detach().double() - recorded.double()).abs()[torch.isfinite(recorded)]
    return error.nan_to_num(nan=math.inf).max().item() if error.numel() else 0.0
