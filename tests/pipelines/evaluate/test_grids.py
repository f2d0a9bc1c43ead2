"""Grids and plots, read back pixel by pixel."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.evaluate.grids import loss_plot, picture_grid

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def solid(side: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.full((side, side, 3), colour, np.uint8)


def places(image: Image.Image, colour: tuple[int, int, int]) -> NDArray[np.intp]:
    """The (y, x) of every pixel with this colour."""
    return np.argwhere((np.asarray(image) == colour).all(axis=-1))


@pytest.mark.parametrize(("side", "shown_px"), [(16, 96), (32, 96), (40, 80), (96, 96), (128, 128)])
def test_pictures_are_enlarged_by_whole_numbers(side: int, shown_px: int) -> None:
    grid = picture_grid([solid(side, RED), solid(side, GREEN)], ["one", "two"], columns=2)
    for colour in (RED, GREEN):
        found = places(grid, colour)
        assert len(found) == shown_px**2
        assert (found.max(axis=0) - found.min(axis=0) + 1 == shown_px).all()


def test_pixels_stay_sharp_and_in_place() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 100, (16, 16, 3), np.uint8)
    grid = np.asarray(picture_grid([picture], ["noise"], title=""))
    inside = np.argwhere((grid <= 99).all(axis=-1) & (grid != grid[..., :1]).any(axis=-1))
    top, left = inside.min(axis=0)
    shown = grid[top : top + 96, left : left + 96]
    np.testing.assert_array_equal(shown, picture.repeat(6, axis=0).repeat(6, axis=1))


def test_rows_fill_from_the_left_in_order() -> None:
    grid = picture_grid([solid(32, RED), solid(32, GREEN), solid(32, BLUE)], ["a", "b", "c"], columns=2)
    red, green, blue = (places(grid, colour).mean(axis=0) for colour in (RED, GREEN, BLUE))
    assert red[0] == green[0] < blue[0]
    assert red[1] == blue[1] < green[1]


def test_no_cell_of_the_last_row_is_empty_where_that_can_be() -> None:
    for count, rows in ((64, 8), (256, 16), (12, 3), (100, 10)):
        grid = picture_grid([solid(8, RED)] * count, [""] * count)
        tops = {int(y) for y, _ in places(grid, RED)}
        assert len(tops) == rows * 96, count
        assert len(places(grid, RED)) == count * 96**2


def test_captions_stay_under_their_own_picture() -> None:
    long = "a caption that goes on and on about one very long thing that hardly fits anywhere"
    alone = np.asarray(picture_grid([solid(32, RED)] * 2, ["", ""], columns=2))
    grid = np.asarray(picture_grid([solid(32, RED)] * 2, [long, ""], columns=2))
    assert grid.shape == alone.shape
    ink = np.argwhere((grid != alone).any(axis=-1))
    left_picture = places(Image.fromarray(alone), RED)[:, 1].min()
    assert len(ink) > 300
    assert ink[:, 1].min() >= left_picture - 1
    assert ink[:, 1].max() <= left_picture + 96


def test_letters_beyond_latin_are_drawn() -> None:
    drawn = [np.asarray(picture_grid([solid(32, RED)], [text])) for text in ("Ж", "λ", "\U0010fffd")]
    assert not np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[1], drawn[2])


def test_a_picture_without_its_caption_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="got 2 pictures and 1 captions"):
        picture_grid([solid(8, RED)] * 2, ["one"])


def test_the_loss_plot_draws_a_curve_a_name_and_takes_gaps() -> None:
    empty = np.asarray(loss_plot({}))
    steps = range(0, 3200, 32)
    one = loss_plot({"16 px": [(step, 1 / (step + 100)) for step in steps]})
    two = loss_plot({"16 px": [(s, 1 / (s + 100)) for s in steps], "32 px": [(s, 2 / (s + 90)) for s in steps]})
    gaps = loss_plot({"16 px": [(step, float("nan") if step == 320 else 1 / (step + 100)) for step in steps]})
    assert one.size == two.size == gaps.size == (1080, 600) == empty.shape[1::-1]
    blue, orange = (31, 119, 180), (255, 127, 14)
    assert len(places(one, blue)) > 500
    assert len(places(one, orange)) == 0
    assert len(places(two, orange)) > 500
    assert len(places(gaps, blue)) > 500
