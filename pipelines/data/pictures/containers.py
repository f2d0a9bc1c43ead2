"""The outer structure of picture files, walked before any library opens them.

It tells which library to ask, whether the file is cut short (decoders show half a picture, or the first frame, and
say nothing), and whether it has so many parts that opening it alone would take the memory or the time of the host.
"""

import itertools
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

# Far more than any picture needs. A part costs its reader a hundred bytes or so, and ten microseconds.
_MAX_PARTS = 100_000
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# Of JPEG: markers without a length, and the one after which the pixels come.
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}
_START_OF_SCAN = 0xDA
# Of TIFF: the tags that say where strips and tiles lie, each with the one that says how long they are.
_TIFF_PARTS = {273: 279, 324: 325, 279: 273, 325: 324}
_NO_VALUES = np.empty(0)
_TIFF_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u8", 7: "u1", 10: "u8", 11: "u4", 12: "u8", 13: "u4", 16: "u8"}


def format_of(body: bytes) -> str | None:
    """Returns Pillow's name of the format of a file, by its first bytes; none for what is not read here.

    ICO is not, as Pillow decodes what is inside it when it is opened, nor what would start another program (EPS).
    """
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WEBP"
    if body[4:8] == b"ftyp":
        brands = {body[8:12], *(body[at : at + 4] for at in range(16, min(_u32(body, 0), 256), 4))}
        return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else None
    for magic, name in (
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"GIF8", "GIF"),
        (b"BM", "BMP"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
        (b"\xff\x4f\xff\x51", "JPEG2000"),
    ):
        if body.startswith(magic):
            return name
    return "TIFF" if body[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else None


def complaint(body: bytes, image_format: str) -> str | None:
    """Returns what is wrong with the structure of a file: truncated, corrupt, too_many_parts, or nothing."""
    walk = _WALKS.get(image_format)
    try:
        for count, _ in enumerate(walk(body) if walk else ()):
            if count >= _MAX_PARTS:
                return "too_many_parts"
    except (struct.error, IndexError, EOFError):
        return "truncated"
    except (ValueError, OverflowError):
        return "corrupt"
    return None


def _jpeg(body: bytes) -> Iterator[None]:
    """Yields for each segment before the pixels, whose end the decoder sees to."""
    at = 2
    while True:
        at = body.find(b"\xff", at)
        if at < 0:
            raise EOFError
        while body[at] == 0xFF:
            at += 1
        marker = body[at]
        if marker == _START_OF_SCAN:
            return
        at += 1 if marker in _BARE_MARKERS else 1 + _u16(body, at + 1)
        yield


def _png(body: bytes) -> Iterator[None]:
    at, kind = 8, b""
    while kind != b"IEND":
        end = at + 12 + _u32(body, at)
        kind = body[at + 4 : at + 8]
        if _u32(body, end - 4) != zlib.crc32(memoryview(body)[at + 4 : end - 4]):
            raise ValueError("a checksum of PNG")
        at = end
        yield


def _gif(body: bytes) -> Iterator[None]:
    at = 13 + _gif_palette_bytes(body[10])
    while (kind := body[at]) in (0x21, 0x2C):
        at += 2
        if kind == 0x2C:
            at += 9 + _gif_palette_bytes(body[at + 7])
        while body[at]:
            at += 1 + body[at]
        at += 1
        yield


def _gif_palette_bytes(flags: int) -> int:
    return 3 << (flags % 8 + 1) if flags & 0x80 else 0


def _webp(body: bytes) -> Iterator[None]:
    """Yields for each chunk; the decoder sees to the end of the last."""
    at, end = 12, 8 + struct.unpack_from("<I", body, 4)[0]
    while at < end - 8:
        size = struct.unpack_from("<I", body, at + 4)[0]
        at += 8 + size + size % 2
        yield


def _boxes(body: bytes) -> Iterator[None]:
    """Yields for each outer box of a file of the ISO base media kind."""
    at = 0
    while at < len(body):
        size = _u32(body, at)
        if size == 1:
            size = struct.unpack_from(">Q", body, at + 8)[0]
        if size == 0:
            return
        if size < 8:
            raise ValueError("a box of ISO base media")
        at += size
        if at > len(body):
            raise EOFError
        yield


def _jpeg2000(body: bytes) -> Iterator[None]:
    if not body.startswith(b"\0\0\0\x0c"):
        # A bare codestream ends in its own marker; in boxes, the decoder is told where it ends.
        if body[-2:] != b"\xff\xd9":
            raise EOFError
        return iter(())
    return _boxes(body)


def _bmp(body: bytes) -> Iterator[None]:
    if struct.unpack_from("<I", body, 2)[0] > len(body):
        raise EOFError
    return iter(())


def _tiff(body: bytes) -> Iterator[None]:
    """Yields for each strip or tile, and for each page; all must lie in the file."""
    order = "<" if body[:2] == b"II" else ">"
    big = body[2:4] in (b"+\0", b"\0+")
    word, count_kind = ("Q", "Q") if big else ("I", "H")
    (at,) = struct.unpack_from(order + word, body, 8 if big else 4)
    pages = set()
    while at and at not in pages:
        pages.add(at)
        (num_entries,) = struct.unpack_from(order + count_kind, body, at)
        at += struct.calcsize(order + count_kind)
        parts: dict[int, npt.NDArray[np.float64]] = {}
        for _ in range(num_entries):
            tag, values = _tiff_entry(body, at, order, word)
            if tag in _TIFF_PARTS:
                yield from itertools.repeat(None, len(values))
                parts[tag] = values.astype(np.float64)
            at += struct.calcsize(order + "HH" + 2 * word)
        for tag, size_tag in _TIFF_PARTS.items():
            offsets, sizes = parts.get(tag, _NO_VALUES), parts.get(size_tag, _NO_VALUES)
            if len(offsets) == len(sizes) and (offsets + sizes).max(initial=0) > len(body):
                raise EOFError
        (at,) = struct.unpack_from(order + word, body, at)
        yield


def _tiff_entry(body: bytes, at: int, order: str, word: str) -> tuple[int, npt.NDArray[Any]]:
    """Returns the tag of an entry and its values, which are not read yet."""
    tag, kind, count = struct.unpack_from(order + "HH" + word, body, at)
    value = np.dtype(order + _TIFF_TYPES.get(kind, "u1"))
    at += struct.calcsize(order + "HH" + word)
    if count * value.itemsize > struct.calcsize(order + word):
        (at,) = struct.unpack_from(order + word, body, at)
    if at + count * value.itemsize > len(body):
        raise EOFError
    return tag, np.frombuffer(body, value, count, at)


def _u16(body: bytes, at: int) -> int:
    return int(struct.unpack_from(">H", body, at)[0])


def _u32(body: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", body, at)[0])


_WALKS: dict[str, Callable[[bytes], Iterator[None]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
    "AVIF": _boxes,
    "HEIF": _boxes,
    "JPEG2000": _jpeg2000,
    "BMP": _bmp,
    "TIFF": _tiff,
}
