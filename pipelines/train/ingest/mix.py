"""Batches of which only some rows have the finer resolutions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0.6180339887498949


def rows_per_step(mix: Sequence[float], global_batch_size: int) -> list[int]:
    """Rows of a step that each resolution has, finest first: its share of them, rounded."""
    return [round(share * global_batch_size) for share in mix]


def num_resolutions(mix: Sequence[float], global_batch_size: int) -> NDArray[np.int64]:
    """How many resolutions each row of a step has, (N,): a row with one has the coarsest, with two that and the next.

    It depends on the place of a row in the step alone. Rows of each number lie evenly among the others (the places are
    taken in the order of the multiples of the golden ratio, modulo 1), so that every worker's share has nearly as many.
    """
    order = np.argsort((np.arange(global_batch_size) * _GOLDEN) % 1.0, kind="stable")
    counts = np.zeros(global_batch_size, np.int64)
    for rows in rows_per_step(mix, global_batch_size):
        counts[order[:rows]] += 1
    return counts
