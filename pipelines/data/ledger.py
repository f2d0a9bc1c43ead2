"""What a table holds, link by link: which links need no work, and which failures may be tried again."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from deltalake import DeltaTable

from pipelines import storage
from pipelines.data import keys
from pipelines.data.table import SampleTable, Shard, create_table

_FIRST_WAIT_S = 3600.0
_WAIT_GROWTH = 4.0
_NUM_READERS = 8


@dataclass(frozen=True)
class FailedRows:
    """The rows of one file of failures."""

    ids: keys.Keys
    attempts: npt.NDArray[np.int32]
    is_due: keys.Mask


class Ledger:
    """The links of a table, kept up to date with the commits of this refresh and of others.

    Args:
        uri: The table, which need not be there yet.
        now_s: Seconds since 1970: failures are due, or not, as of then.
        retry_failed: Which failures to try again.
    """

    def __init__(self, uri: str, *, now_s: float, retry_failed: Literal["due", "none", "all"] = "due") -> None:
        self.uri = storage.absolute(uri)
        self.version = -1
        self.ids = keys.KeySet()
        self.failed: dict[str, FailedRows] = {}
        self.paths: frozenset[str] = frozenset()
        self._now_s = now_s
        self._retry_failed = retry_failed
        self._hashes: keys.KeySet | None = None
        self._written_here: set[str] = set()
        self._written_elsewhere: dict[bytes, int] = {}
        if DeltaTable.is_deltatable(self.uri, storage.delta_options(self.uri)):
            self._read(self._advance())

    def create_table(self) -> None:
        """Makes the table if it is not there."""
        if self.version < 0:
            create_table(self.uri)
            self.catch_up()

    def to_retry(self) -> tuple[keys.Keys, npt.NDArray[np.int32]]:
        """Returns the ids of the failures to try again, sorted, and how often each was tried."""
        rows = list(self.failed.values())
        if not rows:
            return keys.empty(), np.empty(0, np.int32)
        is_due = np.concatenate([row.is_due for row in rows])
        ids = np.concatenate([row.ids for row in rows])[is_due]
        attempts = np.concatenate([row.attempts for row in rows])[is_due]
        order = np.argsort(ids)
        return ids[order], attempts[order]

    def catch_up(self) -> None:
        """Reads what others have committed since the table was read last."""
        shards = self._advance()
        others = [shard for shard in shards if shard.path not in self._written_here]
        self._read([shard for shard in shards if shard.outcome == "failed" or shard in others])
        for shard in others:
            rows = self._table.read(shard, ["id", "attempts"])
            # A failure that was only moved to another file has as many attempts as before, and replaces nothing.
            self._written_elsewhere.update(zip(rows["id"].to_pylist(), rows["attempts"].to_pylist(), strict=True))
            if self._hashes is not None and shard.outcome == "ok":
                self._hashes.add(keys.from_column(self._table.read(shard, ["sha256"])["sha256"]))

    def done_elsewhere(self, ids: keys.Keys, attempts: Sequence[int]) -> keys.Mask:
        """Returns which links another refresh has tried as often as this one, so that its rows stand."""
        if not self._written_elsewhere:
            return np.zeros(len(ids), bool)
        joined = ids.tobytes()
        each = (joined[at : at + keys.KEY_BYTES] for at in range(0, len(joined), keys.KEY_BYTES))
        pairs = zip(each, attempts, strict=True)
        return np.array([self._written_elsewhere.get(key, -1) >= tried for key, tried in pairs], bool)

    def hashes(self) -> keys.KeySet:
        """Returns the hashes of all pictures of the table."""
        if self._hashes is None:
            self._hashes = keys.KeySet()
            for column in self._columns([s for s in self._table.shards("ok") if s.path in self.paths], ["sha256"]):
                self._hashes.add(keys.from_column(column["sha256"]))
        return self._hashes

    def record(self, paths: Sequence[str], hashes: keys.Keys) -> None:
        """Notes files that this refresh has committed, and the hashes of their pictures."""
        self._written_here.update(paths)
        if len(hashes):
            self.hashes().add(hashes)

    def _advance(self) -> list[Shard]:
        self._table = SampleTable.open(self.uri)
        self.version = self._table.version
        shards = self._table.shards(outcome=None)
        added = [shard for shard in shards if shard.path not in self.paths]
        self.paths = frozenset(shard.path for shard in shards)
        self.failed = {path: rows for path, rows in self.failed.items() if path in self.paths}
        return added

    def _read(self, shards: list[Shard]) -> None:
        settled = [shard for shard in shards if shard.outcome != "failed"]
        found = [keys.from_column(rows["id"]) for rows in self._columns(settled, ["id"])]
        failed = [shard for shard in shards if shard.outcome == "failed"]
        columns = ["id", "attempts", "retryable", "fetched_at"]
        for shard, rows in zip(failed, self._columns(failed, columns), strict=True):
            ids, attempts = keys.from_column(rows["id"]), rows["attempts"].to_numpy().astype(np.int32)
            fetched_s = pc.cast(rows["fetched_at"], "int64").to_numpy() / 1e6
            is_due = np.asarray(rows["retryable"]).astype(bool)
            is_due &= fetched_s + _FIRST_WAIT_S * _WAIT_GROWTH ** (np.minimum(attempts, 12) - 1) <= self._now_s
            if self._retry_failed != "due":
                is_due = np.full(len(ids), self._retry_failed == "all")
            self.failed[shard.path] = FailedRows(ids, attempts, is_due)
            found.append(ids)
        if found:
            self.ids.add(np.concatenate(found))

    def _columns(self, shards: Sequence[Shard], columns: list[str]) -> list[Any]:
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            return list(pool.map(lambda shard: self._table.read(shard, columns), shards))
