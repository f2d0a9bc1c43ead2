"""Shards that are written and not yet committed, and what workers tell the driver about them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mdm_core.errors import WorkError
from pipelines import storage
from pipelines.data.table import keys
from pipelines.data.table.sample_table import IMAGE_COLUMNS, SCORE, encode_shard, read_rows

NO_PHASH = 0
"""In the place of a perceptual hash where there is none; half the bits of a real one are set."""


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
    """Of the bytes of pictures; none for rows that have none."""
    phashes: npt.NDArray[np.int64]
    """Perceptual hashes, as `hashes`; NO_PHASH where a picture has none."""
    thumbnails: list[bytes] = field(default_factory=list)
    """Small pictures of some rows that are not kept."""

    @property
    def num_rows(self) -> int:
        """Rows in the file."""
        return len(self.ids)


def write_shard(uri: str, stem: str, outcome: str, rows: pa.Table, thumbnails: Sequence[bytes] = ()) -> WrittenShard:
    """Writes rows of one outcome as a file under the table at `uri`. Until it is committed nobody reads it.

    Raises:
        WorkError: It could not be written.
    """
    # A name of its own for each attempt: a file that is written twice would not match its entry in the log.
    path = f"outcome={outcome}/{stem}-{token_hex(4)}.parquet"
    # The outcome is the name of a folder, not a column of the files in it.
    data = encode_shard(rows.select([name for name in rows.column_names if name != "outcome"]))
    storage.write_bytes_atomic(storage.join(uri, path), data)
    return WrittenShard(
        path=path,
        outcome=outcome,
        size_bytes=len(data),
        ids=keys.from_column(rows["id"]),
        attempts=rows["attempts"].to_pylist(),
        reasons=rows["reason"].to_pylist(),
        hashes=keys.from_column(rows["sha256"]) if outcome == "ok" else keys.empty(),
        phashes=_numbers(rows["phash"]) if outcome == "ok" else np.empty(0, np.int64),
        thumbnails=list(thumbnails),
    )


def read_whole(table_uri: str, path: str, schema: pa.Schema) -> pa.Table:
    """Returns all stored columns of a file, those of `schema` that it lacks as nulls."""
    names = [name for name in schema.names if name != "outcome"]
    return read_rows(table_uri, path, names, schema)


def without_pictures(rows: pa.Table, reason: str) -> pa.Table:
    """Returns rows as they are kept when their pictures are not."""
    for name in rows.column_names:
        if name in IMAGE_COLUMNS or name.startswith(SCORE):
            nulls = pa.nulls(rows.num_rows, rows.schema.field(name).type)
            rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), nulls)
    reasons = pa.array([reason] * rows.num_rows, pa.string())
    return rows.set_column(rows.column_names.index("reason"), rows.schema.field("reason"), reasons)


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(column, NO_PHASH).to_numpy(), np.int64)


_SHARDS = pa.schema(
    [
        ("path", pa.string()),
        ("outcome", pa.string()),
        ("size_bytes", pa.int64()),
        ("ids", pa.binary()),
        ("attempts", pa.list_(pa.int32())),
        ("reasons", pa.list_(pa.string())),
        ("hashes", pa.binary()),
        ("phashes", pa.binary()),
        ("thumbnails", pa.list_(pa.binary())),
    ]
)


def shards_to_table(shards: list[WrittenShard]) -> pa.Table:
    """Returns one row for each shard, as workers send them to the driver."""
    columns: dict[str, list[Any]] = {name: [getattr(shard, name) for shard in shards] for name in _SHARDS.names}
    for name in ("ids", "hashes", "phashes"):
        columns[name] = [array.tobytes() for array in columns[name]]
    return pa.table(columns, schema=_SHARDS)


def shards_from_table(table: pa.Table) -> list[WrittenShard]:
    """Returns the shards that `shards_to_table` was given."""
    rows = table.to_pylist()
    for row in rows:
        row["ids"], row["hashes"] = keys.from_bytes(row["ids"]), keys.from_bytes(row["hashes"])
        row["phashes"] = np.frombuffer(row["phashes"], np.int64)
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
