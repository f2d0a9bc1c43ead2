"""A list of links in which every kind of trouble occurs, and what must become of each link.

What a link is follows from the seed and its number alone, so that the server that serves it, the list that names it
and the test that checks it agree without telling each other.
"""

import functools
import hashlib
import io
import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

HOSTS = tuple(f"127.0.0.{number}" for number in range(1, 9))
ALLOWED_NETWORKS = ["127.0.0.0/29", "127.0.0.8/32"]
MAX_BYTES = 1 << 20
MAX_REDIRECTS = 3
RETRIES = 1
MIN_SIDE_PX = 64
SOURCE_NAME = "troubles"

_SIZES = ((96, 64), (64, 100), (160, 120), (65, 65))
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_BOMB_PX = 30_000
_BOMB_HEADER = struct.pack(">IIBBBBB", _BOMB_PX, _BOMB_PX, 1, 0, 0, 0, 0)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PRIVATE = ("http://10.1.2.3/", "http://127.0.0.9/", "http://169.254.169.254/", "http://[::ffff:10.0.0.1]/")


@dataclass(frozen=True)
class Kind:
    """What a link is: how many of a thousand are, and what must become of it."""

    share: float
    outcome: str
    reason: str | None = None
    retryable: bool = False
    asked: int = 1
    """How often the server is asked for it; redirects count each time."""
    is_hashed: bool = False
    """Whether its whole body arrives, so that its hash is stored."""


_RETRIED = RETRIES + 1
KINDS = {
    "jpeg": Kind(330, "ok", is_hashed=True),
    "png": Kind(70, "ok", is_hashed=True),
    "webp": Kind(70, "ok", is_hashed=True),
    "gif": Kind(50, "ok", is_hashed=True),
    "gzipped": Kind(10, "ok", is_hashed=True),
    "moved": Kind(40, "ok", is_hashed=True),
    "busy_once": Kind(15, "ok", is_hashed=True, asked=2),
    "copy": Kind(50, "filtered", "exact_duplicate", is_hashed=True),
    "small": Kind(25, "filtered", "too_small", is_hashed=True),
    "thin": Kind(25, "filtered", "aspect", is_hashed=True),
    "opted_out": Kind(20, "filtered", "opted_out"),
    "short_caption": Kind(25, "filtered", "caption_words", asked=0),
    "missing": Kind(30, "failed", "http_404"),
    "gone": Kind(15, "failed", "http_410"),
    "forbidden": Kind(15, "failed", "http_403"),
    "broken": Kind(10, "failed", "http_503", retryable=True, asked=_RETRIED),
    "reset": Kind(8, "failed", "connection", retryable=True, asked=_RETRIED),
    "long_liar": Kind(8, "failed", "incomplete_body", retryable=True, asked=_RETRIED),
    "stall": Kind(5, "failed", "deadline", retryable=True),
    "drip": Kind(5, "failed", "deadline", retryable=True),
    "short_liar": Kind(15, "failed", "bad_response"),
    "truncated": Kind(20, "failed", "truncated", is_hashed=True),
    "corrupt": Kind(20, "failed", "corrupt", is_hashed=True),
    "page": Kind(25, "failed", "not_an_image", is_hashed=True),
    "junk": Kind(15, "failed", "not_an_image", is_hashed=True),
    "pixel_bomb": Kind(10, "failed", "too_many_pixels", is_hashed=True),
    "gzip_bomb": Kind(8, "failed", "too_large"),
    "endless": Kind(8, "failed", "too_large"),
    "huge": Kind(8, "failed", "too_large"),
    "loop": Kind(10, "failed", "too_many_redirects", asked=MAX_REDIRECTS + 1),
    "to_private": Kind(15, "failed", "private_address"),
    "private": Kind(10, "failed", "private_address", asked=0),
    "bad_url": Kind(10, "failed", "bad_url", asked=0),
}

MALFORMED = {
    "not_utf8": lambda number: b"http://host/\xff%d\ta caption of some words" % number,
    "wrong_columns": lambda number: b"a line of one column, number %d" % number,
    "not_a_link": lambda number: b"ftp://host/%d.jpg\ta caption of some words" % number,
    "no_caption": lambda number: b"http://127.0.0.1/%d.jpg\t" % number,
}
"""Lines that can't be read, by what is wrong with them."""
_MALFORMED_SHARE = 0.005
_DUPLICATE_SHARE = 0.03


class TroubleList:
    """Links number 0 to `num_links`, less one.

    Args:
        num_links: How many.
        seed: Of what each of them is.
        port: Of the server.
    """

    def __init__(self, num_links: int, *, seed: int = 0, port: int = 0) -> None:
        self.num_links = num_links
        self.seed = seed
        self.port = port

    def kind(self, number: int) -> str:
        """Returns what link `number` is, a key of KINDS."""
        kind = self._random(number, "kind").choices(list(KINDS), [kind.share for kind in KINDS.values()])[0]
        # There is nothing yet that the first one could repeat.
        return "jpeg" if kind == "copy" and self._original(number) is None else kind

    def url(self, number: int) -> str:
        """Returns the link."""
        kind = self.kind(number)
        if kind == "private":
            return f"{_PRIVATE[number % len(_PRIVATE)]}{number}.jpg"
        if kind == "bad_url":
            return f"http://[half/{number}.jpg"
        return f"http://{HOSTS[number % len(HOSTS)]}:{self.port}/{number}.jpg"

    def caption(self, number: int) -> str:
        """Returns the caption; one of them is too short, and some have a quote or letters beyond ASCII."""
        if self.kind(number) == "short_caption":
            return f"number {number}"
        return (f'a "quoted caption, number {number}', f"Bild {number} – größer", f"a picture, number {number}")[
            number % 3
        ]

    def location(self, number: int) -> str:
        """Returns where a link that redirects leads."""
        if self.kind(number) == "to_private":
            return f"{_PRIVATE[number % len(_PRIVATE)]}{number}.jpg"
        if self.kind(number) == "loop":
            return f"/{number}.jpg"
        return f"http://{HOSTS[(number + 3) % len(HOSTS)]}:{self.port}/{number}.jpg?moved"

    def body(self, number: int) -> bytes:
        """Returns the file that the link stands for, whole."""
        kind = self.kind(number)
        if kind == "copy":
            original = self._original(number)
            assert original is not None
            return self.body(original)
        if kind == "page":
            return b"<!doctype html><title>No picture %d here</title>" % number
        if kind == "junk":
            return self._random(number, "junk").randbytes(500)
        if kind == "pixel_bomb":
            return _pixel_bomb(number)
        if kind == "corrupt":
            return _corrupt(_marked("PNG", _picture("PNG", (96, 64)), number))
        image_format = kind.upper() if kind.upper() in _FORMATS else "JPEG"
        body = _marked(image_format, _picture(image_format, self.size(number)), number)
        return body[: len(body) // 2] if kind == "truncated" else body

    def size(self, number: int) -> tuple[int, int]:
        """Returns the width and height of the picture that the link leads to."""
        kind = self.kind(number)
        if kind == "copy":
            original = self._original(number)
            assert original is not None
            return self.size(original)
        return {"small": (90, MIN_SIDE_PX - 1), "thin": (400, MIN_SIDE_PX)}.get(kind, _SIZES[number % len(_SIZES)])

    def sha256(self, number: int) -> bytes | None:
        """Returns the hash that the table must hold."""
        return hashlib.sha256(self.body(number)).digest() if KINDS[self.kind(number)].is_hashed else None

    def lines(self) -> Iterator[bytes]:
        """Yields the lines of the list: the links in order, some of them again later, and lines that can't be read."""
        for number in range(self.num_links):
            yield self._line(number, self.caption(number))
            for fault in self.faults_after(number):
                yield MALFORMED[fault](number)
            if (repeated := self.repeated_after(number)) is not None:
                yield self._line(repeated, f"another caption, number {number}")

    def faults_after(self, number: int) -> list[str]:
        """Returns what is wrong with the lines that follow that of link `number`."""
        draw = self._random(number, "faults")
        return [fault for fault in MALFORMED if draw.random() < _MALFORMED_SHARE]

    def repeated_after(self, number: int) -> int | None:
        """Returns which link stands in the list once more after link `number`."""
        draw = self._random(number, "duplicates")
        return draw.randrange(number + 1) if draw.random() < _DUPLICATE_SHARE else None

    def counts(self) -> dict[str, int]:
        """Returns what a first refresh must count."""
        outcomes = Counter(KINDS[self.kind(number)].outcome for number in range(self.num_links))
        faults = sum(len(self.faults_after(number)) for number in range(self.num_links))
        repeats = sum(self.repeated_after(number) is not None for number in range(self.num_links))
        return {
            "links": self.num_links + faults + repeats,
            **{name: outcomes[name] for name in ("ok", "filtered", "failed")},
            "duplicate": repeats,
            "malformed": faults,
            "unchanged": 0,
        }

    def reasons(self) -> dict[str, int]:
        """Returns how often a first refresh must give each reason."""
        reasons: Counter[str] = Counter()
        for number in range(self.num_links):
            reasons.update(filter(None, [KINDS[self.kind(number)].reason]))
            reasons.update(self.faults_after(number))
        return dict(reasons)

    def _line(self, number: int, caption: str) -> bytes:
        return f"{self.url(number)}\t{caption}".encode()

    def _original(self, number: int) -> int | None:
        """Returns the nearest link ahead whose picture link `number` may repeat."""
        return next((ahead for ahead in range(number - 1, -1, -1) if self._is_plain(ahead)), None)

    def _is_plain(self, number: int) -> bool:
        shares = [kind.share for kind in KINDS.values()]
        return self._random(number, "kind").choices(list(KINDS), shares)[0] in ("jpeg", "png", "webp", "gif")

    def _random(self, number: int, use: str) -> random.Random:
        return random.Random(f"{self.seed} {number} {use}")


@functools.cache
def _picture(image_format: str, size: tuple[int, int]) -> bytes:
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [np.sin(x / 9 + k) + np.cos(y / (7 + k)) for k in range(3)]
    noise = np.random.default_rng(width * height).normal(0, 2, (height, width, 3))
    pixels = (128 + 50 * np.stack(channels, axis=-1) + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def _marked(image_format: str, body: bytes, number: int) -> bytes:
    """Returns a picture with its number in a comment: bytes of its own at no cost."""
    mark = b"link %d" % number
    if image_format == "JPEG":
        return body[:2] + b"\xff\xfe" + struct.pack(">H", len(mark) + 2) + mark + body[2:]
    if image_format == "PNG":
        # After the signature and the header, which have 33 bytes.
        return body[:33] + _png_chunk(b"tEXt", b"Comment\0" + mark) + body[33:]
    if image_format == "GIF":
        return body.removesuffix(b";") + b"\x21\xfe" + bytes([len(mark)]) + mark + b"\0;"
    chunk = b"mdm " + struct.pack("<I", len(mark)) + mark + b"\0" * (len(mark) % 2)
    return b"RIFF" + struct.pack("<I", len(body) - 8 + len(chunk)) + body[8:] + chunk


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _pixel_bomb(number: int) -> bytes:
    """Returns a PNG of few bytes and 900 million pixels, whole and right."""
    mark = _png_chunk(b"tEXt", b"Comment\0%d" % number)
    return _PNG_SIGNATURE + _png_chunk(b"IHDR", _BOMB_HEADER) + mark + _bomb_pixels() + _png_chunk(b"IEND", b"")


@functools.cache
def _bomb_pixels() -> bytes:
    # A row is the number of its filter and one bit a pixel.
    return _png_chunk(b"IDAT", zlib.compress(bytes(_BOMB_PX * (1 + _BOMB_PX // 8))))


def _corrupt(png: bytes) -> bytes:
    """Returns a PNG with one bit of its pixels turned over."""
    at = png.index(b"IDAT") + 40
    return png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :]
