"""A network and its answers, as estimates of the clean pictures.

Legend: B pictures, R resolutions (finest first), N noise levels, r side of a resolution in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mdm_core.conditioning import Condition
from mdm_core.guidance import Guidance
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType, check_prediction_type, to_x0
from mdm_core.thresholding import Threshold

Network = Callable[..., list[Tensor]]
"""Called as `network(x_t, timestep, **condition.arguments())`."""


@dataclass(frozen=True)
class Diffusion:
    """A network, with what it was trained to undo and to answer.

    Raises:
        ValueError: If the prediction type is unknown.
    """

    network: Network
    """Called on 2B rows where guidance is on."""
    schedule: NoiseSchedule
    """The noise that it was trained with."""
    prediction_type: PredictionType = "v"
    """What it answers."""

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """Estimates the clean pictures from noised ones, with guidance and threshold."""

    diffusion: Diffusion
    alpha_bars: Tensor
    """(R, N + 1) on the device of the pictures."""
    divisors: tuple[float, ...]
    """What the pictures of each resolution are divided by in `x_t` and in the estimates (`NoiseSchedule`)."""
    dtype: torch.dtype
    """What the network reads."""
    condition: Condition = field(default_factory=Condition)
    guidance: Guidance = field(default_factory=Guidance)
    threshold: Threshold = field(default_factory=Threshold)

    def estimate(self, x_t: list[Tensor], level: int) -> list[Tensor]:
        """The clean pictures (divided by `divisors`), finest resolution first; one call of the network.

        Args:
            x_t: One (B, 3, r, r) a resolution, noised to `level`.
            level: Entry of `alpha_bars`, from 1 to N.
        """
        outputs = self._outputs(x_t, level)
        estimates = []
        for output, x, row, divisor in zip(outputs, x_t, self.alpha_bars, self.divisors, strict=True):
            x0 = to_x0(output.to(x), x, row[level], self.diffusion.prediction_type)
            estimates.append(self.threshold.apply(x0 * divisor) / divisor)
        return estimates

    def _outputs(self, x_t: list[Tensor], level: int) -> list[Tensor]:
        """What the network says, guided where guidance is on: then it is called with 2B rows."""
        batch = x_t[0].shape[0]
        x_t = [x.to(self.dtype) for x in x_t]
        if not self.guidance.is_on(level / (self.alpha_bars.shape[1] - 1)):
            return self.diffusion.network(x_t, _timesteps(x_t[0], batch, level), **self.condition.arguments())
        both = self.condition.joined(self.guidance.against(self.condition))
        twice = [torch.cat([x, x]) for x in x_t]
        outputs = self.diffusion.network(twice, _timesteps(x_t[0], 2 * batch, level), **both.arguments())
        scales = self.guidance.scales(len(x_t))
        return [
            self.guidance.combine(output[:batch], output[batch:], scale)
            for output, scale in zip(outputs, scales, strict=True)
        ]


def _timesteps(like: Tensor, rows: int, level: int) -> Tensor:
    """The network counts its timesteps from 0, the noise levels count clean pictures in."""
    return torch.full((rows,), level - 1, device=like.device)
