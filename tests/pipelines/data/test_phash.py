import io
import itertools
import tracemalloc
from pathlib import Path

import imagehash
import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.data.pictures.phash import Hashes, HashIndex, mark_near_repeats, perceptual_hash

_FOLDER = Path(skimage.__file__).parent / "data"
PHOTOS = {
    name: Image.open(_FOLDER / name).convert("RGB")
    for name in (
        *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "ihc.png", "motorcycle_left.png"),
        *("moon.png", "coins.png", "page.png", "text.png", "clock_motion.png", "hubble_deep_field.jpg"),
        *("brick.png", "grass.png", "gravel.png"),
    )
}


def hash_of(picture: Image.Image) -> int:
    found = perceptual_hash(np.asarray(picture.convert("RGB")))
    assert found is not None
    return found


def num_different(one: int, other: int) -> int:
    return ((one ^ other) & (2**64 - 1)).bit_count()


def as_int(found: imagehash.ImageHash) -> int:
    return int(str(found), 16)


def test_equals_imagehash_on_photos() -> None:
    # It rounds to whole grey levels twice more, which may exchange the two coefficients beside the median.
    different = [num_different(hash_of(photo), as_int(imagehash.phash(photo))) for photo in PHOTOS.values()]
    assert max(different) <= 2
    assert different.count(0) >= len(PHOTOS) // 2


def test_bits_are_those_of_a_picture_made_of_known_frequencies() -> None:
    # The inverse of the transform, of 64 values far apart; the first bit is the highest, and rows come first.
    rng = np.random.default_rng(0)
    place = np.arange(32) + 0.5
    waves = np.cos(np.pi * np.arange(8)[:, None] * place / 32)
    for _ in range(5):
        values = rng.permutation(np.linspace(-4, 4, 64)).reshape(8, 8)
        values[0, 0] = 5
        scaled = values / np.outer([1, *[2**0.5] * 7], [1, *[2**0.5] * 7])
        wave = 127 + np.tensordot(scaled * 2, waves[:, None, :, None] * waves[None, :, None, :], axes=2)
        wanted = "".join("1" if value > np.median(values) else "0" for value in values.ravel())
        picture = Image.fromarray(wave.round().clip(0, 255).astype(np.uint8))
        assert format(hash_of(picture) & (2**64 - 1), "064b") == wanted


def test_signed_and_fits_the_column() -> None:
    assert all(-(2**63) <= hash_of(photo) < 2**63 for photo in PHOTOS.values())
    assert any(hash_of(photo) < 0 for photo in PHOTOS.values())


@pytest.mark.parametrize("name", PHOTOS)
def test_photo_encoded_again_or_resized_is_near(name: str) -> None:
    photo = PHOTOS[name]
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=60)
    half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BICUBIC)
    assert num_different(hash_of(photo), hash_of(Image.open(buffer))) <= 2
    assert num_different(hash_of(photo), hash_of(half)) <= 2
    assert num_different(hash_of(photo), hash_of(photo.convert("L"))) <= 2


def test_photos_are_far_from_one_another() -> None:
    hashes = [hash_of(photo) for photo in PHOTOS.values()]
    assert min(num_different(one, other) for one, other in itertools.combinations(hashes, 2)) > 20


@pytest.mark.parametrize("colour", ["black", "white", "red", (130, 128, 127)])
def test_flat_picture_has_no_hash(colour: str | tuple[int, int, int]) -> None:
    flat = Image.new("RGB", (300, 200), colour)
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=50)
    noise = np.random.default_rng(0).integers(-3, 4, (200, 300, 3))
    noisy = Image.fromarray((np.asarray(flat, np.int64) + noise).clip(0, 255).astype(np.uint8))
    assert all(perceptual_hash(np.asarray(picture)) is None for picture in (flat, Image.open(buffer), noisy))


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (333, 999), (4000, 31)])
def test_what_is_zero_but_for_rounding_is_no_noise(size: tuple[int, int]) -> None:
    width, height = size
    wave = 128 + 60 * np.cos(np.pi * 3 * (np.arange(width) + 0.5) / width)
    stripes = Image.fromarray(np.tile(wave, (height, 1)).astype(np.uint8))
    # Only the first row of frequencies is in it; and lying down, only the first column.
    assert hash_of(stripes) & (2**56 - 1) == 0
    assert hash_of(stripes.transpose(Image.Transpose.TRANSPOSE)) & 0x7F7F_7F7F_7F7F_7F7F == 0


@pytest.mark.parametrize("size", [(33, 1), (700, 45), (2500, 1800)])
def test_equals_the_transform_of_what_pillow_makes_32_by_32(size: tuple[int, int]) -> None:
    photo = PHOTOS["coffee.png"].resize(size)
    grey = np.asarray(photo, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    small = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    waves = np.cos(np.pi * np.arange(8)[:, None] * (np.arange(32) + 0.5) / 32) / 4
    waves[0] /= 2**0.5
    low = waves @ small @ waves.T
    wanted = "".join("1" if value > np.median(low) + 0.01 else "0" for value in low.ravel())
    assert format(hash_of(photo) & (2**64 - 1), "064b") == wanted


@pytest.mark.parametrize("size", [(12_000, 3), (3, 12_000), (4000, 4000)])
def test_large_picture_takes_little_memory(size: tuple[int, int]) -> None:
    # One as long as these is stored so where nothing is resized, or where its shorter side is short.
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    tracemalloc.start()
    perceptual_hash(pixels)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 32_000_000


HASH = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, 2**63 - 1, -(2**63)])
FLIPS = st.lists(st.integers(0, 63), max_size=18)


@st.composite
def near_hashes(draw: st.DrawFn) -> Hashes:
    """Hashes around a few centres, so that many are near one another, some by a bit more than asked for."""
    centres = draw(st.lists(HASH, min_size=1, max_size=4))
    found = []
    for centre, flips in draw(st.lists(st.tuples(st.sampled_from(centres), FLIPS), max_size=40)):
        bits = centre & (2**64 - 1)
        for flip in flips:
            bits ^= 1 << flip
        found.append(bits)
    return np.array(found, np.uint64).view(np.int64)


def brute_near(hashes: Hashes, others: Hashes, max_bits: int) -> list[bool]:
    return [any(num_different(one, other) <= max_bits for other in others.tolist()) for one in hashes.tolist()]


@pytest.fixture(params=["by bands", "one by one"])
def lookup_cost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes small indexes work as large ones do, or as small ones do."""
    monkeypatch.setattr("pipelines.data.pictures.phash._LOOKUP_COST", 0 if request.param == "by bands" else 10**9)


@pytest.mark.usefixtures("lookup_cost")
@pytest.mark.parametrize("max_bits", [0, 1, 2, 3, 8])
@settings(deadline=None, max_examples=20)
@given(st.lists(near_hashes(), max_size=4), near_hashes())
def test_near_equals_comparing_all(max_bits: int, batches: list[Hashes], asked: Hashes) -> None:
    index = HashIndex()
    for batch in batches:
        index.add(batch)
    held = np.concatenate([np.empty(0, np.int64), *batches])
    asked = np.concatenate([asked, *batches])
    assert index.near(asked, max_bits).tolist() == brute_near(asked, held, max_bits)


@pytest.mark.parametrize("max_bits", [3, 8, 15])
def test_near_in_many(max_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # In small parts, so that every way of cutting up the work is gone through.
    monkeypatch.setattr("pipelines.data.pictures.phash._AT_ONCE", 50)
    monkeypatch.setattr("pipelines.data.pictures.phash._LOOKUP_COST", 0.01)
    rng = np.random.default_rng(max_bits)
    held = rng.integers(-(2**63), 2**63 - 1, 20_000)
    held[:5_000] = held[0] ^ (np.int64(1) << rng.integers(0, 40, 5_000))
    index = HashIndex()
    for batch in np.array_split(held, 7):
        index.add(batch)
    asked = held[rng.integers(0, len(held), 300)]
    for at in range(len(asked)):
        for flip in rng.choice(64, at if at < 30 else max_bits, replace=False):
            asked[at] ^= np.uint64(1 << int(flip)).astype(np.int64)
    wanted = (np.bitwise_count((asked[:, None] ^ held).view(np.uint64)) <= max_bits).any(axis=1)
    assert index.near(asked, max_bits).tolist() == wanted.tolist()
    assert 270 < wanted.sum() < 300


@pytest.mark.parametrize("block", [3, 1024])
@settings(deadline=None, max_examples=40)
@given(near_hashes(), near_hashes(), st.integers(0, 15))
def test_repeats_equal_going_through_one_by_one(block: int, held: Hashes, hashes: Hashes, max_bits: int) -> None:
    kept = held.tolist()
    wanted = []
    for one in hashes.tolist():
        wanted.append(any(num_different(one, other) <= max_bits for other in kept))
        if not wanted[-1]:
            kept.append(one)
    index = HashIndex()
    index.add(held)
    size = len(index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.data.pictures.phash._BLOCK", block)
        assert mark_near_repeats(hashes, max_bits, index).tolist() == wanted
    assert len(index) == size


def test_what_is_near_only_to_a_repeat_is_kept() -> None:
    # Each differs from the one before it in two bits.
    chain = np.array([0b0, 0b11, 0b1111, 0b111111], np.int64)
    assert mark_near_repeats(chain, 2, HashIndex()).tolist() == [False, True, False, True]


def test_twelve_million_hashes_take_24_bytes_each() -> None:
    # Of a hundred thousand, which says the same sooner.
    index = HashIndex()
    index.add(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 100_000))
    assert sum(band.nbytes for run in index._runs for band in run) == 24 * len(index) == 24 * 100_000


def test_empty_index_and_no_hashes() -> None:
    index = HashIndex()
    nothing = np.empty(0, np.int64)
    index.add(nothing)
    assert len(index) == 0
    assert index.near(np.array([5]), 15).tolist() == [False]
    assert index.near(nothing, 3).tolist() == []
    assert mark_near_repeats(nothing, 3, index).tolist() == []
