"""What is kept for the backward pass: planned, counted by hand, and seen in a real forward pass."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mdm_core.nested_unet import build_network
from mdm_core.presets import preset
from pipelines.benchmark.activations import (
    IN_ALL,
    OUTSIDE,
    Planned,
    planned_activations,
    planned_peaks,
    saved_bytes_by_level,
)
from pipelines.benchmark.shapes import shaped

SMALL = shaped(preset("mdm-256"), channels=(32, 64), resolution=64)
PLANNED = Planned(config=SMALL, batch=2, text_tokens=6)


def test_a_small_network_keeps_what_is_counted_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 5, 1))
    x = torch.randn(2, 3, 10, 10)
    kept = saved_bytes_by_level(network, lambda: network(x), levels={"first": network[0], "last": network[2]})
    # The first keeps its input, SiLU (outside the levels) the first's output, the last SiLU's output; 4 bytes each.
    assert kept == {"first": 2 * 3 * 100 * 4, "last": 2 * 8 * 100 * 4, OUTSIDE: 2 * 8 * 100 * 4}


def test_a_storage_that_two_levels_keep_counts_once():
    network = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)])
    x = torch.randn(1, 3, 4, 4)
    levels = dict(network.named_children())
    assert saved_bytes_by_level(network, lambda: [level(x) for level in network], levels=levels) == {
        "0": 3 * 16 * 4,
        "1": 0,
        OUTSIDE: 0,
    }


def test_the_plan_is_what_a_real_forward_pass_keeps():
    planned = planned_activations(PLANNED)
    network = build_network(SMALL).to(memory_format=torch.channels_last)
    x_t = [torch.randn(2, 3, r, r).contiguous(memory_format=torch.channels_last) for r in SMALL.resolutions]
    text, mask = torch.randn(2, 6, 384), torch.ones(2, 6, dtype=torch.bool)
    seen = saved_bytes_by_level(
        network, lambda: network(x_t, torch.tensor([1, 2]), text, mask), levels=network.levels()
    )
    assert planned == seen


def test_checkpointed_levels_keep_next_to_nothing():
    everything = planned_activations(PLANNED)
    less = planned_activations(replace(PLANNED, checkpointed=("64.up.0", "64.up.1")))
    for name in everything:
        if name in ("64.up.0", "64.up.1"):
            assert less[name] < everything[name] / 2
        elif name != OUTSIDE:
            assert less[name] == everything[name]
    assert sum(less.values()) < sum(everything.values())


def test_the_plain_network_keeps_the_matrices_of_attention():
    ours = planned_activations(PLANNED)
    plain = planned_activations(replace(PLANNED, plain=True))
    assert ours.keys() == plain.keys()
    assert sum(ours.values()) < sum(plain.values())
    # 8 heads, 8×8 positions, at least the float32 weights of each of the two attention layers on the way down.
    assert plain["16.down.1"] - ours["16.down.1"] > 2 * 2 * 8 * 64 * 64 * 4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_planned_peak_is_that_of_a_real_step(checkpointed: bool) -> None:
    """As torch's allocator counts in a real step: bytes taken less bytes given back, at their most."""
    config = shaped(preset("mdm-64"), channels=(32, 64), resolution=32)
    network = build_network(config).to(memory_format=torch.channels_last)
    names = tuple(network.levels()) if checkpointed else ()
    network.checkpoint_levels(names)
    x = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    others = (torch.zeros(16), torch.randn(16, 6, 384), torch.ones(16, 6, dtype=torch.bool))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        network([x], *others)[0].square().mean().backward()
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    weights = sum(parameter.nbytes for parameter in network.parameters())
    planned = planned_peaks(Planned(config=config, batch=16, text_tokens=6, checkpointed=names))
    assert planned[IN_ALL] - weights == pytest.approx(max(itertools.accumulate(changes)), rel=0.05)
    assert planned.keys() == {*network.levels(), IN_ALL}
    assert weights < min(planned.values()) <= max(planned.values()) == planned[IN_ALL]


def test_checkpointing_every_level_lowers_the_peak() -> None:
    planned = Planned(config=shaped(preset("mdm-64"), channels=(32, 64), resolution=32), batch=16, text_tokens=6)
    every = tuple(build_network(planned.config).levels())
    assert planned_peaks(replace(planned, checkpointed=every))[IN_ALL] < 0.7 * planned_peaks(planned)[IN_ALL]
