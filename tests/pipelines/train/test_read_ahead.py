"""What is read and decoded in the background: threads end, waiting is counted, errors come to where they belong."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mdm_core.errors import WorkError
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable

from .conftest import SIDE, make_table
from .reading import embeddings_of, reader, steps


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("read_", "decode_"))]


def test_a_reader_that_is_closed_early_leaves_no_thread(grouped: SampleTable) -> None:
    with reader(grouped, num_threads=3, prefetch_steps=4) as opened:
        next(opened.steps(0, global_batch_size=40, rank=0, workers=1))
        assert len([name for name in threads() if name.startswith("decode_")]) == 3
    assert threads() == []
    opened.close()


def slow_down(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], Any]) -> list[str]:
    """Makes every file take longer to open, as on a busy object store; returns the list of those that are opened."""
    at_once, opened = storage.open_input, []

    def open_input(uri: str, *, read_ahead: bool = True) -> Any:
        opened.append(uri)
        wait()
        return at_once(uri, read_ahead=read_ahead)

    monkeypatch.setattr(storage, "open_input", open_input)
    return opened


def test_closing_waits_only_for_what_is_being_read(grouped: SampleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 60 row groups and more that 21 steps ahead need, 8 are being read, each from two files."""
    opened = reader(grouped, shuffle_row_groups=1, prefetch_steps=10)
    gate = threading.Event()
    files = slow_down(monkeypatch, gate.wait)

    def consume() -> None:
        # Its step is called off or refused, or comes after all if what it needs was being read.
        with contextlib.suppress(CancelledError, RuntimeError):
            next(opened.steps(0, global_batch_size=12, rank=0, workers=1))

    consumer = threading.Thread(target=consume)
    consumer.start()
    while len(files) < 8:
        time.sleep(0.01)
    # Once all that waits is called off, which is the first thing that closing does.
    threading.Timer(1.0, gate.set).start()
    opened.close()
    assert len(files) == 16
    consumer.join(30)
    assert not consumer.is_alive()
    assert threads() == []


def test_waiting_is_counted(grouped: SampleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    with reader(grouped, shuffle_row_groups=20, prefetch_steps=1) as opened:
        assert opened.wait_s == 0
        slow_down(monkeypatch, lambda: time.sleep(0.1))
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
    message = rf"the picture of row {one} of {path} can't be decoded: .*; restore the file, or begin another run"
    with pytest.raises(WorkError, match=message):
        steps(table, 1, batch=6)
