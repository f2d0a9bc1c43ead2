import io
import math
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import numpy.typing as npt
import pytest
import skimage
from PIL import Image, ImageCms, ImageOps

from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.failure import Failure
from pipelines.data.pictures.decode import Picture, decode, target_size
from tests.pipelines.data import odd_files
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
    """Returns what Pillow alone makes of a file: all of it decoded, then one bicubic resize."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    return np.asarray(upright.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), np.float64)


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


@pytest.mark.parametrize("name", FORMATS)
def test_file_cut_short_is_a_failure(name: str) -> None:
    body = FORMATS[name]
    for length in (len(body) // 4, len(body) // 2, len(body) * 9 // 10):
        failure = decode(body[:length], EXACT, ALL)
        assert isinstance(failure, Failure)
        assert failure.reason in ("truncated", "corrupt", "not_an_image")
    assert isinstance(decode(FORMATS["jpeg"][:-2], EXACT, ALL), Failure)


def test_stray_bytes_in_a_jpeg_do_no_harm() -> None:
    body = FORMATS["jpeg"]
    assert np.array_equal(stored(body[:-2] + bytes(50) + body[-2:]), stored(body))
    assert np.array_equal(stored(body + b"trailing"), stored(body))


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


@pytest.mark.parametrize("size", [(900, 2), (2, 900)])
def test_a_strip_is_not_enlarged_without_limit(size: tuple[int, int]) -> None:
    body = encode(Image.new("RGB", size, "red"), "PNG")
    fits = ImageConfig(size_px=64, upscale=True, max_pixels=28_800 * 64)
    assert decode(body, fits.model_copy(update={"max_pixels": 28_800 * 64 - 1}), ALL) == Failure("too_many_pixels")
    picture = decode(body, fits, ALL)
    assert isinstance(picture, Picture)
    assert sorted((picture.width, picture.height)) == [64, 28_800]


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


def test_scaled_decoding_shifts_nothing() -> None:
    # A size that doesn't divide by eight: the last pixels of a half or a quarter lie partly outside.
    body = encode(draw_picture(3, 1497, 1003), quality=95)
    for size_px in (230, 110, 50):
        pixels = stored(body, ImageConfig(size_px=size_px, format="png"))
        assert psnr(pixels, reference(body, pixels.shape[1], pixels.shape[0])) > 45


@pytest.mark.parametrize(("image_format", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"),
                                                    ("WEBP", "RGB")])  # fmt: skip
def test_source_keeps_the_very_bytes(image_format: str, mode: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"icc_profile": srgb} if mode == "RGB" else {}
    body = encode(draw_picture(1, 90, 60).convert(mode), image_format, **options)
    picture = decode(body, ImageConfig(format="source"), ALL)
    assert isinstance(picture, Picture)
    assert picture.data == body
    assert picture.format == image_format.lower()
    assert (picture.width, picture.height, picture.original_width, picture.original_height) == (90, 60, 90, 60)
    again = decode(body, EXACT.model_copy(update={"size_px": 256}), ALL)
    assert isinstance(again, Picture)
    assert picture.phash == again.phash


def changed() -> dict[str, tuple[bytes, str]]:
    """Files that can't be stored as they came, and the format in which they are."""
    small, exif = draw_picture(1, 90, 60), Image.Exif()
    exif[0x0112] = 3
    grey = small.convert("L")
    several = {"save_all": True, "append_images": [draw_picture(2, 90, 60)]}
    return {
        "too large": (FORMATS["jpeg"], "jpeg"),
        "too large webp": (FORMATS["webp"], "webp"),
        "upside down jpeg": (encode(small, exif=exif), "jpeg"),
        "upside down webp": (encode(small, "WEBP", exif=exif), "webp"),
        "profile": (encode(small, icc_profile=odd_files.rgb_profile(odd_files.P3_XYZ, 1.8)), "jpeg"),
        "grey profile": (encode(grey, icc_profile=odd_files.grey_profile(1.0)), "jpeg"),
        "inks": (encode(small.convert("CMYK")), "jpeg"),
        "several": (encode(small.copy(), "MPO", **several), "jpeg"),
        "animated": (encode(small, "WEBP", **several), "webp"),
        "animated png": (encode(small, "PNG", **several), "png"),
        "clear png": (encode(small.convert("RGBA"), "PNG"), "png"),
        "clear webp": (encode(Image.new("RGBA", (90, 60), (9, 9, 9, 9)), "WEBP"), "webp"),
        "palette": (encode(small.convert("P"), "PNG"), "png"),
        "deep": (encode(grey.convert("I;16"), "PNG"), "png"),
        "deep colours": (odd_files.png(16, 16, 16, 2, [bytes(range(96))] * 16), "png"),
        "gif": (encode(small, "GIF"), "png"),
        "bmp": (encode(small, "BMP"), "png"),
        "tiff": (encode(small, "TIFF"), "png"),
        "avif": (encode(small, "AVIF"), "png"),
    }


@pytest.mark.parametrize("name", changed())
def test_source_changes_what_it_must(name: str) -> None:
    body, image_format = changed()[name]
    picture = decode(body, ImageConfig(format="source"), ALL)
    assert isinstance(picture, Picture)
    assert picture.data != body
    assert picture.format == image_format
    opened = Image.open(io.BytesIO(picture.data))
    assert (opened.format, opened.mode, opened.size) == (image_format.upper(), "RGB", (picture.width, picture.height))
    assert not {"icc_profile", "exif", "transparency"} & set(opened.info)
    assert getattr(opened, "n_frames", 1) == 1
    exact = stored(body, ImageConfig(format="png"))
    assert psnr(np.asarray(opened, np.float64), exact) > (100 if image_format == "png" else 30)


def test_format_is_the_one_that_is_stored() -> None:
    for image_format in ("jpeg", "webp", "png"):
        picture = decode(FORMATS["gif"], ImageConfig.model_validate({"format": image_format}), ALL)
        assert isinstance(picture, Picture)
        assert picture.format == image_format == str(Image.open(io.BytesIO(picture.data)).format).lower()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
@pytest.mark.parametrize("size_px", [64, 256, 512])
def test_perceptual_hash_is_that_of_the_whole_picture(image_format: str, size_px: int) -> None:
    photo = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB")
    picture = decode(encode(photo, image_format), ImageConfig(size_px=size_px), ALL)
    assert isinstance(picture, Picture)
    assert picture.phash is not None
    different = (picture.phash & (2**64 - 1)) ^ int(str(imagehash.phash(photo)), 16)
    assert different.bit_count() <= 2


def test_flat_picture_has_no_perceptual_hash() -> None:
    picture = decode(encode(Image.new("RGB", (300, 300), "red")), EXACT, ALL)
    assert isinstance(picture, Picture)
    assert picture.phash is None


def test_threads_do_not_get_in_one_anothers_way() -> None:
    bodies = [encode(draw_picture(number, 900 + 8 * number, 600)) for number in range(8)] * 4
    one_by_one = [decode(body, EXACT, ALL) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda body: decode(body, EXACT, ALL), bodies)) == one_by_one
    assert len({picture.data for picture in one_by_one if isinstance(picture, Picture)}) == 8
