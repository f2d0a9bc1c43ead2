"""The web server that the contenders fetch from: a process of its own, on loopback, that knows when it was asked what.

    with PhotoServer(folder, count=2000, cores=[1]) as server:
        server.url("photo", 17)      # http://127.0.1.18:PORT/photo/17
        server.seen()                # {"requests": …, "first_s": …, "last_s": …}

Kinds of links: `photo` and `tiny` give pictures; `stall` accepts and says nothing, `drip` sends a byte a second
without end, `reset` closes the connection in the middle of the headers.
"""

import asyncio
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import uvloop

from pipelines.benchmark.data import photos
from pipelines.benchmark.turns import Worker

KINDS = ("photo", "tiny", "stall", "drip", "reset")
NUM_HOSTS = 64
"""Links are spread over so many addresses, as those of a real list are over hosts."""
_DRIP_EVERY_S = 1.0


class PhotoServer:
    """The server, started and ended with the block.

    Args:
        folder: Photos, as `write_photos` leaves them.
        count: How many of them.
        cores: Those that it runs on.
    """

    def __init__(self, folder: Path, *, count: int, cores: Sequence[int]) -> None:
        self._worker = Worker("the server of pictures", _Making(folder, count, tuple(cores)))
        self.port = 0

    def __enter__(self) -> Self:
        self._worker.__enter__()
        self._worker.ready()
        self.port = int(self._worker.ask("port", doing="at its start"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.__exit__(kind, error, trace)

    def url(self, kind: str, number: int) -> str:
        """The link to a picture, or to trouble."""
        return f"http://127.0.1.{1 + number % NUM_HOSTS}:{self.port}/{kind}/{number}"

    def seen(self) -> dict[str, Any]:
        """What was asked of it since `forget`.

        Returns:
            `requests`, and of them the `links` that differ and the counts by `kinds`; `first_s` and `last_s`, when the
            first request came and the last one was answered or given up, in seconds since 1970, None before.
        """
        return cast(dict[str, Any], self._worker.ask("seen", doing="while it was counting"))

    def forget(self) -> None:
        """Begins to count anew."""
        self._worker.ask("forget", doing="while it was counting")


class _Making:
    """Makes the process's part, once it runs there."""

    def __init__(self, folder: Path, count: int, cores: tuple[int, ...]) -> None:
        self._folder, self._count, self._cores = folder, count, cores

    def __call__(self) -> "_Serving":
        os.sched_setaffinity(0, self._cores)
        bodies = [path.read_bytes() for path in photos.write_photos(self._folder, self._count)]
        return _Serving(bodies)


class _Serving:
    """Serves from a thread, and answers what the benchmark asks from the other."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        self.bodies = bodies
        self.links: Counter[str] = Counter()
        self.first_s: float | None = None
        self.last_s: float | None = None
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def __call__(self, request: str) -> Any:
        """The answer to `port`, `seen` or `forget`; counted in the loop's thread, between two requests."""
        return asyncio.run_coroutine_threadsafe(self._answer(request), self._loop).result()

    async def _answer(self, request: str) -> Any:
        if request == "port":
            return self._port
        if request == "forget":
            self.links.clear()
            self.first_s = self.last_s = None
            return None
        kinds: Counter[str] = Counter()
        for link, count in self.links.items():
            kinds[link.split("/")[1]] += count
        return {
            "requests": self.links.total(),
            "links": len(self.links),
            "kinds": dict(kinds),
            "first_s": self.first_s,
            "last_s": self.last_s,
        }

    async def _listen(self) -> int:
        port = 0
        for number in range(NUM_HOSTS):
            listening = socket.socket()
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((f"127.0.1.{1 + number}", port))
            port = listening.getsockname()[1]
            await self._loop.create_server(lambda: _Connection(self), sock=listening, backlog=1024)
        return port

    def asked(self, link: str) -> None:
        """Notes a request."""
        self.links[link] += 1
        if self.first_s is None:
            self.first_s = time.time()

    def answered(self) -> None:
        """Notes that a request has its answer, or is given up."""
        self.last_s = time.time()


class _Connection(asyncio.Protocol):
    """One connection, kept open as HTTP/1.1 has it."""

    def __init__(self, serving: _Serving) -> None:
        self._serving = serving
        self._received = b""
        self._dripping: asyncio.Task[None] | None = None
        self._in_trouble = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0 and not self._in_trouble:
            head, self._received = self._received[:end], self._received[end + 4 :]
            self._answer(head)

    def connection_lost(self, error: Exception | None) -> None:
        if self._in_trouble:
            self._serving.answered()
        if self._dripping is not None:
            self._dripping.cancel()

    def _answer(self, head: bytes) -> None:
        link = head.split(b" ", 2)[1].decode()
        self._serving.asked(link)
        _, kind, number = link.split("/")
        if kind in ("photo", "tiny"):
            body = self._serving.bodies[int(number)] if kind == "photo" else photos.tiny(int(number))
            self._transport.write(_head(len(body)) + body)
            self._serving.answered()
            if b"connection: close" in head.lower():
                self._transport.close()
            return
        self._in_trouble = True
        if kind == "drip":
            self._dripping = asyncio.get_running_loop().create_task(self._drip())
        elif kind == "reset":
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-")
            # With nothing left to linger for, closing is a reset.
            socket_ = self._transport.get_extra_info("socket")
            socket_.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()

    async def _drip(self) -> None:
        self._transport.write(_head(1_000_000))
        while True:
            self._transport.write(b"\xff")
            await asyncio.sleep(_DRIP_EVERY_S)


def _head(length: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % length
