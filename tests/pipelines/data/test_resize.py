import math

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipelines.data.pictures.resize import lanczos_matrix, resize
from tests.pipelines.data.picture_server import draw_picture

SIZES = [(64, 48), (37, 90), (300, 200), (500, 333), (1, 1), (9, 1), (8, 8), (17, 200)]


def by_pillow(
    pixels: npt.NDArray[np.uint8], size: tuple[int, int], box: tuple[float, float, float, float] | None = None
):
    """Each channel by itself, in floats, which Pillow does not round between its passes."""
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(pixels, 2, 0)]
    resized = [np.asarray(plane.resize(size, Image.Resampling.LANCZOS, box)) for plane in planes]
    return np.stack(resized, axis=2).clip(0, 255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_equals_pillow_in_floats(size: tuple[int, int], channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, channels), np.uint8)
    resized = resize(pixels, size)
    assert resized.shape == (size[1], size[0], channels)
    assert np.abs(resized - by_pillow(pixels, size)).max() <= 0.51


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3), (500, 1, 3), (3, 2, 1), (1000, 40, 3)])
@pytest.mark.parametrize("size", [(5, 7), (64, 1), (200, 300)])
def test_thin_and_small_pictures(shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    assert np.abs(resize(pixels, size) - by_pillow(pixels, size)).max() <= 0.51


@pytest.mark.parametrize(
    "box",
    [(0, 0, 299.5, 199.25), (0, 0, 150.0, 200.0), (0, 0, 299.0, 199.0), (50.25, 0, 250.25, 200), (3, 7.5, 99, 61)],
)
def test_part_of_a_picture(box: tuple[float, float, float, float]) -> None:
    # Beyond the part Pillow sees nothing, and this the neighbours that are there: the outermost outputs differ.
    pixels = np.asarray(draw_picture(3, 300, 200))
    difference = np.abs(resize(pixels, (60, 40), box) - by_pillow(pixels, (60, 40), box))
    assert difference[3:-3, 3:-3].max() <= 0.51


def test_work_that_is_cut_up_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (200, 300, 3), np.uint8)
    whole = resize(pixels, (100, 70))
    monkeypatch.setattr("pipelines.data.pictures.resize._PASS_FLOATS", 1)
    assert np.array_equal(resize(pixels, (100, 70)), whole)


def test_the_same_size_and_flat_pictures_stay_as_they_are() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)
    assert np.array_equal(resize(pixels, (70, 50)), pixels)
    for level in (0, 1, 127, 255):
        assert (resize(np.full((50, 70, 3), level, np.uint8), (31, 99)) == level).all()


def test_matrix_is_the_window_of_three_lobes() -> None:
    matrix = lanczos_matrix(40, 10)
    center = 3.5 * 4  # of output 3, in inputs four times as many
    weights = [
        math.sin(math.pi * x) * math.sin(math.pi * x / 3) * 3 / (math.pi * x) ** 2 if abs(x) < 3 else 0.0
        for x in ((at + 0.5 - center) / 4 for at in range(40))
    ]
    assert np.abs(matrix[3] - np.array(weights) / sum(weights)).max() < 1e-6
    assert np.abs(matrix.sum(axis=1) - 1).max() < 1e-6
