import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipelines.data.pictures.resize import resize
from tests.pipelines.data.picture_server import draw_picture

SIZES = [(64, 48), (37, 90), (300, 200), (500, 333), (1, 1), (9, 1), (8, 8), (17, 200)]


def by_pillow(
    pixels: npt.NDArray[np.uint8], size: tuple[int, int], box: tuple[float, float, float, float] | None = None
):
    """Each channel by itself, in floats, which Pillow does not round between its passes."""
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(pixels, 2, 0)]
    resized = [np.asarray(plane.resize(size, Image.Resampling.BICUBIC, box)) for plane in planes]
    return np.stack(resized, axis=2).clip(0, 255)


@pytest.fixture(params=["cykooz.resizer", "Pillow"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Pillow":
        monkeypatch.setattr("pipelines.data.pictures.resize.cykooz_resizer", None)


def check(pixels: npt.NDArray[np.uint8], size: tuple[int, int], edge: int = 0, **part: Any) -> None:
    resized = resize(pixels, size, **part)
    assert resized.shape == (size[1], size[0], pixels.shape[2])
    difference = resized - by_pillow(pixels, size, **part)
    inner = difference[edge:-edge, edge:-edge] if edge else difference
    # Rounded between the passes, whose weights add up to 1.25 without their signs, and at the end.
    assert np.abs(inner).max() <= 1.125 + 0.01
    # Where a side is enlarged, its pixels are rounded much alike.
    num_rounded = math.prod(map(min, pixels.shape, inner.shape))
    assert abs(inner.mean()) <= 0.01 + 2 / math.sqrt(num_rounded)


def noise(seed: int, *shape: int) -> npt.NDArray[np.uint8]:
    # So far from black and white that nothing is clipped between the passes.
    return np.random.default_rng(seed).integers(80, 176, shape, np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_equals_pillow_in_floats(size: tuple[int, int], channels: int) -> None:
    check(noise(0, 200, 300, channels), size)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3), (500, 1, 3), (3, 2, 1), (1000, 40, 3)])
@pytest.mark.parametrize("size", [(5, 7), (64, 1), (200, 300)])
def test_thin_and_small_pictures(shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    check(noise(1, *shape), size)


@pytest.mark.parametrize(
    "box",
    [(0, 0, 299.5, 199.25), (0, 0, 150.0, 200.0), (0, 0, 299.0, 199.0), (50.25, 0, 250.25, 200), (3, 7.5, 99, 61)],
)
def test_part_of_a_picture(box: tuple[float, float, float, float]) -> None:
    # What lies beyond the part may be seen by its outermost pixels.
    pixels = 80 + np.asarray(draw_picture(3, 300, 200)) // 3
    check(pixels, (60, 40), 3, box=box)


def test_the_same_size_and_flat_pictures_stay_as_they_are() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)
    assert np.array_equal(resize(pixels, (70, 50)), pixels)
    for level in (0, 1, 127, 255):
        assert (resize(np.full((50, 70, 3), level, np.uint8), (31, 99)) == level).all()


def test_black_and_white_are_not_passed_over() -> None:
    stripes = np.repeat(np.repeat(np.array([[0, 255] * 4], np.uint8), 9, axis=1), 40, axis=0)[..., None]
    resized = resize(stripes, (144, 80))
    assert (resized.min(), resized.max()) == (0, 255)
    assert np.abs(resized - by_pillow(stripes, (144, 80))).max() <= 1.125 + 0.01


def test_threads_do_not_disturb_one_another() -> None:
    pictures = [noise(seed, 200 + seed, 300, 3) for seed in range(8)]
    wanted = [resize(picture, (64, 48)) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: resize(pictures[number % 8], (64, 48)), range(400)))
    assert all(np.array_equal(picture, wanted[number % 8]) for number, picture in enumerate(found))
