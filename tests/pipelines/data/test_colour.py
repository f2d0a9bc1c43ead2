"""The colours that are stored are those that a browser shows, whatever the file keeps them in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from PIL import Image

from tests.pipelines.data import odd_files
from tests.pipelines.data.picture_server import encode
from tests.pipelines.data.shown import Pixels, shown, tiff

# As the workers do: Pillow warns of odd metadata that does not touch the pixels.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
_FINE: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100},
    "HEIF": {"quality": -1},
}
pillow_heif.register_heif_opener(thumbnails=False)

COLOURS = np.array([(200, 40, 60), (30, 180, 90), (120, 120, 120), (250, 240, 20), (0, 0, 0), (255, 255, 255)])


def swatches(colours: npt.NDArray[np.int64], mode: str = "RGB") -> Image.Image:
    tall = np.repeat(np.repeat(colours[None], 16, axis=1), 16, axis=0).astype(np.uint8)
    if mode == "CMYK":
        return Image.frombytes("CMYK", (tall.shape[1], 16), tall.tobytes())
    return Image.fromarray(tall)


def swatch_values(pixels: Pixels) -> Pixels:
    return pixels[8, 8::16]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("kind", ["wide", "exchanged"])
def test_profile_of_colours(image_format: str, kind: str) -> None:
    xyz, gamma = (odd_files.P3_XYZ, 1.8) if kind == "wide" else (odd_files.SRGB_XYZ[:, ::-1], 2.2)
    profile = odd_files.rgb_profile(xyz, gamma)
    body = encode(swatches(COLOURS), image_format, icc_profile=profile, **_FINE.get(image_format, {}))
    wanted = np.stack([odd_files.srgb_of(xyz @ (colour / 255) ** gamma) for colour in COLOURS])
    assert np.abs(wanted - COLOURS).max() > 20
    assert np.abs(swatch_values(shown(body)) - wanted).max() <= (6 if image_format in ("JPEG", "AVIF") else 2)


@pytest.mark.parametrize("make", [
    lambda grey, profile: encode(grey, "JPEG", quality=100, icc_profile=profile),
    lambda grey, profile: encode(grey, "PNG", icc_profile=profile),
    lambda grey, profile: encode(Image.merge("LA", (grey, Image.new("L", grey.size, 255))), "PNG", icc_profile=profile),
    lambda grey, profile: encode(grey.convert("I;16").point(lambda value: value * 257), "PNG", icc_profile=profile),
], ids=["jpeg", "png", "with alpha", "16 bits"])  # fmt: skip
def test_profile_of_greys(make: Callable[[Image.Image, bytes], bytes]) -> None:
    greys = COLOURS[:, 0]
    wanted = np.stack([odd_files.srgb_of(odd_files.WHITE_XYZ * grey / 255) for grey in greys])
    pixels = shown(make(swatches(COLOURS).getchannel("R"), odd_files.grey_profile(1.0)))
    assert np.abs(swatch_values(pixels) - wanted).max() <= 2
    assert np.abs(wanted[:, 0] - greys).max() > 20


def test_profile_of_inks() -> None:
    orange, navy = (240, 140, 30), (20, 30, 110)
    profile = odd_files.cmyk_profile({(1, 0, 0, 0): odd_files.lab_of(orange), (0, 0, 0, 1): odd_files.lab_of(navy)})
    inks = swatches(np.array([(255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0)]), "CMYK")
    for image_format in ("JPEG", "TIFF"):
        body = encode(inks, image_format, icc_profile=profile, **_FINE.get(image_format, {}))
        pixels = swatch_values(shown(body))
        assert np.abs(pixels - [orange, navy, (255, 255, 255)]).max() <= 6


def test_profile_that_does_not_fit_is_passed_over() -> None:
    colours = swatches(COLOURS)
    too_large = odd_files.rgb_profile(odd_files.SRGB_XYZ[:, ::-1], 2.2) + bytes(5_000_000)
    for profile in (odd_files.grey_profile(1.0), odd_files.cmyk_profile({}), b"damaged", too_large):
        assert np.array_equal(swatch_values(shown(encode(colours, "TIFF", icc_profile=profile))), COLOURS)


INKS = np.array([(0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 100, 0), (50, 60, 70, 80), (0, 0, 0, 255)])
PRINTED = (255 - INKS[:, :3]) * (255 - INKS[:, 3:]) / 255


def test_inks_without_a_profile() -> None:
    for image_format in ("JPEG", "TIFF"):
        body = encode(swatches(INKS, "CMYK"), image_format, **_FINE.get(image_format, {}))
        assert np.abs(swatch_values(shown(body)) - PRINTED).max() <= 3


def test_inks_as_luminance_and_black() -> None:
    # Adobe's YCCK: the colours turned into luminance and chrominance, and black, inverted, beside them.
    luminance = np.asarray(swatches(INKS[:, :3]).convert("YCbCr"), np.int64)[8, 8::16]
    stored = np.concatenate([luminance, 255 - INKS[:, 3:]], axis=1)
    body = encode(swatches(255 - stored, "CMYK"), quality=100)
    marker = body.index(b"Adobe")
    assert body[marker + 11] == 0
    body = body[: marker + 11] + b"\x02" + body[marker + 12 :]
    assert np.abs(swatch_values(shown(body)) - PRINTED).max() <= 4


def half_clear() -> Image.Image:
    """Clear red, half clear red and red, in three columns of 16 px."""
    pixels = np.zeros((16, 48, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 255, np.repeat([0, 128, 255], 16)
    return Image.fromarray(pixels)


ON_WHITE = [(255, 255, 255), (255, 127, 127), (255, 0, 0)]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "HEIF"])
def test_what_is_half_clear_lies_on_white(image_format: str) -> None:
    pixels = shown(encode(half_clear(), image_format, **_FINE.get(image_format, {})))
    assert np.abs(swatch_values(pixels) - ON_WHITE).max() <= 4


def test_clear_colours_of_palettes_and_single_clear_colours() -> None:
    palette = odd_files.chunk(b"PLTE", bytes([255, 0, 0] * 3 + [0, 0, 255]))
    alphas = odd_files.chunk(b"tRNS", bytes([0, 128]))
    row = bytes(np.repeat([0, 1, 2, 3], 16).astype(np.uint8))
    pixels = shown(odd_files.png(64, 16, 8, 3, [row] * 16, palette, alphas))
    assert swatch_values(pixels).tolist() == [*map(list, ON_WHITE), [0, 0, 255]]
    grey = [bytes(np.repeat([10, 90], 16).astype(np.uint8))] * 16
    pixels = shown(odd_files.png(32, 16, 8, 0, grey, odd_files.chunk(b"tRNS", b"\0\x0a")))
    assert swatch_values(pixels).tolist() == [[255] * 3, [90] * 3]
    pixels = shown(odd_files.png(16, 16, 1, 0, [b"\x00\xff"] * 16, odd_files.chunk(b"tRNS", b"\0\0")))
    assert pixels[8, [4, 12]].tolist() == [[255] * 3, [255] * 3]
    rgb = [bytes([9, 8, 7] * 16 + [9, 8, 6] * 16)] * 16
    pixels = shown(odd_files.png(32, 16, 8, 2, rgb, odd_files.chunk(b"tRNS", bytes([0, 9, 0, 8, 0, 7]))))
    assert swatch_values(pixels).tolist() == [[255] * 3, [9, 8, 6]]


DEEP = np.array([0, 1_000, 20_000, 40_000, 65_535], np.uint16)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_of_png(channels: int) -> None:
    values = np.repeat(np.repeat(DEEP[:, None], 16, axis=0), channels, axis=1).astype(">u2")
    if channels in (2, 4):
        values[:, -1] = 65535
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    pixels = swatch_values(shown(odd_files.png(80, 16, 16, colour, [values.tobytes()] * 16)))
    assert np.abs(pixels - DEEP[:, None] / 257).max() <= 1


def test_single_clear_colour_of_sixteen_bits() -> None:
    grey = np.repeat(DEEP, 16).astype(">u2").tobytes()
    clear = odd_files.chunk(b"tRNS", (20_000).to_bytes(2, "big"))
    pixels = swatch_values(shown(odd_files.png(80, 16, 16, 0, [grey] * 16, clear)))
    assert np.abs(pixels[:, 0] - [0, 4, 255, 156, 255]).max() <= 1


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (RAMP.astype(np.float32), RAMP * 255),
        ((RAMP * 255).astype(np.float32), RAMP * 255),
        ((RAMP * 65535).astype(np.uint16), RAMP * 255),
        ((RAMP * 65535).astype(np.int32), RAMP * 255),
        ((RAMP * 2e9).astype(np.int32), RAMP * 255),
        ((RAMP * 255).astype(np.uint8), RAMP * 255),
    ],
)
def test_numbers_of_tiff(values: npt.NDArray[np.generic], wanted: Pixels) -> None:
    every: list[dict[str, Any]] = [{}, {"byteorder": ">"}, {"bigtiff": True}]
    for options in every:
        pixels = shown(tiff(values, photometric="minisblack", **options))
        assert np.abs(pixels - wanted[..., None]).max() <= 1.01


def test_lab_of_tiff() -> None:
    lab = np.array([odd_files.lab_of(colour) for colour in COLOURS.tolist()])
    stored = np.stack([lab[:, 0] * 2.55, lab[:, 1], lab[:, 2]], axis=1).round().astype(np.int64) & 0xFF
    tall = np.repeat(np.repeat(stored[None], 16, axis=1), 16, axis=0).astype(np.uint8)
    picture = Image.frombytes("LAB", (tall.shape[1], 16), tall.tobytes())
    assert np.abs(swatch_values(shown(encode(picture, "TIFF"))) - COLOURS).max() <= 8
