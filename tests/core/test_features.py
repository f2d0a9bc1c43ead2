"""Feature maps by name: they are those that the network goes on with."""

import pytest
import torch

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.features import feature_names, features, recorded
from mdm_core.nested_unet import build_network

CONFIG = MatryoshkaConfig(
    (
        UNetConfig(
            resolution=16, channels=(8, 16), num_resnets=(2, 1), num_attention_layers=(0, 0), time_dim=32,
            mid_blocks=False, num_groups=4, num_heads=2,
        ),
        UNetConfig(
            resolution=8, channels=(8, 16), num_resnets=(1, 1), num_attention_layers=(0, 2), time_dim=32,
            num_groups=4, num_heads=2,
        ),
    )
)  # fmt: skip


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = build_network(CONFIG).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, side, side, generator=generator) for side in (16, 8)], torch.tensor([3, 900])


def test_names_cover_every_block_of_every_level(network):
    assert feature_names(network) == (
        "16.down.0.0", "16.down.0.1", "16.down.1.0",
        "16.up.1.0", "16.up.1.1", "16.up.0.0", "16.up.0.1", "16.up.0.2",
        "8.down.0.0", "8.down.1.0", "8.mid.0.0", "8.mid.1.0",
        "8.up.1.0", "8.up.1.1", "8.up.0.0", "8.up.0.1",
    )  # fmt: skip


def test_maps_have_the_sides_and_channels_of_their_level(network):
    x_t, timestep = inputs()
    found = features(network, feature_names(network), x_t, timestep)
    shapes = {name: tuple(value.shape[1:]) for name, value in found.items()}
    for name, shape in shapes.items():
        resolution, place, depth, _ = name.split(".")
        level = 1 if place == "mid" else int(depth)
        assert shape == ((8, 16)[level], int(resolution) >> level, int(resolution) >> level)


def test_the_last_map_is_what_the_prediction_is_read_from(network):
    x_t, timestep = inputs()
    found = features(network, ["16.up.0.2", "8.up.0.1"], x_t, timestep)
    with torch.no_grad():
        outer, inner = network(x_t, timestep)
        torch.testing.assert_close(network.read_out(found["16.up.0.2"]), outer)
        torch.testing.assert_close(network.inner_unet.read_out(found["8.up.0.1"]), inner)


def test_a_recorded_map_carries_gradients(network):
    x_t, timestep = inputs()
    with recorded(network, ["8.mid.1.0"]) as found:
        network(x_t, timestep)
    found["8.mid.1.0"].sum().backward()
    assert network.inner_unet.conv_in.weight.grad.abs().max() > 0
    assert network.conv_out.weight.grad is None
    assert not network.levels()["8.mid.1"].resnets[0]._forward_hooks


def test_an_unknown_name_is_refused_with_those_there_are(network):
    x_t, timestep = inputs()
    with pytest.raises(ValueError, match=r"no feature map '8.mid.7' in this network; there are 16.down.0.0, "):
        features(network, ["8.mid.7"], x_t, timestep)
