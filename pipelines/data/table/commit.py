"""Committing shards that were written: each link gets exactly one row, and each picture is kept once."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.config import FiltersConfig
from pipelines.data.pictures.phash import mark_near_repeats
from pipelines.data.table import keys
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.rewrite import drop_rows
from pipelines.data.table.shards import NO_PHASH, WrittenShard, read_whole, without_pictures, write_shard
from pipelines.data.table.transaction import Change, Tally, transact


def commit(
    ledger: Ledger, shards: Sequence[WrittenShard], filters: FiltersConfig, note: Mapping[str, object] | None = None
) -> Tally:
    """Commits shards in one transaction, and returns what became of their links.

    Links that another refresh has finished meanwhile keep its rows, and count as unchanged. Pictures that the table
    holds already, or that an earlier row of `shards` holds, become `filtered`, if `filters` say so. The rows of links
    that were tried before are replaced.

    Raises:
        WorkError: The table can't be written.
    """
    ledger.ensure_table()
    change = transact(ledger, lambda: _change(ledger, shards, filters), note)
    return change.tally


def _change(ledger: Ledger, shards: Sequence[WrittenShard], filters: FiltersConfig) -> Change:
    change = Change()
    lost = [ledger.done_elsewhere(shard.ids, shard.attempts) for shard in shards]
    gone = [is_lost.copy() for is_lost in lost]
    marks: list[tuple[str, list[keys.Mask]]] = []
    if filters.exact_duplicates:
        marks.append(("exact_duplicate", _mark(shards, gone, "hashes", lambda found: _repeated(ledger, found, change))))
    if filters.near_duplicates is not None:
        bits = filters.near_duplicates
        marks.append(
            ("near_duplicate", _mark(shards, gone, "phashes", lambda found: _near(ledger, found, bits, change)))
        )
    tried_before = [keys.empty()]
    for at, shard in enumerate(shards):
        change.tally.add("unchanged", None, int(lost[at].sum()))
        tried_before.append(shard.ids[(np.array(shard.attempts) > 1) & ~lost[at]])
        if gone[at].any():
            _rewrite(ledger, shard, ~gone[at], {reason: masks[at] for reason, masks in marks}, change)
        else:
            change.added.append(shard)
    for shard in change.added:
        for reason, count in Counter(shard.reasons).items():
            change.tally.add(shard.outcome, reason, count)
    drop_rows(ledger, np.unique(np.concatenate(tried_before)), change)
    return change


def _mark(
    shards: Sequence[WrittenShard],
    gone: Sequence[keys.Mask],
    field: str,
    judge: Callable[[Any], keys.Mask],
) -> list[keys.Mask]:
    """Returns which rows `judge` marks by their `field`, of those that are not gone yet, and notes them as gone."""
    marks = [np.zeros(shard.num_rows, bool) for shard in shards]
    kept = [
        np.flatnonzero(~is_gone) if len(getattr(shard, field)) else np.empty(0, np.int64)
        for shard, is_gone in zip(shards, gone, strict=True)
    ]
    values = [getattr(shard, field)[at] for shard, at in zip(shards, kept, strict=True)]
    parts = np.split(judge(np.concatenate(values)), np.cumsum([len(at) for at in kept])[:-1])
    for mark, is_gone, at, part in zip(marks, gone, kept, parts, strict=True):
        mark[at] = part
        is_gone |= mark
    return marks


def _repeated(ledger: Ledger, hashes: keys.Keys, change: Change) -> keys.Mask:
    """Marks hashes that the table or an earlier row holds, and notes the others."""
    is_repeated = ledger.hashes().contains(hashes) | ~keys.is_first(hashes)
    change.new_hashes = hashes[~is_repeated]
    return is_repeated


def _near(ledger: Ledger, phashes: Any, max_bits: int, change: Change) -> keys.Mask:
    """Marks perceptual hashes near one that the table or an earlier row holds, and notes the others."""
    has_hash = phashes != NO_PHASH
    is_near = np.zeros(len(phashes), bool)
    is_near[has_hash] = mark_near_repeats(phashes[has_hash], max_bits, ledger.phashes())
    change.new_phashes = phashes[has_hash & ~is_near]
    return is_near


def _rewrite(
    ledger: Ledger, shard: WrittenShard, keep: keys.Mask, marks: Mapping[str, keys.Mask], change: Change
) -> None:
    rows = read_whole(ledger.uri, shard.path, ledger.schema)
    stem = PurePosixPath(shard.path).stem.rpartition("-")[0]
    parts = [(shard.outcome, rows.filter(pa.array(keep)))]
    parts += [("filtered", without_pictures(rows.filter(pa.array(mark)), reason)) for reason, mark in marks.items()]
    for outcome, part in parts:
        if part.num_rows:
            written = write_shard(ledger.uri, stem, outcome, part)
            change.added.append(written)
            change.rewritten.append(written.path)
    change.superseded.append(shard.path)
