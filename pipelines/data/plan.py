"""What a refresh has to do: the rows of a list less what is repeated, unreadable, or done already."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mdm_core.errors import WorkError
from pipelines import storage
from pipelines.data import keys
from pipelines.data.config import SourceConfig
from pipelines.data.ledger import Ledger, State
from pipelines.data.sources import Row, read_list

_MAX_FAULTS_KEPT = 20


@dataclass(frozen=True)
class Plan:
    """Every row of a list, accounted for; it is small, whatever the length of the list."""

    source: SourceConfig
    limit: int | None
    fingerprint: str
    links: int
    duplicate: int
    unchanged: int
    malformed: Counter[str]
    faults: tuple[Row, ...]
    num_todo: int
    todo_bits: npt.NDArray[np.uint8]
    retry_ids: keys.Keys
    retry_attempts: npt.NDArray[np.int32]
    num_recaption: int
    """Links that the table holds with another caption, and that need no fetch."""
    recaption_bits: npt.NDArray[np.uint8]
    ids: keys.Keys
    """Of all links of the list."""


def make_plan(source: SourceConfig, ledger: Ledger, limit: int | None = None) -> Plan:
    """Returns what there is to do for a list, which is read once for it.

    Of links that are repeated in the list the first counts. Links that the table holds are unchanged, unless they
    failed and are due to be tried again, or have another caption now. One that was left out for its caption alone is
    then fetched.

    Raises:
        ConfigError: The list can't be read.
    """
    fingerprint = _fingerprint(source)
    malformed: Counter[str] = Counter()
    faults: list[Row] = []
    readable: list[keys.Mask] = []
    ids: list[keys.Keys] = []
    hashes = [np.empty(0, np.uint64)]
    for batch in read_list(source, limit):
        readable.append(np.array([not row.fault for row in batch], bool))
        ids.append(keys.from_bytes(b"".join(keys.link_key(row.url) for row in batch if not row.fault)))
        hashes.append(keys.text_hashes(pa.array([row.caption for row in batch if not row.fault], pa.string())))
        bad = [row for row in batch if row.fault]
        malformed.update(row.fault for row in bad)
        faults.extend(bad[: _MAX_FAULTS_KEPT - len(faults)])
    is_readable = np.concatenate([np.empty(0, bool), *readable])
    all_ids = np.concatenate([keys.empty(), *ids])
    is_first = keys.is_first(all_ids)
    is_known, links = ledger.look_up(all_ids)
    is_changed = is_known & (links["caption"] != np.concatenate(hashes)) & (links["state"] != State.FORGOTTEN)
    is_refetched = is_first & is_changed & (links["state"] == State.UNFETCHED)
    retry_ids, retry_attempts = _joined(*ledger.to_retry(), all_ids[is_refetched])
    is_todo = is_first & (~is_known | (keys.find(retry_ids, all_ids) >= 0))
    is_recaptioned = is_first & is_changed & ~is_todo
    return Plan(
        source=source,
        limit=limit,
        fingerprint=fingerprint,
        links=len(is_readable),
        duplicate=int((~is_first).sum()),
        unchanged=int((is_first & ~is_todo & ~is_recaptioned).sum()),
        malformed=malformed,
        faults=tuple(faults),
        num_todo=int(is_todo.sum()),
        todo_bits=_bits(is_readable, is_todo),
        retry_ids=retry_ids,
        retry_attempts=retry_attempts,
        num_recaption=int(is_recaptioned.sum()),
        recaption_bits=_bits(is_readable, is_recaptioned),
        ids=all_ids,
    )


def iter_captions(plan: Plan, batch_rows: int = 100_000) -> Iterator[dict[bytes, str]]:
    """Yields the new captions of links that need no fetch, by the links' ids, at most `batch_rows` at a time.

    Raises:
        WorkError: The list has changed since the plan was made.
    """
    captions: dict[bytes, str] = {}
    for row in _wanted(plan, plan.recaption_bits):
        captions[keys.link_key(row.url)] = row.caption
        if len(captions) == batch_rows:
            yield captions
            captions = {}
    if captions:
        yield captions


def iter_chunks(plan: Plan, chunk_rows: int) -> Iterator[pa.Table]:
    """Yields the rows to do, in the order of the list, `chunk_rows` at a time.

    Columns: `chunk` (from 0), `id`, `url`, `caption`, and `attempts`, this one counted.

    Raises:
        WorkError: The list has changed since the plan was made.
    """
    waiting: list[Row] = []
    num_chunks = 0
    for row in _wanted(plan, plan.todo_bits):
        waiting.append(row)
        if len(waiting) == chunk_rows:
            yield _chunk(plan, num_chunks, waiting)
            num_chunks += 1
            waiting = []
    if waiting:
        yield _chunk(plan, num_chunks, waiting)


def _wanted(plan: Plan, bits: npt.NDArray[np.uint8]) -> Iterator[Row]:
    is_wanted = np.unpackbits(bits, count=plan.links).astype(bool)
    num_rows = 0
    for batch in read_list(plan.source, plan.limit):
        for at in np.flatnonzero(is_wanted[num_rows : num_rows + len(batch)]):
            yield batch[at]
        num_rows += len(batch)
    if num_rows != plan.links or _fingerprint(plan.source) != plan.fingerprint:
        raise WorkError(f"{plan.source.uri} was changed while it was read; run again when it is complete")


def _bits(is_readable: keys.Mask, mask: keys.Mask) -> npt.NDArray[np.uint8]:
    """Returns a mask of the readable rows as bits, one for each row of the list."""
    rows = np.zeros(len(is_readable), bool)
    rows[is_readable] = mask
    return np.packbits(rows)


def _joined(
    ids: keys.Keys, attempts: npt.NDArray[np.int32], further: keys.Keys
) -> tuple[keys.Keys, npt.NDArray[np.int32]]:
    """Returns the links to try again, sorted: those that failed, and `further`, that count as tried once."""
    ids = np.concatenate([ids, further])
    attempts = np.concatenate([attempts, np.ones(len(further), np.int32)])
    order = np.argsort(ids)
    return ids[order], attempts[order]


def _chunk(plan: Plan, number: int, rows: list[Row]) -> pa.Table:
    joined = b"".join(keys.link_key(row.url) for row in rows)
    at = keys.find(plan.retry_ids, keys.from_bytes(joined))
    before = np.where(at >= 0, plan.retry_attempts[at], 0) if len(plan.retry_ids) else np.zeros(len(rows), np.int32)
    return pa.table(
        {
            "chunk": pa.array(np.full(len(rows), number, np.int64)),
            "id": pa.array(
                [joined[i : i + keys.KEY_BYTES] for i in range(0, len(joined), keys.KEY_BYTES)], pa.binary()
            ),
            "url": pa.array([row.url for row in rows], pa.string()),
            "caption": pa.array([row.caption for row in rows], pa.string()),
            "origin": pa.array([getattr(row, "origin", "") for row in rows], pa.string()),
            "attempts": pa.array(before.astype(np.int32) + 1, pa.int32()),
        }
    )


def _fingerprint(source: SourceConfig) -> str:
    try:
        return storage.fingerprint(source.uri)
    except OSError:
        # `read_list` says what is wrong with it.
        return ""
