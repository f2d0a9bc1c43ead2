"""What comes of links, as the tests ask for them."""

import asyncio
from collections.abc import Iterable
from typing import Any

from pipelines.data.config import FetchConfig
from pipelines.data.failure import Failure
from pipelines.data.fetch.addresses import Lookup
from pipelines.data.fetch.fetcher import Fetcher

LOOPBACK = ("127.0.0.1/32",)


def fetch_all(urls: Iterable[str], lookup: Lookup | None = None, **options: Any) -> list[bytes | Failure]:
    config = FetchConfig(
        **{"allow_networks": LOOPBACK, "deadline_s": 2.0, "max_bytes": 1 << 20, "retries": 0} | options
    )

    async def one(fetcher: Fetcher, url: str) -> bytes | Failure:
        async with fetcher.fetched(url) as body:
            return body

    async def run() -> list[bytes | Failure]:
        async with Fetcher(config, lookup=lookup) as fetcher:
            return await asyncio.gather(*(one(fetcher, url) for url in urls))

    return asyncio.run(run())


def fetch(url: str, **options: Any) -> bytes | Failure:
    return fetch_all([url], **options)[0]
