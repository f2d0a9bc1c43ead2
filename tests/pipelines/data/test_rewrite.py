from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable

from pipelines.data.config import FiltersConfig
from pipelines.data.filters import CaptionFilter
from pipelines.data.table import keys, transaction
from pipelines.data.table.commit import commit
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.rewrite import prune, recaption
from pipelines.data.table.sample_table import SampleTable
from pipelines.data.table.transaction import Change
from tests.pipelines.data.test_commit import ONCE, ledger, links, write

JUDGE = CaptionFilter(FiltersConfig())


def captions(uri: str) -> dict[str, str]:
    """Returns the caption of every link; a link with two rows is an error."""
    table = SampleTable.open(uri)
    rows = [row for shard in table.shards(None) for row in table.read(shard, ["url", "caption"]).to_pylist()]
    found = {row["url"]: row["caption"] for row in rows}
    assert len(found) == len(rows)
    return found


def new_captions(*names: str) -> Mapping[bytes, str]:
    return {keys.link_key(name): f"a new caption of {name}" for name in names}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, chunk, [f"a{chunk}", f"b{chunk}"]) for chunk in range(40)], ONCE)
    return uri


def test_many_files_are_rewritten_a_few_at_a_time(uri: str) -> None:
    version = SampleTable.open(uri).version
    names = [f"b{chunk}" for chunk in range(40)]
    tally = recaption(ledger(uri), new_captions(*names, "unheard of"), JUDGE, {})
    assert dict(tally.outcomes) == {"ok": 40, "unchanged": 1}
    assert SampleTable.open(uri).version == version + 2
    expected = {f"a{chunk}": f"a{chunk}" for chunk in range(40)} | {name: f"a new caption of {name}" for name in names}
    assert captions(uri) == expected
    # The order of the rows, which training follows, is what it was.
    table = SampleTable.open(uri)
    order = [url for shard in table.shards() for url in table.read(shard, ["url"])["url"].to_pylist()]
    assert order == [f"{letter}{chunk}" for chunk in range(40) for letter in "ab"]


def test_rows_that_another_moves_meanwhile_are_found_again(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ledger(uri), ledger(uri)
    inner = transaction._commit_once
    overtaken: list[bool] = []

    def overtaken_once(own: Ledger, change: Change, *args: object, **options: bool) -> bool:
        if own is first and not overtaken:
            overtaken.append(True)
            recaption(second, new_captions("a3", "b4"), JUDGE, {})
        return inner(own, change, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(transaction, "_commit_once", overtaken_once)
    tally = recaption(first, new_captions("b3", "b4", "b5"), JUDGE, {})
    assert (overtaken, dict(tally.outcomes)) == ([True], {"ok": 3})
    changed = {url for url, caption in captions(uri).items() if caption != url}
    assert changed == {"a3", "b3", "b4", "b5"}


def test_pruning_a_table_of_many_files(uri: str) -> None:
    listed = keys.from_bytes(b"".join(keys.link_key(f"a{chunk}") for chunk in range(39)))
    assert prune(ledger(uri), "another source", listed, {}) == 0
    assert prune(ledger(uri), "test", listed, {}) == 41
    assert links(uri) == sorted(f"a{chunk}" for chunk in range(39))
    assert prune(ledger(uri), "test", np.unique(listed), {}) == 0


def test_commit_that_arrives_after_it_was_taken_for_lost_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "late")
    own = ledger(uri)
    commit(own, [write(uri, 0, ["a"]), write(uri, 0, ["b", "d"], "failed")], ONCE)
    send = DeltaTable.create_write_transaction
    catch_up = Ledger.catch_up
    under_way: list[Callable[[], None]] = []

    def lost(delta: DeltaTable, *args: Any, **options: Any) -> None:
        monkeypatch.setattr(DeltaTable, "create_write_transaction", send)
        under_way.append(lambda: send(delta, *args, **options))
        raise OSError("HTTP error: connection reset")

    def after_it_arrived(ledger: Ledger) -> None:
        while under_way:
            under_way.pop()()
        catch_up(ledger)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", lost)
    monkeypatch.setattr(Ledger, "catch_up", after_it_arrived)
    # The row of b is taken out of the file that holds d too, which so is written anew.
    assert commit(own, [write(uri, 1, ["b"], attempts=2), write(uri, 1, ["c"])], ONCE).total == 2
    assert captions(uri) == {name: name for name in "abcd"}
    assert (links(uri, "ok"), links(uri, "failed")) == (["a", "b", "c"], ["d"])
