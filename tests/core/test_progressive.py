"""Growth by any number of shells: what is inherited, what starts fresh, and what the grown network computes."""

import pytest
import torch

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import CheckpointError
from mdm_core.nested_unet import NestedUNet, build_network
from mdm_core.progressive import grow
from mdm_core.unet import UNet


def network_config(resolution: int, *, innermost: bool = False) -> UNetConfig:
    return UNetConfig(
        resolution=resolution,
        channels=(8, 16),
        num_resnets=(1, 1),
        num_attention_layers=(0, 1 if innermost else 0),
        time_dim=32,
        text_dim=12 if innermost else None,
        mid_blocks=innermost,
        num_heads=4,
        num_groups=8,
    )


INNER, MIDDLE, OUTER = network_config(4, innermost=True), network_config(8), network_config(16)


def randomised(*networks: UNetConfig) -> UNet:
    generator = torch.Generator().manual_seed(1)
    network = build_network(MatryoshkaConfig(networks)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def nested(*networks: UNetConfig) -> NestedUNet:
    network = build_network(MatryoshkaConfig(networks)).eval()
    assert isinstance(network, NestedUNet)
    return network


@pytest.mark.parametrize(("given", "prefix"), [((INNER,), "inner_unet.inner_unet."), ((MIDDLE, INNER), "inner_unet.")])
def test_growth_from_any_depth_computes_what_the_smaller_network_did(given: tuple[UNetConfig, ...], prefix: str):
    small, large = randomised(*given), nested(OUTER, MIDDLE, INNER)
    fresh_before = {key: value.clone() for key, value in large.state_dict().items() if not key.startswith(prefix)}
    growth = grow(large, small.state_dict())
    assert growth.inherited == tuple(prefix + key for key in small.state_dict())
    assert growth.fresh == tuple(fresh_before)
    assert set(growth.inherited) | set(growth.fresh) == large.state_dict().keys()
    state = large.state_dict()
    assert all(torch.equal(state[key], value) for key, value in fresh_before.items())
    x_t = [torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in (16, 8, 4)]
    rest = (torch.tensor([3, 700]), torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        alone, grown = small(x_t[-len(given) :], *rest), large(x_t, *rest)
    for before, after in zip(alone, grown[-len(given) :], strict=True):
        assert torch.equal(before, after)
        assert before.abs().mean() > 0.01


def test_growth_refuses_weights_of_a_network_as_large() -> None:
    large = nested(MIDDLE, INNER)
    with pytest.raises(CheckpointError, match="have 1 shell and the network to grow has 1; it needs more"):
        grow(large, large.state_dict())


def test_growth_loads_nothing_when_one_key_does_not_fit() -> None:
    large = nested(OUTER, MIDDLE, INNER)
    before = {key: value.clone() for key, value in large.state_dict().items()}
    state = {key: value + 1 for key, value in randomised(MIDDLE, INNER).state_dict().items()}
    state["inner_unet.conv_in.weight"] = torch.zeros(8, 3, 5, 5)
    del state["norm_out.bias"]
    with pytest.raises(
        CheckpointError,
        match=r"don't fit the 8 px network: 1 missing: norm_out\.bias; 1 of another shape: "
        r"inner_unet\.conv_in\.weight is \(8, 3, 5, 5\), wanted \(8, 3, 3, 3\)$",
    ):
        grow(large, state)
    assert all(torch.equal(before[key], value) for key, value in large.state_dict().items())
