"""Shards that are written and not yet committed, and what workers tell the driver about them."""

from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import pyarrow as pa

from mdm_core.errors import WorkError
from pipelines import storage
from pipelines.data import keys
from pipelines.data.table import SCHEMA, encode_shard

# The outcome is the name of a folder, not a column of the files in it.
STORED = [name for name in SCHEMA.names if name != "outcome"]


@dataclass(frozen=True)
class WrittenShard:
    """A Parquet file that is written but not yet part of the table, and what must be known to commit it."""

    path: str
    outcome: str
    size_bytes: int
    ids: keys.Keys
    attempts: list[int]
    reasons: list[str | None]
    hashes: keys.Keys

    @property
    def num_rows(self) -> int:
        """Rows in the file."""
        return len(self.ids)


def write_shard(uri: str, stem: str, outcome: str, rows: pa.Table) -> WrittenShard:
    """Writes rows of one outcome as a file under the table at `uri`. Until it is committed nobody reads it.

    Raises:
        WorkError: It could not be written.
    """
    # A name of its own for each attempt: a file that is written twice would not match its entry in the log.
    path = f"outcome={outcome}/{stem}-{token_hex(4)}.parquet"
    data = encode_shard(rows.select(STORED))
    storage.write_bytes_atomic(storage.join(uri, path), data)
    return WrittenShard(
        path=path,
        outcome=outcome,
        size_bytes=len(data),
        ids=keys.from_column(rows["id"]),
        attempts=rows["attempts"].to_pylist(),
        reasons=rows["reason"].to_pylist(),
        hashes=keys.from_column(rows["sha256"]) if outcome == "ok" else keys.empty(),
    )


_SHARDS = pa.schema(
    [
        ("path", pa.string()),
        ("outcome", pa.string()),
        ("size_bytes", pa.int64()),
        ("ids", pa.binary()),
        ("attempts", pa.list_(pa.int32())),
        ("reasons", pa.list_(pa.string())),
        ("hashes", pa.binary()),
    ]
)


def shards_to_table(shards: list[WrittenShard]) -> pa.Table:
    """Returns one row for each shard, as workers send them to the driver."""
    columns: dict[str, list[Any]] = {name: [getattr(shard, name) for shard in shards] for name in _SHARDS.names}
    for name in ("ids", "hashes"):
        columns[name] = [keys.tobytes() for keys in columns[name]]
    return pa.table(columns, schema=_SHARDS)


def shards_from_table(table: pa.Table) -> list[WrittenShard]:
    """Returns the shards that `shards_to_table` was given."""
    rows = table.to_pylist()
    for row in rows:
        row["ids"], row["hashes"] = keys.from_bytes(row["ids"]), keys.from_bytes(row["hashes"])
    return [WrittenShard(**row) for row in rows]


def pack(rows: pa.Table | None, error: str = "") -> pa.Table:
    """Returns a table as one row, which Ray Data never cuts or joins to another; or an error in place of one."""
    sink = pa.BufferOutputStream()
    if rows is not None:
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
    return pa.table({"rows": [sink.getvalue().to_pybytes()], "error": [error]}, schema=_PACKED)


def unpack(packed: pa.Table) -> pa.Table:
    """Returns the table that `pack` made one row of.

    Raises:
        WorkError: It was an error.
    """
    if error := packed["error"][0].as_py():
        raise WorkError(error)
    return pa.ipc.open_stream(packed["rows"][0].as_buffer()).read_all()


_PACKED = pa.schema([("rows", pa.large_binary()), ("error", pa.string())])
