"""The baseline computes what the network computes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import ConfigError
from mdm_core.nested_unet import build_network
from pipelines.benchmark.plain import attend, build_plain_network

INNER = UNetConfig(
    resolution=16,
    channels=(32, 64),
    num_resnets=(1, 2),
    num_attention_layers=(0, 2),
    text_dim=24,
    text_proj_dim=32,
    micro_conditions=(("scale", 16.0),),
)
SHELL = UNetConfig(
    resolution=32,
    channels=(32, 32),
    num_resnets=(2, 1),
    num_attention_layers=(0, 0),
    time_dim=INNER.time_width,
    micro_conditions=(("scale", 32.0),),
    mid_blocks=False,
)


def randomised(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state with no parameter left at zero, as after training."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in network.state_dict().items()
    }


@pytest.mark.parametrize("mask_text", [True, False])
@pytest.mark.parametrize("shells", [0, 1])
def test_the_same_weights_give_the_same_outputs_and_gradients(shells, mask_text):
    config = MatryoshkaConfig((SHELL, replace(INNER, mask_text=mask_text))[1 - shells :])
    ours, plain = build_network(config), build_plain_network(config)
    state = randomised(ours)
    ours.load_state_dict(state)
    plain.load_state_dict(state)

    generator = torch.Generator().manual_seed(1)
    x_t = [torch.randn(3, 3, side, side, generator=generator) for side in config.resolutions]
    text = torch.randn(3, 5, 24, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    outputs = [network(x_t, torch.tensor([3, 500, 999]), text, mask) for network in (ours, plain)]
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
        assert theirs.abs().mean() > 0.01
    for each in outputs:
        torch.stack([out.square().mean() for out in each]).sum().backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=2e-5, rtol=1e-3)
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_both_networks_have_the_same_keys_and_levels():
    config = MatryoshkaConfig((SHELL, INNER))
    ours, plain = build_network(config), build_plain_network(config)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (ours, plain)]
    assert shapes[0] == shapes[1]
    assert list(ours.levels()) == list(plain.levels())


def test_attention_by_hand():
    # One head, width 1, two positions: scores 0 and ln 3 for the first query, so it sees 1/4 and 3/4 of the values.
    q = torch.tensor([[[1.0, 0.0]]])
    k = torch.tensor([[[0.0, torch.log(torch.tensor(3.0))]]])
    v = torch.tensor([[[4.0, 8.0]]])
    torch.testing.assert_close(attend(q, k, v, num_heads=1), torch.tensor([[[7.0, 6.0]]]))
    seen = torch.tensor([[True, False]])
    torch.testing.assert_close(attend(q, k, v, num_heads=1, mask=seen), torch.tensor([[[4.0, 4.0]]]))


@pytest.mark.parametrize("change", [{"num_text_layers": 1}, {"num_classes": 3}])
def test_what_the_baseline_lacks_is_refused(change):
    with pytest.raises(ConfigError, match="the plain baseline knows neither video, nor text layers, nor class labels"):
        build_plain_network(MatryoshkaConfig((replace(INNER, **change),)))
