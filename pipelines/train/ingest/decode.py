"""From a stored picture to the square that is trained on."""

import io
from math import ceil

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.pictures.decode import jpeg_factor, jpeg_pixels
from pipelines.data.pictures.resize import resize

_JPEG_BEGINS = b"\xff\xd8"


def decode_square(image: bytes, side: int, *, crop: float | None = None) -> NDArray[np.uint8]:
    """Returns a square of an encoded picture, as large as fits, at `side` px.

    A JPEG is decoded at a half, a quarter or an eighth of its size where that leaves twice the side wanted. A square
    that is a whole number of times larger is averaged, as the network's pyramid averages the pictures of a later stage,
    so that both see the same; any other is resized with antialiasing (`pipelines.data.pictures.resize`).

    Args:
        image: The file.
        side: Width and height wanted.
        crop: Which of the squares along the longer side, evenly: a number in [0, 1). None is the middle one.

    Returns:
        (side, side, 3).

    Raises:
        ValueError or OSError: The file is damaged.
    """
    if image.startswith(_JPEG_BEGINS):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if colours != "CMYK":
            square = min(width, height)
            factor = jpeg_factor((square, square), (side, side))
            while square % side == 0 and square % (factor * side):
                factor //= 2
            pixels = jpeg_pixels(image, (width, height), factor, lasts=False)
            return _square(pixels, (width, height), factor, side, crop)
    with Image.open(io.BytesIO(image)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return _square(pixels, picture.size, 1, side, crop)


def _square(
    pixels: NDArray[np.uint8], size: tuple[int, int], factor: int, side: int, crop: float | None
) -> NDArray[np.uint8]:
    """A square of a picture of `size` that was made `factor` times smaller, brought to `side`."""
    square = min(size)
    begins = [(length - square) // 2 if crop is None else int(crop * (length - square + 1)) for length in size]
    (left, shift_x), (top, shift_y) = ((begin // factor, begin % factor / factor) for begin in begins)
    if square % (factor * side) == 0:
        # Whole pixels are averaged: the square begins at most half a pixel of the result earlier.
        times = square // (factor * side)
        return _averaged(pixels[top : top + side * times, left : left + side * times], times)
    # What lies beyond the square is left out: it costs time, and is seen at the edges by at most a pixel.
    scaled = square / factor
    cut = pixels[top : top + ceil(shift_y + scaled), left : left + ceil(shift_x + scaled)]
    return resize(cut, (side, side), (shift_x, shift_y, shift_x + scaled, shift_y + scaled))


def _averaged(pixels: NDArray[np.uint8], times: int) -> NDArray[np.uint8]:
    """Pixels of both sides `times` longer, rounded once."""
    if times == 1:
        return pixels.copy()
    side = len(pixels) // times
    rows = pixels.reshape(side, times, side * times * 3).sum(axis=1, dtype=np.uint32)
    sums = rows.reshape(side, side, times, 3).sum(axis=2, dtype=np.uint32)
    return ((sums + times * times // 2) // (times * times)).astype(np.uint8)
