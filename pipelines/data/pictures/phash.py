"""Perceptual hashes: 64 bits that hardly change when a picture is encoded again or resized, and finding near ones."""

import functools
import itertools
from collections.abc import Iterator
from math import comb
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.data.pictures.resize import Pixels
from pipelines.data.table.keys import Mask

Hashes: TypeAlias = npt.NDArray[np.int64]
_Bits: TypeAlias = npt.NDArray[np.uint64]
_SIDE = 32
_LOW = 8
# What RGB counts for in a grey (ITU-R BT.601).
_GREY = {1: np.ones(1, np.float32), 3: np.array([0.299, 0.587, 0.114], np.float32)}
# Of the lowest frequencies, the mean of the picture left out, in grey levels: less is noise, not a picture.
_FLAT_RMS = 1.0
# Of the same, in floats of 32 bits.
_ROUNDING = 0.01
# The bits of a hash in three bands: the first bit of each, from the highest, and their number.
_BANDS = ((0, 22), (22, 21), (43, 21))
# A look-up takes as long as comparing so many hashes.
_LOOKUP_COST = 100
_AT_ONCE = 1 << 21
_BLOCK = 1024
_LOBES = 3
# Numbers of a picture that are floats at a time.
_FLOATS_AT_ONCE = 1 << 20


def perceptual_hash(pixels: Pixels) -> int | None:
    """Returns the DCT hash of a picture, its 64 bits as a signed number; none for a picture without any structure.

    The picture is made 32×32 and grey, and of its two-dimensional DCT-II the 8×8 lowest frequencies are compared with
    their median, rows first, the first bit the highest (C. Zauner, "Implementation and Benchmarking of Perceptual Image
    Hash Functions", 2010, section 3.2.1). The bits are those of `imagehash.phash`, but for coefficients so near the
    median that its rounding to whole grey levels decides. Of a flat picture all bits but the first would be noise, and
    flat pictures would all be near one another whatever their colours: it has no hash.

    Args:
        pixels: (height, width, channels), grey or RGB.
    """
    height, width, channels = pixels.shape
    # Grey only when few numbers are left: all that is done here is linear.
    rows = np.zeros((_LOW, width * channels), np.float32)
    step = max(1, _FLOATS_AT_ONCE // (width * channels))
    for top in range(0, height, step):
        some = pixels[top : top + step].reshape(-1, width * channels).astype(np.float32)
        rows += _low_frequencies(height)[:, top : top + step] @ some
    grey = rows.reshape(_LOW, width, channels) @ _GREY[channels]
    low = grey @ _low_frequencies(width).T
    energy = float(np.square(low).sum() - low[0, 0] ** 2)
    if energy < (_SIDE * _FLAT_RMS) ** 2:
        return None
    # What is zero but for rounding, as most of a picture of stripes, must not be noise either.
    middle = np.sort(low, axis=None)[_LOW * _LOW // 2 - 1 : _LOW * _LOW // 2 + 1].mean()
    is_high = low > middle + _ROUNDING
    return int(np.packbits(is_high).view(">i8")[0])


@functools.lru_cache(maxsize=256)
def _low_frequencies(length: int) -> npt.NDArray[np.float32]:
    """Returns the matrix (8, length) that resizes to 32 values and takes the lowest frequencies of them."""
    frequency, place = np.mgrid[0:_LOW, 0:_SIDE]
    dct = np.cos(np.pi * frequency * (place + 0.5) / _SIDE) * np.sqrt(2 / _SIDE)
    dct[0] /= np.sqrt(2)
    # A window of Lanczos, as wide as Pillow's, over the inputs of each of the 32.
    scale = max(1.0, length / _SIDE)
    x = (np.arange(length) + 0.5 - (np.arange(_SIDE)[:, None] + 0.5) * length / _SIDE) / scale
    weights = np.where(np.abs(x) < _LOBES, np.sinc(x) * np.sinc(x / _LOBES), 0)
    return (dct @ (weights / weights.sum(axis=1, keepdims=True))).astype(np.float32)


class HashIndex:
    """Hashes in which near ones are found exactly, at 24 bytes each, for tables of millions of rows.

    Hashes that differ in at most d bits differ, in at least one of three bands of bits, in at most d // 3 (the
    pigeonhole principle). So the hashes are kept sorted by each band, and for each band all values near that of the
    hash asked for are looked up. As in `keys.KeySet` there are a few runs, each at least twice as long as the next.
    """

    def __init__(self) -> None:
        # Of each run, the hashes turned left so that a band comes first, sorted, for each band.
        self._runs: list[list[_Bits]] = []

    def __len__(self) -> int:
        return sum(len(run[0]) for run in self._runs)

    def add(self, hashes: Hashes) -> None:
        """Puts `hashes` in; those that are there already stay there once, or at most once a run."""
        bits = hashes.view(np.uint64)
        run = [_sorted_set(_turn(bits, first)) for first, _ in _BANDS]
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            other = self._runs.pop()
            run = [_sorted_set(np.concatenate([other.pop(0), run.pop(0)])) for _ in _BANDS]
        if len(run[0]):
            self._runs.append(run)

    def near(self, hashes: Hashes, max_bits: int) -> Mask:
        """Returns which of `hashes` differ from any hash here in at most `max_bits` bits."""
        bits = hashes.view(np.uint64)
        mask = np.zeros(len(bits), bool)
        for run in self._runs:
            left = np.flatnonzero(~mask)
            num_lookups = sum(len(_flips(width, radius)) for (_, width), radius in _radii(max_bits))
            if len(run[0]) < _LOOKUP_COST * num_lookups:
                mask[left] = _near_any(bits[left], run[0], max_bits)
            else:
                mask[left] = _near_by_bands(bits[left], run, max_bits)
        return mask


def mark_near_repeats(hashes: Hashes, max_bits: int, index: HashIndex) -> Mask:
    """Returns which of `hashes`, in their order, are near one in `index` or near an earlier one that is not marked.

    Args:
        hashes: Of pictures that are to be kept, if they are not repeats.
        max_bits: Bits in which near hashes differ, at most.
        index: Hashes of pictures that are kept already; it is left as it is.
    """
    kept = HashIndex()
    marks = np.zeros(len(hashes), bool)
    for first in range(0, len(hashes), _BLOCK):
        block = hashes[first : first + _BLOCK]
        is_near = index.near(block, max_bits) | kept.near(block, max_bits)
        left = np.flatnonzero(~is_near)
        bits = block[left].view(np.uint64)
        is_close = np.bitwise_count(bits[:, None] ^ bits) <= max_bits
        is_kept = np.ones(len(left), bool)
        for at in np.flatnonzero(is_close.sum(axis=1) > 1):
            if is_kept[at]:
                is_kept[at + 1 :] &= ~is_close[at, at + 1 :]
        kept.add(block[left[is_kept]])
        is_near[left[~is_kept]] = True
        marks[first : first + _BLOCK] = is_near
    return marks


def _turn(bits: _Bits, count: int) -> _Bits:
    if count == 0:
        return bits
    return (bits << np.uint64(count)) | (bits >> np.uint64(64 - count))


def _sorted_set(bits: _Bits) -> _Bits:
    # `np.unique` takes ten times as long for it.
    ordered = np.sort(bits)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


def _radii(max_bits: int) -> list[tuple[tuple[int, int], int]]:
    """Returns the bands to look in, each with how many of its bits may differ: in one of them, no more do."""
    shares = [(max_bits + 1) // len(_BANDS) + (at < (max_bits + 1) % len(_BANDS)) for at in range(len(_BANDS))]
    return [(band, share - 1) for band, share in zip(_BANDS, shares, strict=True) if share]


@functools.cache
def _flips(width: int, radius: int) -> _Bits:
    """Returns every set of at most `radius` of the highest `width` bits."""
    highest = [1 << (63 - at) for at in range(width)]
    sets = (chosen for size in range(radius + 1) for chosen in itertools.combinations(highest, size))
    count = sum(comb(width, size) for size in range(radius + 1))
    return np.fromiter((sum(chosen) for chosen in sets), np.uint64, count)


def _near_any(bits: _Bits, others: _Bits, max_bits: int) -> Mask:
    at_once = max(1, _AT_ONCE // max(1, len(others)))
    parts = [
        (np.bitwise_count(bits[at : at + at_once, None] ^ others) <= max_bits).any(axis=1)
        for at in range(0, len(bits), at_once)
    ]
    return np.concatenate([np.zeros(0, bool), *parts])


def _near_by_bands(bits: _Bits, run: list[_Bits], max_bits: int) -> Mask:
    mask = np.zeros(len(bits), bool)
    for at, ((first, width), radius) in enumerate(_radii(max_bits)):
        left = np.flatnonzero(~mask)
        # In order, so that one look-up finds in the cache what the one before it read.
        turned = _turn(bits[left], first)
        left, turned = left[np.argsort(turned)], np.sort(turned)
        flips = _flips(width, radius)
        at_once = max(1, _AT_ONCE // len(flips))
        for part in range(0, len(left), at_once):
            asked = turned[part : part + at_once]
            for owners, found in _in_band(asked, run[at], flips, width):
                is_close = np.bitwise_count(asked[owners] ^ found) <= max_bits
                mask[left[part + owners[is_close]]] = True
    return mask


def _in_band(asked: _Bits, hashes: _Bits, flips: _Bits, width: int) -> Iterator[tuple[npt.NDArray[np.int64], _Bits]]:
    """Yields hashes whose band differs from that of one asked for by one of `flips`, and the position of that one."""
    rest = np.uint64((1 << (64 - width)) - 1)
    lowest = ((asked & ~rest) ^ flips[:, None]).ravel()
    starts = np.searchsorted(hashes, lowest)
    counts = np.searchsorted(hashes, lowest | rest, side="right") - starts
    some = np.flatnonzero(counts)
    starts, counts = starts[some], counts[some]
    ends = np.cumsum(counts)
    first = 0
    while first < len(some):
        before = int(ends[first] - counts[first])
        last = max(first + 1, int(np.searchsorted(ends, before + _AT_ONCE, side="right")))
        sizes = counts[first:last]
        offsets = np.repeat(starts[first:last] - (ends[first:last] - sizes - before), sizes)
        yield np.repeat(some[first:last] % len(asked), sizes), hashes[offsets + np.arange(len(offsets))]
        first = last
