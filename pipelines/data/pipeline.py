"""What of a refresh runs on Ray: a pool of workers that fetch and write, and one that scores.

list ──▶ chunks of rows ──FetchWorker──▶ written shards
list ──▶ chunks of rows ──FetchWorker──▶ rows ──ScoreWorker──▶ written shards
rows of the table that lack scores ──RowScorer──▶ scores
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from mdm_core.errors import MdmError
from pipelines import cluster
from pipelines.data.config import RefreshConfig
from pipelines.data.plan import Plan, iter_chunks
from pipelines.data.score import score_columns
from pipelines.data.table import keys
from pipelines.data.table.shards import WrittenShard, pack, shards_from_table, unpack
from pipelines.data.worker import CHUNKS_AT_ONCE, FetchWorker, RowScorer, ScoreWorker

# Together one CPU: the reader of the list idles most of the time, and a machine may have one CPU only.
_READER_CPUS = 0.1
_WORKER_CPUS = 0.9


def written_on_cluster(
    config: RefreshConfig, plan: Plan, table_uri: str, stem_prefix: str
) -> Generator[list[WrittenShard]]:
    """Yields the shards of each chunk as they are written, in the order of the list.

    Args:
        config: The refresh.
        plan: What there is to do.
        table_uri: Where the shards go.
        stem_prefix: Begins the name of every file.

    Raises:
        ConfigError: The cluster can't be reached, or is too small.
        WorkError: A worker could not do its part.
    """
    cluster.connect()
    num_workers, num_scorers = _pool_sizes(config, math.ceil(plan.num_todo / config.run.shard_rows))
    cluster.connect(min_cpus=math.ceil((num_workers + num_scorers) * _WORKER_CPUS + _READER_CPUS))
    with _streaming_context():
        dataset = _dataset(config, plan, table_uri, stem_prefix, num_workers, num_scorers)
        for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            yield shards_from_table(unpack(batch))


def scored_on_cluster(config: RefreshConfig, work: Sequence[pa.Table], table_uri: str) -> Generator[pa.Table]:
    """Yields the scores of rows that the table holds, file by file, as `RowScorer` gives and takes them.

    Raises:
        ConfigError: The cluster can't be reached, or is too small.
        WorkError: A worker could not do its part.
    """
    cluster.connect()
    _, num_scorers = _pool_sizes(config, len(work))
    cluster.connect(min_cpus=math.ceil(num_scorers * _WORKER_CPUS))
    with _streaming_context():
        dataset = ray.data.from_arrow([pack(rows) for rows in work]).map_batches(
            RowScorer,
            fn_constructor_kwargs={"score": config.score, "table_uri": table_uri},
            **_scorer_options(num_scorers),
        )
        for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            yield unpack(batch)


def _pool_sizes(config: RefreshConfig, num_chunks: int) -> tuple[int, int]:
    """Returns how many processes fetch, and how many score."""
    resources = ray.cluster_resources()
    num_cpus = int(resources.get("CPU", 1))
    num_scorers = 0
    if score_columns(config.score):
        num_scorers = max(1, int(resources.get("GPU", 0)) or num_cpus // 2)
    wanted = max(1, num_cpus - num_scorers) if config.run.workers == "auto" else config.run.workers
    return min(wanted, num_chunks), min(num_scorers, num_chunks)


@contextlib.contextmanager
def _streaming_context() -> Iterator[None]:
    """Ray Data's settings for this pipeline: chunks go on as soon as they are read."""
    with cluster.data_context(), warnings.catch_warnings():
        # A block is given on when it is larger than this; a chunk is one row, and a row is never cut.
        ray.data.DataContext.get_current().target_max_block_size = 1
        # It takes the one task that reads the list for the only input.
        warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
        yield


def _dataset(
    config: RefreshConfig, plan: Plan, table_uri: str, stem_prefix: str, num_workers: int, num_scorers: int
) -> ray.data.Dataset:
    # The ids of a long list are of no use to the process that reads it again.
    small_plan = dataclasses.replace(plan, ids=keys.empty())
    chunks = ray.data.read_datasource(
        _ListSource(small_plan, config.run.shard_rows), override_num_blocks=1, num_cpus=_READER_CPUS
    )
    fetched = chunks.map_batches(
        FetchWorker,
        fn_constructor_kwargs={
            "config": config,
            "table_uri": table_uri,
            "stem_prefix": stem_prefix,
            "writes": num_scorers == 0,
        },
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_WORKER_CPUS,
        compute=ray.data.ActorPoolStrategy(
            size=num_workers, max_concurrent_calls_per_actor=CHUNKS_AT_ONCE, enable_true_multi_threading=True
        ),
    )
    if not num_scorers:
        return fetched
    return fetched.map_batches(
        ScoreWorker,
        fn_constructor_kwargs={"score": config.score, "table_uri": table_uri},
        **_scorer_options(num_scorers),
    )


def _scorer_options(num_scorers: int) -> dict[str, Any]:
    return {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "num_cpus": _WORKER_CPUS,
        "num_gpus": 1 if ray.cluster_resources().get("GPU", 0) else 0,
        "compute": ray.data.ActorPoolStrategy(size=num_scorers),
    }


class _ListSource(Datasource):
    """Streams the rows to do out of a list; a row of the dataset is a chunk of them."""

    def __init__(self, plan: Plan, chunk_rows: int) -> None:
        super().__init__()
        self._plan = plan
        self._chunk_rows = chunk_rows

    def estimate_inmemory_data_size(self) -> int | None:
        """Returns nothing: it is streamed, so no size is worth planning for."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Returns the one task that reads the list."""
        plan, chunk_rows = self._plan, self._chunk_rows

        def read() -> Iterable[pa.Table]:
            try:
                yield from map(pack, iter_chunks(plan, chunk_rows))
            except MdmError as error:
                yield pack(None, str(error))

        metadata = BlockMetadata(num_rows=plan.num_todo, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, metadata)]
