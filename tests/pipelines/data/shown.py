"""What is stored of a file, exactly, for tests that compare it with what the file must look like."""

import io
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.pictures.decode import Picture, decode

ALL = FiltersConfig(min_side_px=0, max_aspect=1000)
AS_IT_IS = ImageConfig(resize="none", format="png")
Pixels: TypeAlias = npt.NDArray[np.float64]


def shown(body: bytes, image: ImageConfig = AS_IT_IS) -> Pixels:
    """Returns the pixels that are stored, (height, width, 3), 0 to 255."""
    picture = decode(body, image, ALL)
    assert isinstance(picture, Picture), picture
    pixels = np.asarray(Image.open(io.BytesIO(picture.data)), np.float64)
    assert pixels.shape == (picture.height, picture.width, 3)
    return pixels


def tiff(values: npt.NDArray[np.generic], **options: Any) -> bytes:
    """Returns a TIFF as tifffile writes it."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()
