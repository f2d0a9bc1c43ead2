"""Schedules, losses and samplers against numbers that the published code computed (../shared/reference)."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mdm_core.apple_config import config_from_apple
from mdm_core.nested_unet import build_network
from mdm_core.unet import UNet
from tests.core.reference_diffusion import replay_case
from tests.core.test_reference_networks import recipe_state

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
INDEX = REFERENCE / "index_diffusion.json"
CASES = list(json.loads(INDEX.read_text())["cases"]) if INDEX.is_file() else []


def build(name: str) -> UNet:
    """The network of a forward case, with its recipe's weights."""
    case = json.loads((REFERENCE / "index_forward.json").read_text())["cases"][name]
    side = load_file(REFERENCE / case["file"])["in.x0"].shape[-1]
    width = case["conditioning_feature_dim_passed"]
    network = build_network(
        config_from_apple(case["unet_config"], text_dim=width if width > 0 else None, resolution=side)
    )
    state = recipe_state(case)
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    return network


@pytest.mark.skipif(not CASES, reason="the reference numbers (../shared/reference) are absent")
@pytest.mark.parametrize("name", CASES or ["none"])
def test_replay_agrees_with_the_published_code(name: str) -> None:
    result = replay_case(REFERENCE, name, build)
    assert result.error < result.tolerance
