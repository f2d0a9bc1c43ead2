"""Pictures that are given: to be made finer, partly anew, or changed.

Legend: r side of a resolution in pixels.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.failure import Failure
from pipelines.data.pictures.decode import decode
from pipelines.sample.config import SampleConfig
from pipelines.train.ingest.decode import decode_square

_AS_IT_IS = ImageConfig(resize="none", format="png")
_ANY = FiltersConfig(min_side_px=0, max_aspect=1e9)


@dataclass(frozen=True)
class Edit:
    """A picture, and what every caption makes of it."""

    kind: Literal["upscale", "inpaint", "image_to_image"]
    picture: Tensor
    """(3, r, r) in [-1, 1]: at the finest resolution, but for `upscale`, at a smaller one."""
    mask: Tensor | None = None
    """(1, r, r) bool, True = make anew; for `inpaint`."""
    strength: float = 1.0
    """How much is changed, in (0, 1]; for `image_to_image`."""


def read_edit(config: SampleConfig, resolutions: Sequence[int]) -> Edit | None:
    """Returns the picture that a configuration gives, made square and brought to a side of the network.

    Args:
        config: With one of upscale_from, inpaint and start_from, or none.
        resolutions: The network's, finest first.

    Raises:
        ConfigError: A file is missing or no picture, its size doesn't fit, or the network has nothing to make.
    """
    if config.upscale_from:
        data, size = _read("upscale_from", config.upscale_from)
        return Edit("upscale", _as_tensor(decode_square(data, _side_to_upscale(min(size), resolutions))))
    if config.inpaint:
        data, size = _read("inpaint", config.inpaint)
        mask_data, mask_size = _read("mask", config.mask)
        if mask_size != size:
            raise ConfigError(
                f"mask={config.mask} is {_sides(mask_size)} px and inpaint={config.inpaint} is {_sides(size)} px; "
                "give a mask of the picture's size"
            )
        mask = torch.from_numpy(decode_square(mask_data, resolutions[0]).mean(axis=2) >= 128)[None]
        if not mask.any():
            raise ConfigError(f"mask={config.mask} has nothing white in its middle square; white is made anew")
        return Edit("inpaint", _as_tensor(decode_square(data, resolutions[0])), mask=mask)
    if config.start_from:
        data, _ = _read("start_from", config.start_from)
        return Edit("image_to_image", _as_tensor(decode_square(data, resolutions[0])), strength=config.strength)
    return None


def _side_to_upscale(side: int, resolutions: Sequence[int]) -> int:
    """The side itself where it is one of the network's; else the next smaller one, or the smallest."""
    if len(resolutions) == 1:
        raise ConfigError(
            f"upscale_from needs a network of several resolutions; this one makes {resolutions[0]} px alone"
        )
    return next((one for one in resolutions[1:] if one <= side), resolutions[-1])


def _read(field: str, uri: str) -> tuple[bytes, tuple[int, int]]:
    """A picture as PNG in sRGB, upright and without transparency, and its width and height."""
    try:
        body = storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{field}={uri} is not a file; give a picture") from error
    except OSError as error:
        raise ConfigError(f"{field}={uri} can't be read: {storage.one_line(error)}; give a picture") from error
    found = decode(body, _AS_IT_IS, _ANY)
    if isinstance(found, Failure):
        raise ConfigError(f"{field}={uri} can't be read as a picture ({found.reason}); give a PNG, JPEG or WebP file")
    with Image.open(io.BytesIO(found.data)) as picture:
        return found.data, picture.size


def _as_tensor(picture: NDArray[np.uint8]) -> Tensor:
    """(r, r, 3) in 0 to 255 -> (3, r, r) in [-1, 1]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"
