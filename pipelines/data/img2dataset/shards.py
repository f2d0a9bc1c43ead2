"""Shards that img2dataset wrote: a Parquet file of what became of each link, and the pictures beside or inside it."""

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mdm_core.errors import WorkError
from pipelines import storage

_EXTENSIONS = ("jpg", "png", "webp")
_METADATA = (
    "key",
    "status",
    "error_message",
    "original_width",
    "original_height",
    "sha256",
)


class Shard:
    """One shard, in any layout: webdataset (a tar), files (a folder) or parquet (a column of the metadata).

    Args:
        uri: Its Parquet file.

    Raises:
        WorkError: It cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self._stem = uri.removesuffix(".parquet")
        try:
            self._file = storage.open_input(uri)
            self._parquet = pq.ParquetFile(self._file)
            names = self._parquet.schema_arrow.names
            metadata = self._parquet.read(columns=[name for name in _METADATA if name in names])
        except (OSError, pa.ArrowInvalid) as error:
            raise WorkError(f"{uri} cannot be read as a shard of img2dataset: {error}") from error
        self._rows: list[dict[str, Any]] = metadata.to_pylist()
        self._column = next((name for name in _EXTENSIONS if name in names), None)
        self._tar: _Tar | None = None
        self._names: dict[str, str] | None = None

    def close(self) -> None:
        """Closes its files."""
        self._file.close()
        if self._tar:
            self._tar.close()

    def row(self, number: int) -> dict[str, Any]:
        """Returns what the metadata tell of a row; nothing if there is no such row."""
        return self._rows[number] if number < len(self._rows) else {}

    def pictures(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """Returns the pictures of rows, as they are stored; rows of which none is there are left out.

        Raises:
            WorkError: The storage fails.
        """
        keys = {str(self.row(number).get("key")): number for number in numbers}
        try:
            if self._column:
                return self._from_column(self._column, sorted(keys.values()))
            if self._tar is None and storage.exists(f"{self._stem}.tar"):
                self._tar = _Tar(f"{self._stem}.tar")
            found = self._tar.read(set(keys)) if self._tar else self._from_files(set(keys))
        except OSError as error:
            raise WorkError(f"the pictures of {self._stem}.parquet cannot be read: {error}") from error
        return {keys[key]: data for key, data in found.items()}

    def _from_column(self, column: str, numbers: list[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        begin = 0
        for group in range(self._parquet.num_row_groups):
            end = begin + self._parquet.metadata.row_group(group).num_rows
            if inside := [number for number in numbers if begin <= number < end]:
                values = self._parquet.read_row_group(group, columns=[column])[column]
                found |= {number: data for number in inside if (data := values[number - begin].as_py()) is not None}
            begin = end
        return found

    def _from_files(self, keys: set[str]) -> dict[str, bytes]:
        if self._names is None:
            names = (PurePosixPath(uri).name for uri in storage.list_files(self._stem))
            self._names = {key: name for name in names if (key := _key(name))}
        return {
            key: storage.read_bytes(storage.join(self._stem, self._names[key])) for key in keys if key in self._names
        }


class _Tar:
    """A tar that is read from its beginning to its end, once, however often pictures are asked for.

    img2dataset writes rows and pictures in one order, so that the next chunk of rows lies behind the last one.
    """

    def __init__(self, uri: str) -> None:
        self._file = storage.open_input(uri)
        self._places: dict[str, tuple[int, int]] = {}
        self._members = self._walk()

    def close(self) -> None:
        self._file.close()

    def read(self, keys: set[str]) -> dict[str, bytes]:
        """Returns the pictures of those keys that are there."""
        missing = keys - self._places.keys()
        found: dict[str, bytes] = {}
        while missing and (key := next(self._members, None)):
            if key in missing:
                missing.remove(key)
                self._read(key, found)
        for key in keys - found.keys() - missing:
            self._read(key, found)
        return found

    def _read(self, key: str, found: dict[str, bytes]) -> None:
        begin, size = self._places[key]
        self._file.seek(begin)
        data = self._file.read(size)
        if len(data) == size:
            found[key] = data

    def _walk(self) -> Iterator[str]:
        """Yields the key of each picture as it comes to it."""
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                while member := tar.next():
                    # It keeps every member that it has seen, and a shard has three for each row.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.isfile() and (key := _key(PurePosixPath(member.name).name)):
                        self._places[key] = (member.offset_data, member.size)
                        yield key
        except tarfile.TarError:
            # Cut short, or no tar: what was not found in it is missing.
            return


def _key(name: str) -> str:
    """Returns the key of a picture's file name, or nothing if it is none."""
    key, _, extension = name.rpartition(".")
    return key if extension in _EXTENSIONS else ""
