import io
import math
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms, ImageOps

from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.decode import Picture, decode, target_size
from pipelines.data.fetch import Failure
from tests.pipelines.data.picture_server import draw_picture, encode

ALL = FiltersConfig(min_side_px=0, max_aspect=1000)
EXACT = ImageConfig(size_px=64, format="png")


def stored(body: bytes, image: ImageConfig = EXACT) -> npt.NDArray[np.float64]:
    """Returns the pixels that are stored for a file."""
    picture = decode(body, image, ALL)
    assert isinstance(picture, Picture), picture
    pixels = np.asarray(Image.open(io.BytesIO(picture.data)), np.float64)
    assert pixels.shape == (picture.height, picture.width, 3)
    return pixels


def reference(body: bytes, width: int, height: int) -> npt.NDArray[np.float64]:
    """Returns what Pillow alone makes of a file: all of it decoded, then one Lanczos resize."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    return np.asarray(upright.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), np.float64)


def psnr(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return 10 * math.log10(255**2 / max(1e-12, float(np.mean((a - b) ** 2))))


PICTURE = draw_picture(7, 900, 600)
FORMATS = {
    "jpeg": encode(PICTURE),
    "progressive": encode(PICTURE, progressive=True),
    "grey jpeg": encode(PICTURE.convert("L")),
    "cmyk jpeg": encode(PICTURE.convert("CMYK")),
    "png": encode(PICTURE, "PNG"),
    "palette png": encode(PICTURE.convert("P"), "PNG"),
    "bits png": encode(PICTURE.convert("1"), "PNG"),
    "webp": encode(PICTURE, "WEBP"),
    "gif": encode(PICTURE, "GIF"),
    "bmp": encode(PICTURE, "BMP"),
    "tiff": encode(PICTURE, "TIFF"),
    "avif": encode(PICTURE, "AVIF"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_picture_equals_what_pillow_makes_of_it(name: str) -> None:
    pixels = stored(FORMATS[name])
    assert pixels.shape == (64, 96, 3)
    assert psnr(pixels, reference(FORMATS[name], 96, 64)) > 40


@pytest.mark.parametrize("name", [name for name in FORMATS if "bmp" not in name])
def test_file_cut_short_is_a_failure(name: str) -> None:
    body = FORMATS[name]
    for length in (len(body) // 4, len(body) // 2, len(body) * 9 // 10):
        failure = decode(body[:length], EXACT, ALL)
        assert isinstance(failure, Failure)
        assert failure.reason in ("truncated", "corrupt", "not_an_image")
    assert isinstance(decode(FORMATS["jpeg"][:-2], EXACT, ALL), Failure)


@pytest.mark.parametrize("name", ["png", "palette png", "bits png"])
def test_damaged_file_with_checksums_is_a_failure(name: str) -> None:
    for at in np.random.default_rng(0).integers(60, len(FORMATS[name]) - 20, 20):
        body = bytearray(FORMATS[name])
        body[at] ^= 0xFF
        assert isinstance(decode(bytes(body), EXACT, ALL), Failure)


def test_stray_bytes_in_a_jpeg_do_no_harm() -> None:
    body = FORMATS["jpeg"]
    assert np.array_equal(stored(body[:-2] + bytes(50) + body[-2:]), stored(body))
    assert np.array_equal(stored(body + b"trailing"), stored(body))


@pytest.mark.parametrize("body", [b"", b"<html>no</html>", b"\xff\xd8", b"%!PS-Adobe-3.0 EPSF-3.0", bytes(1000)])
def test_what_is_no_picture_is_not_decoded(body: bytes) -> None:
    assert decode(body, EXACT, ALL) == Failure("not_an_image")


def test_icons_are_not_opened_as_they_would_be_decoded_at_once() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(buffer, "ICO")
    assert decode(buffer.getvalue(), EXACT, ALL) == Failure("not_an_image")


def test_a_picture_that_its_format_cannot_hold_is_a_failure() -> None:
    buffer = io.BytesIO()
    Image.new("L", (16_400, 8)).save(buffer, "PNG")
    wide = ImageConfig(resize="none", format="webp")
    everything = FiltersConfig(min_side_px=0, max_aspect=1e6)
    assert decode(buffer.getvalue(), wide, everything) == Failure("corrupt")


def test_header_is_checked_before_anything_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    assert decode(bomb, EXACT, ALL) == Failure("too_many_pixels")
    assert decode(FORMATS["jpeg"], ImageConfig(max_pixels=900 * 600 - 1), ALL) == Failure("too_many_pixels")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_orientation_is_applied(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encode(PICTURE, image_format, exif=exif)
    width, height = (96, 64) if orientation < 5 else (64, 96)
    pixels = stored(body)
    assert pixels.shape == (height, width, 3)
    assert psnr(pixels, reference(body, width, height)) > 40
    picture = decode(body, EXACT, ALL)
    assert isinstance(picture, Picture)
    assert (picture.original_width, picture.original_height) == ((900, 600) if orientation < 5 else (600, 900))


def test_what_is_transparent_lies_on_white() -> None:
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    pixels = stored(encode(half, "PNG"))
    assert pixels[32, 4].tolist() == [255, 255, 255]
    assert pixels[32, 60].tolist() == [255, 127, 127]


def test_sixteen_bits_are_scaled() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    pixels = stored(encode(Image.fromarray(ramp), "PNG"))
    assert np.abs(pixels[0, :, 0] - np.linspace(0, 255, 64)).max() < 1
    floats = stored(encode(Image.fromarray(ramp.astype(np.float32) / 65535), "TIFF"))
    assert np.abs(floats[0, :, 0] - np.linspace(0, 255, 64)).max() < 1


def test_first_frame_of_an_animation_is_stored() -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for image_format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if image_format == "WEBP" else {}
        body = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        assert stored(body)[10, 10].tolist() == [255, 0, 0]


def test_colours_become_srgb() -> None:
    # sRGB with red and blue exchanged: what it calls red is sRGB's blue.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = profile.replace(b"rXYZ", b"tmp.", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmp.", b"bXYZ", 1)
    exchanged = exchanged.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    linear = Image.new("RGB", (64, 64), (60, 120, 180))
    for image_format in ("PNG", "JPEG"):
        pixels = stored(encode(linear, image_format, icc_profile=exchanged))
        assert np.abs(pixels - [180, 120, 60]).max() <= 3
    assert stored(encode(linear, "PNG", icc_profile=profile))[0, 0].tolist() == [60, 120, 180]
    assert stored(encode(linear, "PNG", icc_profile=b"damaged"))[0, 0].tolist() == [60, 120, 180]


@pytest.mark.parametrize("size_px", [16, 64, 256])
def test_scaled_decoding_costs_no_quality(size_px: int) -> None:
    body = encode(draw_picture(3, 1500, 1000), quality=95)
    pixels = stored(body, ImageConfig(size_px=size_px, format="png"))
    assert psnr(pixels, reference(body, pixels.shape[1], pixels.shape[0])) > 42


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"resize": "shorter_side"}, (384, 256)),
        ({"resize": "longer_side"}, (256, 171)),
        ({"resize": "center_crop"}, (384, 256)),
        ({"resize": "none"}, (900, 600)),
        ({"size_px": 700}, (900, 600)),
        ({"size_px": 700, "upscale": True}, (1050, 700)),
    ],
)
def test_target_size(options: dict[str, object], size: tuple[int, int]) -> None:
    assert target_size(900, 600, ImageConfig.model_validate(options)) == size


def test_crop_is_the_middle_square() -> None:
    stripes = Image.new("RGB", (300, 100), "red")
    stripes.paste((0, 0, 255), (100, 0, 200, 100))
    pixels = stored(encode(stripes, "PNG"), ImageConfig(size_px=50, resize="center_crop", format="png"))
    assert pixels.shape == (50, 50, 3)
    assert np.abs(pixels[:, 2:-2] - [0, 0, 255]).max() < 8


@pytest.mark.parametrize(("image_format", "least_db"), [("jpeg", 30), ("webp", 30), ("png", 50)])
def test_stored_formats(image_format: str, least_db: float) -> None:
    image = ImageConfig.model_validate({"size_px": 64, "format": image_format})
    picture = decode(FORMATS["png"], image, ALL)
    assert isinstance(picture, Picture)
    assert Image.open(io.BytesIO(picture.data)).format == image_format.upper()
    assert psnr(stored(FORMATS["png"], image), reference(FORMATS["png"], 96, 64)) > least_db


def test_sizes_are_filtered_before_decoding() -> None:
    body = FORMATS["jpeg"][:20_000]
    assert decode(body, EXACT, FiltersConfig(min_side_px=601)) == Failure("too_small", outcome="filtered")
    assert decode(body, EXACT, FiltersConfig(min_side_px=0, max_aspect=1.4)) == Failure("aspect", outcome="filtered")
