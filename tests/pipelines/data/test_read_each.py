"""Shards of a table read several at a time, against what was written into each."""

import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.benchmark.data.noop import sample_rows
from pipelines.data.config import FiltersConfig
from pipelines.data.table import sample_table
from pipelines.data.table.commit import commit
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.sample_table import SampleTable, Shard
from pipelines.data.table.shards import write_shard


def make_table(folder: Path, num_shards: int) -> SampleTable:
    """Shard n has rows with the captions n.0 and n.1."""
    uri = str(folder / "table")
    shards = []
    for number in range(num_shards):
        captions = [f"{number}.{row}" for row in range(2)]
        urls = [f"http://127.0.0.1/{caption}" for caption in captions]
        rows = sample_rows(urls, [b"a picture"] * 2, captions, datetime.now(UTC))
        shards.append(write_shard(uri, f"00000000-{number:06d}", "ok", rows))
    commit(Ledger(uri, now_s=time.time()), shards, FiltersConfig(exact_duplicates=False))
    return SampleTable.open(uri)


@pytest.mark.parametrize("ahead", [1, 3, 7, 100])
def test_each_shard_comes_with_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    monkeypatch.setattr(sample_table, "_READ_AHEAD", ahead)
    table = make_table(tmp_path, 7)
    read = list(table.read_each(table.shards(), {"ok": ["caption"]}))
    assert [shard for shard, _ in read] == list(table.shards())
    assert [rows["caption"].to_pylist() for _, rows in read] == [[f"{n}.0", f"{n}.1"] for n in range(7)]
    assert list(table.read_each((), {"ok": ["caption"]})) == []


def test_who_stops_half_way_does_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_table, "READERS", 2)
    table = make_table(tmp_path, 60)
    num_read = 0

    def read(self: SampleTable, shard: Shard, columns: list[str]) -> pa.Table:
        nonlocal num_read
        num_read += 1
        time.sleep(0.05)
        return original(self, shard, columns)

    original = SampleTable.read
    monkeypatch.setattr(SampleTable, "read", read)
    each = table.read_each(table.shards(), {"ok": ["caption"]})
    next(each)
    each.close()
    assert 1 <= num_read < 30
