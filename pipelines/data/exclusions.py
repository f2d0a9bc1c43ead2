"""Pictures to keep out of a table whatever link they come from, as those of evaluation sets: a list of hashes."""

import re

import numpy as np
import numpy.typing as npt

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.pictures.phash import HashIndex
from pipelines.data.table import keys

_HASH = re.compile(rb"[0-9a-fA-F]{64}|[0-9a-fA-F]{16}")
_SHOWN_CHARS = 80


class Exclusions:
    """Hashes of pictures to keep out, at 16 bytes for a SHA-256 and 24 for a perceptual hash.

    Args:
        sha256: First 16 bytes of the SHA-256 hashes of files.
        phashes: Perceptual hashes.
        max_bits: Bits in which a picture's perceptual hash differs from one of these, at most, to be kept out.
    """

    def __init__(self, sha256: keys.Keys, phashes: npt.NDArray[np.int64], *, max_bits: int = 4) -> None:
        self._sha256 = keys.KeySet()
        self._sha256.add(sha256)
        self._phashes = HashIndex()
        self._phashes.add(phashes)
        self._max_bits = max_bits

    def __len__(self) -> int:
        return len(self._sha256) + len(self._phashes)

    def reason(self, sha256: bytes, phash: int | None) -> str | None:
        """Returns why a picture is kept out, by the SHA-256 of its file and its perceptual hash, if it has one."""
        if self._sha256.contains(keys.from_bytes(sha256[: keys.KEY_BYTES])).any():
            return "excluded"
        if phash is not None and self._phashes.near(np.array([phash], np.int64), self._max_bits).any():
            return "excluded"
        return None


def read_exclusions(uri: str, *, max_bits: int = 4) -> Exclusions:
    """Returns the hashes in a file, one a line in hexadecimal: SHA-256 (64 digits) or perceptual hashes (16 digits).

    Empty lines and what follows a # are passed over.

    Raises:
        ConfigError: The file can't be read, or a line is neither kind of hash.
    """
    try:
        lines = storage.read_bytes(uri).splitlines()
    except OSError as error:
        raise ConfigError(f"filters.exclude_hashes={uri} can't be read ({error}); give a file of hashes") from error
    sha256, phashes = bytearray(), bytearray()
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf").partition(b"#")[0].strip()
        if not text:
            continue
        if not _HASH.fullmatch(text):
            got = text.decode(errors="replace")[:_SHOWN_CHARS]
            raise ConfigError(
                f"filters.exclude_hashes={uri}, line {number}: got {got!r} ({len(text)} bytes), wanted a hash of 64"
                " hexadecimal digits (SHA-256) or of 16 (perceptual); put # before what is not a hash"
            )
        if len(text) == 64:
            sha256 += bytes.fromhex(text.decode())[: keys.KEY_BYTES]
        else:
            phashes += bytes.fromhex(text.decode())
    return Exclusions(keys.from_bytes(bytes(sha256)), np.frombuffer(phashes, ">i8").astype(np.int64), max_bits=max_bits)
