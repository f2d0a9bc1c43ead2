"""Sets of 16-byte keys (ids of links, hashes of pictures) at 16 bytes each, for tables of millions of rows."""

import hashlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

KEY_BYTES = 16
# numpy drops zero bytes at the end of such a value only when it becomes a Python object; comparing is exact.
Keys: TypeAlias = npt.NDArray[np.bytes_]
Mask: TypeAlias = npt.NDArray[np.bool_]
_DTYPE = np.dtype(f"S{KEY_BYTES}")


def link_key(url: str) -> bytes:
    """Returns the id of a link: the 128-bit BLAKE2b hash of its text."""
    return hashlib.blake2b(url.encode(), digest_size=KEY_BYTES).digest()


def from_bytes(joined: bytes) -> Keys:
    """Returns the keys whose bytes follow one another in `joined`."""
    return np.frombuffer(joined, _DTYPE)


def from_column(column: pa.ChunkedArray) -> Keys:
    """Returns the first 16 bytes of each value of a binary column without nulls."""
    keys = pc.binary_slice(column, 0, KEY_BYTES).cast(pa.binary(KEY_BYTES)).combine_chunks()
    chunks = keys.chunks if isinstance(keys, pa.ChunkedArray) else [keys]
    found = [
        np.frombuffer(chunk.buffers()[1], _DTYPE, len(chunk), chunk.offset * KEY_BYTES)
        for chunk in chunks
        if len(chunk)
    ]
    return np.concatenate(found) if found else empty()


def empty() -> Keys:
    """Returns no keys."""
    return np.empty(0, _DTYPE)


def is_first(keys: Keys) -> Mask:
    """Returns which of `keys` are not equal to an earlier one."""
    mask = np.zeros(len(keys), bool)
    mask[np.unique(keys, return_index=True)[1]] = True
    return mask


def find(sorted_keys: Keys, keys: Keys) -> npt.NDArray[Any]:
    """Returns the position of each of `keys` in `sorted_keys`, or -1 where it is not there."""
    if not len(sorted_keys):
        return np.full(len(keys), -1)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == keys, at, -1)


class KeySet:
    """A set that grows: a few sorted arrays, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[Keys] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def add(self, keys: Keys) -> None:
        """Puts `keys` into the set."""
        run = np.unique(keys[~self.contains(keys)])
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.union1d(self._runs.pop(), run)
        if len(run):
            self._runs.append(run)

    def contains(self, keys: Keys) -> Mask:
        """Returns which of `keys` are in the set."""
        mask = np.zeros(len(keys), bool)
        for run in self._runs:
            mask |= find(run, keys) >= 0
        return mask
