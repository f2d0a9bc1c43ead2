"""Losses since the last report, kept on the device until they are asked for."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from pipelines.train.place import Place

NUM_QUARTERS = 4


@dataclass(frozen=True)
class WindowMeans:
    """Means over the rows of all workers whose loss is finite."""

    by_resolution: list[float]
    """Finest first; NaN where there was no row."""
    by_quarter: list[float]
    """Of all resolutions together, by quarter of the timesteps, least noise first; NaN where there was no row."""
    grad_norm: float
    """Mean over the steps whose gradients were finite."""
    steps: int
    seconds: float
    agreed_step_s: float
    """Seconds of a step as rank 0 has them: the same number on every worker, unlike `seconds`."""
    waited_s: float
    """Mean over the workers of what `take` was given."""

    def losses(self, resolutions: Sequence[int]) -> dict[str, float]:
        """Each loss by the name that it is logged under; none where there was no row whose loss is finite.

        Args:
            resolutions: Sides in pixels, finest first.
        """
        named = {
            "loss": sum(self.by_resolution),
            **{f"loss_{side}": value for side, value in zip(resolutions, self.by_resolution, strict=True)},
            # The first quarter has the least noise.
            **{f"loss_quarter_{q}": value for q, value in enumerate(self.by_quarter, start=1)},
        }
        return {name: value for name, value in named.items() if not math.isnan(value)}


class LossWindow:
    """Adds up losses and gradient norms without waiting for the device.

    Args:
        place: This worker.
        num_timesteps: Noise levels.
    """

    def __init__(self, place: Place, *, num_timesteps: int) -> None:
        self._place, self._num_timesteps = place, num_timesteps
        self._clear()

    def add(self, rows: Tensor, timestep: Tensor, grad_norm: Tensor) -> None:
        """Takes in the (R, B) losses of a step's rows, their (B,) timesteps, and the () norm of its gradients."""
        finite = torch.isfinite(rows).all(dim=0)
        rows = torch.where(finite, rows, 0.0)
        quarter = timestep * NUM_QUARTERS // self._num_timesteps
        sums = torch.zeros(2, NUM_QUARTERS, device=rows.device)
        sums[0].index_add_(0, quarter, rows.sum(dim=0))
        sums[1].index_add_(0, quarter, finite.float())
        good = torch.isfinite(grad_norm)
        # Of the norm, which all workers have alike, rank 0 counts alone.
        norm = torch.stack([torch.where(good, grad_norm, 0.0), good.float()]) * (self._place.rank == 0)
        self._sums.append(torch.cat([rows.sum(dim=1), sums.flatten(), norm]))

    def take(self, *, waited_s: float) -> WindowMeans:
        """Returns the means since the last call, then begins anew; every worker calls it at the same step.

        Args:
            waited_s: Seconds that this worker waited for data meanwhile.
        """
        steps = len(self._sums)
        # Without what the device has still to do, a step or two; to add zeros to it rounds nothing.
        step_s = (time.monotonic() - self._began_s) / steps * (self._place.rank == 0)
        seconds_of = torch.tensor([step_s, waited_s], device=self._place.device)
        totals = torch.cat([torch.stack(self._sums).sum(dim=0), seconds_of])
        if self._place.workers > 1:
            torch.distributed.all_reduce(totals)
        *values, step_s, waited_s = totals.tolist()
        num_resolutions = len(values) - 2 * NUM_QUARTERS - 2
        quarters = values[num_resolutions : num_resolutions + NUM_QUARTERS]
        counts = values[num_resolutions + NUM_QUARTERS : -2]
        num_rows = sum(counts) or float("nan")
        seconds = time.monotonic() - self._began_s
        self._clear()
        return WindowMeans(
            by_resolution=[value / num_rows for value in values[:num_resolutions]],
            by_quarter=[s / n if n else float("nan") for s, n in zip(quarters, counts, strict=True)],
            grad_norm=values[-2] / max(values[-1], 1.0),
            steps=steps,
            seconds=seconds,
            agreed_step_s=step_s,
            waited_s=waited_s / self._place.workers,
        )

    def _clear(self) -> None:
        self._sums: list[Tensor] = []
        self._began_s = time.monotonic()
