"""Files cut short are never stored, and nothing that is done to a file's bytes breaks more than that file."""

import functools
import io
from typing import Any

import numpy as np
import pillow_heif
import pytest
import simplejpeg
from PIL import Image

from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.failure import Failure
from pipelines.data.pictures.decode import Picture, decode
from tests.pipelines.data import odd_files
from tests.pipelines.data.picture_server import draw_picture, encode
from tests.pipelines.data.shown import tiff

# As the workers do: Pillow warns of odd metadata that does not touch the pixels.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
pillow_heif.register_heif_opener(thumbnails=False)

ALL = FiltersConfig(min_side_px=0, max_aspect=1e9)
SMALL = ImageConfig(size_px=32, format="png", max_pixels=1_000_000)
REASONS = {"truncated", "corrupt", "not_an_image", "too_many_pixels", "too_many_parts"}

PICTURE = draw_picture(5, 120, 90)


def several(image_format: str, **options: Any) -> bytes:
    # New ones each time, as saving leaves something in a picture that other formats stumble over.
    others = [draw_picture(number, 120, 90) for number in (6, 7)]
    return encode(PICTURE.copy(), image_format, save_all=True, append_images=others, **options)


@functools.cache
def files() -> dict[str, bytes]:
    grey, inks, clear = PICTURE.convert("L"), PICTURE.convert("CMYK"), PICTURE.convert("RGBA")
    pixels = np.asarray(PICTURE)
    return {
        "jpeg": encode(PICTURE),
        "progressive jpeg": encode(PICTURE, progressive=True),
        "grey jpeg": encode(grey),
        "cmyk jpeg": encode(inks),
        "progressive cmyk jpeg": encode(inks, progressive=True),
        "jpeg with restarts": encode(PICTURE, restart_marker_rows=1),
        "several jpegs": several("MPO"),
        "png": encode(clear, "PNG"),
        "interlaced png": odd_files.png(8, 8, 8, 0, [bytes(8)] * 8),
        "animated png": several("PNG"),
        "webp": encode(PICTURE, "WEBP"),
        "lossless webp": encode(clear, "WEBP", lossless=True),
        "animated webp": several("WEBP"),
        "gif": encode(PICTURE, "GIF"),
        "animated gif": several("GIF"),
        "tiff": encode(PICTURE, "TIFF"),
        "lzw tiff": encode(PICTURE, "TIFF", compression="tiff_lzw"),
        "jpeg tiff": encode(PICTURE, "TIFF", compression="jpeg"),
        "tiles": tiff(pixels, photometric="rgb", tile=(32, 32), compression="zlib", predictor=True),
        "pages": tiff(np.stack([pixels, pixels // 2]), photometric="rgb", compression="zlib"),
        "big tiff": tiff(pixels, photometric="rgb", bigtiff=True),
        "floats": tiff(np.asarray(grey, np.float32), photometric="minisblack"),
        "avif": encode(PICTURE, "AVIF"),
        "animated avif": several("AVIF"),
        "heic": encode(PICTURE, "HEIF"),
        "jpeg 2000": encode(PICTURE, "JPEG2000"),
        "lossy jpeg 2000": encode(PICTURE, "JPEG2000", irreversible=True, quality_layers=[40, 10]),
        "jpeg 2000 codestream": encode(PICTURE, "JPEG2000", no_jp2=True),
        "bmp": encode(PICTURE, "BMP"),
        "palette bmp": encode(PICTURE.convert("P"), "BMP"),
        "bmp in runs": odd_files.bmp(8, 2, 8, 1, bytes([8, 1, 0, 0, 8, 0, 0, 1]), bytes(8)),
    }


def outcome(body: bytes) -> Picture | Failure:
    """Decodes, and sees that a picture is one of the size that it is said to be."""
    found = decode(body, SMALL, ALL)
    if isinstance(found, Picture):
        with Image.open(io.BytesIO(found.data)) as stored:
            assert (stored.size, stored.mode) == ((found.width, found.height), "RGB")
            assert min(found.width, found.height) == min(32, found.original_width, found.original_height)
    else:
        assert found.reason in REASONS
        assert (found.outcome, found.retryable) == ("failed", False)
    return found


@pytest.mark.parametrize("name", files())
def test_file_cut_short_is_a_failure(name: str) -> None:
    body = files()[name]
    assert isinstance(outcome(body), Picture)
    lengths = {len(body) * part // 20 for part in range(20)} | {len(body) - left for left in (1, 2, 3, 8)}
    kept = {length for length in lengths if isinstance(outcome(body[:length]), Picture)}
    # Servers leave out the pictures that cameras put after the first one, and only that one is shown.
    first = body.index(b"\xff\xd9\xff\xd8") + 2 if name == "several jpegs" else len(body)
    assert kept == {length for length in lengths if length >= first}


@pytest.mark.parametrize("name", files())
def test_random_damage_breaks_nothing_else(name: str) -> None:
    body = files()[name]
    rng = np.random.default_rng(len(body))
    for trial in range(60):
        damaged = bytearray(body)
        # Half the time in the header, where there is most to break.
        end = len(body) if trial % 2 else min(len(body), 200)
        for at in rng.integers(0, end, 1 + trial // 10):
            damaged[at] = rng.integers(0, 256)
        outcome(bytes(damaged))


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "gif", "tiff", "avif", "heic", "jpeg 2000", "bmp"])
def test_file_with_a_middle_missing_or_twice(name: str) -> None:
    body = files()[name]
    rng = np.random.default_rng(1)
    for _ in range(20):
        first, last = sorted(rng.integers(0, len(body), 2).tolist())
        outcome(body[:first] + body[last:])
        outcome(body[:last] + body[first:])
        outcome(body[:first] + bytes(last - first) + body[last:])


@pytest.mark.parametrize("name", [name for name in files() if "png" in name])
def test_checksums_are_looked_at(name: str) -> None:
    for at in np.random.default_rng(0).integers(8, len(files()[name]) - 12, 20):
        body = bytearray(files()[name])
        body[at] ^= 0x55
        assert isinstance(outcome(bytes(body)), Failure)


def test_scans_that_are_missing_leave_no_blurred_picture() -> None:
    # Ended in order, with a marker, after the first scans of a progressive JPEG.
    body = files()["progressive jpeg"]
    scans = [at for at in range(len(body)) if body[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 4
    for at in scans[1:4]:
        cut = decode(body[:at], SMALL, ALL)
        assert cut == Failure("truncated")


def test_jpeg_whose_pixels_end_too_soon_is_a_failure_though_it_says_it_ended() -> None:
    body = simplejpeg.encode_jpeg(np.asarray(PICTURE), quality=90)
    for part in (3, 5, 9):
        found = outcome(body[: len(body) * part // 10] + b"\xff\xd9")
        assert isinstance(found, Failure)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>no</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        bytes(1000),
        b"\xff\xd8",
        b"RIFF\0\0\0\0WAVE",
        b"\0\0\0\x18ftypmp42\0\0\0\0isommp42",
        encode(PICTURE, "ICO"),
        encode(PICTURE, "PPM"),
        encode(PICTURE, "TGA"),
    ],
)
def test_what_is_not_read_here_is_not_opened(body: bytes) -> None:
    assert decode(body, SMALL, ALL) == Failure("not_an_image")


def test_heic_without_its_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.pictures.decode._has_heif", lambda: False)
    assert decode(files()["heic"], SMALL, ALL) == Failure("heif_not_installed")
