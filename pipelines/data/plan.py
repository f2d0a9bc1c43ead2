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
from pipelines.data.ledger import Ledger
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


def make_plan(source: SourceConfig, ledger: Ledger, limit: int | None = None) -> Plan:
    """Returns what there is to do for a list, which is read once for it.

    Of links that are repeated in the list the first counts. Links that the table holds are unchanged, unless they
    failed and are due to be tried again.

    Raises:
        ConfigError: The list can't be read.
    """
    fingerprint = _fingerprint(source)
    malformed: Counter[str] = Counter()
    faults: list[Row] = []
    readable: list[keys.Mask] = []
    ids: list[keys.Keys] = []
    for batch in read_list(source, limit):
        readable.append(np.array([not row.fault for row in batch], bool))
        ids.append(keys.from_bytes(b"".join(keys.link_key(row.url) for row in batch if not row.fault)))
        bad = [row for row in batch if row.fault]
        malformed.update(row.fault for row in bad)
        faults.extend(bad[: _MAX_FAULTS_KEPT - len(faults)])
    is_readable = np.concatenate([np.empty(0, bool), *readable])
    all_ids = np.concatenate([keys.empty(), *ids])
    is_first = keys.is_first(all_ids)
    retry_ids, retry_attempts = ledger.to_retry()
    is_new = ~ledger.ids.contains(all_ids) | (keys.find(retry_ids, all_ids) >= 0)
    todo = np.zeros(len(is_readable), bool)
    todo[is_readable] = is_first & is_new
    return Plan(
        source=source,
        limit=limit,
        fingerprint=fingerprint,
        links=len(is_readable),
        duplicate=int((~is_first).sum()),
        unchanged=int((is_first & ~is_new).sum()),
        malformed=malformed,
        faults=tuple(faults),
        num_todo=int(todo.sum()),
        todo_bits=np.packbits(todo),
        retry_ids=retry_ids,
        retry_attempts=retry_attempts,
    )


def iter_chunks(plan: Plan, chunk_rows: int) -> Iterator[pa.Table]:
    """Yields the rows to do, in the order of the list, `chunk_rows` at a time.

    Columns: `chunk` (from 0), `id`, `url`, `caption`, and `attempts`, this one counted.

    Raises:
        WorkError: The list has changed since the plan was made.
    """
    todo = np.unpackbits(plan.todo_bits, count=plan.links).astype(bool)
    waiting: list[Row] = []
    num_rows = num_chunks = 0
    for batch in read_list(plan.source, plan.limit):
        wanted = todo[num_rows : num_rows + len(batch)]
        num_rows += len(batch)
        waiting += [row for row, is_wanted in zip(batch, wanted, strict=False) if is_wanted]
        while len(waiting) >= chunk_rows:
            yield _chunk(plan, num_chunks, waiting[:chunk_rows])
            num_chunks += 1
            waiting = waiting[chunk_rows:]
    if num_rows != plan.links or _fingerprint(plan.source) != plan.fingerprint:
        raise WorkError(f"{plan.source.uri} was changed while it was read; run again when it is complete")
    if waiting:
        yield _chunk(plan, num_chunks, waiting)


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
            "attempts": pa.array(before.astype(np.int32) + 1, pa.int32()),
        }
    )


def _fingerprint(source: SourceConfig) -> str:
    try:
        return storage.fingerprint(source.uri)
    except OSError:
        # `read_list` says what is wrong with it.
        return ""
