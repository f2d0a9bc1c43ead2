"""The generated photos, read as files by a decoder that knows nothing of how they were made."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from pipelines.benchmark.data.photos import photo, photo_size, tiny, write_photos


def test_the_files_are_like_photographs():
    bodies = [photo(number) for number in range(24)]
    opened = [Image.open(io.BytesIO(body)) for body in bodies]
    assert [bool(picture.info.get("progressive")) for picture in opened] == [n % 4 == 3 for n in range(24)]
    pixels = np.array([picture.size[0] * picture.size[1] for picture in opened])
    assert pixels.mean() == pytest.approx(700_000, rel=0.05)
    assert min(min(picture.size) for picture in opened) >= 200
    assert all(picture.mode == "RGB" for picture in opened)
    # Photographs of this size have 1 to 2 bits a pixel at these qualities; flat drawings have a tenth of that.
    bits = 8 * sum(map(len, bodies)) / pixels.sum()
    assert 1.0 < bits < 2.2


def test_the_mean_size_is_right_for_any_number_of_photos():
    sizes = np.array([photo_size(number) for number in range(2000)], float)
    megapixels = sizes.prod(axis=1) / 1e6
    assert megapixels.mean() == pytest.approx(0.7, rel=0.01)
    # Log-normal: as many below the median as above, and the median below the mean by exp(σ²/2).
    assert np.median(megapixels) == pytest.approx(0.7 * math.exp(-(0.45**2) / 2), rel=0.01)


def test_the_same_numbers_give_the_same_bytes():
    assert photo(3) == photo(3)
    assert len({photo(1), photo(2), photo(1, seed=1)}) == 3


def test_photos_that_are_there_are_not_drawn_again(tmp_path):
    first = write_photos(tmp_path, 2)
    first[0].write_bytes(b"as it was")
    again = write_photos(tmp_path, 3)
    assert [path.read_bytes() for path in again] == [b"as it was", photo(1), photo(2)]


def test_tiny_pictures_differ_in_bytes_and_not_in_pixels():
    one, other = tiny(1), tiny(200_000)
    assert one != other
    with Image.open(io.BytesIO(one)) as a, Image.open(io.BytesIO(other)) as b:
        assert a.size == (64, 48)
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert b.info["comment"] == b"number 200000"
