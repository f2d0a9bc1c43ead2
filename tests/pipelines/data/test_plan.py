from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mdm_core.errors import WorkError
from pipelines.data.config import SourceConfig
from pipelines.data.plan import Plan, iter_chunks, make_plan
from pipelines.data.table import keys
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.shards import pack, unpack


def plan(tmp_path: Path, lines: list[str], limit: int | None = None) -> Plan:
    path = tmp_path / "list.tsv"
    path.write_text("\n".join(lines))
    return make_plan(SourceConfig(uri=str(path)), Ledger(str(tmp_path / "table"), now_s=0), limit)


def test_rows_are_dealt_in_order(tmp_path: Path) -> None:
    names = [f"http://h/{number % 17}\tcaption {number}" for number in range(25)]
    names[4] = "nothing"
    made = plan(tmp_path, names)
    assert (made.links, made.num_todo, made.duplicate, dict(made.malformed)) == (25, 17, 7, {"wrong_columns": 1})
    chunks = [chunk.to_pydict() for chunk in iter_chunks(made, 5)]
    # Number 4 was unreadable where it stood first, so the link counts where it is repeated.
    expected = [number for number in range(17) if number != 4] + [21]
    assert [len(chunk["url"]) for chunk in chunks] == [5, 5, 5, 2]
    assert [caption for chunk in chunks for caption in chunk["caption"]] == [f"caption {n}" for n in expected]
    assert [set(chunk["chunk"]) for chunk in chunks] == [{0}, {1}, {2}, {3}]
    assert chunks[0]["id"] == [keys.link_key(url) for url in chunks[0]["url"]]
    assert chunks[0]["attempts"] == [1] * 5


def test_limit_leaves_the_rest_of_the_list_alone(tmp_path: Path) -> None:
    made = plan(tmp_path, [f"http://h/{number}\tcaption" for number in range(25)], limit=7)
    assert (made.links, made.num_todo) == (7, 7)
    assert sum(chunk.num_rows for chunk in iter_chunks(made, 5)) == 7


def test_list_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    made = plan(tmp_path, ["http://h/a\tone", "http://h/b\ttwo"])
    (tmp_path / "list.tsv").write_text("http://h/c\tthree\nhttp://h/d\tfour\nhttp://h/e\tfive")
    with pytest.raises(WorkError, match="changed while it was read"):
        list(iter_chunks(made, 100))


def test_part_that_is_added_meanwhile_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "1.tsv").write_text("http://h/a\tone")
    made = make_plan(SourceConfig(uri=f"{tmp_path}/*.tsv"), Ledger(str(tmp_path / "table"), now_s=0))
    assert [chunk["url"].to_pylist() for chunk in iter_chunks(made, 5)] == [["http://h/a"]]
    (tmp_path / "2.tsv").write_text("")
    with pytest.raises(WorkError, match="changed while it was read"):
        list(iter_chunks(made, 5))


def test_faults_are_counted_and_the_first_are_kept_with_their_part(tmp_path: Path) -> None:
    (tmp_path / "1.tsv").write_text("http://h/a\tone\nx\n" + "y\t\n" * 30)
    (tmp_path / "2.tsv").write_text("z\tz\nhttp://h/b\t\n")
    made = make_plan(SourceConfig(uri=f"{tmp_path}/*.tsv"), Ledger(str(tmp_path / "table"), now_s=0))
    assert made.malformed == {"wrong_columns": 1, "not_a_link": 31, "no_caption": 1}
    assert [(row.line, row.part) for row in made.faults] == [(n, str(tmp_path / "1.tsv")) for n in range(2, 22)]


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000])
def test_chunks_over_many_blocks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    monkeypatch.setattr("pipelines.data.lists.lines._READ_BYTES", 333)
    made = plan(tmp_path, [f"http://h/{number % 150}\tcaption {number}" for number in range(300)])
    chunks = list(iter_chunks(made, chunk_rows))
    assert {chunk.num_rows for chunk in chunks[:-1]} <= {chunk_rows}
    assert [row for chunk in chunks for row in chunk["caption"].to_pylist()] == [f"caption {n}" for n in range(150)]
    assert {row for chunk in chunks for row in chunk["origin"].to_pylist()} == {""}


def test_plan_is_small(tmp_path: Path) -> None:
    made = plan(tmp_path, [f"http://h/{number}\tcaption" for number in range(8000)])
    assert made.todo_bits.nbytes == 1000
    assert np.unpackbits(made.todo_bits).all()


def test_packed_rows_and_errors_come_back() -> None:
    rows = pa.table({"a": [1, 2], "b": ["x", None]})
    assert unpack(pack(rows)).equals(rows)
    with pytest.raises(WorkError, match="the disk is full"):
        unpack(pack(None, "the disk is full"))
