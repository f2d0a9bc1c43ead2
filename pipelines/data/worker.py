"""The part of a refresh that runs in many processes: links in, a written shard out."""

import asyncio
import contextlib
import hashlib
import threading
import warnings
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import uvloop

from mdm_core.errors import WorkError
from pipelines.data.config import RefreshConfig
from pipelines.data.decode import Picture, decode
from pipelines.data.fetch import Failure, Fetcher
from pipelines.data.filters import caption_reason
from pipelines.data.shards import WrittenShard, pack, shards_to_table, unpack, write_shard
from pipelines.data.table import OUTCOMES, SCHEMA

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Result:
    """What became of one link."""

    picture: Picture | None = None
    failure: Failure | None = None
    sha256: bytes | None = None

    @property
    def outcome(self) -> str:
        return "ok" if self.failure is None else self.failure.outcome


class RefreshWorker:
    """Fetches, decodes and writes chunks of links, several at once: the slow links of one don't hold up the next.

    Args:
        config: The refresh.
        table_uri: Where the shards go.
        source_name: Stored with every row.
        stem_prefix: Begins the name of every file; later refreshes have later ones.
        num_threads: Pictures decoded at once.
    """

    def __init__(
        self, *, config: RefreshConfig, table_uri: str, source_name: str, stem_prefix: str, num_threads: int = 1
    ) -> None:
        self._config = config
        self._table_uri = table_uri
        self._source_name = source_name
        self._stem_prefix = stem_prefix
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        # Pillow warns of odd metadata that does not touch the pixels.
        warnings.filterwarnings("ignore", module="PIL")
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._fetcher = self._await(Fetcher(config.fetch).__aenter__())

    def __call__(self, packed: pa.Table) -> pa.Table:
        """Returns what `shards_to_table` tells of the files written for a chunk of links; both are packed."""
        try:
            return pack(shards_to_table(self._write(unpack(packed))))
        except WorkError as error:
            # As a value it arrives as it is; Ray would wrap an exception, and tell of it at length.
            return pack(None, str(error))

    def _write(self, chunk: pa.Table) -> list[WrittenShard]:
        results = self._await(self._fetch_all(chunk["url"].to_pylist(), chunk["caption"].to_pylist()))
        rows = self._rows(chunk, results)
        stem = f"{self._stem_prefix}-{chunk['chunk'][0].as_py():06d}"
        parts = {outcome: rows.filter(pc.equal(rows["outcome"], outcome)) for outcome in OUTCOMES}
        return [write_shard(self._table_uri, stem, outcome, part) for outcome, part in parts.items() if part.num_rows]

    def __del__(self) -> None:
        # The only notice that Ray Data gives a worker before its process ends.
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Closes the connections and ends the threads; closing again does nothing."""
        if self._thread.is_alive() and not self._loop.is_closed():
            self._await(self._fetcher.__aexit__(None, None, None))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._decoders.shutdown(wait=False)

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _fetch_all(self, urls: list[str], captions: list[str]) -> list[_Result]:
        return await asyncio.gather(*map(self._result, urls, captions))

    async def _result(self, url: str, caption: str) -> _Result:
        if reason := caption_reason(caption, self._config.filters):
            return _Result(failure=Failure(reason, outcome="filtered"))
        async with self._fetcher.fetched(url) as body:
            if isinstance(body, Failure):
                return _Result(failure=body)
            return await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, body)

    def _decode(self, body: bytes) -> _Result:
        sha256 = hashlib.sha256(body).digest()
        picture = decode(body, self._config.image, self._config.filters)
        if isinstance(picture, Failure):
            return _Result(failure=picture, sha256=sha256)
        return _Result(picture=picture, sha256=sha256)

    def _rows(self, chunk: pa.Table, results: list[_Result]) -> pa.Table:
        pictures = [result.picture for result in results]
        failures = [result.failure for result in results]
        count = len(results)
        columns: dict[str, Any] = {
            "id": chunk["id"],
            "url": chunk["url"],
            "caption": chunk["caption"],
            "attempts": chunk["attempts"],
            "source": [self._source_name] * count,
            "outcome": [result.outcome for result in results],
            "reason": [failure and failure.reason for failure in failures],
            "retryable": [failure is not None and failure.retryable for failure in failures],
            "fetched_at": [datetime.now(UTC)] * count,
            "image": [picture and picture.data for picture in pictures],
            "sha256": [result.sha256 for result in results],
            "phash": [None] * count,
            "clip_similarity": [None] * count,
        }
        for name in ("format", "width", "height", "original_width", "original_height"):
            columns[name] = [picture and getattr(picture, name) for picture in pictures]
        return pa.table({field.name: columns[field.name] for field in SCHEMA}, schema=SCHEMA)
