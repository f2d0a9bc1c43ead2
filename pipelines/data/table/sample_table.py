"""The sample table: one row per link, in Parquet shards under a Delta log, partitioned by what became of the link."""

import contextlib
import io
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder, Schema
from deltalake.exceptions import DeltaError

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.table.delta import patiently

_READ_AHEAD = 256
READERS = 32
"""Files of a table that one process reads at once: on S3, most of the time is waiting for an answer."""
OUTCOMES = ("ok", "filtered", "failed")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary(), nullable=False),  # 128-bit hash of the URL
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("retryable", pa.bool_(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("fetched_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("sha256", pa.binary()),  # of the bytes fetched
        pa.field("phash", pa.int64()),
        pa.field("clip_similarity", pa.float32()),
        pa.field("language", pa.string()),  # of the caption, where it was asked for
        pa.field("frames", pa.list_(pa.binary())),  # of a clip, in the place of `image`
        pa.field("fps", pa.float32()),
        pa.field("start_s", pa.float32()),
        pa.field("duration_s", pa.float32()),
    ]
)

SCORE = "score_"
"""Begins the names of further columns of numbers, which a table gets when they are asked for."""
FORGOTTEN = "forgotten"
"""Reason of a row that stands for a link that must never be fetched again, and has nothing but its id."""
NOTE = "mdm"
"""Where a version's entry in the log has what made it, as JSON."""

# Null in rows without a picture; the sizes and the hash of what was fetched stay.
IMAGE_COLUMNS = (
    *("image", "format", "width", "height", "phash", "clip_similarity"),
    *("frames", "fps", "start_s", "duration_s"),
)


_RESTORE = "restore it, or use another version of the table"
# Those that every table has had; later ones are added to a table that lacks them.
_FIRST_COLUMNS = SCHEMA.names[: SCHEMA.names.index("language")]


@dataclass(frozen=True)
class Shard:
    """One Parquet file of the table; `path` is relative to the table's URI."""

    path: str
    num_rows: int
    outcome: str
    size_bytes: int


class SampleTable:
    """One version of a table, to read from."""

    SCHEMA = SCHEMA

    def __init__(self, delta: DeltaTable, uri: str, schema: pa.Schema) -> None:
        self.uri = uri
        self.schema = schema
        self._delta = delta

    @classmethod
    def open(cls, uri: str, version: int | None = None) -> "SampleTable":
        """Returns the table at `uri`, as of `version` or as it is now.

        Raises:
            ConfigError: There is no table, it is another kind of table, or it has no such version.
        """
        uri = storage.absolute(uri)
        options = storage.delta_options(uri)
        if not patiently(lambda: DeltaTable.is_deltatable(uri, options)):
            raise ConfigError(f"{uri} is not a table: it has no _delta_log; make one with `mdm refresh`")
        try:
            delta = patiently(lambda: DeltaTable(uri, version=version, storage_options=options))
        except (DeltaError, OSError, ValueError) as error:
            raise _cannot_open(uri, version, options, error) from error
        found = pa.schema(delta.schema().to_arrow())
        missing = [name for name in _FIRST_COLUMNS if name not in found.names]
        if missing:
            raise ConfigError(
                f"{uri} is not a sample table: it lacks the columns {', '.join(missing)}; use another URI"
            )
        return cls(delta, uri, schema_with(name for name in found.names if name.startswith(SCORE)))

    @property
    def version(self) -> int:
        """The version of the table that is read."""
        return self._delta.version()

    def shards(self, outcome: str | None = "ok") -> tuple[Shard, ...]:
        """Returns the files that hold rows with `outcome` (None: all rows), sorted by path.

        The order of paths is the order in which their rows stood in the lists.
        """
        files = pa.table(self._delta.get_add_actions(flatten=True))
        if not files.num_rows:
            return ()
        columns = (files[name].to_pylist() for name in ("path", "num_records", "partition.outcome", "size_bytes"))
        shards = (Shard(*row) for row in zip(*columns, strict=True))
        return tuple(sorted((s for s in shards if outcome in (None, s.outcome)), key=lambda shard: shard.path))

    def read(self, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the rows of one shard, in order, with the columns asked for (None: all).

        Raises:
            ConfigError: There is no such column.
            WorkError: The file is missing or damaged.
        """
        names = list(self.schema.names if columns is None else columns)
        unknown = [name for name in names if name not in self.schema.names]
        if unknown:
            raise ConfigError(f"no column {', '.join(unknown)} in {self.uri}; it has {', '.join(self.schema.names)}")
        stored = [name for name in names if name != "outcome"]
        rows = read_rows(self.uri, shard.path, stored, self.schema)
        if "outcome" in names:
            rows = rows.append_column(SCHEMA.field("outcome"), pa.repeat(pa.scalar(shard.outcome), shard.num_rows))
        return rows.select(names)

    def read_each(
        self, shards: Sequence[Shard], columns: Mapping[str, Sequence[str]]
    ) -> Generator[tuple[Shard, pa.Table]]:
        """Yields each of the shards, in order, with its rows; some shards ahead are in memory.

        Args:
            shards: Of this table.
            columns: Those asked for, by the outcome of the shard.

        Raises:
            WorkError: A file is missing or damaged.
        """
        pool = ThreadPoolExecutor(READERS)
        try:
            for first in range(0, len(shards), _READ_AHEAD):
                some = shards[first : first + _READ_AHEAD]
                rows = pool.map(lambda shard: self.read(shard, columns[shard.outcome]), some)
                yield from zip(some, rows, strict=True)
        finally:
            # Whoever stops half-way does not wait for what is still to be read.
            pool.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def open_shard(self, shard: Shard) -> Iterator[pq.ParquetFile]:
        """Yields the file of a shard, to read some of its row groups and columns.

        Raises:
            WorkError: It is missing or damaged.
        """
        with open_parquet(storage.join(self.uri, shard.path), _RESTORE) as file:
            yield file

    def query(self, sql: str) -> pa.RecordBatchReader:
        """Returns the rows that a query has for an answer, a batch at a time; the table's name in it is `samples`.

        Raises:
            DeltaError: The query can't be understood, or its columns can't be read.
        """
        queries = QueryBuilder().register("samples", self._delta)
        # It reads as many files at once as it has partitions: one a core if nothing is said, and one for small tables.
        # More than there are files would cut them into pieces, each with requests of its own.
        count = min(2 * READERS, max(len(self.shards(outcome=None)), os.cpu_count() or 1))
        queries.execute(f"set datafusion.execution.target_partitions = {count}").read_all()
        queries.execute("set datafusion.optimizer.repartition_file_min_size = 1").read_all()
        return pa.RecordBatchReader.from_stream(queries.execute(sql))

    @property
    def stored_columns(self) -> tuple[str, ...]:
        """Names of the columns that a query knows: those of this version of the table."""
        return tuple(pa.schema(self._delta.schema().to_arrow()).names)

    def notes(self, since: int = -1) -> list[dict[str, Any]]:
        """Returns what made each version after `since`, oldest first: `version`, `timestamp_s` and what was noted."""
        limit = None if since < 0 else max(1, self.version - since)
        entries = []
        for entry in reversed(patiently(lambda: self._delta.history(limit))):
            note = json.loads(entry.get(NOTE) or "{}")
            entries.append({**note, "version": entry["version"], "timestamp_s": entry["timestamp"] / 1000})
        return [entry for entry in entries if entry["version"] > since]


def schema_with(scores: Iterable[str]) -> pa.Schema:
    """Returns the columns of a table that has these columns of scores as well."""
    return pa.schema([*SCHEMA, *(pa.field(name, pa.float32()) for name in scores if name not in SCHEMA.names)])


def ensure_table(uri: str, scores: Iterable[str] = ()) -> None:
    """Makes a table at `uri` if there is none, and the columns that it lacks.

    Raises:
        WorkError: It can't be written there.
    """
    try:
        # Made twice it is made once: what is there is left.
        patiently(lambda: _ensure_table(uri, scores))
    except (DeltaError, OSError) as error:
        raise WorkError(f"could not make a table at {uri}: {storage.one_line(error)}") from error


def _ensure_table(uri: str, scores: Iterable[str]) -> None:
    options = storage.delta_options(uri)
    if not DeltaTable.is_deltatable(uri, options):
        DeltaTable.create(
            uri,
            schema_with(scores),
            mode="ignore",
            partition_by=["outcome"],
            # A version is what a model was trained on, so the log that leads to it is kept.
            configuration={"delta.logRetentionDuration": "interval 36500 days"},
            storage_options=options,
        )
    delta = DeltaTable(uri, storage_options=options)
    names = pa.schema(delta.schema().to_arrow()).names
    if lacking := [field for field in schema_with(scores) if field.name not in names]:
        delta.alter.add_columns(list(Schema.from_arrow(pa.schema(lacking)).fields))


def _cannot_open(uri: str, version: int | None, options: dict[str, str], error: Exception) -> ConfigError:
    if version is not None:
        with contextlib.suppress(DeltaError, OSError, ValueError):
            latest = patiently(lambda: DeltaTable(uri, storage_options=options)).version()
            return ConfigError(f"{uri} has no version {version}; the latest is {latest}")
    reason = storage.one_line(error)
    return ConfigError(
        f"the log of the table {uri} can't be read: {reason}; restore its _delta_log, or use another URI"
    )


def row_group_sizes(file: pq.ParquetFile) -> list[int]:
    """Returns the rows of each row group of a Parquet file."""
    return [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]


def read_row_range(file: pq.ParquetFile, columns: list[str] | None, first: int, count: int) -> pa.Table:
    """Returns `count` rows of a Parquet file from row `first` on; no more is read than the row groups they are in."""
    starts = np.cumsum([0, *row_group_sizes(file)])
    begin, end = np.searchsorted(starts, first, "right") - 1, np.searchsorted(starts, first + count, "left")
    rows = file.read_row_groups(range(begin, end), columns=columns, use_threads=False)
    return rows.slice(first - starts[begin], count)


@contextlib.contextmanager
def open_parquet(uri: str, fix: str) -> Iterator[pq.ParquetFile]:
    """Yields a Parquet file, to read some of its row groups and columns.

    Args:
        uri: The file.
        fix: What can be done if it can't be read.

    Raises:
        WorkError: It is missing or damaged, which may be found while it is read.
    """
    try:
        with storage.open_input(uri, read_ahead=False) as file:
            yield pq.ParquetFile(file, pre_buffer=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise WorkError(f"{uri} can't be read: {storage.one_line(error)}; {fix}") from error


def read_rows(table_uri: str, path: str, columns: Sequence[str], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Returns the columns of one file of a table, in the order of the file; nulls for those that it lacks.

    Raises:
        WorkError: The file is missing or damaged.
    """
    with open_parquet(storage.join(table_uri, path), _RESTORE) as parquet:
        there = set(parquet.schema_arrow.names)
        # Arrow's threads, one a core, would each wait for what it reads: of many files on S3 few would be on the way.
        rows = parquet.read(columns=[name for name in columns if name in there], use_threads=False)
        num_rows = parquet.metadata.num_rows
    if len(rows.column_names) == len(columns):
        return rows
    fields = [schema.field(name) for name in columns]
    return pa.table(
        [rows[f.name] if f.name in there else pa.nulls(num_rows, f.type) for f in fields], pa.schema(fields)
    )


def encode_shard(rows: pa.Table) -> bytes:
    """Returns rows of the table, without `outcome`, as a Parquet file of row groups small enough to shuffle by."""
    buffer = io.BytesIO()
    pq.write_table(
        rows,
        buffer,
        row_group_size=100,
        compression="zstd",
        # Statistics of the pictures would copy the largest and the smallest of them.
        use_dictionary=["source", "reason", "format", "language"],
        write_statistics=[
            *("width", "height", "original_width", "original_height", "fetched_at", "clip_similarity", "fps"),
        ],
    )
    return buffer.getvalue()
