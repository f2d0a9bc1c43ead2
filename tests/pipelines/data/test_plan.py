from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mdm_core.errors import WorkError
from pipelines.data import keys
from pipelines.data.config import SourceConfig
from pipelines.data.ledger import Ledger
from pipelines.data.plan import Plan, iter_chunks, make_plan
from pipelines.data.shards import pack, unpack


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


def test_plan_is_small(tmp_path: Path) -> None:
    made = plan(tmp_path, [f"http://h/{number}\tcaption" for number in range(8000)])
    assert made.todo_bits.nbytes == 1000
    assert np.unpackbits(made.todo_bits).all()


def test_packed_rows_and_errors_come_back() -> None:
    rows = pa.table({"a": [1, 2], "b": ["x", None]})
    assert unpack(pack(rows)).equals(rows)
    with pytest.raises(WorkError, match="the disk is full"):
        unpack(pack(None, "the disk is full"))
