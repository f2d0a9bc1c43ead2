"""Bicubic resizing, by the vector instructions of `cykooz.resizer`, or by Pillow where there is no build of that.

The cubic is Catmull and Rom's, that of Pillow's `BICUBIC`. It takes a third less time than Lanczos, and costs the PSNR
of a stored photo, against full decoding and Lanczos, 0.4 dB at 256 px and 0.7 at 64 px.
"""

import threading
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

try:
    import cykooz_resizer
except ImportError:  # there is none for Linux on ARM
    cykooz_resizer = None

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""(height, width, channels), of 1 channel in grey, 3 in RGB or 4 in CMYK."""
_MODES = {1: "L", 3: "RGB", 4: "CMYK"}


def resize(pixels: Pixels, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Pixels:
    """Returns the picture at another size, antialiased with a cubic as wide as four pixels of the smaller size.

    Args:
        pixels: (height, width, channels), of 1, 3 or 4 channels.
        size: The width and height wanted.
        box: What part of the picture is taken: left, top, right and bottom, which need not be whole; all of it if it
            isn't given.

    Returns:
        (size[1], size[0], channels).
    """
    height, width, channels = pixels.shape
    box = box or (0, 0, width, height)
    return (_by_pillow if cykooz_resizer is None else _by_cykooz)(pixels, size, box, channels)


def _by_pillow(pixels: Pixels, size: tuple[int, int], box: tuple[float, float, float, float], channels: int) -> Pixels:
    height, width = pixels.shape[:2]
    picture = Image.frombytes(_MODES[channels], (width, height), pixels.tobytes())
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC, box)).reshape(size[1], size[0], channels)


class _Resizer(threading.local):
    """One a thread: it keeps memory from one picture to the next."""

    def __init__(self) -> None:
        self.resizer = cykooz_resizer.Resizer()


if cykooz_resizer is not None:
    _bicubic = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom)
    _PIXELS = {
        1: cykooz_resizer.PixelType.U8,
        3: cykooz_resizer.PixelType.U8x3,
        4: cykooz_resizer.PixelType.U8x4,
    }
    _own = _Resizer()


def _by_cykooz(pixels: Pixels, size: tuple[int, int], box: tuple[float, float, float, float], channels: int) -> Pixels:
    height, width = pixels.shape[:2]
    left, top, right, bottom = box
    source = cykooz_resizer.ImageData(width, height, _PIXELS[channels], pixels.tobytes())
    resized = cykooz_resizer.ImageData(*size, _PIXELS[channels])
    part = cykooz_resizer.CropBox(left, top, right - left, bottom - top)
    _own.resizer.resize(source, resized, cykooz_resizer.ResizeOptions(_bicubic, use_alpha=False, crop_box=part))
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(size[1], size[0], channels)
