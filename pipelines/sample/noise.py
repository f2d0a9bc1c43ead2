"""The noise of pictures: what each begins with and what a step adds, drawn from (seed, the picture's number) only.

Legend: B pictures, r side of a resolution in pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class PictureNoise:
    """The standard normal noise of a batch: a picture has the same in whatever batch it is made."""

    def __init__(
        self, *, seed: int, noise_ids: Sequence[int], resolutions: Sequence[int], device: torch.device
    ) -> None:
        self._seed, self._noise_ids = seed, tuple(noise_ids)
        self._resolutions, self._device = tuple(resolutions), device

    def initial(self) -> list[Tensor]:
        """What the pictures begin with: one (B, 3, r, r) a resolution, finest first."""
        return self._drawn([np.random.default_rng([self._seed, number]) for number in self._noise_ids])

    def of_steps(self, count: int) -> "StepNoise":
        """What each of `count` steps may add, drawn when it is asked for."""
        return StepNoise(self, count)

    def of_step(self, step: int) -> list[Tensor]:
        """What one step may add, as `initial`."""
        # A spawn key, and not one more number: numpy fills short seeds with zeros, so [a, b] is [a, b, 0].
        seeds = [np.random.SeedSequence([self._seed, number], spawn_key=(step,)) for number in self._noise_ids]
        return self._drawn([np.random.default_rng(seed) for seed in seeds])

    def _drawn(self, draws: list[np.random.Generator]) -> list[Tensor]:
        return [
            torch.from_numpy(np.stack([draw.standard_normal((3, side, side), dtype=np.float32) for draw in draws]))
            .to(self._device)
            .contiguous(memory_format=torch.channels_last)
            for side in self._resolutions
        ]


class StepNoise(Sequence[list[Tensor]]):
    """The noise of the steps, of which only the latest that was asked for is in memory."""

    def __init__(self, noise: PictureNoise, count: int) -> None:
        self._noise, self._count = noise, count
        self._latest: tuple[int, list[Tensor]] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """(B, 3, r, r) a resolution of one step; the sampler asks once a resolution."""
        if self._latest is None or self._latest[0] != index:
            self._latest = (index, self._noise.of_step(range(self._count)[index]))
        return self._latest[1]
