"""The frames of a video that a clip needs: which they are, and how they look."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.config import ImageConfig, VideoConfig
from pipelines.data.pictures.decode import as_array, as_image, center_square, encode_pixels, target_size
from pipelines.data.pictures.resize import Pixels

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# A cut is where the mean difference of neighbouring frames, as small grey pictures of 0 to 255, is above this. In the
# clips that this was tried with, motion stays below 20 and cuts lie above 40.
_CUT = 28.0
_SMALL = (32, 18)
# How far a stretch without cuts is searched for: so many lengths of the clip, or so many pixels decoded, which are 40 s
# of 1920×1080 at 60 a second.
_SEARCH_CLIPS = 4
_SEARCH_PIXELS = 5_000_000_000
# Frames a second that are believed, so that a file can't ask for endless work.
_MAX_RATE = 240
# What does not say what its colours mean is taken for BT.709 from here on, and for BT.601 below, as browsers do.
_HD_PX = 720
# The matrices that libswscale tells apart, by H.273's numbers.
_KNOWN_MATRICES = (1, 4, 5, 6, 7, 9)
_UPRIGHT = (1, 0, 0, 1)
_TRANSPOSED = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = [matrix for matrix in _TRANSPOSED if matrix[0] == 0]


def iter_shown(
    container: "InputContainer", stream: "VideoStream", video: VideoConfig
) -> Iterator[tuple["VideoFrame", bool]]:
    """Yields what is shown at each k / fps, and whether a cut lies between it and the one before.

    Where there is to be a choice, it yields more than the clip has frames.
    """
    step = 1 / Fraction(video.fps)
    limit = video.num_frames * (_SEARCH_CLIPS if video.scene_cuts else 1)
    cuts = _Cuts() if video.scene_cuts else None
    shown: VideoFrame | None = None
    begins = ends = tolerance = Fraction(0)
    index, is_cut, pixels = 0, False, 0
    for at, frame in _decoded(container, stream, max_packets=_MAX_RATE * (1 + int(limit * step))):
        pixels += frame.width * frame.height
        if shown is None:
            # Containers round times to their ticks, which in some are a millisecond.
            begins, tolerance = at, min(Fraction(stream.time_base or 1) / 2, Fraction(1, 1000))
        while shown is not None and index * step < at - begins - tolerance:
            yield shown, is_cut
            index, is_cut = index + 1, False
            if index >= limit or (index > video.num_frames and pixels > _SEARCH_PIXELS):
                return
        is_cut = (cuts is not None and cuts.is_before(frame)) or is_cut
        shown, ends = frame, at - begins + _duration(frame, stream)
    while shown is not None and index < limit and index * step < ends - tolerance:
        yield shown, is_cut
        index, is_cut = index + 1, False


def _decoded(
    container: "InputContainer", stream: "VideoStream", *, max_packets: int
) -> Iterator[tuple[Fraction, "VideoFrame"]]:
    """Yields the times and the frames of a stream, in order; raises if one is damaged."""
    # AVI has one time a packet, in the order of decoding: the frames, in the order of showing, take the same times.
    ticks: deque[int | None] | None = deque() if container.format.name == "avi" else None
    last: Fraction | None = None
    for num_packets, packet in enumerate(container.demux(stream)):
        # Packets, as some give no frame, or one at a time that was before.
        if num_packets >= max_packets:
            raise ValueError(f"more than {_MAX_RATE} frames a second")
        if packet.is_corrupt:
            raise EOFError("a packet is cut short")
        if ticks is not None and packet.size:
            ticks.append(packet.dts)
        for frame in packet.decode():
            if frame.is_corrupt:
                raise ValueError("a frame is damaged")
            at = _seconds(frame.pts if ticks is None else ticks.popleft(), stream)
            if at is None:
                at = Fraction(0) if last is None else last + _duration(frame, stream)
            if last is None or at > last:
                last = at
                yield at, frame


def _seconds(ticks: int | None, stream: "VideoStream") -> Fraction | None:
    return None if ticks is None else ticks * (stream.time_base or Fraction(1))


def _duration(frame: "VideoFrame", stream: "VideoStream") -> Fraction:
    seconds = _seconds(frame.duration, stream)
    return seconds or 1 / (stream.average_rate or Fraction(25))


class _Cuts:
    """Tells cuts by the difference of neighbouring frames, made small and grey."""

    def __init__(self) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self._reformatter = VideoReformatter()
        self._area = Interpolation.AREA
        self._last: NDArray[np.int16] | None = None

    def is_before(self, frame: "VideoFrame") -> bool:
        """Returns whether a cut lies between this frame and the one that was given before."""
        width, height = _SMALL
        grey = self._reformatter.reformat(frame, width, height, "gray", interpolation=self._area, threads=1)
        array = grey.to_ndarray().astype(np.int16)
        last, self._last = self._last, array
        return last is not None and float(np.abs(array - last).mean()) > _CUT


class Renderer:
    """Makes stored pictures of frames; all have the size and orientation that the first one asks for."""

    def __init__(self, stream: "VideoStream", frame: "VideoFrame", image: ImageConfig) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self._image = image
        self._reformatter = VideoReformatter()
        self._interpolation = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        # Pixels that are not square are stretched, never squeezed.
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
        width, height = round(frame.width * max(aspect, Fraction(1))), round(frame.height / min(aspect, Fraction(1)))
        matrix = _matrix(frame)
        self._transposed = _TRANSPOSED.get(matrix)
        self._target = target_size(width, height, image)
        self.shown_width, self.shown_height = (height, width) if matrix in _SWAPS_SIDES else (width, height)
        self.stored_size = (0, 0)
        self._last: tuple[VideoFrame, bytes, Pixels] | None = None

    def render(self, frame: "VideoFrame") -> tuple[bytes, Pixels]:
        """Returns a frame as it is stored, and its pixels."""
        if self._last is None or self._last[0] is not frame:
            pixels = self._pixels(frame)
            self.stored_size = (pixels.shape[1], pixels.shape[0])
            self._last = (frame, encode_pixels(pixels, self._image.format, self._image.quality), pixels)
        return self._last[1:]

    def _pixels(self, frame: "VideoFrame") -> Pixels:
        width, height = self._target
        rgb = self._reformatter.reformat(
            frame,
            width,
            height,
            "rgb24",
            interpolation=self._interpolation,
            threads=1,
            **_colours(frame),
        )
        pixels: Pixels = np.asarray(rgb.to_ndarray(), np.uint8)
        if self._transposed is not None:
            pixels = as_array(as_image(pixels).transpose(self._transposed))
        if self._image.resize == "center_crop":
            pixels = center_square(pixels)
        return pixels


def _matrix(frame: "VideoFrame") -> tuple[int, int, int, int]:
    """Returns what the frame's display matrix makes of right and of down."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return _UPRIGHT
    a, b, _, c, d, *_ = (round(value / 65536) for value in np.frombuffer(data, np.int32).tolist())
    return a, b, c, d


def _colours(frame: "VideoFrame") -> dict[str, Any]:
    """Returns what the frame's numbers mean, as arguments of `reformat`."""
    from av.video.reformatter import ColorRange, Colorspace

    if frame.format.is_rgb:
        return {}
    matrix = None
    if frame.colorspace not in _KNOWN_MATRICES:
        matrix = Colorspace.ITU709 if frame.height >= _HD_PX else Colorspace.ITU601
    is_full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return {
        "src_colorspace": matrix,
        "src_color_range": ColorRange.JPEG if is_full else ColorRange.MPEG,
        "dst_color_range": ColorRange.JPEG,
    }
