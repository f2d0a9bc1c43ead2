"""Keeping estimates of the clean picture in the range of pictures.

Legend: B pictures, r side of a resolution in pixels.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

ThresholdKind = Literal["none", "clip", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What happens to an estimate that leaves [-1, 1].

    Raises:
        ValueError: If a field is out of its range.
    """

    kind: ThresholdKind = "clip"
    """`none`; `clip` cuts values off; `dynamic` (arXiv 2205.11487, section 2.3) takes the largest size that the
    fraction `ratio` of a picture's values stays below, cuts at it, and divides by it where it is above 1."""
    ratio: float = 0.995
    """That fraction, in (0, 1]. The published code's DYNAMIC_IF has 0.95."""
    max_value: float = 100.0
    """The most that `dynamic` divides by, at least 1. The published code's DYNAMIC_IF has 1.5."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ThresholdKind):
            raise ValueError(f"threshold kind={self.kind!r} is unknown; use one of {list(get_args(ThresholdKind))}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"threshold ratio={self.ratio} must be in (0, 1]; 0.995 is usual")
        if not self.max_value >= 1:
            raise ValueError(f"threshold max_value={self.max_value} must be at least 1, the largest value of a picture")

    def apply(self, x0: Tensor) -> Tensor:
        """(B, 3, r, r) estimates of any size -> the same shape, in [-1, 1] unless the kind is `none`."""
        if self.kind == "none":
            return x0
        if self.kind == "clip":
            return x0.clamp(-1, 1)
        # One quantile a picture, for torch takes at most 16 million values at a time.
        sizes = torch.stack([picture.abs().flatten().float().quantile(self.ratio) for picture in x0])
        limit = sizes.clamp(1, self.max_value).to(x0)[:, None, None, None]
        return x0.clamp(-limit, limit) / limit
