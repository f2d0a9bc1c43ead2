"""What a refresh has to do: the rows of a list less what is repeated, unreadable, or done already."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mdm_core.errors import WorkError
from pipelines.data.config import SourceConfig
from pipelines.data.lists.sources import Batch, Row, fingerprint, read_list
from pipelines.data.table import keys
from pipelines.data.table.ledger import Ledger, State

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
    found = _fingerprint(source)
    malformed: Counter[str] = Counter()
    faults: list[Row] = []
    readable: list[keys.Mask] = []
    ids: list[keys.Keys] = []
    hashes = [np.empty(0, np.uint64)]
    for batch in read_list(source, limit):
        readable.append(batch.readable)
        ids.append(_link_keys(batch.urls))
        hashes.append(keys.text_hashes(batch.captions))
        malformed.update(batch.count_faults())
        faults.extend(itertools.islice(batch.faulty(), _MAX_FAULTS_KEPT - len(faults)))
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
        fingerprint=found,
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
    for rows in _wanted(plan, plan.recaption_bits, batch_rows):
        yield dict(zip(keys.to_list(_link_keys(rows["url"])), rows["caption"].to_pylist(), strict=True))


def iter_chunks(plan: Plan, chunk_rows: int) -> Iterator[pa.Table]:
    """Yields the rows to do, in the order of the list, `chunk_rows` at a time.

    Columns: `chunk` (from 0), `id`, `url`, `caption`, `origin` (where the picture lies already, or nothing), and
    `attempts`, this one counted.

    Raises:
        WorkError: The list has changed since the plan was made.
    """
    for number, rows in enumerate(_wanted(plan, plan.todo_bits, chunk_rows)):
        yield _chunk(plan, number, rows)


def _wanted(plan: Plan, bits: npt.NDArray[np.uint8], num_rows: int) -> Iterator[pa.Table]:
    """Yields rows of the list, `num_rows` at a time: columns `url`, `caption` and `origin`."""
    is_wanted = np.unpackbits(bits, count=plan.links).astype(bool)
    num_read = 0
    waiting: list[pa.Table] = []
    num_waiting = 0
    for batch in read_list(plan.source, plan.limit):
        found = _columns(batch, is_wanted[num_read : num_read + len(batch)])
        num_read += len(batch)
        waiting.append(found)
        num_waiting += found.num_rows
        if num_waiting >= num_rows:
            whole = pa.concat_tables(waiting).combine_chunks()
            at = num_waiting - num_waiting % num_rows
            yield from (whole.slice(start, num_rows) for start in range(0, at, num_rows))
            waiting, num_waiting = [whole.slice(at)], num_waiting - at
    if num_read != plan.links or _fingerprint(plan.source) != plan.fingerprint:
        raise WorkError(f"{plan.source.uri} was changed while it was read; run again when it is complete")
    if num_waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _columns(batch: Batch, is_wanted: keys.Mask) -> pa.Table:
    origins = pa.repeat("", len(batch.urls)) if batch.origins is None else batch.origins
    rows = pa.table({"url": batch.urls, "caption": batch.captions, "origin": origins})
    if len(is_wanted) < len(batch):
        # The list has grown since.
        is_wanted = np.append(is_wanted, np.zeros(len(batch) - len(is_wanted), bool))
    return rows.filter(pa.array(is_wanted[batch.readable]))


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


def _chunk(plan: Plan, number: int, rows: pa.Table) -> pa.Table:
    ids = _link_keys(rows["url"])
    at = keys.find(plan.retry_ids, ids)
    before = np.where(at >= 0, plan.retry_attempts[at], 0) if len(plan.retry_ids) else np.zeros(len(ids), np.int32)
    return pa.table(
        {
            "chunk": pa.array(np.full(len(ids), number, np.int64)),
            "id": pa.array(keys.to_list(ids), pa.binary()),
            **{name: rows[name] for name in rows.column_names},
            "attempts": pa.array(before.astype(np.int32) + 1, pa.int32()),
        }
    )


def _link_keys(urls: pa.Array | pa.ChunkedArray) -> keys.Keys:
    return keys.from_bytes(b"".join(map(keys.link_key, urls.to_pylist())))


def _fingerprint(source: SourceConfig) -> str:
    try:
        return fingerprint(source)
    except OSError:
        # `read_list` says what is wrong with it.
        return ""
