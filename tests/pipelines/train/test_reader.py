"""What a step trains on: a pure function of seed, stage, step and selection, whoever reads it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.train.ingest.batch import Batch

from .conftest import SIDE, make_table, picture
from .reading import Read, assert_same, embeddings_of, joined, reader, steps


@pytest.fixture(scope="module")
def alone(grouped: SampleTable) -> list[Read]:
    """Seven steps of 13 rows, more than two epochs, as one worker reads them in one go."""
    return [joined(list(batches)) for batches in steps(grouped, 7, batch=13)]


@pytest.mark.parametrize(("workers", "micro"), [(1, 4), (1, 13), (2, None), (3, 2), (4, None), (4, 1), (13, 1)])
def test_workers_share_exactly_what_one_would_read(
    grouped: SampleTable, alone: list[Read], workers: int, micro: int | None
) -> None:
    shares = [steps(grouped, 7, batch=13, rank=rank, workers=workers, micro=micro) for rank in range(workers)]
    for step, whole in enumerate(alone):
        sizes = [[len(batch.ids) for batch in share[step]] for share in shares]
        assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
        assert max(map(max, sizes)) <= (micro or 13)
        assert_same(whole, joined([batch for share in shares for batch in share[step]]))


@pytest.mark.parametrize(
    "changes",
    [{"prefetch_steps": 0}, {"prefetch_steps": 5, "num_threads": 3}, {"first": 4, "num_threads": 2}],
)
def test_threads_prefetching_and_the_first_step_change_nothing(
    grouped: SampleTable, alone: list[Read], changes: dict[str, Any]
) -> None:
    first = changes.get("first", 0)
    for whole, batches in zip(alone[first:], steps(grouped, 7 - first, batch=13, **changes), strict=True):
        assert_same(whole, joined(list(batches)))


def test_a_table_in_object_storage_gives_the_same(grouped: SampleTable, alone: list[Read], bucket: str) -> None:
    for path in Path(grouped.uri).rglob("*"):
        if path.is_file():
            uri = storage.join(bucket, "table", str(path.relative_to(grouped.uri)))
            storage.write_bytes_atomic(uri, path.read_bytes())
    remote = SampleTable.open(f"{bucket}/table")
    for whole, batches in zip(alone[:3], steps(remote, 3, batch=13, where="width = 16"), strict=True):
        assert_same(whole, joined(list(batches)))


@pytest.mark.parametrize(("where", "num_rows"), [(None, 40), ("caption like '%3%' or caption = 'caption 8'", 14)])
def test_every_chosen_row_comes_once_an_epoch(grouped: SampleTable, where: str | None, num_rows: int) -> None:
    read = [one for (batch,) in steps(grouped, 12, where=where) for one in batch.ids]
    epochs = [read[start : start + num_rows] for start in range(0, 144 - num_rows + 1, num_rows)]
    assert len(epochs) >= 3
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == num_rows for epoch in epochs)
    # The rows of a step lie by row group, so what is in a step is compared, not the order.
    assert set(read[:12]) != set(read[num_rows : num_rows + 12])


def test_seeds_and_stages_read_other_rows_with_other_noise(grouped: SampleTable) -> None:
    first = joined(list(steps(grouped, 1)[0]))
    for changes in ({"seed": 4}, {"stage": 1}):
        other = joined(list(steps(grouped, 1, **changes)[0]))
        assert first["ids"] != other["ids"]
        assert not torch.isclose(first["noise"][0], other["noise"][0], atol=1e-3).float().mean() > 0.01


def test_pictures_and_texts_are_those_of_their_rows(grouped: SampleTable) -> None:
    by_id: dict[bytes, int] = {}
    for shard in grouped.shards("ok"):
        rows = grouped.read(shard, ["id", "caption"])
        captions = rows["caption"].to_pylist()
        by_id |= {one: int(text.split()[1]) for one, text in zip(rows["id"].to_pylist(), captions, strict=True)}
    mirrored = dropped = 0
    for (batch,) in steps(grouped, 20):
        for x0, text, mask, one in zip(batch.x0, batch.text_emb, batch.text_mask, batch.ids, strict=True):
            number = by_id[one]
            shown, wanted = x0.permute(1, 2, 0).numpy(), picture(number)
            flipped = not np.array_equal(shown, wanted)
            np.testing.assert_array_equal(shown, wanted[:, ::-1] if flipped else wanted)
            assert text[0, 0] == number
            assert int(mask.sum()) in (0, 2 + number % 4)
            mirrored, dropped = mirrored + flipped, dropped + (not mask.any())
    # 240 draws each: four standard deviations about one half and one quarter.
    assert 89 <= mirrored <= 151
    assert 33 <= dropped <= 87


def wide(number: int) -> np.ndarray[Any, Any]:
    """Of its columns, each has its own number in the red channel."""
    pixels = np.zeros((SIDE, SIDE + 9, 3), np.uint8)
    pixels[..., 0] = 10 * np.arange(SIDE + 9)
    return pixels


def test_random_crops_take_every_square_and_centre_the_middle_one(tmp_path: Path) -> None:
    table = make_table(tmp_path, (30,), draw=wide)
    begins = [
        x0[0, 0, 0].item() // 10
        for (batch,) in steps(table, 20, crop="random", flip=False)
        for x0 in batch.x0
        if np.array_equal(np.diff(x0[0, 0].numpy().astype(int)), [10] * (SIDE - 1))
    ]
    assert len(begins) == 240
    # 24 of each of 10, within five standard deviations.
    assert all(abs(begins.count(begin) - 24) < 5 * (240 * 0.1 * 0.9) ** 0.5 for begin in range(10))
    assert {x0[0, 0, 0].item() for (batch,) in steps(table, 5, flip=False) for x0 in batch.x0} == {40}


def test_no_setting_changes_what_another_draws(grouped: SampleTable, alone: list[Read]) -> None:
    plain = joined(list(steps(grouped, 1, batch=13, flip=False, drop_prob=0.0, crop="random")[0]))
    assert plain["ids"] == alone[0]["ids"]
    assert torch.equal(plain["timestep"], alone[0]["timestep"])
    assert all(torch.equal(a, b) for a, b in zip(plain["noise"], alone[0]["noise"], strict=True))


def test_noise_is_standard_normal_and_new_each_time(grouped: SampleTable) -> None:
    batches = [batch for (batch,) in steps(grouped, 20)]
    for level, side in enumerate((16, 8)):
        noise = torch.cat([batch.noise[level] for batch in batches])
        assert noise.shape == (240, 3, side, side)
        assert noise.mean().abs() < 4 / noise.numel() ** 0.5
        assert noise.std().item() == pytest.approx(1, abs=0.02)
        assert len({row.flatten()[0].item() for row in noise}) == 240
        # Neighbours in number have nothing in common.
        assert torch.corrcoef(noise.flatten(1)).triu(1).abs().max() < 6 / (3 * side * side) ** 0.5
    spread = torch.cat([batch.timestep for batch in batches]).double()
    assert spread.mean().item() == pytest.approx(499.5, abs=10)
    for batch in batches:
        gaps = np.diff(np.sort(batch.timestep.numpy()))
        # Twelve timesteps, evenly over a thousand.
        assert (np.abs(gaps - 1000 / 12) <= 1).all()


def test_more_workers_than_rows_are_refused(grouped: SampleTable) -> None:
    with (
        reader(grouped) as opened,
        pytest.raises(ConfigError, match=r"global_batch_size=2 leaves some of 3 workers without a row; use at most 2"),
    ):
        opened.steps(0, global_batch_size=2, rank=0, workers=3)


def test_row_groups_of_embeddings_may_be_others_than_the_shards(copied: SampleTable, alone: list[Read]) -> None:
    for index, size in enumerate((3, 100, 1)):
        path = embeddings_of(copied, index)
        pq.write_table(pq.read_table(path, partitioning=None), path, row_group_size=size)
    for whole, batches in zip(alone, steps(copied, 7, batch=13), strict=True):
        assert_same(whole, joined(list(batches)))


@pytest.mark.parametrize(("workers", "micro"), [(1, None), (1, 5), (3, None), (2, 1)])
def test_the_same_rows_have_the_finer_resolution_however_a_step_is_shared(
    table: SampleTable, workers: int, micro: int | None
) -> None:
    mix = (0.3, 1.0)
    expected = [fine_ids([whole]) for (whole,) in steps(table, 3, resolution_mix=mix)]
    assert [len(fine) for fine in expected] == [round(0.3 * 12)] * 3
    plain = [set(whole.ids) for (whole,) in steps(table, 3)]
    shared = [steps(table, 3, rank=rank, workers=workers, micro=micro, resolution_mix=mix) for rank in range(workers)]
    for step, fine in enumerate(expected):
        parts = [part for worker in shared for part in worker[step]]
        assert {one for part in parts for one in part.ids} == plain[step]
        assert fine_ids(parts) == fine
        assert all(part.rows_per_resolution[1] == len(part.ids) for part in parts)


def fine_ids(parts: Sequence[Batch]) -> set[bytes]:
    return {one for part in parts for one in part.ids[: part.rows_per_resolution[0]]}
