"""Serves the links of a TroubleList on eight loopback addresses, in a process of its own, and remembers what it served.

    python -m tests.pipelines.data.trouble_server --links 2000 --seed 0

prints its port; each line on its standard input is answered with one line of JSON: `report` with what was asked for
and served, `forget` after beginning to count anew. When its standard input ends it ends too.
"""

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from tests.pipelines.data.trouble_list import HOSTS, MAX_BYTES, TroubleList

_DRIP_S = 0.2


@dataclass(frozen=True)
class Served:
    """What the server knows of: how often each link was asked for, and the hash of what it sent last for it."""

    asked: dict[int, int]
    sha256: dict[int, bytes]
    moved: dict[int, int]
    """How often the place was asked for to which a link redirects."""


class TroubleServer:
    """The server, from the outside: a process that ends with the `with` block."""

    def __init__(self, num_links: int, *, seed: int = 0) -> None:
        self._num_links = num_links
        self._seed = seed

    def __enter__(self) -> Self:
        words = ["--links", str(self._num_links), "--seed", str(self._seed)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.data.trouble_server", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.links = TroubleList(self._num_links, seed=self._seed, port=self._answer())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def report(self) -> Served:
        """Returns what it was asked for since it began, or since `forget`."""
        answer = self._ask("report")
        return Served(
            asked={int(number): count for number, count in answer["asked"].items()},
            sha256={int(number): bytes.fromhex(digest) for number, digest in answer["sha256"].items()},
            moved={int(number): count for number, count in answer["moved"].items()},
        )

    def forget(self) -> None:
        """Lets it begin to count anew."""
        self._ask("forget")

    def _ask(self, word: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


class _Server:
    """The server, from the inside."""

    def __init__(self, links: TroubleList) -> None:
        self._links = links
        self._gzip_bomb = gzip.compress(bytes(8 * MAX_BYTES))
        self.forget()

    def forget(self) -> None:
        self.asked: Counter[int] = Counter()
        self.moved: Counter[int] = Counter()
        self.sha256: dict[int, str] = {}

    def report(self) -> dict[str, Any]:
        return {"asked": self.asked, "moved": self.moved, "sha256": self.sha256}

    async def serve(self, request: web.Request) -> web.StreamResponse:
        number = int(request.path.strip("/").removesuffix(".jpg"))
        if request.query_string:
            self.moved[number] += 1
            return self._whole(number)
        self.asked[number] += 1
        # Clients are expected to leave.
        with contextlib.suppress(ConnectionError):
            return await self._serve(request, number, self._links.kind(number))
        return web.Response()

    async def _serve(self, request: web.Request, number: int, kind: str) -> web.StreamResponse:
        if status := {"missing": 404, "gone": 410, "forbidden": 403, "broken": 503}.get(kind):
            return web.Response(status=status)
        if kind == "busy_once" and self.asked[number] == 1:
            return web.Response(status=429, headers={"Retry-After": "0"})
        if kind in ("moved", "loop", "to_private"):
            return web.Response(status=302, headers={"Location": self._links.location(number)})
        if kind == "opted_out":
            return self._whole(number, {"X-Robots-Tag": "noai"})
        if kind == "gzipped":
            return self._whole(number, {"Content-Encoding": "gzip"})
        if kind == "gzip_bomb":
            return web.Response(body=self._gzip_bomb, headers={"Content-Encoding": "gzip"})
        if kind in ("long_liar", "short_liar"):
            return await self._lie(request, self._links.body(number), 2.0 if kind == "long_liar" else 0.5)
        if kind == "huge":
            return await self._lie(request, b"", 0, length=MAX_BYTES + 1)
        if kind in ("stall", "drip", "endless"):
            return await self._go_on(request, kind, self._links.body(number))
        if kind == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return self._whole(number)

    def _whole(self, number: int, headers: dict[str, str] | None = None) -> web.Response:
        body = self._links.body(number)
        self.sha256[number] = hashlib.sha256(body).hexdigest()
        if headers and "Content-Encoding" in headers:
            body = gzip.compress(body)
        return web.Response(body=body, headers={"Content-Type": "image/jpeg"} | (headers or {}))

    async def _lie(
        self, request: web.Request, body: bytes, factor: float, length: int | None = None
    ) -> web.StreamResponse:
        """Says that a body is longer or shorter than it is, sends all of it, and leaves."""
        assert request.transport is not None
        length = int(len(body) * factor) if length is None else length
        request.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % length + body)
        # What waits to be sent still goes.
        request.transport.close()
        return web.Response()

    async def _go_on(self, request: web.Request, kind: str, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        if kind == "stall":
            await asyncio.sleep(3600)
        await response.prepare(request)
        if kind == "drip":
            for byte in body:
                await response.write(bytes([byte]))
                await asyncio.sleep(_DRIP_S)
        while kind == "endless":
            await response.write(bytes(1 << 16))
        return response


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--links", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    links = TroubleList(words.links, seed=words.seed)
    server = _Server(links)
    app = web.Application()
    app.router.add_get("/{path:.*}", server.serve)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, HOSTS[0], 0, backlog=4096).start()
    links.port = runner.addresses[0][1]
    for host in HOSTS[1:]:
        await web.TCPSite(runner, host, links.port, backlog=4096).start()
    print(links.port, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if line.strip() == "forget":
            server.forget()
        print(json.dumps(server.report()), flush=True)
    # Handlers that never end on their own are not waited for.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main())
