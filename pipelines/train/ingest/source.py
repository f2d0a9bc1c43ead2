"""The stored rows of a row group, pictures still encoded, and how many row groups are held in memory."""

from collections import OrderedDict
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mdm_core.errors import WorkError
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.embed.live import Embeddings
from pipelines.embed.store import Embedding
from pipelines.train.ingest.decode import decode_square
from pipelines.train.ingest.selection import RowGroup, Selection


@dataclass(frozen=True)
class StoredRows:
    """The rows of a row group that are trained on."""

    uri: str
    """The file that they are in."""
    ids: list[bytes]
    images: pa.ChunkedArray
    captions: list[Embedding]

    def picture(self, row: int, side: int, crop: float | None) -> NDArray[np.uint8]:
        """(side, side, 3), as `decode_square` makes it.

        Raises:
            WorkError: There is none, or it is damaged.
        """
        image = self.images[row].as_py()
        try:
            if image is None:
                raise ValueError("it has none, as clips have")
            return decode_square(image, side, crop=crop)
        except (ValueError, OSError) as error:
            raise WorkError(
                f"the picture of row {self.ids[row].hex()} of {self.uri} can't be decoded: {storage.one_line(error)}; "
                "restore the file, or begin another run (another checkpoint.uri) whose data.where leaves the row out"
            ) from error


class RowGroupSource:
    """Reads row groups in the background, and holds the last ones that were asked for."""

    def __init__(
        self, table: SampleTable, store: Embeddings, selection: Selection, *, executor: Executor, num_held: int
    ) -> None:
        """Takes where to read, who reads, and how many row groups are held beside those still in use."""
        self._table, self._store, self._selection = table, store, selection
        self._executor, self._num_held = executor, num_held
        self._held: OrderedDict[int, Future[StoredRows]] = OrderedDict()

    def __getitem__(self, number: int) -> Future[StoredRows]:
        """The row group with a number, which is being read unless it is there."""
        if number not in self._held:
            self._held[number] = self._executor.submit(self._read, number)
        self._held.move_to_end(number)
        while len(self._held) > self._num_held:
            self._held.popitem(last=False)
        return self._held[number]

    def _read(self, number: int) -> StoredRows:
        group, rows = self._selection.group(number), self._selection.chosen_rows(number)
        with self._table.open_shard(group.shard) as file:
            stored = file.read_row_group(group.index, columns=["id", "image"], use_threads=False)
        ids, captions = self._store.read_rows(group.shard, group.first_row, group.num_rows)
        if ids != stored["id"].to_pylist():
            raise WorkError(self._mismatch(group))
        images = stored["image"] if len(rows) == len(ids) else stored["image"].take(rows)
        uri = storage.join(self._table.uri, group.shard.path)
        return StoredRows(uri, [ids[row] for row in rows], images, [captions[row] for row in rows])

    def _mismatch(self, group: RowGroup) -> str:
        return (
            f"the embeddings of {storage.join(self._table.uri, group.shard.path)} by {self._store.info.encoder} are of "
            f"other rows: their ids differ in rows {group.first_row} to {group.first_row + group.num_rows - 1}; "
            f"delete {self._store.uri_of(group.shard)} and run `mdm embed` again"
        )
