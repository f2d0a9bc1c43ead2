"""Lists of text as blocks of whole lines: unpacked, streamed, and checked to be text at all."""

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from mdm_core.errors import ConfigError
from pipelines import storage

MAX_LINE_BYTES = 16 << 20
_READ_BYTES = 4 << 20
_HEAD_BYTES = 1 << 20
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_UTF8_MARK = b"\xef\xbb\xbf"
# What begins like this would be read as rows and rows of nonsense.
_NOT_TEXT = {
    b"\xff\xfe": "is UTF-16 and not UTF-8; convert it, as with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16 and not UTF-8; convert it, as with iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "is packed by gzip, and its name does not say so; let it end in .gz",
    b"\x28\xb5\x2f\xfd": "is packed by zstd, and its name does not say so; let it end in .zst",
    b"PAR1": "is a Parquet file; set source.format: parquet",
}
_LINKS_AFTER_CR = re.compile(rb"\r[^\r\n]*https?://", re.IGNORECASE)


def read_blocks(uri: str) -> Iterator[bytes | None]:
    """Yields a list as blocks of whole lines, without a byte-order mark; None in the place of a line that is too long.

    What is in memory at a time is a block and the beginning of a line, whatever the length of the list or of its lines.

    Raises:
        ConfigError: It is not text in UTF-8, or its lines do not end with LF.
        OSError: It cannot be read or unpacked, as when it is cut short.
    """
    rest = b""
    is_skipping = False
    with storage.open_stream(uri) as file, _unpacked(file, uri) as stream:
        block = _first_block(stream, uri)
        if not block and stream is not file and file.tell() == 0:
            raise OSError("it is empty, and what is packed never is")
        while block:
            if is_skipping:
                _, newline, block = block.partition(b"\n")
                is_skipping = not newline
            whole, newline, end = block.rpartition(b"\n")
            if newline:
                yield rest + whole + newline
                rest = end
            else:
                rest += end
            if len(rest) > MAX_LINE_BYTES:
                yield None
                rest, is_skipping = b"", True
            block = stream.read(_READ_BYTES)
    if rest:
        yield rest


def is_utf8(text: bytes) -> bool:
    """Returns whether `text` is UTF-8, without decoding it."""
    offsets = pa.py_buffer(np.array([0, len(text)], np.int32))
    try:
        pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(text)]).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _first_block(stream: pa.NativeFile, uri: str) -> bytes:
    block = b""
    # A server may send less than was asked for, and what is told of a list must not depend on that.
    while b"\n" not in block and len(block) < _HEAD_BYTES and (more := stream.read(_READ_BYTES)):
        block += more
    for start, what in _NOT_TEXT.items():
        if block.startswith(start):
            raise ConfigError(f"{uri} {what}")
    if b"\n" not in block[:_HEAD_BYTES] and _LINKS_AFTER_CR.search(block[:_HEAD_BYTES]):
        raise ConfigError(f"{uri} ends its lines with CR alone; wanted LF or CRLF, as from tr '\\r' '\\n'")
    return block.removeprefix(_UTF8_MARK)


def _unpacked(file: pa.NativeFile, uri: str) -> pa.NativeFile:
    name = storage.file_name(uri)
    for suffix, compression in _COMPRESSIONS.items():
        if name.endswith(suffix):
            return pa.CompressedInputStream(file, compression)
    return file
