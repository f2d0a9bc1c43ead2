"""The parts of a refresh that run in many processes: links in, a written shard out."""

import asyncio
import contextlib
import os
import resource
import threading
import warnings
from collections import deque
from collections.abc import Coroutine, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import uvloop
from threadpoolctl import threadpool_limits

from mdm_core.errors import MdmError
from pipelines.data.config import RefreshConfig, ScoreConfig
from pipelines.data.engine import Engine, Link, NativeEngine, Result
from pipelines.data.exclusions import Exclusions, read_exclusions
from pipelines.data.failure import Failure
from pipelines.data.filters import CaptionFilter
from pipelines.data.img2dataset.engine import Img2datasetEngine, check_img2dataset
from pipelines.data.img2dataset.importing import Img2datasetImport
from pipelines.data.pictures.video import require_av
from pipelines.data.score import Scorer, check_scores, score_columns
from pipelines.data.table.rows import THUMBNAIL, picture_to_score, rows_of
from pipelines.data.table.sample_table import OUTCOMES, read_rows
from pipelines.data.table.shards import WrittenShard, pack, shards_from_table, shards_to_table, unpack, write_shard

_T = TypeVar("_T")
CHUNKS_AT_ONCE = 4
"""Chunks that a worker has in hand: while the slow links of one are waited for, the next are fetched."""
_STEM = b"mdm.stem"
_LINK_COLUMNS = ["url", "caption", "origin"]


class FetchWorker:
    """Fetches and decodes chunks of links, several at once: the slow links of one don't hold up the next.

    Args:
        config: The refresh.
        table_uri: Where the shards go.
        stem_prefix: Begins the name of every file; later refreshes have later ones.
        writes: Whether it writes the shards; else it hands the rows on, for `ScoreWorker`.
        num_threads: Pictures decoded at once.
    """

    def __init__(
        self,
        *,
        config: RefreshConfig,
        table_uri: str,
        stem_prefix: str,
        writes: bool = True,
        num_threads: int = 1,
    ) -> None:
        self._config = config
        self._table_uri = table_uri
        self._stem_prefix = stem_prefix
        self._writes = writes
        self._captions = CaptionFilter(config.filters)
        self._exclusions = _read_exclusions(config.filters.exclude_hashes)
        _allow_many_files()
        # Decoders have threads of their own, and a picture's products are too small to share among more.
        self._blas = threadpool_limits(1, user_api="blas")
        # Pillow warns of odd metadata that does not touch the pixels.
        warnings.filterwarnings("ignore", module="PIL")
        self._engine = make_engine(config, num_threads)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="fetch", daemon=True)
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
            self._await(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._blas.restore_original_limits()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._engine.close()

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _rows(self, chunk: pa.Table) -> pa.Table:
        links = [Link(row["url"], row["caption"], row["origin"]) for row in chunk.select(_LINK_COLUMNS).to_pylist()]
        verdicts = [self._captions.check(link.caption) for link in links]
        wanted = [link for link, (reason, _) in zip(links, verdicts, strict=True) if reason is None]
        fetched = iter(self._await(self._engine.results(wanted)))
        results = [
            self._unless_excluded(next(fetched))
            if reason is None
            else Result(failure=Failure(reason, outcome="filtered"))
            for reason, _ in verdicts
        ]
        # Those of an outcome follow one another, so that each shard is a slice of the rows, and no picture is copied.
        order = sorted(range(len(results)), key=lambda at: OUTCOMES.index(results[at].outcome))
        return rows_of(
            chunk.take(pa.array(order, pa.int64())),
            [results[at] for at in order],
            source_name=self._config.source.name,
            languages=[verdicts[at][1] for at in order],
        )

    def _unless_excluded(self, result: Result) -> Result:
        if self._exclusions is None or result.picture is None or result.sha256 is None:
            return result
        reason = self._exclusions.reason(result.sha256, result.picture.phash)
        if reason is None:
            return result
        return Result(failure=Failure(reason, outcome="filtered"), sha256=result.sha256)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    # Not a method, which would keep the worker for as long as the thread runs, and the worker's end is the thread's.
    # Where a core fetches and decodes, no packet that comes interrupts a decoder, and takes its cache: those that came
    # meanwhile are read together. The decoders' threads are started in this one, and have the policy from it.
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    loop.run_forever()


def _read_exclusions(uri: str | None) -> Exclusions | None:
    return None if uri is None else read_exclusions(uri)


def _allow_many_files() -> None:
    """Raises this process's limit of open files, connections among them, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check(config: RefreshConfig) -> None:
    """Raises ConfigError if a worker could not begin: what it needs is tried here, before Ray starts any."""
    check_scores(config.score)
    CaptionFilter(config.filters)
    _read_exclusions(config.filters.exclude_hashes)
    if config.video is not None:
        require_av()
    if config.fetch.engine == "img2dataset" and config.source.format != "img2dataset":
        check_img2dataset(config)
    engine = make_engine(config, num_threads=1)
    asyncio.run(engine.close())


class _Scoring:
    """Takes rows and gives rows, both packed, with a scorer between.

    Args:
        score: Which scores.
        table_uri: The table.
    """

    def __init__(self, *, score: ScoreConfig, table_uri: str) -> None:
        self._table_uri = table_uri
        self._error = ""
        try:
            self._scorer = Scorer(score)
        except MdmError as error:
            # As in `FetchWorker`; and Ray would make the actor again and again.
            self._error = str(error)

    def __call__(self, packed: pa.Table) -> pa.Table:
        """Returns what `_answer` makes of the rows, or the error."""
        if self._error:
            return pack(None, self._error)
        try:
            return pack(self._answer(unpack(packed)))
        except MdmError as error:
            return pack(None, str(error))

    def _answer(self, given: pa.Table) -> pa.Table:
        raise NotImplementedError

    def _scores(self, rows: pa.Table) -> dict[str, pa.Array]:
        """The columns of scores of rows with `image`, `frames` and `caption`."""
        pictures = [picture_to_score(row) for row in rows.select(["image", "frames"]).to_pylist()]
        scores = self._scorer(pictures, rows["caption"].to_pylist())
        return {name: pa.array(values, pa.float32()) for name, values in scores.items()}


class ScoreWorker(_Scoring):
    """Scores and writes the rows that a `FetchWorker` hands on; gives what `shards_to_table` tells of the files."""

    def _answer(self, given: pa.Table) -> pa.Table:
        stem, rows = given.schema.metadata[_STEM].decode(), given
        for name, scores in self._scores(rows).items():
            if name in rows.column_names:
                rows = rows.set_column(rows.column_names.index(name), name, scores)
            else:
                rows = rows.append_column(name, scores)
        return shards_to_table(write_rows(self._table_uri, stem, rows))


class RowScorer(_Scoring):
    """Scores rows that the table holds already: of one file's `path` and `id` it makes `id` and columns of scores."""

    def _answer(self, given: pa.Table) -> pa.Table:
        rows = read_rows(self._table_uri, given["path"][0].as_py(), ["id", "caption", "image", "frames"])
        rows = rows.filter(pc.is_in(rows["id"], value_set=given["id"].combine_chunks()))
        return pa.table({"id": rows["id"], **self._scores(rows)})


def written_here(
    config: RefreshConfig, chunks: Iterator[pa.Table], table_uri: str, stem_prefix: str, *, num_threads: int
) -> Generator[list[WrittenShard]]:
    """Yields the shards of each chunk as they are written, in order, by one worker in this process.

    Args:
        config: The refresh.
        chunks: Of links.
        table_uri: Where the shards go.
        stem_prefix: Begins the name of every file.
        num_threads: Pictures decoded at once.

    Raises:
        WorkError: Something could not be read or written.
    """
    scorer = ScoreWorker(score=config.score, table_uri=table_uri) if score_columns(config.score) else None
    worker = FetchWorker(
        config=config, table_uri=table_uri, stem_prefix=stem_prefix, writes=scorer is None, num_threads=num_threads
    )
    waiting: deque[Future[pa.Table]] = deque()

    def first() -> list[WrittenShard]:
        written = waiting.popleft().result()
        return shards_from_table(unpack(written if scorer is None else scorer(written)))

    # Closed in this order on an error or Ctrl-C: the worker first, so that no thread waits for what is still fetched.
    with ThreadPoolExecutor(CHUNKS_AT_ONCE) as pool, contextlib.closing(worker):
        for chunk in chunks:
            waiting.append(pool.submit(worker, pack(chunk)))
            if len(waiting) == CHUNKS_AT_ONCE:
                yield first()
        while waiting:
            yield first()


def make_engine(config: RefreshConfig, num_threads: int) -> Engine:
    """Returns what fetches and decodes as configured."""
    if config.source.format == "img2dataset":
        return Img2datasetImport(config)
    if config.fetch.engine == "img2dataset":
        return Img2datasetEngine(config, num_threads=num_threads)
    return NativeEngine(config, num_threads=num_threads)


def write_rows(table_uri: str, stem: str, rows: pa.Table) -> list[WrittenShard]:
    """Writes rows, which are in the order of `OUTCOMES`, as shards, one for each outcome that there is.

    Thumbnails go to the driver, not into the files.
    """
    shards = []
    outcomes, first = rows["outcome"].to_pylist(), 0
    for outcome in OUTCOMES:
        part = rows.slice(first, outcomes.count(outcome))
        first += part.num_rows
        if part.num_rows:
            thumbnails = part[THUMBNAIL].drop_null().to_pylist()
            shards.append(write_shard(table_uri, stem, outcome, part.drop_columns([THUMBNAIL]), thumbnails))
    return shards
