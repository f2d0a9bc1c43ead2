"""What a table holds, link by link: which links need no work, and which failures may be tried again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from pipelines import storage
from pipelines.data.pictures.phash import HashIndex
from pipelines.data.table import keys
from pipelines.data.table.delta import patiently
from pipelines.data.table.sample_table import FORGOTTEN, OUTCOMES, SampleTable, Shard, ensure_table
from pipelines.data.table.shards import WrittenShard

_FIRST_WAIT_S = 3600.0
_WAIT_GROWTH = 4.0
_SHARDS_AT_ONCE = 256
_CAPTION_REASONS = ("caption_chars", "caption_words", "language")
_COLUMNS = {
    "ok": ["id", "caption"],
    "filtered": ["id", "caption", "reason"],
    "failed": ["id", "caption", "attempts", "retryable", "fetched_at"],
}


class State(IntEnum):
    """What a link's row means for later refreshes."""

    SETTLED = 0
    FAILED = 1
    UNFETCHED = 2
    """Filtered for its caption alone: another caption is a reason to fetch it."""
    FORGOTTEN = 3


_LINK = np.dtype([("caption", np.uint64), ("shard", np.uint32), ("state", np.uint8)])


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
        self.failed: dict[str, FailedRows] = {}
        self.paths: frozenset[str] = frozenset()
        self._links = keys.KeyMap(_LINK)
        self._shards: list[Shard] = []
        self._now_s = now_s
        self._retry_failed = retry_failed
        self._hashes: keys.KeySet | None = None
        self._phashes: HashIndex | None = None
        self._written_here: set[str] = set()
        self._rewritten_here: set[str] = set()
        self._written_elsewhere: dict[bytes, int] = {}
        if patiently(lambda: DeltaTable.is_deltatable(self.uri, storage.delta_options(self.uri))):
            self._read(self._advance())

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table as it was read last."""
        return self._table.schema

    def ensure_table(self, scores: Sequence[str] = ()) -> None:
        """Makes the table if it is not there, and the columns that it lacks."""
        if self.version < 0 or not set(scores) <= set(self.schema.names):
            ensure_table(self.uri, scores)
            self.catch_up()

    def look_up(self, ids: keys.Keys) -> tuple[keys.Mask, npt.NDArray[Any]]:
        """Returns which links have a row, and of each its fields `caption` (a hash), `shard` and `state`."""
        return self._links.get(ids)

    def locate(self, ids: keys.Keys) -> dict[Shard, keys.Keys]:
        """Returns the files that hold rows of `ids`, and which of them each holds."""
        found, links = self._links.get(ids)
        here, numbers = ids[found], links["shard"][found]
        files = {self._shards[number]: here[numbers == number] for number in np.unique(numbers)}
        return {shard: rows for shard, rows in files.items() if shard.path in self.paths}

    def each_shard(self, columns: Sequence[str], outcome: str | None = None) -> Iterator[tuple[Shard, pa.Table]]:
        """Yields each file of the version that was read, and columns of its rows; some files ahead are in memory."""
        yield from self._table.read_each(self._table.shards(outcome), dict.fromkeys(OUTCOMES, columns))

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
        """Reads what has been committed since the table was read last, by others or by rewriting."""
        shards = [shard for shard in self._advance() if shard.path not in self._written_here]
        self._read(shards)
        for shard in shards:
            if shard.path in self._rewritten_here:
                continue
            rows = self._table.read(shard, ["id", "attempts"])
            # A failure that was only moved to another file has as many attempts as before, and replaces nothing.
            self._written_elsewhere.update(zip(rows["id"].to_pylist(), rows["attempts"].to_pylist(), strict=True))
            if self._hashes is not None and shard.outcome == "ok":
                self._hashes.add(keys.from_column(self._table.read(shard, ["sha256"])["sha256"]))
            if self._phashes is not None and shard.outcome == "ok":
                self._phashes.add(_numbers(self._table.read(shard, ["phash"])["phash"]))

    def done_elsewhere(self, ids: keys.Keys, attempts: Sequence[int]) -> keys.Mask:
        """Returns which links another refresh has tried as often as this one, so that its rows stand."""
        if not self._written_elsewhere:
            return np.zeros(len(ids), bool)
        pairs = zip(keys.to_list(ids), attempts, strict=True)
        return np.array([self._written_elsewhere.get(key, -1) >= tried for key, tried in pairs], bool)

    def hashes(self) -> keys.KeySet:
        """Returns the hashes of all pictures of the table."""
        if self._hashes is None:
            self._hashes = keys.KeySet()
            for _, rows in self.each_shard(["sha256"], "ok"):
                self._hashes.add(keys.from_column(rows["sha256"]))
        return self._hashes

    def phashes(self) -> HashIndex:
        """Returns the perceptual hashes of all pictures of the table."""
        if self._phashes is None:
            self._phashes = HashIndex()
            for _, rows in self.each_shard(["phash"], "ok"):
                self._phashes.add(_numbers(rows["phash"]))
        return self._phashes

    def record(
        self, shards: Sequence[WrittenShard], hashes: keys.Keys, phashes: npt.NDArray[np.int64], replaced: Sequence[str]
    ) -> None:
        """Notes what this process has committed.

        Args:
            shards: Files of links that were worked on, which this process need not read again.
            hashes: Of their pictures.
            phashes: The perceptual hashes of their pictures, where these count.
            replaced: Files that hold rows of files that they replace.
        """
        self._rewritten_here.update(replaced)
        own = [shard for shard in shards if shard.path not in self._rewritten_here]
        # Failures are read like those of others: they may be tried again, and then be replaced.
        self._written_here.update(shard.path for shard in own if shard.outcome != "failed")
        self._rewritten_here.update(shard.path for shard in own if shard.outcome == "failed")
        if len(hashes):
            self.hashes().add(hashes)
        if len(phashes):
            self.phashes().add(phashes)

    def _advance(self) -> list[Shard]:
        self._table = SampleTable.open(self.uri)
        self.version = self._table.version
        shards = self._table.shards(outcome=None)
        added = [shard for shard in shards if shard.path not in self.paths]
        self.paths = frozenset(shard.path for shard in shards)
        self.failed = {path: rows for path, rows in self.failed.items() if path in self.paths}
        return added

    def _read(self, shards: Sequence[Shard]) -> None:
        for outcome in OUTCOMES:
            wanted = [shard for shard in shards if shard.outcome == outcome]
            for first in range(0, len(wanted), _SHARDS_AT_ONCE):
                some = wanted[first : first + _SHARDS_AT_ONCE]
                parts = [self._entries(*part) for part in self._table.read_each(some, _COLUMNS)]
                ids, links = zip(*parts, strict=True)
                self._links.add(np.concatenate(ids), np.concatenate(links))

    def _entries(self, shard: Shard, rows: pa.Table) -> tuple[keys.Keys, npt.NDArray[Any]]:
        """Returns the ids of a file, and what is kept of each."""
        ids = keys.from_column(rows["id"])
        links = np.zeros(len(ids), _LINK)
        links["caption"] = keys.text_hashes(rows["caption"])
        links["shard"] = len(self._shards)
        self._shards.append(shard)
        if shard.outcome == "failed":
            links["state"] = State.FAILED
            self.failed[shard.path] = self._failed_rows(ids, rows)
        elif shard.outcome == "filtered":
            links["state"][_is_in(rows["reason"], _CAPTION_REASONS)] = State.UNFETCHED
            links["state"][_is_in(rows["reason"], [FORGOTTEN])] = State.FORGOTTEN
        return ids, links

    def _failed_rows(self, ids: keys.Keys, rows: pa.Table) -> FailedRows:
        attempts = rows["attempts"].to_numpy().astype(np.int32)
        fetched_s = pc.cast(rows["fetched_at"], "int64").to_numpy() / 1e6
        is_due = np.asarray(rows["retryable"]).astype(bool)
        is_due &= fetched_s + _FIRST_WAIT_S * _WAIT_GROWTH ** (np.minimum(attempts, 12) - 1) <= self._now_s
        if self._retry_failed != "due":
            is_due = np.full(len(ids), self._retry_failed == "all")
        return FailedRows(ids, attempts, is_due)


def _is_in(column: pa.ChunkedArray, values: Sequence[str]) -> keys.Mask:
    return np.asarray(pc.is_in(column, value_set=pa.array(values, pa.string()))).astype(bool)


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(column.drop_null().to_numpy(), np.int64)
