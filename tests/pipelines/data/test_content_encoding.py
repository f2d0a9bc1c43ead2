import gzip
import random
import zlib

import pytest

from pipelines.data.fetch.content_encoding import UnknownEncodingError, Unpacker

BODY = random.Random(2).randbytes(3_000) + bytes(1_000_000) + random.Random(3).randbytes(3_000)


def unpack(encoding: str, packed: bytes, block_bytes: int) -> tuple[bytes, bool]:
    unpacker = Unpacker(encoding)
    blocks = (packed[start : start + block_bytes] for start in range(0, len(packed), block_bytes))
    body = b"".join(piece for block in blocks for piece in unpacker.pieces(block))
    return body, unpacker.is_complete


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


PACKED = {
    "gzip": ("gzip", gzip.compress(BODY)),
    "x-gzip": ("x-gzip", gzip.compress(BODY, compresslevel=1)),
    "members": ("gzip", gzip.compress(BODY[:2_000]) + gzip.compress(b"") + gzip.compress(BODY[2_000:])),
    "zlib": ("deflate", zlib.compress(BODY)),
    "raw": ("deflate", raw_deflate(BODY)),
    "zeros after it": ("gzip", gzip.compress(BODY) + bytes(700)),
    "rubbish after it": ("gzip", gzip.compress(BODY) + b"\x1frubbish\x1f\x8b" * 3),
}


@pytest.mark.parametrize("block_bytes", [1, 2, 777, 10_000_000])
@pytest.mark.parametrize("name", PACKED)
def test_body_is_unpacked_however_it_is_cut(name: str, block_bytes: int) -> None:
    encoding, packed = PACKED[name]
    assert unpack(encoding, packed, block_bytes) == (BODY, True)


@pytest.mark.parametrize("name", ["gzip", "members", "zlib", "raw"])
def test_cut_body_is_not_complete(name: str) -> None:
    encoding, packed = PACKED[name]
    for size in (0, 1, 10, len(packed) - 1):
        body, is_complete = unpack(encoding, packed[:size], 100)
        assert not is_complete
        assert BODY.startswith(body)


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "*", "gzip2"])
def test_unknown_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(UnknownEncodingError):
        Unpacker(encoding)


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", b"\xff\xd8\xff\xe0 a JPEG"),
        ("deflate", b"\xff\xd8\xff\xe0 a JPEG"),
        ("gzip", zlib.compress(BODY)),
        ("gzip", gzip.compress(BODY)[:-8] + bytes(8)),
        ("deflate", zlib.compress(BODY)[:-1] + b"x"),
    ],
)
def test_body_that_is_not_packed_as_it_says_is_refused(encoding: str, packed: bytes) -> None:
    with pytest.raises(UnknownEncodingError):
        unpack(encoding, packed, 1_000)


def test_pieces_are_small_whatever_they_come_from() -> None:
    unpacker = Unpacker("gzip")
    sizes = [len(piece) for piece in unpacker.pieces(gzip.compress(bytes(32 << 20)))]
    assert sum(sizes) == 32 << 20
    assert max(sizes) <= 1 << 18
