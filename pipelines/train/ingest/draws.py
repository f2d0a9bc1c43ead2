"""What is drawn by chance for the images of a stage: a pure function of the seed, the stage and the image's number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# What is drawn comes first in a seed, so that no two draws share a stream.
_TIMESTEPS, _IMAGES = 3, 4

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class ImageDraw:
    """What is drawn for one image, beside its noise."""

    crop: float | None
    """Which square of the picture, as `decode_square` takes it."""
    mirrored: bool
    """Whether it is seen in a mirror."""
    dropped: bool
    """Whether its caption is left out."""


class Draws:
    """The draws of a stage.

    Each image has a stream of its own of Philox (`numpy.random.Philox`), a generator whose numbers are a function of a
    key, here the run's and the stage's, and of a counter, here the image's. So any thread of any worker draws the same.
    """

    def __init__(self, *, seed: int, stage: int, num_timesteps: int, drop_prob: float, flip: bool, crop: Crop) -> None:
        """Takes what the draws depend on.

        Args:
            seed: Of the run.
            stage: From 0.
            num_timesteps: Noise levels.
            drop_prob: Share of the captions that are left out.
            flip: Whether half of the pictures are mirrored.
            crop: The middle square of a picture, or any.
        """
        self._seed, self._stage = seed, stage
        self._num_timesteps, self._drop_prob, self._flip, self._crop = num_timesteps, drop_prob, flip, crop
        self._key = np.random.SeedSequence([_IMAGES, seed, stage]).generate_state(2, np.uint64)

    def timesteps(self, step: int, count: int) -> NDArray[np.int64]:
        """(count,) timesteps in [0, num_timesteps) of a step of so many rows.

        They are spread evenly from one random start, which lowers the variance of the loss (arXiv 2107.00630,
        appendix I.1).
        """
        draw = np.random.default_rng([_TIMESTEPS, self._seed, self._stage, step])
        spread = (draw.random() + np.arange(count) / count) % 1.0
        return draw.permutation((spread * self._num_timesteps).astype(np.int64))

    def image(self, number: int, noise: Sequence[NDArray[np.float32]]) -> ImageDraw:
        """What is drawn for an image of the stage.

        Args:
            number: Its number, repeats included, from 0.
            noise: Contiguous arrays that are filled with standard normal numbers.
        """
        draw = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, number, 0]))
        # Drawn whether it is used or not, so that no setting changes another's draws.
        crop, mirror, drop = draw.random(3)
        for level in noise:
            draw.standard_normal(dtype=np.float32, out=level)
        return ImageDraw(
            crop=float(crop) if self._crop == "random" else None,
            mirrored=self._flip and bool(mirror < 0.5),
            dropped=bool(drop < self._drop_prob),
        )
