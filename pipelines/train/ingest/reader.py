"""A worker's share of each step, read and decoded ahead of time.

Row groups are read by a few threads, which wait for the storage; pictures are decoded and noise is drawn by others,
which compute. Steps are handed out in order, and what goes wrong in a thread is raised where its step is asked for.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from threadpoolctl import threadpool_limits

from mdm_core.errors import ConfigError
from pipelines.data.table.sample_table import SampleTable
from pipelines.embed.live import Embeddings
from pipelines.train.ingest.batch import Batch
from pipelines.train.ingest.draft import BatchShape, Draft
from pipelines.train.ingest.draws import Crop, Draws
from pipelines.train.ingest.mix import num_resolutions
from pipelines.train.ingest.order import CanonicalOrder
from pipelines.train.ingest.selection import Selection
from pipelines.train.ingest.source import RowGroupSource

_READ_THREADS = 8


class BatchReader:
    """Reads the rows of a stage from the table and the embeddings beside it; closed by the `with` block that it is in.

    What step k holds is a pure function of (seed, stage, k, the selection): the rows, their order, crops, mirrorings,
    dropped captions, timesteps and noise.
    """

    def __init__(
        self,
        table: SampleTable,
        store: Embeddings,
        selection: Selection,
        *,
        resolutions: tuple[int, ...],
        seed: int,
        stage: int,
        num_timesteps: int,
        max_tokens: int,
        fill_text: bool = False,
        resolution_mix: tuple[float, ...] | None = None,
        drop_prob: float = 0.0,
        flip: bool = False,
        crop: Crop = "center",
        shuffle_row_groups: int = 64,
        prefetch_steps: int = 2,
        num_threads: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Takes what is read, and how.

        Args:
            table: The table.
            store: The embeddings of its captions.
            selection: The rows of the table that are trained on.
            resolutions: Sides of the pictures, finest first.
            seed: Of the run.
            stage: From 0.
            num_timesteps: Noise levels.
            max_tokens: Tokens of a caption that are kept.
            fill_text: Whether every caption is padded to them, for networks whose attention sees padding.
            resolution_mix: Share of the rows of a step that have each resolution; all have all if None.
            drop_prob: Share of captions that are left out.
            flip: Whether half of the pictures are mirrored.
            crop: The middle square of a picture, or any.
            shuffle_row_groups: Row groups whose rows are mixed, which are held in memory.
            prefetch_steps: Steps that are made ready while one is trained on.
            num_threads: Pictures decoded at once.
            pin_memory: Whether batches lie where a GPU can fetch them by itself; needs a GPU.
        """
        self._order = CanonicalOrder(
            selection.rows_per_group, seed=seed, stage=stage, shuffle_row_groups=shuffle_row_groups
        )
        self._draws = Draws(
            seed=seed, stage=stage, num_timesteps=num_timesteps, drop_prob=drop_prob, flip=flip, crop=crop
        )
        self._shape = BatchShape(resolutions, store.width, max_tokens, fill_text, pin_memory)
        self._mix = resolution_mix or (1.0,) * len(resolutions)
        self._prefetch_steps, self._wait_s = prefetch_steps, 0.0
        self._readers = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._source = RowGroupSource(table, store, selection, executor=self._readers, num_held=shuffle_row_groups)
        # Pictures have threads of their own, and a picture's products are too small to share among more.
        self._blas = threadpool_limits(1, user_api="blas")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, once they have done what they are at; closing again does nothing."""
        # The readers first: a decoder may wait for what will then not be read.
        self._readers.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)
        self._blas.restore_original_limits()

    @property
    def wait_s(self) -> float:
        """Seconds that whoever takes the steps has waited for them, in all."""
        return self._wait_s

    def steps(
        self, first: int, *, global_batch_size: int, rank: int, workers: int, micro_batch_size: int | None = None
    ) -> Iterator[tuple[Batch, ...]]:
        """The share of a worker of every step from step `first` on, without end.

        All shares of a step, in the order of the ranks, are the same rows in the same order for any number of workers.

        Args:
            first: The first step, from 0.
            global_batch_size: Rows of a step, over all workers.
            rank: The worker.
            workers: How many there are; their shares differ by at most one row.
            micro_batch_size: Rows of a batch, at most; None is the whole share.

        Raises:
            ConfigError: There are more workers than rows.
            WorkError: A row can't be read; raised by the step that it is in.
        """
        if global_batch_size < workers:
            raise ConfigError(
                f"global_batch_size={global_batch_size} leaves some of {workers} workers without a row; "
                f"use at most {global_batch_size} workers, or a larger batch"
            )
        begin, end = (number * global_batch_size // workers for number in (rank, rank + 1))
        share = slice(begin, end)
        return self._steps(first, global_batch_size, share, micro_batch_size or end - begin)

    def _steps(self, first: int, global_batch_size: int, share: slice, size: int) -> Iterator[tuple[Batch, ...]]:
        drafts = (self._drafts(step, global_batch_size, share, size) for step in itertools.count(first))
        reading: deque[list[Draft]] = deque()
        decoding: deque[list[Future[Batch]]] = deque()
        while True:
            began_s = time.monotonic()
            while len(decoding) <= self._prefetch_steps:
                while len(reading) <= self._prefetch_steps:
                    reading.append(next(drafts))
                decoding.append([draft.start(self._decoders) for draft in reading.popleft()])
            batches = tuple(batch.result() for batch in decoding.popleft())
            self._wait_s += time.monotonic() - began_s
            yield batches

    def _drafts(self, step: int, global_batch_size: int, share: slice, size: int) -> list[Draft]:
        """The batches of a step, whose rows are being read."""
        rows = self._order.step(step, global_batch_size)[share]
        timesteps = self._draws.timesteps(step, global_batch_size)[share]
        depths = num_resolutions(self._mix, global_batch_size)[share]
        drafts = []
        for at in range(0, len(rows), size):
            depth = depths[at : at + size]
            # Those that have the finer resolutions come first.
            order = at + np.argsort(-depth, kind="stable")
            drafts.append(
                Draft(
                    rows[order],
                    timesteps[order],
                    rows_per_resolution=tuple(int((depth >= n).sum()) for n in range(len(self._mix), 0, -1)),
                    source=self._source,
                    draws=self._draws,
                    shape=self._shape,
                )
            )
        return drafts
