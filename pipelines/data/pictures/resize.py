"""Lanczos resizing as two matrix products, one down the rows and one across them.

What comes out is what Pillow makes of it, less the rounding between its two passes, in less than half the time: a
matrix product uses the whole width of the processor. The matrices are nearly all zeros, as an output pixel depends on
a few input pixels, so they are cut into blocks of a few output pixels, and only the band that is not zero is kept.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.data.pictures.scratch import Scratch

_LOBES = 3
_BLOCK = 8
# Floats that the first pass makes before the second is run: enough to be quick, and little memory for any picture.
_PASS_FLOATS = 1 << 20
_scratch = Scratch()


@dataclass(frozen=True)
class _Bands:
    """Weights (num_blocks, block, span) of the `span` inputs from `starts` on, for blocks of outputs."""

    starts: list[int]
    span: int
    weights: npt.NDArray[np.float32]


def resize(
    pixels: npt.NDArray[np.uint8], size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> npt.NDArray[np.uint8]:
    """Returns the picture at another size, antialiased with a Lanczos window of three lobes.

    Args:
        pixels: (height, width, channels).
        size: The width and height wanted.
        box: What part of the picture is taken: left, top, right and bottom, which need not be whole; all of it if it
            isn't given. The window reaches beyond it, as far as there are pixels.

    Returns:
        (size[1], size[0], channels).
    """
    height, width, channels = pixels.shape
    left, top, right, bottom = box or (0, 0, width, height)
    down, across = _bands(top, bottom, height, size[1]), _bands(left, right, width, size[0])
    rows = pixels.reshape(height, width * channels)
    resized = np.empty((size[1], size[0], channels), np.uint8)
    blocks_at_once = max(1, _PASS_FLOATS // (width * channels * _BLOCK))
    for block in range(0, len(down.starts), blocks_at_once):
        part = resized[block * _BLOCK : (block + blocks_at_once) * _BLOCK]
        columns = _down(rows, down, block, len(part)).reshape(width, channels * len(part))
        values = _across(columns, across, size[0])
        values += np.float32(0.5)
        np.clip(values, 0, 255, out=values)
        part[...] = values.astype(np.uint8).reshape(size[0], channels, len(part)).transpose(2, 0, 1)
    return resized


def lanczos_matrix(length: int, size: int) -> npt.NDArray[np.float32]:
    """Returns the matrix (size, length) that resizes `length` values to `size`."""
    matrix = np.zeros((size, length), np.float32)
    bands = _bands(0, length, length, size)
    for block, start in enumerate(bands.starts):
        rows = matrix[block * _BLOCK : (block + 1) * _BLOCK]
        rows[:, start : start + bands.span] = bands.weights[block, : len(rows)]
    return matrix


def _down(rows: npt.NDArray[np.uint8], bands: _Bands, first_block: int, num_rows: int) -> npt.NDArray[np.float32]:
    """Returns `num_rows` rows resized from all of `rows`, as columns: the next pass then goes down its rows as well."""
    resized = _scratch.floats("columns", rows.shape[1], num_rows)
    # Converted a band at a time, which then is still in the processor's cache.
    band = _scratch.floats("band", bands.span, rows.shape[1])
    for at in range(0, num_rows, _BLOCK):
        block = first_block + at // _BLOCK
        band[...] = rows[bands.starts[block] : bands.starts[block] + bands.span]
        out = resized[:, at : at + _BLOCK]
        np.matmul(band.T, bands.weights[block, : out.shape[1]].T, out=out)
    return resized


def _across(columns: npt.NDArray[np.float32], bands: _Bands, length: int) -> npt.NDArray[np.float32]:
    """Returns `length` columns resized from all of `columns`, which lie as rows."""
    resized = _scratch.floats("resized", length, columns.shape[1])
    for block, start in enumerate(bands.starts):
        out = resized[block * _BLOCK : (block + 1) * _BLOCK]
        np.matmul(bands.weights[block, : len(out)], columns[start : start + bands.span], out=out)
    return resized


@functools.lru_cache(maxsize=32)
def _bands(begin: float, end: float, length: int, size: int) -> _Bands:
    """Returns what makes `size` outputs of `length` inputs from `begin` to `end`."""
    step = (end - begin) / size
    scale = max(step, 1.0)
    reach = _LOBES * scale
    num_blocks = -(-size // _BLOCK)
    # The outputs that fill the last block are repeats of the last one, and not used.
    outputs = np.minimum(np.arange(num_blocks * _BLOCK), size - 1).reshape(num_blocks, _BLOCK)
    centers = begin + (outputs + 0.5) * step
    span = min(length, int((_BLOCK - 1) * step + 2 * reach) + 3)
    starts = np.clip(np.floor(centers[:, 0] - reach).astype(np.int64), 0, length - span)
    offsets = (starts[:, None] + 0.5 - centers) * (np.pi / scale)
    x = offsets.astype(np.float32)[..., None] + np.arange(span, dtype=np.float32) * np.float32(np.pi / scale)
    np.maximum(np.abs(x, out=x), np.float32(1e-4), out=x)  # sin(x) / x is 1 at 0
    weights = np.sin(x) * np.sin(x / np.float32(_LOBES)) / (x * x)
    weights[x >= np.float32(_LOBES * np.pi)] = 0
    weights /= weights.sum(axis=-1, keepdims=True)
    return _Bands(starts.tolist(), span, weights)
