"""From the bytes of a video to the clip that is stored."""

from dataclasses import dataclass

from pipelines.data.config import FiltersConfig, ImageConfig, VideoConfig
from pipelines.data.fetch import Failure


@dataclass(frozen=True)
class Clip:
    """Encoded frames as they are stored; the original sizes are those after orientation."""

    frames: tuple[bytes, ...]
    format: str
    width: int
    height: int
    original_width: int
    original_height: int
    fps: float
    start_s: float
    duration_s: float
    phash: int
    """Of the frame in the middle."""


def decode_clip(body: bytes, image: ImageConfig, filters: FiltersConfig, video: VideoConfig) -> Clip | Failure:
    """Returns the clip of a video, or why there is none."""
    raise NotImplementedError
