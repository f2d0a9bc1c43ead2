"""What a step trains on: a pure function of seed, stage, step and selection, whoever reads it."""

import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.table import SampleTable
from pipelines.embed.store import EmbeddingStore
from pipelines.train.ingest.batch import Batch
from pipelines.train.ingest.reader import BatchReader
from pipelines.train.ingest.selection import select_rows

from .conftest import SIDE, make_table, picture

Read = dict[str, Any]


def reader(table: SampleTable, where: str | None = None, **changes: Any) -> BatchReader:
    values: dict[str, Any] = {
        "resolutions": (16, 8),
        "seed": 3,
        "stage": 0,
        "num_timesteps": 1000,
        "max_tokens": 8,
        "drop_prob": 0.25,
        "flip": True,
        "shuffle_row_groups": 3,
    }
    return BatchReader(table, EmbeddingStore.open(table, "minilm"), select_rows(table, where), **(values | changes))


def steps(
    table: SampleTable,
    count: int,
    *,
    first: int = 0,
    batch: int = 12,
    rank: int = 0,
    workers: int = 1,
    micro: int | None = None,
    **changes: Any,
) -> list[tuple[Batch, ...]]:
    with reader(table, **changes) as opened:
        found = opened.steps(first, global_batch_size=batch, rank=rank, workers=workers, micro_batch_size=micro)
        return [next(found) for _ in range(count)]


def joined(parts: list[Batch]) -> Read:
    """All that batches hold, one after the other; the text cut to its real tokens, as it is padded to the longest."""
    return {
        "x0": torch.cat([part.x0 for part in parts]),
        "timestep": torch.cat([part.timestep for part in parts]),
        "noise": [torch.cat(level) for level in zip(*(part.noise for part in parts), strict=True)],
        "tokens": [int(row.sum()) for part in parts for row in part.text_mask],
        "text": [row[row.any(dim=1)] for part in parts for row in part.text_emb],
        "ids": [one for part in parts for one in part.ids],
    }


def assert_same(a: Read, b: Read) -> None:
    assert a["ids"] == b["ids"]
    assert a["tokens"] == b["tokens"]
    assert torch.equal(a["x0"], b["x0"])
    assert torch.equal(a["timestep"], b["timestep"])
    assert all(torch.equal(x, y) for x, y in zip(a["noise"] + a["text"], b["noise"] + b["text"], strict=True))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> SampleTable:
    """40 rows in three shards with row groups of 4; the last of each has fewer."""
    return make_table(tmp_path_factory.mktemp("grouped"), (17, 13, 10), row_group_rows=4)


@pytest.fixture
def copied(grouped: SampleTable, tmp_path: Path) -> SampleTable:
    """A copy of it that a test may damage."""
    return SampleTable.open(str(shutil.copytree(grouped.uri, tmp_path / "table")))


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


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("read_", "decode_"))]


def test_a_reader_that_is_closed_early_leaves_no_thread(grouped: SampleTable) -> None:
    with reader(grouped, num_threads=3, prefetch_steps=4) as opened:
        next(opened.steps(0, global_batch_size=40, rank=0, workers=1))
        assert len([name for name in threads() if name.startswith("decode_")]) == 3
    assert threads() == []
    opened.close()


def slow_down(monkeypatch: pytest.MonkeyPatch, delay_s: float) -> None:
    """Makes every file take longer to open, as on a busy object store."""
    at_once = storage.open_input

    def open_input(uri: str, *, read_ahead: bool = True) -> Any:
        time.sleep(delay_s)
        return at_once(uri, read_ahead=read_ahead)

    monkeypatch.setattr(storage, "open_input", open_input)


def test_closing_waits_only_for_what_is_being_read(grouped: SampleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 60 row groups and more that 21 steps ahead need, 8 are being read, each in a second."""
    opened = reader(grouped, shuffle_row_groups=1, prefetch_steps=10)
    slow_down(monkeypatch, 0.5)
    failures: list[BaseException] = []

    def consume() -> None:
        try:
            next(opened.steps(0, global_batch_size=12, rank=0, workers=1))
        except BaseException as failure:
            failures.append(failure)

    consumer = threading.Thread(target=consume)
    consumer.start()
    while len([name for name in threads() if name.startswith("read_")]) < 8:
        time.sleep(0.01)
    began_s = time.monotonic()
    opened.close()
    assert time.monotonic() - began_s < 4
    consumer.join()
    assert [type(failure).__name__ for failure in failures] == ["CancelledError"]
    assert threads() == []


def test_waiting_is_counted(grouped: SampleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    with reader(grouped, shuffle_row_groups=20, prefetch_steps=1) as opened:
        assert opened.wait_s == 0
        slow_down(monkeypatch, 0.1)
        found = opened.steps(0, global_batch_size=4, rank=0, workers=1)
        began_s = time.monotonic()
        next(found)
        first_s = opened.wait_s
        # A shard is opened, then its embeddings.
        assert 0.2 <= first_s <= time.monotonic() - began_s
        # One step is decoded ahead, and the rows of the one after it are read.
        time.sleep(1)
        next(found)
        next(found)
        assert opened.wait_s - first_s < 0.2


def embeddings_of(table: SampleTable, index: int) -> Path:
    return Path(EmbeddingStore.open(table, "minilm").uri_of(table.shards("ok")[index]))


@pytest.mark.parametrize("prefetch_steps", [0, 4])
def test_an_error_in_the_background_is_raised_by_the_step_that_needs_the_row(
    copied: SampleTable, prefetch_steps: int
) -> None:
    """The steps before it are trained on as if nothing had been."""
    with reader(copied, shuffle_row_groups=1) as opened:
        found = opened.steps(0, global_batch_size=2, rank=0, workers=1)
        whole = [next(found)[0].ids for _ in range(20)]
    first_steps = []
    for shard in copied.shards("ok"):
        ids = set(copied.read(shard, ["id"])["id"].to_pylist())
        first_steps.append(next(step for step, read in enumerate(whole) if ids & set(read)))
    first_broken = max(first_steps)
    assert first_broken > 1
    path = embeddings_of(copied, first_steps.index(first_broken))
    with reader(copied, shuffle_row_groups=1, prefetch_steps=prefetch_steps) as opened:
        path.unlink()
        found = opened.steps(0, global_batch_size=2, rank=0, workers=1)
        assert [next(found)[0].ids for _ in range(first_broken)] == whole[:first_broken]
        with pytest.raises(WorkError, match=r"can't be read: .*; delete it and run `mdm embed` again"):
            next(found)
    assert threads() == []


def test_embeddings_of_other_rows_are_told(copied: SampleTable) -> None:
    path = embeddings_of(copied, 0)
    rows = pq.read_table(path, partitioning=None)
    pq.write_table(rows.take([1, 0, *range(2, len(rows))]), path, row_group_size=4)
    message = r"the embeddings of .* by minilm are of other rows: their ids differ in rows 0 to 3; delete .*run `mdm em"
    with pytest.raises(WorkError, match=message):
        steps(copied, 4)


def test_row_groups_of_embeddings_may_be_others_than_the_shards(copied: SampleTable, alone: list[Read]) -> None:
    for index, size in enumerate((3, 100, 1)):
        path = embeddings_of(copied, index)
        pq.write_table(pq.read_table(path, partitioning=None), path, row_group_size=size)
    for whole, batches in zip(alone, steps(copied, 7, batch=13), strict=True):
        assert_same(whole, joined(list(batches)))


def test_a_damaged_file_of_embeddings_is_named(copied: SampleTable) -> None:
    path = embeddings_of(copied, 0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WorkError, match=rf"{path} can't be read: .*; delete it and run `mdm embed` again"):
        steps(copied, 4)


def test_a_picture_that_can_t_be_decoded_is_named(tmp_path: Path) -> None:
    table = make_table(tmp_path, (6,), draw=lambda number: np.zeros((SIDE, SIDE, 3), np.uint8))
    (shard,) = table.shards("ok")
    path = Path(table.uri) / shard.path
    rows = pq.read_table(path, partitioning=None)
    images = rows["image"].to_pylist()
    images[2] = images[2][:20]
    column = rows.schema.get_field_index("image")
    pq.write_table(rows.set_column(column, rows.schema.field(column), [images]), path)
    one = rows["id"][2].as_py().hex()
    message = rf"the picture of row {one} of {path} can't be decoded: .*; restore the file, or leave the row out"
    with pytest.raises(WorkError, match=message):
        steps(table, 1, batch=6)
