"""What a user relies on in the networks: growth, text and its absence, fused kernels, bad shapes."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.nested_unet import NestedUNet, build_network
from mdm_core.progressive import grow
from mdm_core.temporal import to_frames, to_grid
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

# What UNetConfig did not have at first; files from then lack them.
NEW_FIELDS = {
    "num_text_layers", "num_classes", "micro_conditions", "num_attention_groups", "feed_inner", "video",
    "num_temporal_layers", "rotary_positions",
}  # fmt: skip


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
        ({"channels": (), "num_resnets": (), "num_attention_layers": ()}, r"channels=\[\] must be at least one number"),
        ({"num_groups": 0}, "num_groups=0 must be at least 1"),
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


def test_the_whole_network_compiles_into_one_graph() -> None:
    network = randomised(build_network(MatryoshkaConfig((SHELL, INNER))))
    arguments = inputs((16, 8))
    found = []
    for run in (network, torch.compile(network, backend="eager", fullgraph=True)):
        network.zero_grad()
        sum(level.square().mean() for level in run(*arguments)).backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for ours, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, ours, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_attention_is_a_fused_kernel(memory_format: torch.memory_format) -> None:
    network = randomised(build_network(MatryoshkaConfig((SHELL, INNER)))).to(memory_format=memory_format)
    x_t, timestep, text_emb, text_mask = inputs((16, 8))
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        outputs = network([x.contiguous(memory_format=memory_format) for x in x_t], timestep, text_emb, text_mask)
        sum(level.square().mean() for level in outputs).backward()
    counts = Counter(event.name for event in profile.function_events if "scaled_dot_product" in event.name)
    num_layers = 1 + 1 + 2  # down, middle, up; each asks the picture and the text
    assert counts["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2 * num_layers
    assert counts["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == 2 * num_layers
    assert not [name for name in counts if "math" in name]


def test_a_label_is_a_text_of_one_token() -> None:
    config = MatryoshkaConfig((replace(INNER, num_classes=3),))
    network = randomised(build_network(config))
    x_t, timestep, *_ = inputs((8,))
    with torch.no_grad():
        by_label = network(x_t, timestep, labels=torch.tensor([2, -1]))[0]
        token = network.label_emb.weight[2].expand(2, 1, -1)
        by_text = network(x_t, timestep, token, torch.tensor([[True], [False]]))[0]
        alone = network(x_t, timestep)[0]
    assert torch.equal(by_label, by_text)
    torch.testing.assert_close(by_label[1], alone[1])
    assert (by_label[0] - alone[0]).abs().max() > 1e-3


def test_scale_is_clipped_and_other_numbers_are_thousandfold() -> None:
    network = randomised(
        build_network(MatryoshkaConfig((replace(INNER, micro_conditions=(("scale", 8.0), ("a", 0.5))),)))
    )
    x_t, timestep, *_ = inputs((8,))

    def run(**micros: float) -> torch.Tensor:
        with torch.no_grad():
            return network(x_t, timestep, micros={k: torch.full((2,), v) for k, v in micros.items()})[0]

    assert torch.equal(run(), run(scale=8.0, a=0.5))
    assert torch.equal(run(scale=8.0), run(scale=30.0))
    assert (run(scale=8.0) - run(scale=4.0)).abs().max() > 1e-3
    assert (run(a=0.5) - run(a=0.501)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_t": []}, r"x_t has 0 pictures; wanted one for each resolution \(8,\)"),
        ({"text_emb": torch.zeros(2, 5, 7)}, "text_emb is 7 wide; the network reads text_dim=12"),
        ({"labels": torch.zeros(2).long()}, "labels are given to a network without classes"),
        ({"labels": torch.zeros(2).long(), "text_emb": torch.zeros(2, 5, 12)}, "can't both be given"),
        ({"micros": {"scael": torch.zeros(2)}}, r"no micro-condition 'scael' in this network; it has \[\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    network = build_network(MatryoshkaConfig((INNER,)))
    x_t, timestep, *_ = inputs((8,))
    with pytest.raises(ValueError, match=message):
        network(**{"x_t": x_t, "timestep": timestep, **arguments})


def test_a_finer_resolution_has_no_more_rows_than_a_coarser_one() -> None:
    network = build_network(MatryoshkaConfig((SHELL, INNER)))
    x_t, timestep, *_ = inputs((16, 8))
    with pytest.raises(ValueError, match=r"x_t has \[2, 1\] rows; a finer resolution can't have more"):
        network([x_t[0], x_t[1][:1]], timestep)


def test_a_network_without_memory_is_called_and_differentiated() -> None:
    with torch.device("meta"):
        network = build_network(MatryoshkaConfig((SHELL, INNER)))
        x_t = [torch.zeros(2, 3, side, side) for side in (16, 8)]
        outputs = network(x_t, torch.zeros(2))
        sum(output.sum() for output in outputs).backward()
    assert [output.shape[-1] for output in outputs] == [16, 8]
    assert all(parameter.grad is not None for name, parameter in network.named_parameters() if "conv" in name)


def test_frames_lie_row_by_row_on_the_grid() -> None:
    grid = torch.zeros(2, 1, 4, 6)
    for clip, row, column in itertools.product(range(2), range(2), range(2)):
        grid[clip, 0, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3] = 10 * clip + 2 * row + column
    frames = to_frames(grid, 2)
    assert frames.shape == (8, 1, 2, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert all((frame == frame[0, 0, 0]).all() for frame in frames)
    assert torch.equal(to_grid(frames, 2), grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": "temporal"}, "needs an odd number of levels, got 2"),
        ({"num_temporal_layers": (1, 1)}, 'num_temporal_layers=.1, 1. needs video="temporal", got "none"'),
        ({"mid_blocks": True}, "the 16 px shell has the network inside it for its middle; set mid_blocks=false"),
        ({"text_dim": 5}, "text width 5 of the 16 px shell must be .* 16; set text_dim=16"),
        ({"time_dim": 64}, "time width 64 of the 16 px shell must equal the innermost network's, 32; set time_dim=32"),
        ({"time_dim": 36}, "time width 36 must be a multiple of 8"),
        ({"num_classes": 3}, "num_classes=3 needs text_dim"),
        ({"num_resnets": (1, 0)}, r"num_resnets=\[1, 0\]: each level needs at least one residual block"),
    ],
)
def test_contradictions_of_a_shell_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MatryoshkaConfig((replace(SHELL, **change), INNER))


def test_a_configuration_from_before_micro_conditions_had_names_is_read() -> None:
    before = {name: value for name, value in SHELL.__dict__.items() if name not in NEW_FIELDS}
    written = json.loads(json.dumps({"networks": [{**before, "scale_condition": scale} for scale in (None, 16)]}))
    read = [
        MatryoshkaConfig.from_dict({"networks": [{**network, "mid_blocks": True}]}) for network in written["networks"]
    ]
    wanted = [replace(SHELL, mid_blocks=True, micro_conditions=micros) for micros in ((), (("scale", 16.0),))]
    assert [config.networks for config in read] == [(network,) for network in wanted]


def test_a_field_that_is_not_known_is_named() -> None:
    values = MatryoshkaConfig((INNER,)).to_dict()
    values["networks"][0]["shape"] = 3
    with pytest.raises(ConfigError, match="a network has the unknown field 'shape'"):
        MatryoshkaConfig.from_dict(values)
