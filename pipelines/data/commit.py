"""Committing shards that were written: each link gets exactly one row, and each picture is kept once."""

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from mdm_core.errors import WorkError
from pipelines import storage
from pipelines.data import keys
from pipelines.data.ledger import Ledger
from pipelines.data.shards import STORED, WrittenShard, write_shard
from pipelines.data.table import IMAGE_COLUMNS, SCHEMA, SampleTable, read_rows

_MAX_TRIES = 50


@dataclass
class Tally:
    """What became of links."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: str, reason: str | None, count: int = 1) -> None:
        """Counts `count` links."""
        if count:
            self.outcomes[outcome] += count
            if reason:
                self.reasons[reason] += count

    def update(self, other: "Tally") -> None:
        """Adds the counts of `other`."""
        self.outcomes += other.outcomes
        self.reasons += other.reasons

    @property
    def total(self) -> int:
        """Links counted."""
        return self.outcomes.total()


def commit(ledger: Ledger, shards: Sequence[WrittenShard], *, exact_duplicates: bool) -> Tally:
    """Commits shards in one transaction, and returns what became of their links.

    Links that another refresh has finished meanwhile keep its rows, and count as unchanged. Pictures that the table
    holds already, or that an earlier row of `shards` holds, become `filtered`, if `exact_duplicates`. The rows of
    links that failed before are replaced.

    Raises:
        WorkError: The table can't be written.
    """
    ledger.create_table()
    for attempt in range(_MAX_TRIES):
        ledger.catch_up()
        change = _change(ledger, shards, exact_duplicates)
        if _commit_once(ledger, change):
            ledger.record([shard.path for shard in change.added], change.new_hashes)
            _delete(ledger.uri, change.superseded)
            return change.tally
        # Another refresh was first, and what it committed may concern these links.
        _delete(ledger.uri, change.rewritten)
        time.sleep(random.uniform(0.0, min(1.0, 0.02 * 2**attempt)))
    raise WorkError(f"{ledger.uri} was changed by others {_MAX_TRIES} times while committing; run again later")


@dataclass
class _Change:
    """What one transaction adds and removes, as things stand in the version that the ledger has read."""

    tally: Tally = field(default_factory=Tally)
    added: list[WrittenShard] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    # Files that were written for this change, and those that they stand in for.
    rewritten: list[str] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)
    new_hashes: keys.Keys = field(default_factory=keys.empty)


def _change(ledger: Ledger, shards: Sequence[WrittenShard], exact_duplicates: bool) -> _Change:
    change = _Change()
    lost = [ledger.done_elsewhere(shard.ids, shard.attempts) for shard in shards]
    repeated = [np.zeros(shard.num_rows, bool) for shard in shards]
    if exact_duplicates:
        change.new_hashes = _mark_repeated(ledger, shards, lost, repeated)
    retried = [keys.empty()]
    for shard, is_lost, is_repeated in zip(shards, lost, repeated, strict=True):
        change.tally.add("unchanged", None, int(is_lost.sum()))
        retried.append(shard.ids[(np.array(shard.attempts) > 1) & ~is_lost])
        if is_lost.any() or is_repeated.any():
            _rewrite(ledger.uri, shard, ~is_lost & ~is_repeated, is_repeated, change)
        else:
            change.added.append(shard)
    for shard in change.added:
        for reason, count in Counter(shard.reasons).items():
            change.tally.add(shard.outcome, reason, count)
    _retire(ledger, np.unique(np.concatenate(retried)), change)
    return change


def _mark_repeated(
    ledger: Ledger, shards: Sequence[WrittenShard], lost: Sequence[keys.Mask], repeated: Sequence[keys.Mask]
) -> keys.Keys:
    """Marks rows whose picture the table or an earlier row holds, and returns the hashes of the others."""
    kept = [
        np.flatnonzero(~is_lost) if len(shard.hashes) else np.empty(0, np.int64)
        for shard, is_lost in zip(shards, lost, strict=True)
    ]
    hashes = np.concatenate([shard.hashes[at] for shard, at in zip(shards, kept, strict=True)])
    is_repeated = ledger.hashes().contains(hashes) | ~keys.is_first(hashes)
    parts = np.split(is_repeated, np.cumsum([len(at) for at in kept])[:-1])
    for marks, at, part in zip(repeated, kept, parts, strict=True):
        marks[at] = part
    return hashes[~is_repeated]


def _rewrite(uri: str, shard: WrittenShard, keep: keys.Mask, is_repeated: keys.Mask, change: _Change) -> None:
    rows = read_rows(uri, shard.path, STORED)
    stem = PurePosixPath(shard.path).stem.rpartition("-")[0]
    parts = [(shard.outcome, rows.filter(pa.array(keep)))]
    if is_repeated.any():
        parts.append(("filtered", _without_pictures(rows.filter(pa.array(is_repeated)), "exact_duplicate")))
    for outcome, part in parts:
        if part.num_rows:
            written = write_shard(uri, stem, outcome, part)
            change.added.append(written)
            change.rewritten.append(written.path)
    change.superseded.append(shard.path)


def _without_pictures(rows: pa.Table, reason: str) -> pa.Table:
    for name in STORED:
        if name in IMAGE_COLUMNS:
            nulls = pa.nulls(rows.num_rows, SCHEMA.field(name).type)
            rows = rows.set_column(rows.column_names.index(name), SCHEMA.field(name), nulls)
    reasons = pa.array([reason] * rows.num_rows, pa.string())
    return rows.set_column(rows.column_names.index("reason"), SCHEMA.field("reason"), reasons)


def _retire(ledger: Ledger, ids: keys.Keys, change: _Change) -> None:
    """Takes the old rows of links that were tried again out of the files that hold them."""
    for path, rows in ledger.failed.items() if len(ids) else ():
        is_old = keys.find(ids, rows.ids) >= 0
        if not is_old.any():
            continue
        change.removed.append(path)
        if not is_old.all():
            left = read_rows(ledger.uri, path, STORED).filter(pa.array(~is_old))
            written = write_shard(ledger.uri, PurePosixPath(path).stem.rpartition("-")[0], "failed", left)
            change.added.append(written)
            change.rewritten.append(written.path)


def _commit_once(ledger: Ledger, change: _Change) -> bool:
    """Returns whether the change became the version after the one that the ledger has read."""
    if not change.added and not change.removed:
        return True
    now_ms = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [
        AddAction(
            path=shard.path,
            size=shard.size_bytes,
            partition_values={"outcome": shard.outcome},
            modification_time=now_ms,
            data_change=True,
            stats=json.dumps({"numRecords": shard.num_rows}),
        )
        for shard in change.added
    ]
    for path in change.removed:
        actions.append(RemoveAction(path, True, now_ms, partition_values={"outcome": "failed"}))
    options = storage.delta_options(ledger.uri)
    delta = DeltaTable(ledger.uri, version=ledger.version, storage_options=options)
    try:
        # No tries of its own: it would put the change on top of a version that was not looked at.
        once = CommitProperties(max_commit_retries=0)
        delta.create_write_transaction(actions, "append", delta.schema(), ["outcome"], commit_properties=once)
    except (CommitFailedError, DeltaError, OSError) as error:
        latest = SampleTable.open(ledger.uri)
        if latest.version == ledger.version:
            raise WorkError(f"could not commit to {ledger.uri}: {error}") from error
        # An answer that was lost on its way back is not a commit that failed.
        return bool(change.added) and change.added[0].path in {shard.path for shard in latest.shards(outcome=None)}
    return True


def _delete(uri: str, paths: Sequence[str]) -> None:
    for path in paths:
        storage.delete(storage.join(uri, path))
