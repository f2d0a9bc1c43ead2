"""JPEGs like photographs, drawn from a seed: soft colours, sharp edges and texture, of many sizes."""

import functools
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

MEAN_MEGAPIXELS = 0.7
_SPREAD = 0.45
_ASPECTS = (4 / 3, 3 / 2, 1.0, 3 / 4, 16 / 9, 2 / 3)
_QUALITIES = (85, 86, 87, 88, 89, 90)
_GOLDEN = (math.sqrt(5) - 1) / 2
_TILE_PX = 1024
_CONTRAST = 40
_BLUR = 0.35


def photo(number: int, seed: int = 0) -> bytes:
    """A photo-like JPEG, the same for the same numbers; every fourth is progressive."""
    rng = np.random.default_rng((seed, number))
    width, height = photo_size(number)
    buffer = io.BytesIO()
    drawn = _draw(rng, width, height, seed)
    drawn.save(buffer, "JPEG", quality=_QUALITIES[number % len(_QUALITIES)], progressive=number % 4 == 3)
    return buffer.getvalue()


def photo_size(number: int) -> tuple[int, int]:
    """Width and height of a photo: log-normal in pixels, spread so evenly that a few have the mean of all."""
    # Multiples of the golden ratio fill (0, 1) evenly, however many there are.
    share = (0.5 + number * _GOLDEN) % 1.0
    z = NormalDist().inv_cdf(min(max(share, 0.005), 0.995))
    pixels = 1e6 * MEAN_MEGAPIXELS * math.exp(_SPREAD * z - _SPREAD**2 / 2)
    aspect = _ASPECTS[number * 7 % 11 % len(_ASPECTS)]
    height = math.sqrt(pixels / aspect)
    return round(height * aspect), round(height)


def write_photos(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """The files of `count` photos in `folder`; those that are there already are not drawn again."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}-{number:06d}.jpg" for number in range(count)]

    def write(number: int) -> None:
        if not paths[number].exists():
            partial = paths[number].with_suffix(".partial")
            partial.write_bytes(photo(number, seed))
            partial.rename(paths[number])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(count)))
    return paths


def tiny(number: int) -> bytes:
    """A JPEG of 64 × 48 pixels that differs from all others, if only by its comment."""
    plain = _tiny_picture()
    comment = f"number {number}".encode()
    return plain[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + plain[2:]


@functools.cache
def _tiny_picture() -> bytes:
    ramp = np.add.outer(np.arange(48) * 2, np.arange(64)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _draw(rng: np.random.Generator, width: int, height: int, seed: int) -> Image.Image:
    colours = _muted(rng, (int(rng.integers(3, 6)), int(rng.integers(3, 6))))
    half = Image.fromarray(colours).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    _draw_shapes(ImageDraw.Draw(half), rng, *half.size)
    # Edges are as soft as a lens makes them.
    picture = half.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture).astype(np.int16)
    # As in a photograph, some regions are smooth and some are full of detail.
    busy = Image.fromarray(rng.random((4, 5), dtype=np.float32) ** 2)
    strength = np.asarray(busy.resize((width, height), Image.Resampling.BICUBIC))
    texture = (_texture(rng, width, height, seed) * (0.05 + 0.95 * strength.clip(0, 1))).astype(np.int16)
    return Image.fromarray((pixels + texture[..., None]).clip(0, 255).astype(np.uint8))


def _draw_shapes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    for _ in range(int(rng.integers(6, 20))):
        red, green, blue = _muted(rng, ()).tolist()
        colour = (red, green, blue)
        x, y = float(rng.uniform(0, width)), float(rng.uniform(0, height))
        reach = float(rng.uniform(0.02, 0.2)) * min(width, height)
        if rng.random() < 0.5:
            draw.ellipse((x - reach, y - reach, x + reach, y + reach * float(rng.uniform(0.3, 1))), fill=colour)
        else:
            corners = rng.uniform(-reach, reach, (int(rng.integers(3, 7)), 2))
            draw.polygon([(x + float(u), y + float(v)) for u, v in corners], fill=colour)


def _muted(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Colours, more grey than not, as those of photographs are."""
    grey, colour = rng.uniform(20, 235, (*shape, 1)), rng.uniform(0, 255, (*shape, 3))
    return (0.65 * grey + 0.35 * colour).astype(np.uint8)


def _texture(rng: np.random.Generator, width: int, height: int, seed: int) -> npt.NDArray[Any]:
    """A cut of the tile, repeated where it is too small."""
    rows = (np.arange(height) + rng.integers(_TILE_PX)) % _TILE_PX
    columns = (np.arange(width) + rng.integers(_TILE_PX)) % _TILE_PX
    return _tile(seed)[rows[:, None], columns]


@functools.cache
def _tile(seed: int) -> npt.NDArray[np.float32]:
    """Noise whose amplitude falls as one over the frequency, and faster where a lens blurs; it joins at its ends."""
    white = np.random.default_rng(seed).normal(size=(_TILE_PX, _TILE_PX))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_TILE_PX), np.fft.rfftfreq(_TILE_PX), indexing="ij"))
    frequency[0, 0] = np.inf
    pink = np.fft.irfft2(np.fft.rfft2(white) * np.exp(-((frequency / _BLUR) ** 2)) / frequency, s=white.shape)
    return (pink * (_CONTRAST / pink.std())).astype(np.float32)
