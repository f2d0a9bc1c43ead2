"""How a clip's frames look: turned, stretched, coloured and stored as the video is shown."""

import io
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mdm_core.errors import ConfigError
from pipelines.data.config import FiltersConfig, ImageConfig, VideoConfig
from pipelines.data.failure import Failure
from pipelines.data.pictures.phash import perceptual_hash
from pipelines.data.pictures.video import decode_clip
from tests.pipelines.data.videos import EXACT, FROM_START, PHOTO, clip_of, make_stretched, make_video, pixels_of, psnr

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
