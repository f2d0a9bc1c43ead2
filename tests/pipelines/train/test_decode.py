"""The square that is trained on, against Pillow and known pictures."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from mdm_core.pyramid import build_pyramid
from pipelines.train.ingest.decode import decode_square

Pixels = NDArray[np.uint8]


def encode(pixels: Pixels, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def psnr(a: Pixels, b: Pixels) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def by_pillow(image: bytes, side: int, left: int, top: int) -> Pixels:
    """Decoded at its full size, cut to a square, and averaged where it is whole times larger, else resized."""
    with Image.open(io.BytesIO(image)) as picture:
        square = min(picture.size)
        cut = picture.convert("RGB").crop((left, top, left + square, top + square))
    return np.asarray(cut.resize((side, side), Image.Resampling[("BICUBIC" if square % side else "BOX")]))


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(("crop", "begins"), [(None, 8), (0.0, 0), (0.5, 8), (0.999, 16), (0.3, 5)])
def test_a_square_is_cut_where_it_is_asked_for(crop: float | None, begins: int, upright: bool) -> None:
    """Of the 17 squares along 24 pixels, 0.3 is the sixth, and the middle one the ninth."""
    wide = np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8)
    image = encode(wide.transpose(1, 0, 2) if upright else wide, "PNG")
    wanted = wide[:, begins : begins + 8]
    found = decode_square(image, 8, crop=crop)
    np.testing.assert_array_equal(found.transpose(1, 0, 2) if upright else found, wanted)


def test_all_squares_are_as_likely() -> None:
    wide = np.zeros((2, 5, 3), dtype=np.uint8)
    wide[:, :, 0] = np.arange(5)
    image = encode(wide, "PNG")
    begins = [int(decode_square(image, 2, crop=(number + 0.5) / 400)[0, 0, 0]) for number in range(400)]
    assert [begins.count(value) for value in range(4)] == [100] * 4


@pytest.mark.parametrize("shape", [(512, 512), (400, 512), (401, 333), (511, 300)])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize("crop", [None, 0.77])
def test_a_small_stage_sees_what_full_decoding_gives(shape: tuple[int, int], side: int, crop: float | None) -> None:
    height, width = shape
    image = encode(data.astronaut()[:height, :width], "JPEG", quality=92)
    square = min(shape)
    left, top = (
        (length - square) // 2 if crop is None else int(crop * (length - square + 1)) for length in (width, height)
    )
    if square % side == 0:
        # Decoded at a part of its size, what is averaged begins at a whole pixel of it.
        times = square // side
        part = max(part for part in (1, 2, 4, 8) if part == 1 or (times >= 2 * part and times % part == 0))
        left, top = left // part * part, top // part * part
    assert psnr(decode_square(image, side, crop=crop), by_pillow(image, side, left, top)) > 35


@pytest.mark.parametrize("side", [100, 256, 300])
def test_decoding_at_full_size_equals_pillow(side: int) -> None:
    image = encode(data.astronaut()[:256, :300], "JPEG", quality=92)
    assert psnr(decode_square(image, side), by_pillow(image, side, 22, 0)) > 45


def test_what_is_averaged_is_what_the_pyramid_of_a_later_stage_shows() -> None:
    image = encode(data.astronaut()[:96, :120], "PNG")
    fine = torch.from_numpy(decode_square(image, 96)).permute(2, 0, 1)[None].float()
    levels = build_pyramid(fine, (96, 48, 16))
    for side, level in zip((96, 48, 16), levels, strict=True):
        found = torch.from_numpy(decode_square(image, side)).permute(2, 0, 1)[None].float()
        assert (found - level).abs().max() <= 0.5


def test_other_formats_and_colours_are_decoded() -> None:
    picture = data.astronaut()[:64, :64]
    np.testing.assert_array_equal(decode_square(encode(picture, "PNG"), 64), picture)
    np.testing.assert_array_equal(decode_square(encode(picture, "WEBP", lossless=True), 64), picture)
    grey = picture[..., 1]
    np.testing.assert_array_equal(decode_square(encode(grey, "PNG"), 64), np.stack([grey] * 3, axis=2))
    assert psnr(decode_square(encode(grey, "JPEG", quality=95), 64), np.stack([grey] * 3, axis=2)) > 35
    buffer = io.BytesIO()
    Image.fromarray(picture).convert("CMYK").save(buffer, "JPEG", quality=95)
    assert psnr(decode_square(buffer.getvalue(), 64), picture) > 30


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_a_damaged_file_is_an_error(image_format: str) -> None:
    image = encode(data.astronaut()[:64, :64], image_format)
    with pytest.raises((ValueError, OSError)):
        decode_square(image[: len(image) // 2], 16)
