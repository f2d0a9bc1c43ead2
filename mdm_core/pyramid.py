"""One picture, or the frames of one clip, at several resolutions.

Legend: B pictures, r side of a resolution in pixels, T frames along a side of a tiled clip.
"""

from torch import Tensor
from torch.nn import functional as F


def build_pyramid(x0: Tensor, resolutions: tuple[int, ...], tiles: tuple[int, ...] | None = None) -> list[Tensor]:
    """The picture at each resolution, the lower ones average-pooled from the highest (arXiv 2310.15111, section 3.1).

    Args:
        x0: (B, 3, r, r), r the first of `resolutions`.
        resolutions: Sides in pixels, finest first; each divides the first.
        tiles: For a clip whose T² frames lie row by row on a square grid in one picture: T at each resolution, finest
            first. Where T falls by a factor k, every k²-th frame is kept; what remains of the factor between the two
            sides is pooled in each frame. None for pictures.

    Returns:
        One (B, 3, r, r) a resolution, finest first.

    Raises:
        ValueError: If sides, frames and `x0` don't fit together.
    """
    finest = resolutions[0]
    if x0.shape[-2:] != (finest, finest):
        raise ValueError(f"x0 is {tuple(x0.shape)}; wanted (B, 3, {finest}, {finest}) for resolutions {resolutions}")
    if tiles is None:
        return [x0 if side == finest else F.avg_pool2d(x0, finest // side) for side in resolutions]
    if len(tiles) != len(resolutions) or any(side % t for side, t in zip(resolutions, tiles, strict=False)):
        raise ValueError(f"tiles={tiles} must give a divisor of each of the resolutions {resolutions}")
    levels = [x0]
    for side, before, now in zip(resolutions[1:], tiles, tiles[1:], strict=False):
        frames = _fewer_frames(levels[-1], before, now)
        if frames.shape[-1] % side:
            raise ValueError(
                f"tiles={tiles}: {now} × {now} frames of {frames.shape[-1] // now} px can't be pooled to {side} px; "
                "let tiles fall by at most the factor between the resolutions"
            )
        pool = frames.shape[-1] // side
        levels.append(frames if pool == 1 else F.avg_pool2d(frames, pool))
    return levels


def _fewer_frames(clip: Tensor, before: int, now: int) -> Tensor:
    """(B, 3, T·h, T·h) with T = `before` -> the same with T = `now`: every (before ÷ now)²-th frame, tiled anew."""
    if before == now:
        return clip
    if before % now:
        raise ValueError(f"{before} × {before} frames can't become {now} × {now}; {now} must divide {before}")
    batch, channels, side, _ = clip.shape
    h = side // before
    frames = clip.reshape(batch, channels, before, h, before, h).permute(0, 2, 4, 1, 3, 5)
    kept = frames.reshape(batch, before * before, channels, h, h)[:, :: (before // now) ** 2]
    rows = kept.reshape(batch, now, now, channels, h, h).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(batch, channels, now * h, now * h)
