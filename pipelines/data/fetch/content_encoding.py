"""Unpacking bodies that were sent packed though nobody asked for it."""

import zlib
from collections.abc import Iterator

_PIECE_BYTES = 1 << 18
_GZIP_BEGINS = b"\x1f\x8b"


class UnknownEncodingError(Exception):
    """A body that is packed in a way that is not known, or not packed in the way that it says."""


class Unpacker:
    """Unpacks gzip, of one member or more, and deflate, with its header or without, as browsers do.

    Args:
        encoding: What `Content-Encoding` says.

    Raises:
        UnknownEncodingError: It says something else. Brotli and zstd are among it: their decoders cannot all be told
            how much to give at most, and no server is asked for them.
    """

    def __init__(self, encoding: str) -> None:
        self._is_gzip = encoding in ("gzip", "x-gzip")
        if not self._is_gzip and encoding != "deflate":
            raise UnknownEncodingError(f"Content-Encoding: {encoding}")
        self._begin = b""
        self._is_over = False
        self._decoder: zlib._Decompress | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the end of the packed data has been seen."""
        return self._decoder is not None and self._decoder.eof

    def pieces(self, block: bytes) -> Iterator[bytes]:
        """Yields what the next block of a body unpacks to, in pieces of 256 KiB at most: a bomb goes off slowly.

        Raises:
            UnknownEncodingError: It is not packed in the way that it says.
        """
        block, self._begin = self._begin + block, b""
        is_more = bool(block) and not self._is_over
        try:
            while is_more:
                if self.is_complete or self._decoder is None:
                    if len(block) < 2:
                        self._begin = block
                        return
                    if self.is_complete and not (self._is_gzip and block.startswith(_GZIP_BEGINS)):
                        self._is_over = True  # What follows is no part of the body.
                        return
                    self._decoder = self._new_decoder(block)
                piece = self._decoder.decompress(block, _PIECE_BYTES)
                if piece:
                    yield piece
                block = self._decoder.unused_data if self._decoder.eof else self._decoder.unconsumed_tail
                # A full piece may leave more of it in the decoder than in the block.
                is_more = bool(block) or (len(piece) == _PIECE_BYTES and not self._decoder.eof)
        except zlib.error as error:
            raise UnknownEncodingError(str(error)) from None

    def _new_decoder(self, begin: bytes) -> "zlib._Decompress":
        if self._is_gzip:
            return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        has_header = begin[0] & 0x0F == zlib.DEFLATED and int.from_bytes(begin[:2], "big") % 31 == 0
        return zlib.decompressobj(wbits=zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
