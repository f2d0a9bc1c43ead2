"""A web server on loopback that serves a corpus, its trouble included, and counts what it served."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from mdm_core.errors import ConfigError
from pipelines.quickstart.corpus import Corpus

_DRIP_EVERY_S = 0.5
_KINDS = ("pictures", "busy", "gone", "page", "cut", "drip", "pixel")
_PAGE = b"<!doctype html><html><head><title>Gallery</title></head><body><p>This picture has moved.</p></body></html>"
# The smallest GIF there is, one transparent pixel: what pages use to count their readers.
_PIXEL = bytes.fromhex("47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b")
_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}


class CorpusServer:
    """What a running server knows; every link's first path component says what it does."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.served: Counter[str] = Counter()
        """Answers by kind: pictures, busy (after its 429), too_many (the 429s), gone, page, cut, drip, pixel, other."""
        self.requests: Counter[str] = Counter()
        """Requests by path."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answers one request."""
        path = request.path
        self.requests[path] += 1
        kind, _, name = path.removeprefix("/").partition("/")
        if kind == "busy" and self.requests[path] == 1:
            self.served["too_many"] += 1
            # Half of them ask for a second's patience, half for none.
            return web.Response(status=429, headers={"Retry-After": str(self.served["too_many"] % 2)})
        known = kind in _KINDS
        self.served[kind if known else "other"] += 1
        if not known or kind == "gone":
            return web.Response(status=404, text="not found")
        content_type = _TYPES[Path(name).suffix]
        match kind:
            case "page":
                # Every other page claims to be a picture: what counts is what arrives.
                return web.Response(body=_PAGE, content_type=content_type if self.served[kind] % 2 else "text/html")
            case "pixel":
                return web.Response(body=_PIXEL, content_type=content_type)
            case "drip":
                return await self._drip(request, content_type)
        data = self.corpus.picture_path(name).read_bytes()
        return web.Response(body=data[: len(data) // 2] if kind == "cut" else data, content_type=content_type)

    async def _drip(self, request: web.Request, content_type: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        while True:
            await response.write(b"\x89")
            await asyncio.sleep(_DRIP_EVERY_S)


@contextmanager
def serve(corpus: Corpus) -> Iterator[CorpusServer]:
    """Serves `corpus` on its port of 127.0.0.1, from a thread, until the block is left.

    Raises:
        ConfigError: The port is taken.
    """
    server = CorpusServer(corpus)
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    # Without cancellation a drip would go on after its reader has left.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    try:
        loop.run_until_complete(_start(runner, corpus.port))
    except OSError as error:
        loop.run_until_complete(runner.cleanup())
        loop.close()
        raise ConfigError(
            f"port {corpus.port} of 127.0.0.1 is taken ({error.strerror}), and {corpus.links_path} names it; "
            "end what listens there, or use another folder"
        ) from error
    thread = threading.Thread(target=loop.run_forever, name="corpus-server", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(runner: web.AppRunner, port: int) -> None:
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
