"""How much signal is left at each timestep.

`alpha_bar` has N + 1 entries; entry 0 is 1 (a clean picture). Training draws a timestep in [0, N), gives it to the
network and noises with entry `timestep + 1`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdm_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A squared-cosine schedule (arXiv 2102.09672, equation 17), shifted by resolution.

    The shift is that of arXiv 2310.15111, section 3.3.
    """

    num_timesteps: int = 1000
    """N, the number of noise levels."""
    shift_power: float = 1.0
    """The signal-to-noise ratio at a resolution is divided by (its side ÷ the innermost side) to this power."""

    def __post_init__(self) -> None:
        if self.num_timesteps < 1:
            raise ConfigError(f"num_timesteps={self.num_timesteps} must be at least 1")

    def alpha_bar(self, resolution_ratio: float = 1.0) -> Tensor:
        """Cumulative signal power at each timestep.

        Args:
            resolution_ratio: Side of the resolution ÷ side of the innermost one; at least 1.

        Returns:
            (N + 1,) float32, falling from 1 to nearly 0.
        """
        steps = np.arange(self.num_timesteps + 1, dtype=np.float64) / self.num_timesteps
        signal = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
        alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
        divisor = resolution_ratio**self.shift_power
        return torch.from_numpy(alpha_bar / (alpha_bar + (1 - alpha_bar) * divisor)).float()

    def alpha_bars(self, resolutions: tuple[int, ...]) -> Tensor:
        """(R, N + 1): `alpha_bar` of every resolution, in the order given; the last is the innermost."""
        return torch.stack([self.alpha_bar(side / resolutions[-1]) for side in resolutions])
