"""Memory that a thread uses again and again.

New memory of a few megabytes comes from the kernel a page at a time, zeroed, which takes a third as long as decoding a
picture into it.
"""

import math
import threading

import numpy as np
import numpy.typing as npt

# A picture of ten million pixels; what larger ones need is given back.
_MAX_KEPT_BYTES = 32_000_000


class Scratch(threading.local):
    """Arrays whose content lasts until the same thread asks for the same name again."""

    def __init__(self) -> None:
        self._kept: dict[str, npt.NDArray[np.uint8]] = {}

    def floats(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """Returns an array with anything in it."""
        return self.bytes(name, 4 * math.prod(shape)).view(np.float32).reshape(shape)

    def bytes(self, name: str, count: int) -> npt.NDArray[np.uint8]:
        """Returns `count` bytes, whatever they are."""
        if count > _MAX_KEPT_BYTES:
            return np.empty(count, np.uint8)
        kept = self._kept.get(name)
        if kept is None or len(kept) < count:
            kept = self._kept[name] = np.empty(count, np.uint8)
        return kept[:count]
