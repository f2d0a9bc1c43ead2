"""What a user relies on in the networks: growth, text and its absence, bad shapes."""

import pytest
import torch

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.nested_unet import NestedUNet, build_network
from mdm_core.progressive import grow
from mdm_core.unet import UNet

INNER = UNetConfig(
    resolution=8,
    channels=(16, 32),
    num_resnets=(1, 1),
    num_attention_layers=(0, 1),
    time_dim=32,
    text_dim=12,
    text_proj_dim=16,
    num_heads=4,
    num_groups=8,
)
SHELL = UNetConfig(
    resolution=16,
    channels=(8, 16),
    num_resnets=(1, 1),
    num_attention_layers=(0, 0),
    time_dim=32,
    mid_blocks=False,
    attention_ffn=False,
    num_heads=4,
    num_groups=8,
)


def randomised(network: UNet, seed: int = 0) -> UNet:
    """The network with no parameter left at zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


def inputs(resolutions: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = [torch.randn(2, 3, side, side, generator=generator) for side in resolutions]
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, True]])
    return x_t, torch.tensor([3, 700]), torch.randn(2, 5, 12, generator=generator), mask


def test_grown_network_computes_at_first_what_the_inner_one_did() -> None:
    inner = randomised(build_network(MatryoshkaConfig((INNER,))))
    outer = build_network(MatryoshkaConfig((SHELL, INNER))).eval()
    assert isinstance(outer, NestedUNet)
    growth = grow(outer, inner.state_dict())
    x_t, timestep, text_emb, text_mask = inputs((16, 8))
    with torch.no_grad():
        alone = inner(x_t[1:], timestep, text_emb, text_mask)[0]
        nested = outer(x_t, timestep, text_emb, text_mask)[1]
    assert torch.equal(alone, nested)
    assert alone.abs().mean() > 0.01
    assert set(growth.inherited) | set(growth.fresh) == set(outer.state_dict())
    assert {key.split(".")[0] for key in growth.inherited} == {"inner_unet"}
    assert len(growth.inherited) == len(inner.state_dict())


def test_growth_names_what_does_not_fit_and_loads_nothing() -> None:
    outer = build_network(MatryoshkaConfig((SHELL, INNER)))
    assert isinstance(outer, NestedUNet)
    before = {key: value.clone() for key, value in outer.state_dict().items()}
    state = {key: value + 1 for key, value in build_network(MatryoshkaConfig((INNER,))).state_dict().items()}
    state["odd.key"] = state.pop("conv_in.weight")
    state["conv_out.bias"] = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"conv_in\.weight.*odd\.key.*conv_out\.bias is \(4,\), wanted \(3,\)"):
        grow(outer, state)
    assert all(torch.equal(before[key], value) for key, value in outer.state_dict().items())


def test_padding_does_not_change_what_is_drawn() -> None:
    network = randomised(build_network(MatryoshkaConfig((SHELL, INNER))))
    x_t, timestep, text_emb, text_mask = inputs((16, 8))
    longer = torch.cat([text_emb, torch.full((2, 3, 12), 9.0)], dim=1)
    mask = torch.cat([text_mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        for short, padded in zip(
            network(x_t, timestep, text_emb, text_mask), network(x_t, timestep, longer, mask), strict=True
        ):
            torch.testing.assert_close(short, padded, atol=1e-5, rtol=0)


def test_a_row_without_tokens_is_drawn_as_without_text() -> None:
    network = randomised(build_network(MatryoshkaConfig((SHELL, INNER))))
    x_t, timestep, text_emb, text_mask = inputs((16, 8))
    dropped = text_mask & torch.tensor([[False], [True]])
    outputs = network(x_t, timestep, text_emb, dropped)
    sum(level.square().mean() for level in outputs).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())
    with torch.no_grad():
        for without, level, full in zip(
            network(x_t, timestep), outputs, network(x_t, timestep, text_emb, text_mask), strict=True
        ):
            torch.testing.assert_close(level[0], without[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(level[1], full[1], atol=1e-5, rtol=0)
            assert (level[0] - full[0]).abs().max() > 1e-3


def test_every_parameter_learns() -> None:
    network = randomised(build_network(MatryoshkaConfig((SHELL, INNER))))
    outputs = network(*inputs((16, 8)))
    sum(level.square().mean() for level in outputs).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_resnets": (1,)}, "num_resnets=.1. has 1 entries, but channels=.8, 16. has 2"),
        ({"resolution": 15}, "resolution=15 can't be halved 1 times"),
        ({"num_groups": 6}, "8 is not a multiple of num_groups=6"),
        ({"num_attention_layers": (1, 0), "num_heads": 3}, "8 is not a multiple of num_heads=3"),
    ],
)
def test_contradictions_in_a_configuration_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNetConfig(**{**SHELL.__dict__, **change})


def test_a_shell_must_end_where_the_inner_network_begins() -> None:
    wrong = UNetConfig(**{**SHELL.__dict__, "resolution": 32})
    with pytest.raises(ConfigError, match="ends at 16 px, but the network inside it works at 8 px"):
        MatryoshkaConfig((wrong, INNER))


def test_configuration_comes_back_from_its_dictionary() -> None:
    config = MatryoshkaConfig((SHELL, INNER))
    assert MatryoshkaConfig.from_dict(config.to_dict()) == config
    assert config.up_to(8) == MatryoshkaConfig((INNER,))
