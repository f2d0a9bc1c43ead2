"""Rows of the table that change though nothing is fetched: they go, or their captions become others."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data import keys
from pipelines.data.filters import CaptionFilter
from pipelines.data.ledger import Ledger
from pipelines.data.shards import WrittenShard, read_whole, without_pictures, write_shard
from pipelines.data.table import Shard
from pipelines.data.transaction import Change, Tally, transact


def drop_rows(ledger: Ledger, ids: keys.Keys, change: Change) -> int:
    """Takes the rows of `ids` out of the files that hold them, as part of `change`, and returns how many they were."""
    num_dropped = 0
    for shard, here in ledger.locate(ids).items() if len(ids) else ():
        if len(here) == shard.num_rows:
            change.replace(shard, [])
        else:
            rows = read_whole(ledger.uri, shard.path, ledger.schema)
            left = rows.filter(pa.array(keys.find(np.sort(here), keys.from_column(rows["id"])) < 0))
            change.replace(shard, [write_shard(ledger.uri, _stem(shard), shard.outcome, left)])
        num_dropped += len(here)
    return num_dropped


def recaption(ledger: Ledger, captions: Mapping[bytes, str], judge: CaptionFilter, note: Mapping[str, object]) -> Tally:
    """Gives rows of the table new captions, by their ids, and returns what became of them.

    A row whose new caption is filtered loses its picture. Similarities to the old caption are emptied. Links that have
    no row any more count as unchanged.
    """

    def make_change() -> Change:
        change = Change()
        num_left = len(captions)
        for shard, here in ledger.locate(keys.from_bytes(b"".join(captions))).items():
            written = _recaptioned(ledger, shard, captions, judge, change.tally)
            change.replace(shard, written)
            num_left -= len(here)
        change.tally.add("unchanged", None, num_left)
        return change

    return transact(ledger, make_change, note).tally


def prune(ledger: Ledger, source_name: str, ids: keys.Keys, note: Mapping[str, object]) -> int:
    """Takes the rows of a source whose links are not among `ids` out of the table, and returns how many."""
    listed = np.unique(ids)
    num_dropped = 0

    def make_change() -> Change:
        nonlocal num_dropped
        change = Change()
        gone = [keys.empty()]
        for _, rows in ledger.each_shard(["id", "source"]):
            own = keys.from_column(rows.filter(pc.equal(rows["source"], source_name))["id"])
            gone.append(own[keys.find(listed, own) < 0])
        num_dropped = drop_rows(ledger, np.concatenate(gone), change)
        return change

    transact(ledger, make_change, note)
    return num_dropped


def _recaptioned(
    ledger: Ledger, shard: Shard, captions: Mapping[bytes, str], judge: CaptionFilter, tally: Tally
) -> list[WrittenShard]:
    rows = read_whole(ledger.uri, shard.path, ledger.schema)
    new = [captions.get(key) for key in rows["id"].to_pylist()]
    is_new = pa.array([caption is not None for caption in new])
    verdicts = [(None, None) if caption is None else judge.check(caption) for caption in new]
    rows = _replace(rows, "caption", lambda old: pc.coalesce(pa.array(new, pa.string()), old))
    rows = _replace(rows, "language", lambda old: pc.if_else(is_new, pa.array([v[1] for v in verdicts], old.type), old))
    rows = _replace(rows, "clip_similarity", lambda old: pc.if_else(is_new, pa.scalar(None, old.type), old))
    # What was filtered or failed for another reason stays so.
    reasons = [reason if shard.outcome == "ok" else None for reason, _ in verdicts]
    stays = pa.array([reason is None for reason in reasons])
    written = [write_shard(ledger.uri, _stem(shard), shard.outcome, part) for part in _some(rows.filter(stays))]
    for reason in sorted({reason for reason in reasons if reason is not None}):
        mask = pa.array([reason == each for each in reasons])
        written.append(write_shard(ledger.uri, _stem(shard), "filtered", without_pictures(rows.filter(mask), reason)))
        tally.add("filtered", reason, pc.sum(mask).as_py())
    kept = Counter(
        reason
        for reason, is_kept, caption in zip(rows["reason"].to_pylist(), stays.to_pylist(), new, strict=True)
        if is_kept and caption is not None
    )
    for reason, count in kept.items():
        tally.add(shard.outcome, reason, count)
    return written


def _some(rows: pa.Table) -> list[pa.Table]:
    return [rows] if rows.num_rows else []


def _replace(rows: pa.Table, name: str, change: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> pa.Table:
    at = rows.column_names.index(name)
    return rows.set_column(at, rows.schema.field(name), change(rows[name]))


def _stem(shard: Shard) -> str:
    """Returns what the name of a file begins with: its place in the order of the table."""
    return PurePosixPath(shard.path).stem.rpartition("-")[0]
