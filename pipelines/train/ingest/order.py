"""The order in which a stage trains on the rows of a table: a pure function of the seed, the stage and the step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What is drawn comes first in a seed, so that no two draws share a stream.
_GROUPS, _ROWS = 1, 2

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class StepRows:
    """Rows of a step, in the order in which they are shared out among the workers. N rows."""

    number: Numbers
    """(N,) number of each among all images of the stage, repeats included, from 0."""
    group: Numbers
    """(N,) its row group."""
    row: Numbers
    """(N,) its place among the rows of the group that are trained on."""

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, part: slice | Numbers) -> "StepRows":
        return StepRows(self.number[part], self.group[part], self.row[part])


class CanonicalOrder:
    """Every row once an epoch, shuffled anew each epoch.

    The row groups are shuffled, and the rows of `shuffle_row_groups` neighbours, a window, are mixed with each other:
    so many must be read to make a step. Within a step rows lie by row group, so that a worker, whose share is a part of
    the step, finds it in few of them. Windows are worked out when they are asked for, whatever the number of rows.
    """

    def __init__(self, rows_per_group: NDArray[np.integer], *, seed: int, stage: int, shuffle_row_groups: int) -> None:
        """Takes the rows of each row group that are trained on; at least one in all.

        Args:
            rows_per_group: (G,) numbers.
            seed: Of the run.
            stage: From 0.
            shuffle_row_groups: Row groups of a window.
        """
        self._rows_per_group = np.asarray(rows_per_group, np.int64)
        self._groups = np.flatnonzero(self._rows_per_group)
        self._seed, self._stage, self._window_groups = seed, stage, shuffle_row_groups
        self.rows_per_epoch = int(self._rows_per_group.sum())
        self._epoch = -1
        self._shuffled, self._starts = self._groups, np.zeros(1, np.int64)
        self._window = (-1, -1)
        self._slots = self._rows = np.zeros(0, np.int64)

    def step(self, step: int, global_batch_size: int) -> StepRows:
        """The rows of a step, those of all workers; it may end one window or epoch and begin the next."""
        at, end = step * global_batch_size, (step + 1) * global_batch_size
        numbers, groups, rows = [], [], []
        while at < end:
            epoch, position = divmod(at, self.rows_per_epoch)
            window = self._enter(epoch, position)
            part = slice(position - self._starts[window], position - self._starts[window] + end - at)
            by_group = np.argsort(self._slots[part], kind="stable")
            numbers.append(at + by_group)
            groups.append(self._shuffled[window * self._window_groups + self._slots[part][by_group]])
            rows.append(self._rows[part][by_group])
            at += len(by_group)
        return StepRows(np.concatenate(numbers), np.concatenate(groups), np.concatenate(rows))

    def _enter(self, epoch: int, position: int) -> int:
        """Returns the window that a position of an epoch lies in, and works out its rows."""
        if epoch != self._epoch:
            draw = np.random.default_rng([_GROUPS, self._seed, self._stage, epoch])
            self._shuffled = draw.permutation(self._groups)
            # Where each window begins, in rows of the epoch.
            begins = np.cumsum(np.append(0, self._rows_per_group[self._shuffled]))
            self._starts = begins[: -1 : self._window_groups]
            self._epoch = epoch
        window = int(np.searchsorted(self._starts, position, "right")) - 1
        if (epoch, window) != self._window:
            draw = np.random.default_rng([_ROWS, self._seed, self._stage, epoch, window])
            first = window * self._window_groups
            counts = self._rows_per_group[self._shuffled[first : first + self._window_groups]]
            mixed = draw.permutation(int(counts.sum()))
            # Of each row: the place of its row group in the window, and its place in the row group.
            self._slots = np.repeat(np.arange(len(counts)), counts)[mixed]
            self._rows = np.concatenate([np.arange(count) for count in counts])[mixed]
            self._window = (epoch, window)
        return window
