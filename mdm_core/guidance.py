"""Classifier-free guidance: away from what the network predicts without the condition.

Legend: B pictures, R resolutions (finest first), r side of a resolution in pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mdm_core.conditioning import Condition


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How far, when, and away from what.

    Raises:
        ValueError: If a field is out of its range.
    """

    scale: float | tuple[float, ...] = 1.0
    """w of classifier-free guidance (arXiv 2207.12598): none + w · (condition − none), on the network's output; one, or
    one a resolution, finest first. 1 is off."""
    rescale: float = 0.0
    """How much of the guided output gets back the standard deviation that the conditional one has, in [0, 1]
    (arXiv 2305.08891, section 3.4; 0.7 there); 0 is off."""
    interval: tuple[float, float] = (0.0, 1.0)
    """First and last t in [0, 1] (noise level ÷ N) with guidance (arXiv 2404.07724); steps outside cost half."""
    negative: Condition | None = None
    """What to go away from; None is the same condition with its text and label dropped."""

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale={self.rescale} must be between 0 (off) and 1; 0.7 is usual")
        first, last = self.interval
        if not 0 <= first <= last <= 1:
            raise ValueError(f"guidance interval={self.interval} must rise within [0, 1]; (0, 1) is every step")

    def scales(self, num_resolutions: int) -> tuple[float, ...]:
        """The scale of each resolution.

        Raises:
            ValueError: If there are several scales, but not one a resolution.
        """
        if not isinstance(self.scale, tuple):
            return (self.scale,) * num_resolutions
        if len(self.scale) != num_resolutions:
            raise ValueError(
                f"guidance scale={self.scale} has {len(self.scale)} entries for {num_resolutions} resolutions; "
                "give one number, or one a resolution"
            )
        return self.scale

    def is_on(self, t: float) -> bool:
        """Whether outputs at `t` are guided."""
        off = self.scale == 1 if not isinstance(self.scale, tuple) else all(scale == 1 for scale in self.scale)
        return not off and self.interval[0] <= t <= self.interval[1]

    def against(self, condition: Condition) -> Condition:
        """What the guided outputs of `condition` go away from.

        Raises:
            ValueError: If there is nothing to drop and no negative condition.
        """
        if self.negative is not None:
            return self.negative
        if not condition.can_be_dropped:
            raise ValueError(
                f"guidance scale={self.scale} needs a text or a label to drop, or a negative condition, got neither; "
                "give one, or set scale to 1"
            )
        return condition.dropped()

    def combine(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """The guided output of one resolution, from (B, 3, r, r) with the condition and the same without."""
        guided = torch.lerp(negative, positive, scale)
        if self.rescale == 0:
            return guided
        wanted = positive.std(dim=(1, 2, 3), keepdim=True)
        return torch.lerp(guided, guided * (wanted / guided.std(dim=(1, 2, 3), keepdim=True)), self.rescale)
