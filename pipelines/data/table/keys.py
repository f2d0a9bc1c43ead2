"""Sets and maps of 16-byte keys (ids of links, hashes of pictures), packed, for tables of millions of rows."""

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


def to_list(keys: Keys) -> list[bytes]:
    """Returns each key as bytes, zero bytes at its end included."""
    joined = keys.tobytes()
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


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


def text_hashes(texts: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.uint64]:
    """Returns a 64-bit hash of each text, the same in every process: enough to tell whether a caption has changed."""
    # Not at the top: it takes a third of a second that other commands need not wait for.
    from pandas.util import hash_array

    return np.asarray(hash_array(texts.to_numpy(zero_copy_only=False).astype(object), categorize=False))


class KeyMap:
    """A map that grows, from keys to rows of a numpy dtype; the newest value of a key counts.

    A few sorted arrays, each at least twice as long as the next.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._runs: list[tuple[Keys, npt.NDArray[Any]]] = []

    def add(self, keys: Keys, values: npt.NDArray[Any]) -> None:
        """Maps each of `keys` to the value at its place."""
        keys, values = _newest(keys, values)
        while self._runs and len(self._runs[-1][0]) < 2 * len(keys):
            older_keys, older_values = self._runs.pop()
            keys, values = _newest(np.concatenate([older_keys, keys]), np.concatenate([older_values, values]))
        if len(keys):
            self._runs.append((keys, values))

    def get(self, keys: Keys) -> tuple[Mask, npt.NDArray[Any]]:
        """Returns which of `keys` are there, and the value of each; zeros where it is not there."""
        found = np.zeros(len(keys), bool)
        values = np.zeros(len(keys), self._dtype)
        for run_keys, run_values in self._runs:
            at = find(run_keys, keys)
            here = at >= 0
            values[here] = run_values[at[here]]
            found |= here
        return found, values


def _newest(keys: Keys, values: npt.NDArray[Any]) -> tuple[Keys, npt.NDArray[Any]]:
    """Returns the keys sorted, each once, with the last of its values."""
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    is_last = np.append(keys[1:] != keys[:-1], True) if len(keys) else np.empty(0, bool)
    return keys[is_last], values[is_last]


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
