"""Picture files that Pillow doesn't write: profiles, chunks and layouts made by hand."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# XYZ of the three primaries at the white of profiles (D50), as columns.
SRGB_XYZ = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
P3_XYZ = np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
WHITE_XYZ = np.array([0.9642, 1.0, 0.8249])


def rgb_profile(xyz: npt.NDArray[np.float64], gamma: float) -> bytes:
    """Returns a profile of three primaries and one gamma."""
    tags = {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), xyz.T, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))
    return _profile(b"RGB ", b"XYZ ", tags | curves)


def grey_profile(gamma: float) -> bytes:
    """Returns a profile of shades of grey."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile(corners: dict[tuple[int, int, int, int], Sequence[float]]) -> bytes:
    """Returns a profile of four inks: the Lab colour of each given corner of the cube, white for the others."""
    identity = bytes(range(256))
    cube = bytearray()
    for corner in np.ndindex(2, 2, 2, 2):
        lightness, a, b = corners.get(tuple(int(ink) for ink in corner), (100.0, 0.0, 0.0))  # type: ignore[arg-type]
        cube += bytes([round(lightness * 2.55), round(a) + 128, round(b) + 128])
    matrix = b"".join(struct.pack(">i", value << 16) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * identity + bytes(cube) + 3 * identity
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut}, b"prtr")


def srgb_of(xyz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the sRGB values, 0 to 255, of colours at the white of profiles."""
    linear = np.clip(np.linalg.inv(SRGB_XYZ) @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def lab_of(rgb: Sequence[int]) -> list[float]:
    """Returns the Lab colour of sRGB values, 0 to 255."""
    values = np.array(rgb) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    ratios = SRGB_XYZ @ linear / WHITE_XYZ
    x, y, z = np.where(ratios > (6 / 29) ** 3, np.cbrt(ratios), ratios / (3 * (6 / 29) ** 2) + 4 / 29)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def png(
    width: int, height: int, depth: int, colour: int, rows: Sequence[bytes], *before: bytes, after: bytes = b""
) -> bytes:
    """Returns a PNG of the given rows, with chunks before and after its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + after + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk of PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif(orientation: int, thumbnail: bytes = b"") -> bytes:
    """Returns EXIF data of big-endian order, without the six bytes that begin it in JPEG."""
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    if not thumbnail:
        return b"MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)
    second = 8 + 2 + 12 + 4
    place = struct.pack(">HHII", 0x0201, 4, 1, second + 2 + 24 + 4)
    size = struct.pack(">HHII", 0x0202, 4, 1, len(thumbnail))
    first = struct.pack(">IH", 8, 1) + entry + struct.pack(">I", second)
    return b"MM\0*" + first + struct.pack(">H", 2) + place + size + bytes(4) + thumbnail


def bmp(width: int, height: int, bits: int, compression: int, pixels: bytes, extra: bytes = b"") -> bytes:
    """Returns a BMP; `extra` are its masks or its palette, and a negative height means from the top down."""
    start = 14 + 40 + len(extra)
    colours = len(extra) // 4 if bits <= 8 else 0
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, colours, 0)
    return struct.pack("<2sIII", b"BM", start + len(pixels), 0, start) + header + extra + pixels


def gif(canvas: tuple[int, int], *parts: bytes, palette: bytes) -> bytes:
    """Returns a GIF of parts that `gif_frame` makes."""
    flags = 0x80 | (len(palette) // 3).bit_length() - 2
    return b"GIF89a" + struct.pack("<HHBBB", *canvas, flags, 0, 0) + palette + b"".join(parts) + b";"


def gif_frame(
    left: int, top: int, width: int, height: int, colour: int, *, clear: int | None = None, disposal: int = 0
) -> bytes:
    """Returns a frame of one colour, number `clear` being transparent; its pixels are stored without compression."""
    control = bytes([0x21, 0xF9, 4, disposal << 2 | (clear is not None), 0, 0, clear or 0, 0])
    codes = []
    for _ in range(width * height):
        codes += [4, colour]  # clear the table before each pixel, so that codes stay three bits wide
    codes.append(5)
    bits = sum(code << 3 * at for at, code in enumerate(codes))
    packed = bits.to_bytes(-(-3 * len(codes) // 8), "little")
    blocks = b"".join(bytes([len(packed[at : at + 255])]) + packed[at : at + 255] for at in range(0, len(packed), 255))
    return control + b"," + struct.pack("<HHHHB", left, top, width, height, 0) + b"\x02" + blocks + b"\0"


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    name = b"hand made\0"
    described = b"desc" + struct.pack(">II", 0, len(name)) + name + bytes(4 + 4 + 2 + 1 + 67)
    tags = {b"desc": described, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": _xyz(WHITE_XYZ)} | tags
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    body = table + data
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"test", 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(4 + 4 + 4 + 4 + 8 + 4)
    header += b"".join(struct.pack(">i", round(value * 65536)) for value in WHITE_XYZ)
    return header + bytes(128 - len(header)) + body


def _xyz(values: npt.NDArray[np.float64]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
