"""A web server on loopback that serves pictures and every kind of trouble, and remembers what it was asked for."""

import asyncio
import contextlib
import gzip
import io
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
from aiohttp import web
from PIL import Image

from tests.pipelines.data.loop_server import LoopServer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def draw_picture(number: int, width: int = 96, height: int = 64) -> Image.Image:
    """Returns a smooth picture with some noise, different for each number."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / rng.uniform(9, 30) + k) + np.cos(y / rng.uniform(9, 30)) for k in range(3)]
    pixels = 128 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 2, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """Returns the picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **({"quality": 92} if image_format == "JPEG" else {}) | options)
    return buffer.getvalue()


class PictureServer(LoopServer):
    """Serves `files` by path, and trouble under fixed names, on 127.0.0.1 and 127.0.0.2."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.hits: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.delay_s = 0.0
        self.busy_once: set[str] = set()
        self._troubles: dict[str, Handler] = {
            "/missing": _status(404),
            "/gone": _status(410),
            "/patience": _status(404, {"Retry-After": "Mon, 01 Jan 99999999999 00:00:00 GMT"}),
            "/forbidden": _status(403),
            "/broken": _status(503),
            "/page": _page,
            "/truncated.jpg": _truncated,
            "/drip": self._drip,
            "/stall": self._stall,
            "/endless": self._endless,
            "/liar": self._liar,
            "/reset": self._reset,
            "/bomb": _bomb,
            "/gzipped": _gzipped,
            "/noai": _opted_out("noai"),
            "/noai-for-other": _opted_out("otherbot: noai"),
            "/redirect": self._redirect("/0.jpg"),
            "/loop": self._redirect("/loop"),
            "/to-private": self._redirect("http://127.0.0.3:9/0.jpg"),
            "/to-file": self._redirect("file:///etc/passwd"),
            "/relative": self._redirect("sub/../1.jpg"),
        }

    def add_pictures(self, count: int) -> Iterator[str]:
        """Puts pictures on the server, and yields their links."""
        for number in range(count):
            self.files[f"/{number}.jpg"] = encode(draw_picture(number))
            yield self.url(f"/{number}.jpg")

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """Returns the link to a path."""
        return f"http://{host}:{self.port}{path}"

    def forget(self) -> None:
        """Begins to count anew."""
        self.hits.clear()
        self.hosts.clear()
        self.busy_once.clear()
        self.delay_s = 0.0

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._serve)
        # Handlers that never end on their own must not hold up the end of the tests.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        first = web.TCPSite(self._runner, "127.0.0.1", 0)
        await first.start()
        self.port = self._runner.addresses[0][1]
        await web.TCPSite(self._runner, "127.0.0.2", self.port).start()

    async def _stop(self) -> None:
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.hits[request.path] += 1
        assert request.transport is not None
        self.hosts.append(request.transport.get_extra_info("sockname")[0])
        await asyncio.sleep(self.delay_s)
        if trouble := self._troubles.get(request.path):
            # Clients are expected to leave.
            with contextlib.suppress(ConnectionError):
                return await trouble(request)
            return web.Response()
        if request.path.startswith("/busy/") and request.path not in self.busy_once:
            self.busy_once.add(request.path)
            return web.Response(status=429, headers={"Retry-After": "0"})
        body = self.files.get(request.path.removeprefix("/busy"))
        return web.Response(status=404) if body is None else web.Response(body=body, content_type="image/jpeg")

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for byte in encode(draw_picture(0)):
            await response.write(bytes([byte]))
            await asyncio.sleep(0.1)
        return response

    async def _stall(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        return web.Response()

    async def _endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    async def _liar(self, request: web.Request) -> web.StreamResponse:
        body = encode(draw_picture(0))
        response = web.StreamResponse(headers={"Content-Length": str(2 * len(body))})
        await response.prepare(request)
        await response.write(body)
        assert request.transport is not None
        request.transport.close()
        return response

    async def _reset(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def _redirect(self, location: str) -> Handler:
        async def handle(_: web.Request) -> web.StreamResponse:
            return web.Response(status=302, headers={"Location": location})

        return handle


def _status(status: int, headers: dict[str, str] | None = None) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers=headers)

    return handle


def _opted_out(directive: str) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        body = encode(draw_picture(900))
        return web.Response(body=body, headers={"X-Robots-Tag": directive}, content_type="image/jpeg")

    return handle


async def _page(_: web.Request) -> web.StreamResponse:
    return web.Response(text="<!doctype html><title>No picture here</title>", content_type="text/html")


async def _truncated(_: web.Request) -> web.StreamResponse:
    body = encode(draw_picture(901))
    return web.Response(body=body[: len(body) // 2], content_type="image/jpeg")


async def _bomb(_: web.Request) -> web.StreamResponse:
    return web.Response(body=gzip.compress(bytes(200 << 20)), headers={"Content-Encoding": "gzip"})


async def _gzipped(_: web.Request) -> web.StreamResponse:
    return web.Response(body=gzip.compress(encode(draw_picture(902))), headers={"Content-Encoding": "gzip"})
