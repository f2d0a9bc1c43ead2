"""Text embeddings beside the shards of a table: one file a shard, row by row in the same order.

    TABLE/_embeddings/ENCODER/encoder.json      what the files of this folder were made with
    TABLE/_embeddings/ENCODER/SHARD.parquet     id, num_tokens, embedding (num_tokens × width float16, flattened)

A folder that begins with an underscore is no part of a Delta table, so no engine that reads it takes these for rows.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable, Shard, open_parquet, read_row_range

Embedding: TypeAlias = NDArray[np.float16]

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("embedding", pa.list_(pa.field("element", pa.float16(), nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True)
class EncoderInfo:
    """What embeddings were made with."""

    encoder: str
    width: int
    max_tokens: int


class EmbeddingStore:
    """The embeddings that one encoder made for one version of a table."""

    def __init__(self, table: SampleTable, info: EncoderInfo) -> None:
        self.info = info
        self._folder = embedding_folder(table.uri, info.encoder)

    @classmethod
    def open(cls, table: SampleTable, encoder_name: str, *, max_tokens: int | None = None) -> "EmbeddingStore":
        """Returns the embeddings of every ok row of `table`.

        Args:
            table: The table.
            encoder_name: The encoder.
            max_tokens: The cut that captions must have been given; None takes any.

        Raises:
            ConfigError: Some are missing, or they were made with another `max_tokens`.
        """
        info = read_info(table.uri, encoder_name)
        tokens = "" if max_tokens is None else f" --max_tokens {max_tokens}"
        command = f"run `mdm embed --table {table.uri} --encoder {encoder_name}{tokens}`"
        if info is None:
            raise ConfigError(f"{table.uri} has no embeddings by {encoder_name}; {command}")
        check_max_tokens(table.uri, info, max_tokens)
        missing = missing_shards(table, encoder_name)
        if missing:
            raise ConfigError(
                f"{len(missing)} of {len(table.shards('ok'))} shards of {table.uri} at version {table.version} "
                f"have no embeddings by {encoder_name}; {command}"
            )
        return cls(table, info)

    @property
    def width(self) -> int:
        """Width of one token's embedding."""
        return self.info.width

    @property
    def max_tokens(self) -> int:
        """Tokens that captions were cut to."""
        return self.info.max_tokens

    def read(self, shard: Shard) -> list[Embedding]:
        """Returns one (L, width) array a row of `shard`, in its order.

        Raises:
            WorkError: The file does not fit the shard.
        """
        return self.read_rows(shard, 0, shard.num_rows)[1]

    def uri_of(self, shard: Shard) -> str:
        """URI of the file that mirrors a shard."""
        return storage.join(self._folder, shard.path)

    def read_rows(self, shard: Shard, first: int, count: int) -> tuple[list[bytes], list[Embedding]]:
        """Returns the ids and the (L, width) arrays of some rows of `shard`; no more is read than their row groups.

        Args:
            shard: The shard.
            first: The first of the rows, from 0.
            count: How many rows.

        Raises:
            WorkError: The file is missing or damaged, or does not fit the shard.
        """
        uri = self.uri_of(shard)
        fix = "delete it and run `mdm embed` again"
        with open_parquet(uri, fix) as file:
            if file.metadata.num_rows != shard.num_rows:
                raise WorkError(f"{uri} holds {file.metadata.num_rows} rows, wanted {shard.num_rows} rows; {fix}")
            rows = read_row_range(file, None, first, count)
        lengths = rows["num_tokens"].to_numpy()
        values = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if len(values) != int(lengths.sum()) * self.width:
            raise WorkError(f"{uri} holds {len(values)} numbers, wanted {int(lengths.sum()) * self.width}; {fix}")
        captions = np.split(values.reshape(-1, self.width), np.cumsum(lengths)[:-1]) if len(rows) else []
        return rows["id"].to_pylist(), captions


def encoder_slug(name: str) -> str:
    """Returns the name of an encoder as a folder name: readable, and different for different names."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")
    return readable if readable == name else f"{readable[-60:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def embedding_folder(table_uri: str, encoder_name: str) -> str:
    """Returns the folder of the embeddings that one encoder made for a table."""
    return storage.join(table_uri, "_embeddings", encoder_slug(encoder_name))


def read_info(table_uri: str, encoder_name: str) -> EncoderInfo | None:
    """Returns what the embeddings beside a table were made with; None if there are none."""
    uri = storage.join(embedding_folder(table_uri, encoder_name), "encoder.json")
    if not storage.exists(uri):
        return None
    return EncoderInfo(**json.loads(storage.read_bytes(uri)))


def write_info(table_uri: str, info: EncoderInfo) -> None:
    """Writes what the embeddings beside a table are made with; that is done before any of them is written."""
    data = json.dumps(asdict(info), indent=1).encode()
    storage.write_bytes_atomic(storage.join(embedding_folder(table_uri, info.encoder), "encoder.json"), data)


def check_max_tokens(table_uri: str, info: EncoderInfo, max_tokens: int | None) -> None:
    """Raises a ConfigError if embeddings were made with another `max_tokens`."""
    if max_tokens is not None and info.max_tokens != max_tokens:
        raise ConfigError(
            f"the embeddings by {info.encoder} beside {table_uri} have max_tokens={info.max_tokens}, "
            f"wanted {max_tokens}; ask for max_tokens={info.max_tokens}, or delete "
            f"{embedding_folder(table_uri, info.encoder)} and run `mdm embed` again"
        )


def missing_shards(table: SampleTable, encoder_name: str) -> tuple[Shard, ...]:
    """Returns the ok shards of `table` that the encoder has made no file for."""
    folder = embedding_folder(table.uri, encoder_name)
    # The scheme is put in or left out by the filesystem; what follows the folder's own name is the shard's path.
    done = {uri.partition(f"/_embeddings/{encoder_slug(encoder_name)}/")[2] for uri in storage.list_files(folder)}
    return tuple(shard for shard in table.shards("ok") if shard.path not in done)


def encode_embeddings(
    ids: pa.ChunkedArray, embeddings: Sequence[Embedding], info: EncoderInfo, row_groups: Sequence[int]
) -> bytes:
    """Returns a Parquet file of embeddings, a row a caption, in row groups of so many rows: those of the shard."""
    lengths = np.array([len(one) for one in embeddings], np.int32)
    if int(lengths.sum()) * info.width >= 2**31:
        raise WorkError(
            f"{len(lengths)} captions have {int(lengths.sum()) * info.width:,} numbers, and a file of embeddings holds "
            "2,147,483,647; refresh with a smaller run.shard_rows"
        )
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64) * info.width]).astype(np.int32))
    values = pa.array(np.concatenate([one.reshape(-1) for one in embeddings] or [np.empty(0, np.float16)]))
    column = pa.ListArray.from_arrays(offsets, values).cast(_SCHEMA.field("embedding").type)
    rows = pa.Table.from_arrays([ids.combine_chunks(), pa.array(lengths), column], schema=_SCHEMA)
    rows = rows.replace_schema_metadata({key: str(value) for key, value in asdict(info).items()})
    buffer = io.BytesIO()
    # The numbers are as good as random: compression would cost more than it saves.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(buffer, rows.schema, **options) as writer:
        first = 0
        for count in row_groups:
            writer.write_table(rows.slice(first, count), row_group_size=max(count, 1))
            first += count
    return buffer.getvalue()
