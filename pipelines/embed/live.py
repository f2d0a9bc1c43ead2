"""Text embeddings made while training reads, in the place of files beside the shards."""

import threading
from typing import Protocol

from pipelines import storage
from pipelines.data.table.sample_table import SampleTable, Shard, read_row_range
from pipelines.embed.store import Embedding, EmbeddingStore, EncoderInfo
from pipelines.text_encoder import load_text_encoder


class Embeddings(Protocol):
    """The embeddings of a table's captions, wherever they come from."""

    @property
    def info(self) -> EncoderInfo:
        """What they are made with."""

    @property
    def width(self) -> int:
        """Width of one token's embedding."""

    def uri_of(self, shard: Shard) -> str:
        """URI of the file that those of a shard come from."""

    def read_rows(self, shard: Shard, first: int, count: int) -> tuple[list[bytes], list[Embedding]]:
        """Returns the ids and the (L, width) arrays of some rows of `shard`, as `EmbeddingStore.read_rows`."""


class LiveEmbeddings:
    """Encodes captions when they are asked for, one row group after the other, whoever asks.

    The rows of a row group are encoded together, and apart from all others: what comes out does not depend on what is
    read beside them, on how many workers there are, or on when.
    """

    def __init__(self, table: SampleTable, encoder_name: str, *, max_tokens: int, device: str = "cpu") -> None:
        """Loads the encoder.

        Args:
            table: The table.
            encoder_name: The encoder.
            max_tokens: Tokens that are kept of a caption.
            device: Where it computes.

        Raises:
            ConfigError: There is no such encoder, its weights are not there, or it can't read so many tokens.
        """
        self._table = table
        self._encoder = load_text_encoder(encoder_name, max_tokens=max_tokens, device=device)
        self._one_at_a_time = threading.Lock()
        self.info = EncoderInfo(encoder_name, self._encoder.width, max_tokens)

    @property
    def width(self) -> int:
        """Width of one token's embedding."""
        return self.info.width

    def uri_of(self, shard: Shard) -> str:
        """URI of the shard, which has the captions."""
        return storage.join(self._table.uri, shard.path)

    def read_rows(self, shard: Shard, first: int, count: int) -> tuple[list[bytes], list[Embedding]]:
        """Returns the ids and the (L, width) arrays of some rows of `shard`.

        Raises:
            WorkError: The shard can't be read, or an embedding is not finite.
        """
        with self._table.open_shard(shard) as file:
            rows = read_row_range(file, ["id", "caption"], first, count)
        with self._one_at_a_time:
            return rows["id"].to_pylist(), self._encoder.encode(rows["caption"].to_pylist())


def open_embeddings(
    table: SampleTable, encoder_name: str, *, max_tokens: int, precomputed: bool, device: str = "cpu"
) -> Embeddings:
    """Returns the embeddings of every ok row of `table`: those beside it, or else those to be made on `device`.

    Raises:
        ConfigError: Some are missing or were made with another `max_tokens`; or the encoder can't be loaded.
    """
    if precomputed:
        return EmbeddingStore.open(table, encoder_name, max_tokens=max_tokens)
    return LiveEmbeddings(table, encoder_name, max_tokens=max_tokens, device=device)
