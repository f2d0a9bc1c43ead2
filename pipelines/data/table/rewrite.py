"""Rows of the table that change though nothing is fetched: they go, get other captions, or scores that they lack."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.filters import CaptionFilter
from pipelines.data.table import keys
from pipelines.data.table.ledger import Ledger, State
from pipelines.data.table.sample_table import Shard
from pipelines.data.table.shards import WrittenShard, read_whole, without_pictures, write_shard
from pipelines.data.table.transaction import Change, Tally, transact

_FILES_AT_ONCE = 32


def drop_rows(ledger: Ledger, ids: keys.Keys, change: Change) -> None:
    """Takes the rows of `ids` out of the files that hold them, as part of `change`."""
    for shard, here in ledger.locate(ids).items() if len(ids) else ():
        if len(here) == shard.num_rows:
            change.replace(shard, [])
        else:
            rows = read_whole(ledger.uri, shard.path, ledger.schema)
            left = rows.filter(pa.array(keys.find(np.sort(here), keys.from_column(rows["id"])) < 0))
            change.replace(shard, [write_shard(ledger.uri, _stem(shard), shard.outcome, left)])
        change.num_dropped += len(here)


def recaption(ledger: Ledger, captions: Mapping[bytes, str], judge: CaptionFilter, note: Mapping[str, object]) -> Tally:
    """Gives rows of the table new captions, by their ids, and returns what became of them.

    A row whose new caption is filtered loses its picture. Similarities to the old caption are emptied. Links that have
    no row any more count as unchanged.
    """
    tally = Tally()
    for ids in _by_files(ledger, keys.from_bytes(b"".join(captions))):
        tally.update(transact(ledger, functools.partial(_recaption, ledger, ids, captions, judge), note).tally)
    tally.add("unchanged", None, len(captions) - tally.total)
    return tally


def add_scores(ledger: Ledger, scores: pa.Table, note: Mapping[str, object]) -> int:
    """Gives rows of the table the scores that they lack, and returns how many rows.

    Args:
        ledger: The table.
        scores: Column `id`, and one for each score.
        note: Kept in the log.
    """
    ids = keys.from_column(scores["id"])
    order = np.argsort(ids)
    ids, scores = ids[order], scores.drop_columns(["id"]).take(pa.array(order))
    num_rows = 0
    for some in _by_files(ledger, ids):
        transact(ledger, functools.partial(_add_scores, ledger, some, ids, scores), note)
        num_rows += len(some)
    return num_rows


def prune(ledger: Ledger, source_name: str, ids: keys.Keys, note: Mapping[str, object]) -> int:
    """Takes the rows of a source whose links are not among `ids` out of the table, and returns how many.

    What stands for a link that was forgotten stays, or the link would be new to the next refresh.
    """
    listed = np.unique(ids)
    gone = [keys.empty()]
    for _, rows in ledger.each_shard(["id", "source"]):
        own = keys.from_column(rows.filter(pc.equal(rows["source"], source_name))["id"])
        is_forgotten = ledger.look_up(own)[1]["state"] == State.FORGOTTEN
        gone.append(own[(keys.find(listed, own) < 0) & ~is_forgotten])
    num_dropped = 0
    for some in _by_files(ledger, np.concatenate(gone)):

        def drop(some: keys.Keys = some) -> Change:
            change = Change()
            drop_rows(ledger, some, change)
            return change

        num_dropped += transact(ledger, drop, note).num_dropped
    return num_dropped


def _by_files(ledger: Ledger, ids: keys.Keys) -> Iterator[keys.Keys]:
    """Yields the ids that have rows, those of a few files at a time.

    A transaction that rewrites much would be overtaken by every commit of another refresh, and begin again.
    """
    ledger.catch_up()
    parts = iter(ledger.locate(ids).values())
    while some := list(itertools.islice(parts, _FILES_AT_ONCE)):
        yield np.concatenate(some)


def _recaption(ledger: Ledger, ids: keys.Keys, captions: Mapping[bytes, str], judge: CaptionFilter) -> Change:
    change = Change()
    wanted = {key: captions[key] for key in keys.to_list(ids)}
    for shard in ledger.locate(ids):
        change.replace(shard, _recaptioned(ledger, shard, wanted, judge, change.tally))
    return change


def _add_scores(ledger: Ledger, some: keys.Keys, ids: keys.Keys, scores: pa.Table) -> Change:
    change = Change()
    for shard in ledger.locate(some):
        if shard.outcome == "ok":
            rows = read_whole(ledger.uri, shard.path, ledger.schema)
            at = keys.find(ids, keys.from_column(rows["id"]))
            new = scores.take(pa.array(at, mask=at < 0))
            for name in scores.column_names:
                rows = _replace(rows, name, functools.partial(_filled, new[name]))
            change.replace(shard, [write_shard(ledger.uri, _stem(shard), shard.outcome, rows)])
    return change


def _filled(new: pa.ChunkedArray, old: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.coalesce(old, new)


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
