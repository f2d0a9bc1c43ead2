"""Forget: takes links out of a table for good: their rows, the bytes of their pictures, and their way back in."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.config import ForgetConfig
from pipelines.data.table import keys
from pipelines.data.table.ledger import Ledger, State
from pipelines.data.table.rewrite import drop_rows
from pipelines.data.table.sample_table import FORGOTTEN, OUTCOMES, SCHEMA, SampleTable, read_rows
from pipelines.data.table.shards import write_shard
from pipelines.data.table.sweep import committed_paths
from pipelines.data.table.transaction import Change, transact

# More tries than any refresh makes: a refresh that fetches the link at this moment finds that its row is not wanted.
_ATTEMPTS = 2**31 - 1
_MAX_FAULTS_SHOWN = 5


@dataclass(frozen=True)
class ForgetReport:
    """What was taken out."""

    links: int
    """Different links of the file."""
    rows_removed: int
    """Those that had a row; the others are kept out all the same."""
    already_forgotten: int
    files_deleted: int
    """Files that held them, those of older versions among them: these versions can no longer be read in whole."""
    table_version: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is written to JSON."""
        return dataclasses.asdict(self)


def forget(config: ForgetConfig) -> ForgetReport:
    """Returns what was taken out of the table.

    What is kept of a link is its id, in a row `filtered` for the reason `forgotten`: later refreshes count the link as
    unchanged and do not ask for it. Files that a refresh is writing at this moment are left to it; it commits none of
    these links. Files that a killed refresh left uncommitted go when they are a day old, as ever.

    Raises:
        ConfigError: There is no such table or file, or the file holds something else than links.
        WorkError: The table can't be written, or a file of it can't be read.
    """
    SampleTable.open(config.table)
    ledger = Ledger(config.table, now_s=time.time(), retry_failed="none")
    ids = np.unique(_read_links(config.urls, ledger))
    num_before = 0
    doomed: list[str] = []

    def make_change() -> Change:
        nonlocal num_before
        is_known, links = ledger.look_up(ids)
        is_forgotten = is_known & (links["state"] == State.FORGOTTEN)
        num_before = int(is_forgotten.sum())
        change = Change()
        left = ids[~is_forgotten]
        drop_rows(ledger, left, change)
        doomed[:] = [shard.path for shard in change.removed]
        if len(left):
            stem = f"{ledger.version + 1:08d}-{FORGOTTEN}"
            written = write_shard(ledger.uri, stem, "filtered", _tombstones(left, ledger.schema))
            change.added.append(written)
            change.rewritten.append(written.path)
            change.replaced.append(written.path)
        return change

    ledger.ensure_table()
    # Always a version: a refresh that commits at this moment must notice, and look again.
    num_removed = transact(ledger, make_change, {"operation": "forget"}, always=True).num_dropped
    num_deleted = _delete_files(ledger, ids, doomed)
    return ForgetReport(len(ids), num_removed, num_before, num_deleted, ledger.version + 1)


def _read_links(uri: str, ledger: Ledger) -> keys.Keys:
    try:
        lines = storage.read_bytes(storage.absolute(uri)).removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ConfigError(f"urls={uri} cannot be read: {error.strerror or error}; give a file of links") from error
    found: list[bytes] = []
    faults: list[tuple[int, str]] = []
    spaced: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            faults.append((number, "is not UTF-8"))
            continue
        if not text:
            continue
        if not text.lower().startswith(("http://", "https://")):
            faults.append((number, f"is {text[:80]!r}"))
            continue
        found.append(keys.link_key(text))
        if any(mark in text for mark in "\t "):
            spaced.append((number, text))
    # Links may have spaces, but a line of a list, caption and all, has them too: it is no link that the table knows.
    is_known, _ = ledger.look_up(keys.from_bytes(b"".join(keys.link_key(text) for _, text in spaced)))
    faults += [
        (number, f"is {text[:80]!r}") for (number, text), known in zip(spaced, is_known, strict=True) if not known
    ]
    if faults or not found:
        shown = sorted(faults)[:_MAX_FAULTS_SHOWN]
        told = "; ".join(f"line {number} {what}" for number, what in shown) or "it is empty"
        more = f"; and {len(faults) - _MAX_FAULTS_SHOWN} more" if len(faults) > _MAX_FAULTS_SHOWN else ""
        raise ConfigError(f"urls={uri}: {told}{more}; wanted one http(s) link a line; nothing was forgotten")
    return keys.from_bytes(b"".join(found))


def _tombstones(ids: keys.Keys, schema: pa.Schema) -> pa.Table:
    count = len(ids)
    values: dict[str, list[Any]] = {
        "id": keys.to_list(ids),
        **{name: [""] * count for name in ("url", "caption", "source")},
        "outcome": ["filtered"] * count,
        "reason": [FORGOTTEN] * count,
        "retryable": [False] * count,
        "attempts": [_ATTEMPTS] * count,
        "fetched_at": [datetime.now(UTC)] * count,
    }
    columns = {field.name: pa.array(values.get(field.name, [None] * count), field.type) for field in schema}
    return pa.table(columns, schema=schema)


def _delete_files(ledger: Ledger, ids: keys.Keys, doomed: Sequence[str]) -> int:
    """Deletes the files that held the links, those that only older versions refer to among them.

    Raises:
        WorkError: A file can't be read, and so may hold one of them; all others are deleted.
    """
    now = {shard.path for shard in SampleTable.open(ledger.uri).shards(outcome=None)}
    older = committed_paths(ledger.uri) - now
    there = {
        f"outcome={outcome}/{file.rpartition('/')[2]}"
        for outcome in OUTCOMES
        for file in storage.list_files(storage.join(ledger.uri, f"outcome={outcome}"))
    }
    fault: WorkError | None = None
    num_deleted = 0
    for path in (*doomed, *sorted((older & there) - set(doomed))):
        try:
            if path not in doomed and not _holds(ledger.uri, path, ids):
                continue
        except WorkError as error:
            # The others are no less to be deleted.
            fault = error
            continue
        # The file last: while it is there, forgetting again finds its copies.
        for copy in storage.list_files(storage.join(ledger.uri, "_embeddings")):
            if copy.endswith(path):
                storage.delete(copy)
        storage.delete(storage.join(ledger.uri, path))
        num_deleted += path in there
    if fault is not None:
        raise fault
    return num_deleted


def _holds(uri: str, path: str, ids: keys.Keys) -> bool:
    found = keys.find(ids, keys.from_column(read_rows(uri, path, ["id"], SCHEMA)["id"]))
    return bool((found >= 0).any())
