"""One change of a table: files that come, files that go, and the version that tells of both."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from mdm_core.errors import WorkError
from pipelines import storage
from pipelines.data.table import keys
from pipelines.data.table.delta import may_pass, patiently
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.sample_table import NOTE, SampleTable, Shard
from pipelines.data.table.shards import WrittenShard

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


@dataclass
class Change:
    """What one transaction adds and removes, as things stand in the version that the ledger has read."""

    tally: Tally = field(default_factory=Tally)
    added: list[WrittenShard] = field(default_factory=list)
    removed: list[Shard] = field(default_factory=list)
    """Files of the table that go."""
    rewritten: list[str] = field(default_factory=list)
    """Files that were written for this change, of no use if it fails."""
    superseded: list[str] = field(default_factory=list)
    """Files, not yet of the table, that are of no use once it is made."""
    replaced: list[str] = field(default_factory=list)
    """Those of `added` that hold rows which the table had in `removed`."""
    num_dropped: int = 0
    """Rows that went, and did not come back in another file."""
    new_hashes: keys.Keys = field(default_factory=keys.empty)
    new_phashes: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def replace(self, removed: Shard, written: Sequence[WrittenShard]) -> None:
        """Puts files that were written anew in the place of one of the table."""
        self.removed.append(removed)
        self.added += written
        self.rewritten += [shard.path for shard in written]
        self.replaced += [shard.path for shard in written]


def transact(
    ledger: Ledger, make_change: Callable[[], Change], note: Mapping[str, object] | None = None, *, always: bool = False
) -> Change:
    """Makes a change on top of the newest version, and returns it as it was made.

    Args:
        ledger: The table.
        make_change: Returns the change for the version that the ledger has read; called again for each version that
            others make first.
        note: Kept in the log, for `mdm stats`.
        always: Whether a change of nothing makes a version too.

    Raises:
        WorkError: The table can't be written.
    """
    for attempt in range(_MAX_TRIES):
        ledger.catch_up()
        change = make_change()
        if _commit_once(ledger, change, note or {}, always=always):
            ledger.record(change.added, change.new_hashes, change.new_phashes, change.replaced)
            # A commit that was taken for lost, and arrived after all, has made some of them part of the table.
            _delete(ledger.uri, [path for path in change.superseded if path not in ledger.paths])
            return change
        # Another writer was first, and what it committed may concern these links.
        _delete(ledger.uri, change.rewritten)
        time.sleep(random.uniform(0.0, min(1.0, 0.02 * 2**attempt)))
    raise WorkError(f"{ledger.uri} was changed by others {_MAX_TRIES} times while committing; run again later")


def _commit_once(ledger: Ledger, change: Change, note: Mapping[str, object], *, always: bool) -> bool:
    """Returns whether the change became the version after the one that the ledger has read."""
    if not change.added and not change.removed and not always:
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
    for gone in change.removed:
        actions.append(RemoveAction(gone.path, True, now_ms, partition_values={"outcome": gone.outcome}))
    options = storage.delta_options(ledger.uri)
    delta = patiently(lambda: DeltaTable(ledger.uri, version=ledger.version, storage_options=options))
    token = f"{random.getrandbits(64):016x}"
    try:
        # No tries of its own: it would put the change on top of a version that was not looked at.
        once = CommitProperties(
            max_commit_retries=0, custom_metadata={NOTE: json.dumps({**note, **_counts(change), "token": token})}
        )
        delta.create_write_transaction(actions, "append", delta.schema(), ["outcome"], commit_properties=once)
    except (CommitFailedError, DeltaError, OSError) as error:
        latest = SampleTable.open(ledger.uri)
        if latest.version == ledger.version:
            if not may_pass(error):
                raise WorkError(f"could not commit to {ledger.uri}: {storage.one_line(error)}") from error
            # It may yet arrive, and then needs its files; if it does not, they are swept.
            change.rewritten.clear()
            return False
        # An answer that was lost on its way back is not a commit that failed.
        return any(entry.get("token") == token for entry in patiently(lambda: latest.notes(since=ledger.version)))
    return True


def _counts(change: Change) -> dict[str, object]:
    return {"outcomes": dict(change.tally.outcomes)}


def _delete(uri: str, paths: Sequence[str]) -> None:
    for path in paths:
        storage.delete(storage.join(uri, path))
