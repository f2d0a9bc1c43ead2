"""Which rows of a table are trained on: those for which an SQL expression is true.

It is evaluated once, before any worker starts, over the columns that it names and no others; workers are given one bit
a row.
"""

import difflib
import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake.exceptions import DeltaError
from numpy.typing import NDArray

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.table import keys
from pipelines.data.table.delta import may_pass, patiently
from pipelines.data.table.sample_table import READERS, SampleTable, Shard, row_group_sizes

_PICTURES = ("image", "frames")
_CLIP = "fps"
"""A column that clips have, and pictures have not."""
_UNKNOWN_COLUMN = re.compile(r'No field named "?(?:samples\.)?"?(.+?)"?\.(?:\s|$)')
# What is quoted names no function.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")
_CHANGING = re.compile(r"\b(random|uuid|now|today|current_date|current_time|current_timestamp)\b", re.IGNORECASE)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a shard."""

    shard: Shard
    index: int
    """Its place among the row groups of the shard."""
    first_row: int
    """Its first row in the shard."""
    num_rows: int
    """Its rows, whether they are trained on or not."""


class Selection:
    """The rows of one version of a table that are trained on; small enough to be sent to every worker."""

    def __init__(
        self, shards: Sequence[Shard], row_groups: Sequence[Sequence[int]], chosen: NDArray[np.bool_] | None = None
    ) -> None:
        """Takes rows in the order of the shards.

        Args:
            shards: The shards.
            row_groups: Rows of each row group of each shard.
            chosen: Which rows are trained on; None is all.
        """
        self.shards = tuple(shards)
        self._rows = np.array([rows for sizes in row_groups for rows in sizes], np.int32)
        self._firsts = np.cumsum([0, *self._rows], dtype=np.int64)
        self._shard_firsts = np.cumsum([0, *(len(sizes) for sizes in row_groups)], dtype=np.int32)
        if chosen is None:
            chosen = np.ones(int(self._firsts[-1]), bool)
        self._chosen = np.packbits(chosen)
        running = np.cumsum(np.append(0, chosen), dtype=np.int64)
        self.rows_per_group: NDArray[np.int64] = np.diff(running[self._firsts])
        """Rows of each row group that are trained on."""

    @property
    def num_rows(self) -> int:
        """Rows that are trained on."""
        return int(self.rows_per_group.sum())

    @property
    def digest(self) -> str:
        """What is equal for equal rows in equal row groups, and different else: 32 hexadecimal digits."""
        content = hashlib.sha256()
        for shard in self.shards:
            content.update(f"{shard.path}\n".encode())
        for array in (self._shard_firsts, self._rows, self._chosen):
            content.update(array.tobytes())
        return content.hexdigest()[:32]

    def group(self, number: int) -> RowGroup:
        """The row group with a number, which counts through all shards."""
        shard = int(np.searchsorted(self._shard_firsts, number, "right")) - 1
        first = int(self._shard_firsts[shard])
        first_row = int(self._firsts[number] - self._firsts[first])
        return RowGroup(self.shards[shard], number - first, first_row, int(self._rows[number]))

    def chosen_rows(self, number: int) -> NDArray[np.intp]:
        """Places in a row group of the rows that are trained on, in order."""
        begin, end = int(self._firsts[number]), int(self._firsts[number + 1])
        bits = np.unpackbits(self._chosen[begin // 8 : -(-end // 8)])
        return np.flatnonzero(bits[begin % 8 : begin % 8 + end - begin])


def select_rows(table: SampleTable, where: str | None = None, *, key: str = "data.where") -> Selection:
    """Returns the `ok` rows of a table for which an expression is true: as in SQL, null is not.

    Args:
        table: The table.
        where: An SQL expression over its columns but the pictures; None takes all rows.
        key: What messages call it.

    Raises:
        ConfigError: The expression is wrong, no row is chosen, or one that is a clip.
        WorkError: The table can't be read.
    """
    shards = table.shards("ok")
    if not shards:
        raise ConfigError(f"{table.uri} has no ok row at version {table.version}; run `mdm refresh` first")
    wanted = None if where is None else _ids_where(table, where, key)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda shard: _chosen_of(table, shard, wanted), shards))
    num_clips = sum(clips for _, _, clips in found)
    if wanted is None:
        _check_clips(table, where, key, num_clips)
        return Selection(shards, [sizes for sizes, _, _ in found])
    chosen = np.concatenate([mask for _, mask, _ in found])
    if chosen.sum() != len(wanted):
        raise WorkError(
            f"{key}={where!r} is true of {len(wanted):,} rows of {table.uri} at version {table.version}, whose "
            f"ids {chosen.sum():,} rows have: some rows share an id; refresh the links into a new table"
        )
    if not len(wanted):
        raise ConfigError(
            f"{key}={where!r} is true of none of the {len(chosen):,} ok rows of {table.uri} at version "
            f"{table.version}; loosen it"
        )
    if num_clips:
        clips = _ids_where(table, f"{_CLIP} is not null", key)
        _check_clips(table, where, key, int((keys.find(wanted, clips) >= 0).sum()))
    return Selection(shards, [sizes for sizes, _, _ in found], chosen)


def _check_clips(table: SampleTable, where: str | None, key: str, num_clips: int) -> None:
    if num_clips:
        fix = f"{_CLIP} is null" if where is None else f"({where}) and {_CLIP} is null"
        raise ConfigError(
            f"{num_clips:,} of the rows of {table.uri} at version {table.version} that {key}={where!r} chooses "
            f"are clips, which have frames in the place of a picture; leave them out: {key}={fix!r}"
        )


def _chosen_of(table: SampleTable, shard: Shard, wanted: keys.Keys | None) -> tuple[list[int], NDArray[np.bool_], int]:
    """The sizes of a shard's row groups, which of its rows are among the sorted ids that are wanted, and its clips."""
    with table.open_shard(shard) as file:
        sizes = row_group_sizes(file)
        if sum(sizes) != shard.num_rows:
            raise WorkError(
                f"{storage.join(table.uri, shard.path)} holds {sum(sizes)} rows, wanted {shard.num_rows} as the "
                "table's log says; restore it, or use another version of the table"
            )
        num_clips = _num_values(file, _CLIP)
        if wanted is None:
            return sizes, np.ones(0, bool), num_clips
        ids = keys.from_column(file.read(columns=["id"], use_threads=False)["id"])
    return sizes, keys.find(wanted, ids) >= 0, num_clips


def _num_values(file: pq.ParquetFile, name: str) -> int:
    """Values of a column that are not null; 0 where a file has no such column."""
    names = [file.metadata.schema.column(index).path for index in range(file.metadata.num_columns)]
    if name not in names:
        return 0
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    counted = [group.column(names.index(name)).statistics for group in groups]
    if any(statistics is None for statistics in counted):
        column = file.read(columns=[name], use_threads=False)[name]
        return len(column) - column.null_count
    return sum(group.num_rows - statistics.null_count for group, statistics in zip(groups, counted, strict=True))


def _ids_where(table: SampleTable, where: str, key: str) -> keys.Keys:
    """The ids of the ok rows for which an expression is true, sorted."""
    if changing := _CHANGING.search(_QUOTED.sub("", where)):
        raise ConfigError(
            f"{key}={where!r} calls {changing[0]}, whose value is another each time; "
            "a run must choose the same rows whenever it goes on: write the value itself"
        )
    known = [name for name in table.stored_columns if name not in _PICTURES]
    columns = ", ".join(f'"{name}"' for name in known)
    # The inner query hides the pictures, which must not be read.
    source = f"from (select {columns} from samples where outcome = 'ok') as samples where"

    def ids() -> keys.Keys:
        try:
            # Read without parentheses as well, so that it can't close ours. On a line of its own it may end in a
            # comment. `is true` refuses what is no condition, and takes null for what it is.
            table.query(f"explain select id {source} {where}")
            rows = table.query(f"select id {source} (\n{where}\n) is true")
            found = [keys.from_column(pa.chunked_array([batch["id"].cast(pa.binary())])) for batch in rows]
        except pa.ArrowException as error:
            # What goes wrong while rows are read, a broken connection or a division by zero.
            raise OSError(storage.one_line(error)) from error
        joined = np.concatenate(found) if found else keys.empty()
        joined.sort()
        return joined

    try:
        return patiently(ids)
    except (DeltaError, OSError) as error:
        if may_pass(error):
            raise WorkError(f"{table.uri} can't be read: {storage.one_line(error)}; try again") from error
        raise _wrong(where, key, error, known) from error


def _wrong(where: str, key: str, error: Exception, known: Sequence[str]) -> ConfigError:
    if unknown := _UNKNOWN_COLUMN.search(str(error)):
        name = unknown[1]
        near = difflib.get_close_matches(name.lower(), known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        if name in _PICTURES:
            fix = "pictures are not read to choose rows; use width, height or another column that tells of them"
        return ConfigError(f"{key}={where!r} names {name}, which is no column to choose by; {fix}")
    reason = storage.one_line(error)
    return ConfigError(
        f"{key}={where!r} can't be evaluated: {reason if len(reason) <= 300 else reason[:300] + '…'}; "
        "wanted an SQL condition, as in clip_similarity >= 0.28 and width >= 256"
    )
