"""Small files that would become huge are refused before they do: what the process takes stays far below it."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from tests.pipelines.data import odd_files
from tests.pipelines.data.odd_files import chunk
from tests.pipelines.data.picture_server import draw_picture, encode

pillow_heif.register_heif_opener(thumbnails=False)

_MEGABYTE = 1 << 20
# Decodes small files, for what the libraries take for themselves; then prints of each bomb its outcome, and by how much
# the most memory that was ever taken has grown, in kilobytes.
_CHILD = """
import resource, sys, warnings
from pathlib import Path
from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.pictures.decode import decode
warnings.filterwarnings("ignore", module="PIL")
anything = FiltersConfig(min_side_px=0, max_aspect=1e9)
for small in sorted(Path(sys.argv[1], "small").iterdir()):
    assert hasattr(decode(small.read_bytes(), ImageConfig(), anything), "phash"), small
Path(sys.argv[1], "largest").read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bomb in sorted(Path(sys.argv[1], "bombs").iterdir()):
    found = decode(bomb.read_bytes(), ImageConfig(), anything)
    print(bomb.name, getattr(found, "reason", "a picture"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
          sep="|")
"""


def with_header_size(body: bytes, at: int, layout: str, *values: int) -> bytes:
    packed = struct.pack(layout, *values)
    return body[:at] + packed + body[at + len(packed) :]


def packed_zeros(num_megabytes: int) -> bytes:
    """Returns what zlib makes of zeros, one packed megabyte again and again."""
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(_MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = (num_megabytes * _MEGABYTE % 65521) << 16 | 1
    return b"\x78\xda" + piece * num_megabytes + b"\x03\0" + struct.pack(">I", checksum)


def huge_png() -> bytes:
    # Its pixels are all there, 2.7 GB of them.
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", packed_zeros(2_600))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    body = encode(Image.new("RGB", (64, 64)))
    return with_header_size(body, body.index(b"\xff\xc0") + 5, ">HH", 65_000, 65_000)


def huge_gif() -> bytes:
    return with_header_size(encode(Image.new("P", (8, 8)), "GIF"), 6, "<HH", 65_535, 65_535)


def huge_webp() -> bytes:
    # The largest canvas that there is, around a frame of one pixel.
    body = encode(Image.new("RGBA", (8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGBA", (8, 8), "red")])
    assert body[12:16] == b"VP8X"
    return with_header_size(body, 24, "<HBHB", 0x3FFE, 0, 0x3FFE, 0)


def tiff_of(entries: list[tuple[int, int, int, int]], tail: bytes = b"") -> bytes:
    """Returns a TIFF of entries of tag, kind, count and value; `tail` comes after them."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + tail


def tiff_entries(side: int) -> list[tuple[int, int, int, int]]:
    return [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]


def huge_tiff() -> bytes:
    return tiff_of([*tiff_entries(60_000), (273, 4, 1, 8), (278, 4, 1, 60_000), (279, 4, 1, 8)])


def tiff_of_many_tiles() -> bytes:
    # A tile a pixel, of a picture that is not too large.
    count = 3_000_000
    entries = [*tiff_entries(1733), (322, 4, 1, 1), (323, 4, 1, 1)]
    start = 8 + 2 + 12 * (len(entries) + 2) + 4
    arrays = [(324, 4, count, start), (325, 4, count, start)]
    return tiff_of([*entries, *arrays], np.ones(count, "<u4").tobytes())


def avif() -> bytes:
    body = encode(Image.new("RGB", (64, 64)), "AVIF")
    return with_header_size(body, body.index(b"ispe") + 8, ">II", 40_000, 40_000)


def heic() -> bytes:
    body = encode(Image.new("RGB", (64, 64)), "HEIF")
    return with_header_size(body, body.index(b"ispe") + 8, ">II", 40_000, 40_000)


def huge_jpeg2000() -> bytes:
    body = encode(Image.new("RGB", (64, 64)), "JPEG2000")
    body = with_header_size(body, body.index(b"ihdr") + 4, ">II", 60_000, 60_000)
    return with_header_size(body, body.index(b"\xff\x51") + 6, ">II", 60_000, 60_000)


def compressed_chunk(kind: bytes, start: bytes) -> bytes:
    """Returns a small PNG with 500 MB of metadata."""
    return odd_files.png(64, 64, 8, 0, [bytes(64)] * 64, chunk(kind, start + packed_zeros(500)))


def many_chunks() -> bytes:
    return odd_files.png(64, 64, 8, 0, [bytes(64)] * 64, chunk(b"tEXt", b"a\0b") * 1_000_000)


def many_webp_chunks() -> bytes:
    body = encode(Image.new("RGBA", (8, 8)), "WEBP") + struct.pack("<4sI", b"junk", 0) * 1_000_000
    return with_header_size(body, 4, "<I", len(body) - 8)


def many_segments() -> bytes:
    body = encode(Image.new("RGB", (64, 64)))
    return body[:2] + b"\xff\xe1\0\2" * 4_000_000 + body[2:]


def many_frames() -> bytes:
    frame = odd_files.gif_frame(0, 0, 1, 1, 1)
    return odd_files.gif((64, 64), frame * 1_000_000, palette=bytes(12))


def many_boxes(image_format: str) -> bytes:
    body = encode(Image.new("RGB", (64, 64)), image_format)
    first = struct.unpack_from(">I", body)[0]
    return body[:first] + struct.pack(">I4s", 8, b"free") * 1_000_000 + body[first:]


BOMBS = {
    "png": (huge_png, {"too_many_pixels"}),
    "jpeg": (huge_jpeg, {"too_many_pixels"}),
    "gif": (huge_gif, {"too_many_pixels"}),
    "webp": (huge_webp, {"too_many_pixels"}),
    "tiff": (huge_tiff, {"too_many_pixels"}),
    "tiff of many tiles": (tiff_of_many_tiles, {"too_many_parts"}),
    "avif": (avif, {"too_many_pixels", "corrupt", "not_an_image"}),
    "heic": (heic, {"too_many_pixels", "corrupt", "not_an_image"}),
    "jpeg 2000": (huge_jpeg2000, {"too_many_pixels"}),
    "profile of a png": (lambda: compressed_chunk(b"iCCP", b"p\0\0"), {"corrupt"}),
    "text of a png": (lambda: compressed_chunk(b"zTXt", b"t\0\0"), {"corrupt"}),
    "international text of a png": (lambda: compressed_chunk(b"iTXt", b"t\0\1\0\0\0"), {"corrupt"}),
    "many chunks": (many_chunks, {"too_many_parts"}),
    "many segments": (many_segments, {"too_many_parts"}),
    "many boxes of an avif": (lambda: many_boxes("AVIF"), {"too_many_parts"}),
    "many boxes of a heic": (lambda: many_boxes("HEIF"), {"too_many_parts"}),
    "many boxes of a jpeg 2000": (lambda: many_boxes("JPEG2000"), {"too_many_parts"}),
    "many chunks of a webp": (many_webp_chunks, {"too_many_parts"}),
    "many frames": (many_frames, {"too_many_parts"}),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """The reason for which each bomb was refused, and the kilobytes that the process had grown by until then."""
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "bombs").mkdir()
    (folder / "small").mkdir()
    for name, (make, _) in BOMBS.items():
        (folder / "bombs" / name).write_bytes(make())
    largest = max((folder / "bombs").iterdir(), key=lambda path: path.stat().st_size)
    assert largest.stat().st_size < 50 * _MEGABYTE
    (folder / "largest").write_bytes(largest.read_bytes())
    for image_format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000"):
        (folder / "small" / image_format).write_bytes(encode(draw_picture(0), image_format))
    command = [sys.executable, "-c", _CHILD, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return {name: (reason, int(kilobytes)) for name, reason, kilobytes in lines}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_takes_no_memory(name: str, outcomes: dict[str, tuple[str, int]]) -> None:
    reason, grown_kb = outcomes[name]
    assert reason in BOMBS[name][1]
    assert grown_kb < 64 * 1024
