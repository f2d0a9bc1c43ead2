"""How much signal is left at each noise level.

`alpha_bar` has N + 1 entries; entry 0 is 1 (a clean picture). Training draws a timestep in [0, N), gives it to the
network and noises with entry `timestep + 1`. Between the entries, t = entry ÷ N runs from 0 (clean) to 1.

Legend: N noise levels, R resolutions (finest first).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdm_core.errors import ConfigError

ScheduleKind = Literal["squared_cosine", "cosine", "linear", "sigmoid"]
Shift = Literal["snr", "signal"]

_Entries = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Signal power at each noise level, and how it depends on the resolution (arXiv 2310.15111, section 3.3).

    Raises:
        ConfigError: If a field is out of its range.
    """

    kind: ScheduleKind = "squared_cosine"
    """`squared_cosine` (arXiv 2102.09672, equation 17), the published networks'; `cosine`, with a log-SNR from 5 to −5
    (arXiv 2202.00512, appendix); `linear` in beta (arXiv 2006.11239); `sigmoid` (arXiv 2301.10972, algorithm 1)."""
    num_timesteps: int = 1000
    """N, the number of noise levels."""
    shift_power: float = 1.0
    """The signal-to-noise ratio at a resolution is divided by (its side ÷ the innermost side) to this power."""
    shift: Shift = "snr"
    """What is divided: `snr` changes alpha_bar; `signal` keeps alpha_bar and divides the picture (see
    `signal_divisor`), so that a finer resolution has less variance as well."""
    input_divisor: float = 1.0
    """What pictures of every resolution are divided by besides (arXiv 2301.10972, section 2.2)."""
    beta_start: float = 1e-4
    """First beta of `linear`."""
    beta_end: float = 0.02
    """Last beta of `linear`."""
    sigmoid_start: float = -3.0
    """Where on the sigmoid `sigmoid` begins; the more negative, the longer little noise."""
    sigmoid_end: float = 3.0
    """Where it ends."""
    sigmoid_tau: float = 1.0
    """Temperature of `sigmoid`; smaller is steeper."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ConfigError(f"kind={self.kind!r} is no noise schedule; use one of {list(get_args(ScheduleKind))}")
        if self.shift not in get_args(Shift):
            raise ConfigError(f"shift={self.shift!r} is no way to shift; use one of {list(get_args(Shift))}")
        if self.num_timesteps < 1:
            raise ConfigError(f"num_timesteps={self.num_timesteps} must be at least 1")
        if not self.input_divisor > 0:
            raise ConfigError(f"input_divisor={self.input_divisor} must be above 0; 1 leaves pictures as they are")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} must rise and lie between 0 and 1; "
                "1e-4 and 0.02 are usual"
            )
        if not (self.sigmoid_start < self.sigmoid_end and self.sigmoid_tau > 0):
            raise ConfigError(
                f"sigmoid_start={self.sigmoid_start} must be below sigmoid_end={self.sigmoid_end}, and "
                f"sigmoid_tau={self.sigmoid_tau} above 0; -3, 3 and 1 are usual"
            )

    def alpha_bar(self, resolution_ratio: float = 1.0) -> Tensor:
        """Signal power at each noise level.

        Args:
            resolution_ratio: Side of the resolution ÷ side of the innermost one; at least 1.

        Returns:
            (N + 1,) float32, falling from 1 to nearly 0.
        """
        entries, divisor = torch.from_numpy(self._entries()).float(), self._snr_divisor(resolution_ratio)
        if divisor == 1:
            return entries
        # In float32 and this order: near 1 the rounding decides how much noise there is, up to 1 part in 1,000 at the
        # first levels, and the published networks were trained with this one.
        return 1 / (1 + 1 / (entries / (1 - entries) / divisor))

    def alpha_bars(self, resolutions: tuple[int, ...]) -> Tensor:
        """(R, N + 1): `alpha_bar` of every resolution, in the order given; the last is the innermost."""
        return torch.stack([self.alpha_bar(side / resolutions[-1]) for side in resolutions])

    def signal_divisor(self, resolution_ratio: float = 1.0) -> float:
        """What pictures at a resolution are divided by before noise is added (arXiv 2301.10972, section 2.2).

        With `shift="snr"` it depends on `input_divisor` only. The published code divides by the ratio itself where it
        doesn't shift the schedule, which is `shift="signal"` with `shift_power=2`.
        """
        return self.input_divisor * (resolution_ratio ** (self.shift_power / 2) if self.shift == "signal" else 1.0)

    def signal_divisors(self, resolutions: tuple[int, ...]) -> tuple[float, ...]:
        """`signal_divisor` of every resolution, in the order given; the last is the innermost."""
        return tuple(self.signal_divisor(side / resolutions[-1]) for side in resolutions)

    def log_snr(self, t: Tensor, resolution_ratio: float = 1.0) -> Tensor:
        """log(alpha_bar ÷ (1 − alpha_bar)) anywhere between the noise levels; falls strictly.

        Linear in t between two levels; before the first one, the noise-to-signal ratio grows linearly from 0.

        Args:
            t: Any shape, float in [0, 1].
            resolution_ratio: See `alpha_bar`.

        Returns:
            The shape and type of `t`; infinite where it is 0.
        """
        levels = self._log_snr_entries()
        position = t.detach().cpu().double().numpy() * self.num_timesteps
        values = np.interp(position, np.arange(1, self.num_timesteps + 1), levels)
        with np.errstate(divide="ignore"):
            values = np.where(position < 1, levels[0] - np.log(position), values)
        return torch.from_numpy(np.asarray(values - math.log(self._snr_divisor(resolution_ratio)))).to(t)

    def alpha_bar_at(self, t: Tensor, resolution_ratio: float = 1.0) -> Tensor:
        """Signal power anywhere between the noise levels; arguments as for `log_snr`."""
        return torch.sigmoid(self.log_snr(t, resolution_ratio))

    def t_at(self, log_snr: Tensor, resolution_ratio: float = 1.0) -> Tensor:
        """The t in [0, 1] at which `log_snr` has a value; 1 for any value below its last."""
        levels = self._log_snr_entries()
        wanted = log_snr.detach().cpu().double().numpy() + math.log(self._snr_divisor(resolution_ratio))
        position = np.interp(-wanted, -levels, np.arange(1, self.num_timesteps + 1))
        position = np.where(wanted > levels[0], np.exp(np.minimum(levels[0] - wanted, 0)), position)
        return torch.from_numpy(np.asarray(position / self.num_timesteps)).to(log_snr)

    def _snr_divisor(self, resolution_ratio: float) -> float:
        return resolution_ratio**self.shift_power if self.shift == "snr" else 1.0

    def _log_snr_entries(self) -> _Entries:
        """(N,): of entries 1 to N, at the innermost resolution."""
        entries = self._entries()[1:]
        return np.asarray(np.log(entries) - np.log1p(-entries))

    def _entries(self) -> _Entries:
        """(N + 1,): alpha_bar at the innermost resolution."""
        levels = self.num_timesteps
        steps = np.arange(levels + 1) / levels
        if self.kind == "squared_cosine":
            signal = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
            return _cumulative(np.minimum(1 - signal[1:] / signal[:-1], 0.999))
        if self.kind == "linear":
            return _cumulative(np.linspace(self.beta_start, self.beta_end, levels))
        if self.kind == "cosine":
            angles = np.linspace(math.atan(math.exp(-2.5)), math.atan(math.exp(2.5)), levels)
            return np.concatenate([[1.0], np.cos(angles) ** 2])
        rise = 1 / (
            1 + np.exp(-(self.sigmoid_start + steps * (self.sigmoid_end - self.sigmoid_start)) / self.sigmoid_tau)
        )
        # The paper's floor, without which nothing is left of the picture at the last level and log-SNR is infinite.
        return np.maximum((rise[-1] - rise) / (rise[-1] - rise[0]), 1e-9)


def _cumulative(beta: _Entries) -> _Entries:
    return np.concatenate([[1.0], np.cumprod(1 - beta)])
