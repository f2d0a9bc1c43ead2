import hashlib
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.config import FiltersConfig
from pipelines.data.stats import table_stats
from pipelines.data.table import keys
from pipelines.data.table.commit import commit
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.sample_table import SCHEMA, SampleTable
from pipelines.data.table.shards import WrittenShard, shards_from_table, shards_to_table, write_shard
from pipelines.data.table.sweep import sweep

ONCE = FiltersConfig()
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def write(
    uri: str,
    chunk: int,
    names: Sequence[str],
    outcome: str = "ok",
    *,
    attempts: int = 1,
    contents: Sequence[str] = (),
    retryable: bool = True,
) -> WrittenShard:
    """Writes a shard of links called `names`; pictures are equal where their `contents` are."""
    count = len(names)
    values = {
        "id": [keys.link_key(name) for name in names],
        "url": names,
        "caption": names,
        "source": ["test"] * count,
        "outcome": [outcome] * count,
        "reason": [None if outcome == "ok" else "http_503"] * count,
        "retryable": [outcome == "failed" and retryable] * count,
        "attempts": [attempts] * count,
        "fetched_at": [NOW] * count,
        "image": [name.encode() if outcome == "ok" else None for name in names],
        "sha256": [hashlib.sha256(content.encode()).digest() for content in (contents or names)],
    }
    columns = {field.name: values.get(field.name, [None] * count) for field in SCHEMA}
    return write_shard(storage.absolute(uri), f"00000001-{chunk:06d}", outcome, pa.table(columns, schema=SCHEMA))


def ledger(uri: str, after: timedelta = timedelta(), **options: object) -> Ledger:
    return Ledger(uri, now_s=(NOW + after).timestamp(), **options)  # type: ignore[arg-type]


def links(uri: str, outcome: str | None = None) -> list[str]:
    """Returns the links of a table, sorted; one that has two rows is there twice."""
    table = SampleTable.open(uri)
    return sorted(url for shard in table.shards(outcome) for url in table.read(shard, ["url"])["url"].to_pylist())


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "table")


def test_rows_come_back_in_order(uri: str) -> None:
    shards = [write(uri, 1, ["c", "d"]), write(uri, 0, ["b", "a"]), write(uri, 0, ["x"], "failed")]
    tally = commit(ledger(uri), shards, ONCE)
    assert (dict(tally.outcomes), dict(tally.reasons)) == ({"ok": 4, "failed": 1}, {"http_503": 1})
    table = SampleTable.open(uri)
    assert [shard.num_rows for shard in table.shards()] == [2, 2]
    rows = [table.read(shard, ["outcome", "caption", "image"]).to_pylist() for shard in table.shards()]
    assert rows[0] == [{"outcome": "ok", "caption": name, "image": name.encode()} for name in "ba"]
    assert [row["caption"] for row in rows[1]] == ["c", "d"]
    assert table.read(table.shards("failed")[0]).schema.names == SCHEMA.names
    with pytest.raises(ConfigError, match="no column colour"):
        table.read(table.shards()[0], ["colour"])


def test_what_workers_tell_survives_the_way(uri: str) -> None:
    shards = [write(uri, 0, ["a", "b"]), write(uri, 0, ["c"], "failed")]
    for sent, received in zip(shards, shards_from_table(shards_to_table(shards)), strict=True):
        assert received.ids.tobytes() == sent.ids.tobytes()
        assert received.hashes.tobytes() == sent.hashes.tobytes()
        names = ("path", "outcome", "size_bytes", "attempts", "reasons")
        assert [getattr(received, name) for name in names] == [getattr(sent, name) for name in names]


def test_version_is_a_dataset(uri: str) -> None:
    first = ledger(uri)
    commit(first, [write(uri, 0, ["a"])], ONCE)
    version = SampleTable.open(uri).version
    commit(first, [write(uri, 1, ["b"])], ONCE)
    assert links(uri) == ["a", "b"]
    assert [shard.num_rows for shard in SampleTable.open(uri, version).shards()] == [1]
    with pytest.raises(ConfigError, match=rf"no version 99; the latest is {version + 1}"):
        SampleTable.open(uri, 99)


def test_equal_pictures_are_kept_once_and_the_first_wins(uri: str) -> None:
    one = ledger(uri)
    commit(one, [write(uri, 0, ["a", "b", "a2"], contents=["A", "B", "A"])], ONCE)
    shards = [write(uri, 1, ["b2", "c"], contents=["B", "C"]), write(uri, 2, ["c2", "d"], contents=["C", "D"])]
    tally = commit(one, shards, ONCE)
    assert dict(tally.outcomes) == {"ok": 2, "filtered": 2}
    assert dict(tally.reasons) == {"exact_duplicate": 2}
    # And against a table that another process reads.
    assert dict(commit(ledger(uri), [write(uri, 3, ["d2"], contents=["D"])], ONCE).outcomes) == {"filtered": 1}
    assert links(uri, "ok") == ["a", "b", "c", "d"]
    assert links(uri, "filtered") == ["a2", "b2", "c2", "d2"]
    table = SampleTable.open(uri)
    repeated = table.read(table.shards("filtered")[0], ["image", "reason", "sha256"]).to_pylist()
    assert repeated == [{"image": None, "reason": "exact_duplicate", "sha256": hashlib.sha256(b"A").digest()}]
    assert dict(
        commit(one, [write(uri, 4, ["e"], contents=["A"])], FiltersConfig(exact_duplicates=False)).outcomes
    ) == {"ok": 1}


def test_retried_link_has_one_row(uri: str) -> None:
    commit(ledger(uri), [write(uri, 0, ["a", "b", "c"], "failed")], ONCE)
    later = ledger(uri, timedelta(hours=1))
    ids, attempts = later.to_retry()
    assert (len(ids), attempts.tolist()) == (3, [1, 1, 1])
    shards = [write(uri, 1, ["b"], attempts=2), write(uri, 1, ["c"], "failed", attempts=2)]
    assert dict(commit(later, shards, ONCE).outcomes) == {"ok": 1, "failed": 1}
    assert (links(uri, "ok"), links(uri, "failed")) == (["b"], ["a", "c"])
    # A whole file of failures goes, in the same process and the next.
    shards = [write(uri, 2, ["a"], attempts=2), write(uri, 2, ["c"], "failed", attempts=3)]
    commit(later, shards, ONCE)
    assert (links(uri, "ok"), links(uri, "failed")) == (["a", "b"], ["c"])
    commit(ledger(uri), [write(uri, 3, ["c"], attempts=4)], ONCE)
    assert (links(uri, "ok"), links(uri, "failed")) == (["a", "b", "c"], [])


@pytest.mark.parametrize(("attempts", "wait_hours"), [(1, 1), (2, 4), (3, 16), (4, 64)])
def test_failure_is_due_after_a_wait_that_grows(uri: str, attempts: int, wait_hours: int) -> None:
    commit(ledger(uri), [write(uri, 0, ["a"], "failed", attempts=attempts)], ONCE)
    wait = timedelta(hours=wait_hours)
    assert len(ledger(uri, wait - timedelta(seconds=1)).to_retry()[0]) == 0
    assert ledger(uri, wait).to_retry()[0].tobytes() == keys.link_key("a")
    assert len(ledger(uri, wait, retry_failed="none").to_retry()[0]) == 0
    assert len(ledger(uri, retry_failed="all").to_retry()[0]) == 1


def test_failure_that_will_not_pass_is_not_due(uri: str) -> None:
    commit(ledger(uri), [write(uri, 0, ["a"], "failed", retryable=False)], ONCE)
    assert len(ledger(uri, timedelta(days=999)).to_retry()[0]) == 0
    assert len(ledger(uri, retry_failed="all").to_retry()[0]) == 1


def test_two_refreshes_of_the_same_links_leave_one_row_each(uri: str) -> None:
    one, two = ledger(uri), ledger(uri)
    shards = [write(uri, 0, ["a", "b"]), write(uri, 0, ["b", "c"])]
    assert dict(commit(one, shards[:1], ONCE).outcomes) == {"ok": 2}
    tally = commit(two, shards[1:], ONCE)
    assert dict(tally.outcomes) == {"unchanged": 1, "ok": 1}
    assert links(uri) == ["a", "b", "c"]


def test_two_refreshes_that_retry_the_same_link_leave_one_row(uri: str) -> None:
    commit(ledger(uri), [write(uri, 0, ["a", "b", "c"], "failed")], ONCE)
    one, two, three = (ledger(uri, timedelta(hours=1)) for _ in range(3))
    commit(one, [write(uri, 1, ["a"], attempts=2)], ONCE)
    # The file that held all three was replaced meanwhile: b and c are elsewhere, and as old as before.
    tally = commit(two, [write(uri, 1, ["a", "b"], attempts=2)], ONCE)
    assert dict(tally.outcomes) == {"unchanged": 1, "ok": 1}
    assert dict(commit(three, [write(uri, 1, ["b"], "failed", attempts=2)], ONCE).outcomes) == {"unchanged": 1}
    assert (links(uri, "ok"), links(uri, "failed")) == (["a", "b"], ["c"])


def test_many_writers_at_once_lose_nothing(uri: str) -> None:
    ledger(uri).ensure_table()
    tallies: list[int] = []

    def work(writer: int) -> None:
        own = ledger(uri)
        for round_ in range(6):
            # Each round's link "shared" is everybody's; the pictures of "same" links are equal.
            names = [f"{writer}-{round_}", f"shared-{round_}", f"same-{writer}-{round_}"]
            contents = [names[0], names[1], "same"]
            tally = commit(own, [write(uri, round_, names, contents=contents)], ONCE)
            tallies.append(tally.total)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tallies == [3] * 24
    expected = [f"{w}-{r}" for w in range(4) for r in range(6)]
    expected += [f"same-{name}" for name in expected] + [f"shared-{r}" for r in range(6)]
    assert links(uri) == sorted(expected)
    assert sum(url.startswith("same") for url in links(uri, "ok")) == 1


def test_files_that_no_version_needs_are_swept(uri: str, tmp_path: Path) -> None:
    one = ledger(uri)
    commit(one, [write(uri, 0, ["a"], "failed"), write(uri, 1, ["b"])], ONCE)
    commit(one, [write(uri, 2, ["a"], attempts=2)], ONCE)
    left = write(uri, 3, ["c"])
    half = tmp_path / "table" / "outcome=ok" / ".x.parquet.0a1b2c3d.partial"
    half.write_bytes(b"half")
    before = storage.list_files(uri)
    assert sweep(uri, now_s=time.time()) == 0
    assert sweep(uri, now_s=time.time() + 2 * 24 * 3600) == 2
    assert set(before) - set(storage.list_files(uri)) == {storage.join(uri, left.path)}
    assert not half.exists()
    # What an old version refers to is still there.
    assert [shard.num_rows for shard in SampleTable.open(uri, 1).shards("failed")] == [1]
    old = SampleTable.open(uri, 1)
    assert old.read(old.shards("failed")[0], ["url"])["url"].to_pylist() == ["a"]


def test_stats(uri: str) -> None:
    shards = [write(uri, 0, ["a", "b"]), write(uri, 0, ["c"], "failed"), write(uri, 0, ["d"], "filtered")]
    commit(ledger(uri), shards, ONCE)
    stats = table_stats(uri)
    assert stats["size_bytes"] == sum(shard.size_bytes for shard in shards)
    assert [stats[name] for name in ("rows", "ok", "failed", "filtered", "table_version")] == [4, 2, 1, 1, 1]
    assert stats["reasons"] == {"http_503": 2}


def test_what_is_no_sample_table_is_refused(tmp_path: Path) -> None:
    from deltalake import write_deltalake

    with pytest.raises(ConfigError, match="is not a table"):
        SampleTable.open(str(tmp_path))
    cut = tmp_path / "cut"
    write_deltalake(str(cut), pa.table({"x": [1]}))
    (cut / "_delta_log" / "00000000000000000000.json").write_text('{"add": ')
    with pytest.raises(ConfigError, match=r"the log of the table .*cut can't be read: .*; restore its _delta_log"):
        SampleTable.open(str(cut))
    write_deltalake(str(tmp_path / "other"), pa.table({"x": [1]}))
    with pytest.raises(ConfigError, match="not a sample table: it lacks the columns id"):
        Ledger(str(tmp_path / "other"), now_s=0)


def test_table_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkError, match="could not make a table"):
        ledger(str(tmp_path / "file" / "table")).ensure_table()
