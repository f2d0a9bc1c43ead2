"""Which rows a step trains on, and their pictures, captions and noise.

Everything here is a pure function of (seed, stage, images seen): not of the number of workers, nor of when a run was
interrupted. Image `n` of a stage is the same row, mirrored the same way, with the same noise, wherever it is read.

Legend: B rows, r side of the stage's resolution, L tokens, D width of the text.
"""

import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.data.table import SampleTable, Shard
from pipelines.embed.store import EmbeddingStore

# What is drawn comes first in a seed, so that no two draws share a stream.
_ORDER, _TIMESTEPS, _SAMPLE = 1, 2, 3


@dataclass(frozen=True)
class Row:
    """One image of a stage: the row of the table, and its number among the stage's images."""

    number: int
    shard: int
    row: int


class CanonicalOrder:
    """The order of a stage's images: every row once an epoch, shuffled anew each epoch.

    The shards are shuffled, and the rows of `shuffle_shards` neighbours are mixed with each other, so that a reader
    needs no more than those in memory.
    """

    def __init__(self, rows_per_shard: Sequence[int], *, seed: int, stage: int, shuffle_shards: int) -> None:
        self._rows = np.asarray(rows_per_shard)
        self._seed, self._stage, self._window = seed, stage, shuffle_shards
        self.rows_per_epoch = int(self._rows.sum())
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)

    def rows(self, first: int, count: int) -> list[Row]:
        """Images `first` to `first + count` of the stage."""
        return [Row(number, *map(int, self._locate(number))) for number in range(first, first + count)]

    def _locate(self, number: int) -> NDArray[np.int64]:
        epoch, position = divmod(number, self.rows_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        row: NDArray[np.int64] = self._order[position]
        return row

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        draw = np.random.default_rng([_ORDER, self._seed, self._stage, epoch])
        shards = draw.permutation(len(self._rows))
        windows = []
        for start in range(0, len(shards), self._window):
            members = shards[start : start + self._window]
            window = np.concatenate(
                [np.stack([np.full(self._rows[s], s), np.arange(self._rows[s])], axis=1) for s in members]
            )
            windows.append(window[draw.permutation(len(window))])
        return np.concatenate(windows)


@dataclass(frozen=True)
class Batch:
    """What one worker's share of a step needs."""

    x0: Tensor
    """(B, 3, r, r) uint8."""
    text_emb: Tensor
    """(B, L, D) float32, zeros beyond a caption's tokens."""
    text_mask: Tensor
    """(B, L) bool; a dropped caption has no real token."""
    timestep: Tensor
    """(B,) int64 in [0, N)."""
    noise: list[Tensor]
    """One (B, 3, r, r) a resolution, finest first, standard normal."""
    ids: list[bytes]
    """Ids of the rows."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(
            x0=self.x0.to(device),
            text_emb=self.text_emb.to(device),
            text_mask=self.text_mask.to(device),
            timestep=self.timestep.to(device),
            noise=[level.to(device) for level in self.noise],
            ids=self.ids,
        )


@dataclass(frozen=True)
class _DecodedShard:
    ids: list[bytes]
    pictures: NDArray[np.uint8]
    captions: list[NDArray[np.float16]]


class BatchReader:
    """Reads a worker's share of each step from the table and the embeddings beside it."""

    def __init__(
        self,
        table: SampleTable,
        store: EmbeddingStore,
        *,
        resolutions: tuple[int, ...],
        seed: int,
        stage: int,
        num_timesteps: int,
        max_tokens: int,
        drop_prob: float,
        flip: bool,
        shuffle_shards: int,
    ) -> None:
        self._table, self._store = table, store
        self._shards: tuple[Shard, ...] = table.shards("ok")
        self._order = CanonicalOrder(
            [shard.num_rows for shard in self._shards], seed=seed, stage=stage, shuffle_shards=shuffle_shards
        )
        self._resolutions, self._seed, self._stage = resolutions, seed, stage
        self._num_timesteps, self._max_tokens = num_timesteps, max_tokens
        self._drop_prob, self._flip = drop_prob, flip
        self._decoded: OrderedDict[int, _DecodedShard] = OrderedDict()
        # Rows of a batch may straddle two windows.
        self._max_decoded = 2 * shuffle_shards

    def steps(self, first: int, *, global_batch_size: int, rank: int, workers: int) -> Iterator[Batch]:
        """The share of worker `rank` of every step from step `first` on, without end."""
        share = global_batch_size // workers
        step = first
        while True:
            start = step * global_batch_size
            spread = self._timesteps(step, global_batch_size)[rank * share : (rank + 1) * share]
            yield self._batch(self._order.rows(start + rank * share, share), spread)
            step += 1

    def _timesteps(self, step: int, count: int) -> Tensor:
        """Timesteps spread evenly over a batch from one random start, which lowers the variance of its loss.

        (arXiv 2107.00630, appendix I.1.)
        """
        draw = np.random.default_rng([_TIMESTEPS, self._seed, self._stage, step])
        spread = (draw.random() + np.arange(count) / count) % 1.0
        return torch.from_numpy(draw.permutation((spread * self._num_timesteps).astype(np.int64)))

    def _batch(self, rows: list[Row], timestep: Tensor) -> Batch:
        pictures, captions, ids, noise, dropped = [], [], [], [], []
        for row in rows:
            shard = self._shard(row.shard)
            draw = np.random.default_rng([_SAMPLE, self._seed, self._stage, row.number])
            mirrored = draw.random() < 0.5 and self._flip
            dropped.append(draw.random() < self._drop_prob)
            noise.append([draw.standard_normal((3, side, side), dtype=np.float32) for side in self._resolutions])
            picture = shard.pictures[row.row]
            pictures.append(picture[:, ::-1] if mirrored else picture)
            captions.append(shard.captions[row.row])
            ids.append(shard.ids[row.row])
        text_emb, text_mask = pad_text(captions, width=self._store.width, length=self._max_tokens)
        return Batch(
            x0=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2),
            text_emb=text_emb,
            text_mask=text_mask & ~torch.tensor(dropped)[:, None],
            timestep=timestep,
            noise=[torch.from_numpy(np.stack(level)) for level in zip(*noise, strict=True)],
            ids=ids,
        )

    def _shard(self, index: int) -> _DecodedShard:
        if index in self._decoded:
            self._decoded.move_to_end(index)
            return self._decoded[index]
        shard = self._shards[index]
        rows = self._table.read(shard, ["id", "image"])
        pictures = [decode_square(image, self._resolutions[0]) for image in rows["image"].to_pylist()]
        decoded = _DecodedShard(rows["id"].to_pylist(), np.stack(pictures), self._store.read(shard))
        self._decoded[index] = decoded
        while len(self._decoded) > self._max_decoded:
            self._decoded.popitem(last=False)
        return decoded


def decode_square(image: bytes, side: int) -> NDArray[np.uint8]:
    """The middle square of an encoded picture at `side` px, (side, side, 3); averaged where it shrinks."""
    with Image.open(io.BytesIO(image)) as picture:
        picture.draft("RGB", (2 * side, 2 * side))
        square = min(picture.size)
        left, top = (picture.width - square) // 2, (picture.height - square) // 2
        middle = picture.convert("RGB").crop((left, top, left + square, top + square))
    if square != side:
        middle = middle.resize((side, side), Image.Resampling.BOX if square % side == 0 else Image.Resampling.LANCZOS)
    return np.asarray(middle)


def pad_text(captions: Sequence[NDArray[np.float16]], *, width: int, length: int) -> tuple[Tensor, Tensor]:
    """Token embeddings (L_i, D) of each caption, cut to `length` and padded to the longest of them.

    Returns:
        (B, L, D) float32 with zeros for padding, and (B, L) bool, True = real token.
    """
    longest = max((min(len(caption), length) for caption in captions), default=0)
    text_emb = torch.zeros(len(captions), max(longest, 1), width)
    text_mask = torch.zeros(len(captions), max(longest, 1), dtype=torch.bool)
    for row, caption in enumerate(captions):
        tokens = torch.from_numpy(np.asarray(caption[:length], dtype=np.float32))
        text_emb[row, : len(tokens)] = tokens
        text_mask[row, : len(tokens)] = True
    return text_emb, text_mask
