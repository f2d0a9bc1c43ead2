"""A web server on loopback that sends what it is told to, byte for byte, and keeps what it was sent."""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TypeAlias

from tests.pipelines.data.loop_server import LoopServer


class End(Enum):
    """How a connection ends."""

    CLOSE = "closed"
    ABORT = "reset"


Step: TypeAlias = bytes | float | End
"""Bytes to send, seconds to wait, or the end of the connection."""


def ok(body: bytes, *headers: str) -> bytes:
    """Returns a whole answer with a body."""
    return answer("200 OK", f"Content-Length: {len(body)}", *headers) + body


def answer(status: str, *headers: str) -> bytes:
    """Returns the head of an answer."""
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("utf-8", "surrogateescape")


class RawServer(LoopServer):
    """Answers each request with what `script` has for its path, on 127.0.0.1 to 127.0.0.3, and on ::1 where it is.

    Args:
        script: Returns the steps of an answer.
        tls: How to speak TLS, if it does.
    """

    def __init__(self, script: Callable[[str], Sequence[Step]], tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.script = script
        self.requests: list[bytes] = []
        """Heads of all requests."""
        self.num_connections = 0
        self.hosts: list[str] = []
        """The address that each connection came to."""
        self._tls = tls

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        """Returns the link to a path."""
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}{path}"

    @property
    def request_lines(self) -> list[str]:
        """The first line of each request."""
        return [head.partition(b"\r\n")[0].decode("latin-1") for head in self.requests]

    async def _start(self) -> None:
        self._servers = [await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)]
        self.port = self._servers[0].sockets[0].getsockname()[1]
        for host in ("127.0.0.2", "127.0.0.3", "::1"):
            # Not every machine has IPv6.
            with contextlib.suppress(OSError):
                self._servers.append(await asyncio.start_server(self._serve, host, self.port, ssl=self._tls))

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.hosts.append(writer.get_extra_info("sockname")[0])
        # Clients leave when they please, and the server when the test ends.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                if await self._play(writer, self.script(head.split(b" ")[1].decode("latin-1"))):
                    break
        writer.close()

    async def _play(self, writer: asyncio.StreamWriter, steps: Sequence[Step]) -> bool:
        for step in steps:
            if step is End.ABORT:
                writer.transport.abort()
            if isinstance(step, End):
                return True
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            else:
                await asyncio.sleep(step)
        return False
