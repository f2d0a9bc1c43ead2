"""One picture at several resolutions."""

from torch import Tensor
from torch.nn import functional as F


def build_pyramid(x0: Tensor, resolutions: tuple[int, ...]) -> list[Tensor]:
    """The picture at each resolution, the lower ones average-pooled from the highest (arXiv 2310.15111, section 3.1).

    Args:
        x0: (B, 3, r, r), r the first of `resolutions`.
        resolutions: Sides in pixels, finest first; each divides the first.

    Returns:
        One (B, 3, r, r) a resolution, finest first.
    """
    finest = resolutions[0]
    if x0.shape[-2:] != (finest, finest):
        raise ValueError(f"x0 is {tuple(x0.shape)}; wanted (B, 3, {finest}, {finest}) for resolutions {resolutions}")
    return [x0 if side == finest else F.avg_pool2d(x0, finest // side) for side in resolutions]
