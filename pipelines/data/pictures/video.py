"""From the bytes of a video to the clip that is stored: a few seconds of it, as a player would show them.

The clip's frame k is the one that is on the screen at `start_s + k / fps`. Rotation and the shape of pixels are
applied, sound is ignored. A clip begins with the video, or, where `scene_cuts` is set, with the first stretch between
two cuts that is long enough. No more is decoded than that takes: a film costs what its first seconds cost. Animated
GIF, WebP and AVIF are pictures here, not videos.

Videos are files from strangers: which reader of libavformat sees them is decided here, by their first bytes, so none of
those that follow links (playlists, lists of files, session descriptions) ever does; and what a reader asks to open
besides is refused.
"""

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mdm_core.errors import ConfigError
from pipelines.data.config import FiltersConfig, ImageConfig, VideoConfig
from pipelines.data.failure import Failure
from pipelines.data.filters import size_reason
from pipelines.data.pictures.decode import has_too_many_pixels
from pipelines.data.pictures.phash import perceptual_hash
from pipelines.data.pictures.resize import Pixels
from pipelines.data.pictures.video_frames import Renderer, iter_shown

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# What the web uses, by the names of libavcodec's decoders; the rest of its hundreds, seldom tried, are left alone.
_CODECS = frozenset(
    (
        *("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv", "vp6"),
        *("vp6f", "theora", "mjpeg", "prores", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2", "wmv3", "vc1"),
    )
)
# The largest picture of the highest levels of H.264 and H.265; a decoder keeps up to 16 of them.
_MAX_PIXELS = 35_651_584
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_SIGNATURES = {
    b"\x1aE\xdf\xa3": "matroska",
    b"FLV\x01": "flv",
    b"OggS": "ogg",
    b"\x00\x00\x01\xba": "mpeg",
    b"0&\xb2u\x8ef\xcf\x11": "asf",
}


@dataclass(frozen=True)
class Clip:
    """Encoded frames as they are stored; the original sizes are those that a player shows."""

    frames: tuple[bytes, ...]
    format: str
    width: int
    height: int
    original_width: int
    original_height: int
    fps: float
    start_s: float
    """Seconds from the video's first frame to the clip's."""
    duration_s: float
    """Length of the clip, num_frames / fps; not of the video."""
    phash: int | None
    """Perceptual hash of the frame in the middle."""


def require_av() -> Any:
    """Returns PyAV; raises ConfigError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ConfigError("videos need the package av; pip install 'mdm[video]'") from error
    return av


def decode_clip(body: bytes, image: ImageConfig, filters: FiltersConfig, video: VideoConfig) -> Clip | Failure:
    """Returns the clip of a video, or why there is none.

    Raises:
        ConfigError: PyAV is not installed, or frames are to be stored as they came.
    """
    av = require_av()
    if image.format == "source":
        raise ConfigError("image.format=source: the frames of a video are made here; store them as jpeg, webp or png")
    reader = _reader(body)
    if reader is None:
        return Failure("not_a_video")
    try:
        with av.open(
            io.BytesIO(body),
            format=reader,
            # Opening decodes nothing, as nothing is known yet of what it would take.
            container_options={"codec_whitelist": "none", "protocol_whitelist": "none", "analyzeduration": "1"},
            io_open=_refuse,
            metadata_errors="replace",
        ) as container:
            stream = _video_stream(container)
            if stream is None:
                return Failure("not_a_video")
            codec = stream.codec_context
            if codec.name not in _CODECS:
                return Failure("unsupported_codec")
            max_pixels = min(image.max_pixels, _MAX_PIXELS)
            if codec.width * codec.height > max_pixels:
                return Failure("too_many_pixels")
            # Frames may be larger than the header says.
            codec.options = {"max_pixels": str(max_pixels)}
            codec.thread_count = 1
            return _clip(container, stream, image, filters, video)
    except Exception as error:  # a damaged file raises nearly anything in a reader
        is_cut_short = isinstance(error, EOFError) or _is_cut_short(body, reader)
        return Failure("truncated" if is_cut_short else "corrupt")


@dataclass
class _Stretch:
    """Neighbouring frames of a clip to be; `start` counts frames from the video's beginning."""

    start: int
    num_frames: int
    frames: list[bytes] = field(default_factory=list)
    phash: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether no frame is lacking."""
        return len(self.frames) == self.num_frames

    def add(self, data: bytes, pixels: Pixels) -> None:
        """Takes the next frame, if one is lacking."""
        if self.is_full:
            return
        if len(self.frames) == self.num_frames // 2:
            self.phash = perceptual_hash(pixels)
        self.frames.append(data)


def _clip(
    container: "InputContainer", stream: "VideoStream", image: ImageConfig, filters: FiltersConfig, video: VideoConfig
) -> Clip | Failure:
    first = stretch = _Stretch(0, video.num_frames)
    renderer: Renderer | None = None
    for index, (frame, is_cut) in enumerate(iter_shown(container, stream, video)):
        if renderer is None:
            # Only the first frame tells the shape of pixels and the rotation for certain.
            renderer = Renderer(stream, frame, image)
            if has_too_many_pixels(renderer.shown_width, renderer.shown_height, image):
                return Failure("too_many_pixels")
            if reason := size_reason(renderer.shown_width, renderer.shown_height, filters):
                return Failure(reason, outcome="filtered")
        data, pixels = renderer.render(frame)
        if is_cut:
            stretch = _Stretch(index, video.num_frames)
        if stretch is not first:
            first.add(data, pixels)
        stretch.add(data, pixels)
        if stretch.is_full:
            break
    else:
        # None is long enough, so a cut lies in the clip.
        stretch = first
    if renderer is None or not stretch.is_full:
        is_cut_short = _promised_s(container, stream) >= video.num_frames / video.fps
        return Failure("truncated") if is_cut_short else Failure("too_short", outcome="filtered")
    width, height = renderer.stored_size
    return Clip(
        frames=tuple(stretch.frames),
        format=image.format,
        width=width,
        height=height,
        original_width=renderer.shown_width,
        original_height=renderer.shown_height,
        fps=video.fps,
        start_s=stretch.start / video.fps,
        duration_s=video.num_frames / video.fps,
        phash=stretch.phash,
    )


def _reader(body: bytes) -> str | None:
    """Returns libavformat's name of what reads a file that begins so, if it is a video's."""
    if body[4:8] in _BOXES:
        return None if body[4:8] == b"ftyp" and body[8:12] in _STILL_BRANDS else "mov"
    if body[:4] == b"RIFF" and body[8:12] == b"AVI ":
        return "avi"
    # A transport stream is packets of 188 bytes that begin with G, or of 192, and then the G is the fifth.
    if any(body[at : at + 2 * step + 1 : step] == b"GGG" for at, step in ((0, 188), (4, 192))):
        return "mpegts"
    return next((reader for start, reader in _SIGNATURES.items() if body.startswith(start)), None)


def _refuse(url: str, flags: int, options: object) -> None:
    raise PermissionError(f"a video asked for {url}")


def _video_stream(container: "InputContainer") -> "VideoStream | None":
    """Returns the stream that a player shows, and turns the others off; covers of albums are none."""
    from av.stream import Discard, Disposition

    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        return None
    best = container.streams.best("video")
    shown = next((stream for stream in streams if stream is best), streams[0])
    for stream in container.streams:
        if stream is not shown:
            stream.discard = Discard.all
    return shown


def _promised_s(container: "InputContainer", stream: "VideoStream") -> float:
    """Returns how long the header says that the video is."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1_000_000


def _is_cut_short(body: bytes, reader: str) -> bool:
    """Returns whether a file says that there is more of it; some formats can't."""
    if reader == "avi":
        return int.from_bytes(body[4:8], "little") + 8 > len(body)
    at = 0
    while reader == "mov" and at < len(body):
        size = int.from_bytes(body[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(body[at + 8 : at + 16], "big")
        if size < 8:  # 0: to the end of the file
            return False
        at += size
    return at > len(body)
