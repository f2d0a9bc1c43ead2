"""A batch that several threads fill, each a row at a time."""

from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.embed.store import Embedding
from pipelines.train.ingest.batch import Batch, pad_text
from pipelines.train.ingest.draws import Draws
from pipelines.train.ingest.order import StepRows
from pipelines.train.ingest.source import RowGroupSource


@dataclass(frozen=True)
class BatchShape:
    """What all batches of a stage share."""

    resolutions: tuple[int, ...]
    """Sides of the pictures in pixels, finest first."""
    text_width: int
    """Width of a token's embedding."""
    max_tokens: int
    """Tokens of a caption that are kept."""
    fill_text: bool
    """Whether every caption is padded to `max_tokens`."""
    pin_memory: bool
    """Whether a GPU can fetch them by itself."""


class Draft:
    """A batch to be; its row groups are being read from the beginning."""

    def __init__(
        self,
        rows: StepRows,
        timesteps: NDArray[np.int64],
        *,
        rows_per_resolution: tuple[int, ...],
        source: RowGroupSource,
        draws: Draws,
        shape: BatchShape,
    ) -> None:
        """Takes the rows and their timesteps, where they are read, what is drawn for them, and what they become."""
        self._rows, self._draws, self._shape = rows, draws, shape
        self._rows_per_resolution = rows_per_resolution
        self._stored = [source[int(group)] for group in rows.group]
        self._timestep = torch.from_numpy(timesteps)
        self._ids: list[bytes] = [b""] * len(rows)
        self._captions: list[Embedding] = [np.empty((0, 0), np.float16)] * len(rows)
        self._dropped = torch.zeros(len(rows), dtype=torch.bool)

    def start(self, executor: Executor) -> Future[Batch]:
        """Has the rows decoded; returns the batch that they are."""
        pin, count = self._shape.pin_memory, len(self._rows)
        sides = self._shape.resolutions
        # Not before, as they are large: of most steps ahead only the row groups are read. Channels lie last in memory.
        self._x0 = torch.empty(count, sides[0], sides[0], 3, dtype=torch.uint8, pin_memory=pin)
        self._noise = [torch.empty(count, side, side, 3, pin_memory=pin) for side in sides]
        rows = [executor.submit(self._fill, row) for row in range(count)]
        # Behind the rows in the executor's line, so that what it waits for has been begun.
        return executor.submit(self._finish, rows)

    def _fill(self, row: int) -> None:
        stored, place = self._stored[row].result(), int(self._rows.row[row])
        draw = self._draws.image(int(self._rows.number[row]), [level[row].numpy() for level in self._noise])
        picture = stored.picture(place, self._shape.resolutions[0], draw.crop)
        self._x0[row].numpy()[...] = picture[:, ::-1] if draw.mirrored else picture
        self._ids[row], self._captions[row] = stored.ids[place], stored.captions[place]
        self._dropped[row] = draw.dropped

    def _finish(self, rows: list[Future[None]]) -> Batch:
        for row in rows:
            row.result()
        shape = self._shape
        text_emb, text_mask = pad_text(
            self._captions,
            width=shape.text_width,
            length=shape.max_tokens,
            fill=shape.fill_text,
            pin_memory=shape.pin_memory,
        )
        text_mask &= ~self._dropped[:, None]
        return Batch(
            x0=self._x0.permute(0, 3, 1, 2),
            text_emb=text_emb,
            text_mask=text_mask,
            timestep=self._timestep.pin_memory() if shape.pin_memory else self._timestep,
            noise=[level.permute(0, 3, 1, 2) for level in self._noise],
            ids=self._ids,
            rows_per_resolution=self._rows_per_resolution,
        )
