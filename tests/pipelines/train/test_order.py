"""Which rows a step takes: each once an epoch, and the same however one comes to the step."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.data.table.sample_table import Shard
from pipelines.train.ingest.order import CanonicalOrder, StepRows
from pipelines.train.ingest.selection import Selection

Pair = tuple[int, int]


def pairs(rows: StepRows) -> list[Pair]:
    return list(zip(rows.group.tolist(), rows.row.tolist(), strict=True))


def make_order(sizes: list[int], window: int = 3, seed: int = 0, stage: int = 0) -> CanonicalOrder:
    return CanonicalOrder(np.array(sizes), seed=seed, stage=stage, shuffle_row_groups=window)


layouts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes=layouts, window=st.integers(1, 14), batch=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_epoch_has_every_row_once(sizes: list[int], window: int, batch: int, seed: int) -> None:
    order = make_order(sizes, window, seed)
    every_row = {(group, row) for group, size in enumerate(sizes) for row in range(size)}
    assert order.rows_per_epoch == len(every_row)
    num_steps = -(-3 * len(every_row) // batch)
    by_number: dict[int, Pair] = {}
    for step in range(num_steps):
        rows = order.step(step, batch)
        assert sorted(rows.number.tolist()) == list(range(step * batch, (step + 1) * batch))
        by_number |= dict(zip(rows.number.tolist(), pairs(rows), strict=True))
    for epoch in range(3):
        found = [by_number[epoch * len(every_row) + position] for position in range(len(every_row))]
        assert set(found) == every_row


@settings(max_examples=40, deadline=None)
@given(sizes=layouts, batch=st.integers(1, 40), steps=st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_step_is_the_same_however_one_comes_to_it(sizes: list[int], batch: int, steps: list[int]) -> None:
    used = make_order(sizes)
    for step in steps:
        fresh = make_order(sizes)
        assert pairs(used.step(step, batch)) == pairs(fresh.step(step, batch))


@settings(max_examples=30, deadline=None)
@given(sizes=layouts, batches=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_an_image_has_its_number_at_any_batch_size(sizes: list[int], batches: tuple[int, int]) -> None:
    order = make_order(sizes)
    found: list[dict[int, Pair]] = []
    for batch in batches:
        steps = [order.step(step, batch) for step in range(-(-40 // batch))]
        found.append({n: pair for rows in steps for n, pair in zip(rows.number.tolist(), pairs(rows), strict=True)})
    assert all(found[0][number] == found[1][number] for number in range(40))


@settings(max_examples=60, deadline=None)
@given(
    layout=st.lists(st.lists(st.lists(st.booleans(), max_size=12), max_size=4), min_size=1, max_size=5),
    window=st.integers(1, 8),
    batch=st.integers(1, 30),
    workers=st.integers(1, 5),
)
def test_chosen_rows_of_any_shards_come_once_an_epoch_whoever_reads_them(
    layout: list[list[list[bool]]], window: int, batch: int, workers: int
) -> None:
    wanted = set()
    for shard, groups in enumerate(layout):
        bits = [bit for group in groups for bit in group]
        wanted |= {(f"{shard}.parquet", row) for row, bit in enumerate(bits) if bit}
    assume(wanted)
    shards = [Shard(f"{index}.parquet", sum(map(len, groups)), "ok", 1) for index, groups in enumerate(layout)]
    mask = np.array([bit for groups in layout for group in groups for bit in group])
    selection = Selection(shards, [[len(group) for group in groups] for groups in layout], mask)
    order = CanonicalOrder(selection.rows_per_group, seed=1, stage=0, shuffle_row_groups=window)
    by_number = {}
    for step in range(-(-2 * len(wanted) // batch)):
        bounds = [rank * batch // workers for rank in range(workers + 1)]
        for begin, end in pairwise(bounds):
            share = order.step(step, batch)[begin:end]
            for number, group, row in zip(share.number.tolist(), share.group, share.row, strict=True):
                place = selection.group(int(group))
                by_number[number] = (place.shard.path, place.first_row + int(selection.chosen_rows(int(group))[row]))
    for epoch in range(2):
        assert {by_number[epoch * len(wanted) + position] for position in range(len(wanted))} == wanted


def test_a_window_of_row_groups_is_used_up_before_the_next() -> None:
    order = make_order([5] * 6, window=2)
    groups = [set(order.step(step, 10).group.tolist()) for step in range(3)]
    assert [len(window) for window in groups] == [2, 2, 2]
    assert set.union(*groups) == set(range(6))
    # Mixed, a step of 5 of the 10 rows is not just one of the groups.
    assert sum(len(set(order.step(step, 5).group.tolist())) == 2 for step in range(6)) >= 5


def test_epochs_seeds_and_stages_differ() -> None:
    sizes = [20] * 10
    first = pairs(make_order(sizes).step(0, 200))
    others = [
        pairs(make_order(sizes).step(1, 200)),
        pairs(make_order(sizes, seed=1).step(0, 200)),
        pairs(make_order(sizes, stage=1).step(0, 200)),
    ]
    for other in others:
        assert sorted(other) == sorted(first)
        # By chance one row in two hundred keeps its place.
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 60


def test_every_row_is_as_likely_in_every_place() -> None:
    """Over 600 epochs, each of 12 rows is in the first step of 3 about 150 times: within 5 standard deviations."""
    order = make_order([3, 4, 5], window=2)
    counts = Counter(pair for epoch in range(600) for pair in pairs(order.step(epoch * 4, 3)))
    assert len(counts) == 12
    assert all(abs(count - 150) < 5 * (600 * 0.25 * 0.75) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_a_worker_needs_few_of_the_row_groups(workers: int) -> None:
    """Read by all workers together, row groups are read little more often than by one."""
    order = make_order([100] * 64, window=64)
    share = 512 // workers
    reads = 0
    for rank in range(workers):
        needed = {
            int(group) for step in range(12) for group in order.step(step, 512)[rank * share : (rank + 1) * share].group
        }
        reads += len(needed)
    assert 64 <= reads <= 64 + 8 * workers


def test_a_table_of_twelve_million_rows_is_ordered_window_by_window() -> None:
    order = make_order([100] * 120_000, window=64)
    rows = order.step(9_999, 1024)
    assert len(set(pairs(rows))) == 1024
    assert pairs(make_order([100] * 120_000, window=64).step(9_999, 1024)) == pairs(rows)
    held = sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray))
    assert held < 6_000_000
