"""The parts of a refresh that run in many processes: links in, a written shard out."""

import asyncio
import contextlib
import threading
import warnings
from collections.abc import Coroutine
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import uvloop

from mdm_core.errors import MdmError
from pipelines.data.config import RefreshConfig
from pipelines.data.engine import Engine, Link, NativeEngine, Result
from pipelines.data.fetch import Failure
from pipelines.data.filters import caption_reason
from pipelines.data.rows import rows_of
from pipelines.data.shards import WrittenShard, pack, shards_to_table, unpack, write_shard
from pipelines.data.table import OUTCOMES

_T = TypeVar("_T")
_STEM = b"mdm.stem"


class FetchWorker:
    """Fetches and decodes chunks of links, several at once: the slow links of one don't hold up the next.

    Args:
        config: The refresh.
        table_uri: Where the shards go.
        source_name: Stored with every row.
        stem_prefix: Begins the name of every file; later refreshes have later ones.
        writes: Whether it writes the shards; else it hands the rows on, for `ScoreWorker`.
        num_threads: Pictures decoded at once.
    """

    def __init__(
        self,
        *,
        config: RefreshConfig,
        table_uri: str,
        source_name: str,
        stem_prefix: str,
        writes: bool = True,
        num_threads: int = 1,
    ) -> None:
        self._config = config
        self._table_uri = table_uri
        self._source_name = source_name
        self._stem_prefix = stem_prefix
        self._writes = writes
        # Pillow warns of odd metadata that does not touch the pixels.
        warnings.filterwarnings("ignore", module="PIL")
        self._engine = make_engine(config, num_threads)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()

    def __call__(self, packed: pa.Table) -> pa.Table:
        """Returns what `shards_to_table` tells of the files written for a chunk of links, or its rows; all packed."""
        try:
            chunk = unpack(packed)
            rows = self._rows(chunk)
            stem = f"{self._stem_prefix}-{chunk['chunk'][0].as_py():06d}"
            if not self._writes:
                return pack(rows.replace_schema_metadata({_STEM: stem}))
            return pack(shards_to_table(write_rows(self._table_uri, stem, rows)))
        except MdmError as error:
            # As a value it arrives as it is; Ray would wrap an exception, and tell of it at length.
            return pack(None, str(error))

    def __del__(self) -> None:
        # The only notice that Ray Data gives a worker before its process ends.
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Closes the connections and ends the threads; closing again does nothing."""
        if self._thread.is_alive() and not self._loop.is_closed():
            self._await(self._engine.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _rows(self, chunk: pa.Table) -> pa.Table:
        links = [Link(row["url"], row["caption"]) for row in chunk.select(["url", "caption"]).to_pylist()]
        results: list[Result | None] = [self._before_fetching(link.caption) for link in links]
        wanted = [at for at, result in enumerate(results) if result is None]
        fetched = self._await(self._engine.results([links[at] for at in wanted]))
        for at, result in zip(wanted, fetched, strict=True):
            results[at] = result
        known = [result for result in results if result is not None]
        return rows_of(chunk, known, source_name=self._source_name, languages=[None] * len(known))

    def _before_fetching(self, caption: str) -> Result | None:
        if reason := caption_reason(caption, self._config.filters):
            return Result(failure=Failure(reason, outcome="filtered"))
        return None


def make_engine(config: RefreshConfig, num_threads: int) -> Engine:
    """Returns what fetches and decodes as configured."""
    return NativeEngine(config, num_threads=num_threads)


def write_rows(table_uri: str, stem: str, rows: pa.Table) -> list[WrittenShard]:
    """Writes rows as shards, one for each outcome that there is."""
    parts = {outcome: rows.filter(pc.equal(rows["outcome"], outcome)) for outcome in OUTCOMES}
    return [write_shard(table_uri, stem, outcome, part) for outcome, part in parts.items() if part.num_rows]
