"""What turns links into pictures: a worker has one engine, and gives it the links of a chunk."""

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from pipelines.data.config import RefreshConfig
from pipelines.data.failure import Failure
from pipelines.data.fetch.fetcher import Fetcher
from pipelines.data.pictures.decode import Picture, decode
from pipelines.data.pictures.video import Clip, decode_clip
from pipelines.data.review import make_thumbnail

# For people to look at: a few from each worker are enough.
_MAX_THUMBNAILS = 32


@dataclass(frozen=True)
class Link:
    """What an engine is given; `origin` says where its picture lies already, if it does."""

    url: str
    caption: str
    origin: str = ""


@dataclass(frozen=True)
class Result:
    """What became of one link: a picture, a clip or a failure."""

    picture: Picture | Clip | None = None
    failure: Failure | None = None
    sha256: bytes | None = None
    """Of the bytes fetched, where any were."""
    thumbnail: bytes | None = None
    """A small JPEG of a picture that is not kept, of some of them."""

    @property
    def outcome(self) -> str:
        """ok, filtered or failed."""
        return "ok" if self.failure is None else self.failure.outcome


class Engine(Protocol):
    """Made and used inside one event loop."""

    async def results(self, links: Sequence[Link]) -> list[Result]:
        """What became of each link, in their order; it may be called again while it runs."""

    async def close(self) -> None:
        """Ends what runs, and closes connections."""


class NativeEngine:
    """Fetches with aiohttp, and decodes in threads.

    Args:
        config: The refresh.
        num_threads: Pictures decoded at once.
    """

    def __init__(self, config: RefreshConfig, *, num_threads: int = 1) -> None:
        self._config = config
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._fetcher = Fetcher(config.fetch)
        self._num_thumbnails = _MAX_THUMBNAILS

    async def results(self, links: Sequence[Link]) -> list[Result]:
        """Returns what became of each link, in their order."""
        return await asyncio.gather(*(self._result(link.url) for link in links))

    async def close(self) -> None:
        """Closes the connections, and ends the threads."""
        await self._fetcher.close()
        self._decoders.shutdown(wait=False)

    async def _result(self, url: str) -> Result:
        async with self._fetcher.fetched(url) as body:
            if isinstance(body, Failure):
                return Result(failure=body)
            return await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, body)

    def _decode(self, body: bytes) -> Result:
        config = self._config
        sha256 = hashlib.sha256(body).digest()
        picture: Picture | Clip | Failure
        if config.video is None:
            picture = decode(body, config.image, config.filters)
        else:
            picture = decode_clip(body, config.image, config.filters, config.video)
        if isinstance(picture, Failure):
            return Result(failure=picture, sha256=sha256, thumbnail=self._thumbnail(body, picture))
        return Result(picture=picture, sha256=sha256)

    def _thumbnail(self, body: bytes, failure: Failure) -> bytes | None:
        if failure.outcome != "filtered" or self._config.video is not None or self._num_thumbnails == 0:
            return None
        self._num_thumbnails -= 1
        return make_thumbnail(body)
