"""Refresh: brings a sample table up to date with a list of links.

    list ──plan──▶ chunks of rows to do ──workers: fetch, decode, write──▶ shards ──driver──▶ commits

With scores the workers hand their rows on to others that score and write them. The table is the checkpoint. Killed at
any point, the next refresh does what was not committed.
"""

import contextlib
import dataclasses
import logging
import math
import secrets
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from mdm_core.errors import ConfigError, MdmError, WorkError
from pipelines import cluster, storage
from pipelines.data import keys
from pipelines.data.commit import commit
from pipelines.data.config import RefreshConfig
from pipelines.data.filters import CaptionFilter
from pipelines.data.ledger import Ledger
from pipelines.data.plan import Plan, iter_captions, iter_chunks, make_plan
from pipelines.data.review import Review
from pipelines.data.rewrite import prune, recaption
from pipelines.data.score import score_columns
from pipelines.data.shards import WrittenShard, pack, shards_from_table, unpack
from pipelines.data.sweep import sweep
from pipelines.data.table import OUTCOMES
from pipelines.data.transaction import Tally
from pipelines.data.worker import FetchWorker, ScoreWorker, check
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

# Together one CPU: the reader of the list idles most of the time, and a machine may have one CPU only.
_READER_CPUS = 0.1
_WORKER_CPUS = 0.9
_CHUNKS_PER_WORKER = 4


@dataclass(frozen=True)
class RefreshReport:
    """What became of every row of a list; ok, filtered and failed are this run's work."""

    links: int
    ok: int
    filtered: int
    failed: int
    duplicate: int
    malformed: int
    unchanged: int
    reasons: dict[str, int]
    recaptioned: int
    """Links of the list whose rows got another caption without a fetch; they count by their outcome above."""
    pruned: int
    """Rows taken out because their links are no longer in the list."""
    seconds: float
    table_version: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is written to JSON."""
        return dataclasses.asdict(self)


def refresh(config: RefreshConfig) -> RefreshReport:
    """Returns what became of every row of the list, all of it committed to the table.

    Raises:
        ConfigError: The list or the table can't be read, or the cluster is too small.
        WorkError: The table can't be written, or rows went missing.
    """
    started_s = time.time()
    source = config.source.model_copy(
        update={
            "uri": storage.absolute(config.source.uri),
            "name": config.source.name or PurePosixPath(config.source.uri).name,
        }
    )
    config = config.model_copy(update={"source": source})
    ledger = Ledger(config.table.uri, now_s=started_s, retry_failed=config.run.retry_failed)
    plan = make_plan(source, ledger, config.run.limit)
    if config.run.prune and not len(plan.ids):
        raise ConfigError(f"{source.uri} has no link, and run.prune would remove all of {source.name}; leave it out")
    _tell_of_faults(plan)
    if plan.num_todo:
        check(config)
    with Review.open(config) as review:
        ledger.ensure_table(score_columns(config.score))
        note = {"operation": "refresh", "run": secrets.token_hex(8), "started_s": started_s, "source": source.name}
        tally = _recaption(config, plan, ledger, note)
        if plan.num_todo:
            tally.update(_run(config, plan, ledger, note, review))
        num_pruned = prune(ledger, source.name, plan.ids, note) if config.run.prune else 0
        report = _report(plan, tally, ledger, num_pruned, time.time() - started_s)
        review.tell(report.as_dict(), ledger)
    return report


def _tell_of_faults(plan: Plan) -> None:
    for row in plan.faults:
        logger.warning("%s line %d is malformed: %s", plan.source.uri, row.line, row.fault)
    if (more := plan.malformed.total() - len(plan.faults)) > 0:
        logger.warning("%s has %d more malformed lines", plan.source.uri, more)


def _recaption(config: RefreshConfig, plan: Plan, ledger: Ledger, note: dict[str, object]) -> Tally:
    tally = Tally()
    if plan.num_recaption:
        judge = CaptionFilter(config.filters)
        for captions in iter_captions(plan):
            tally.update(recaption(ledger, captions, judge, note))
    return tally


def _run(config: RefreshConfig, plan: Plan, ledger: Ledger, note: dict[str, object], review: Review) -> Tally:
    cluster.connect()
    num_workers, num_scorers = _pool_sizes(config, math.ceil(plan.num_todo / config.run.shard_rows))
    cluster.connect(min_cpus=math.ceil((num_workers + num_scorers) * _WORKER_CPUS + _READER_CPUS))
    sweep(ledger.uri, now_s=time.time())
    tally = Tally()
    waiting: list[WrittenShard] = []

    def commit_waiting() -> None:
        if not waiting:
            return
        tally.update(commit(ledger, waiting, config.filters, note))
        waiting.clear()

    seen = Counter(dict.fromkeys(OUTCOMES, 0))
    with Progress("refresh", total=plan.num_todo, unit="links") as progress, _streaming_context():
        committed_s = time.monotonic()
        for shards in _written(_dataset(config, plan, ledger, num_workers, num_scorers)):
            waiting.extend(shards)
            review.note(shards)
            if time.monotonic() - committed_s >= config.run.commit_every_s:
                commit_waiting()
                committed_s = time.monotonic()
            for shard in shards:
                seen[shard.outcome] += shard.num_rows
            progress.advance(sum(shard.num_rows for shard in shards), **seen)
    commit_waiting()
    return tally


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


def _dataset(config: RefreshConfig, plan: Plan, ledger: Ledger, num_workers: int, num_scorers: int) -> ray.data.Dataset:
    # The ids of a long list are of no use to the process that reads it again.
    small_plan = dataclasses.replace(plan, ids=keys.empty())
    chunks = ray.data.read_datasource(
        _ListSource(small_plan, config.run.shard_rows), override_num_blocks=1, num_cpus=_READER_CPUS
    )
    fetched = chunks.map_batches(
        FetchWorker,
        fn_constructor_kwargs={
            "config": config,
            "table_uri": ledger.uri,
            "stem_prefix": f"{ledger.version + 1:08d}",
            "writes": num_scorers == 0,
        },
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_WORKER_CPUS,
        compute=ray.data.ActorPoolStrategy(
            size=num_workers, max_concurrent_calls_per_actor=_CHUNKS_PER_WORKER, enable_true_multi_threading=True
        ),
    )
    if not num_scorers:
        return fetched
    return fetched.map_batches(
        ScoreWorker,
        fn_constructor_kwargs={"score": config.score, "table_uri": ledger.uri},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_WORKER_CPUS,
        num_gpus=1 if ray.cluster_resources().get("GPU", 0) else 0,
        compute=ray.data.ActorPoolStrategy(size=num_scorers),
    )


def _written(dataset: ray.data.Dataset) -> Iterator[list[WrittenShard]]:
    """Yields the shards of each chunk as they are written, in the order of the list."""
    for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield shards_from_table(unpack(batch))


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


def _report(plan: Plan, tally: Tally, ledger: Ledger, num_pruned: int, seconds: float) -> RefreshReport:
    malformed = plan.malformed.total()
    accounted = tally.total + plan.duplicate + plan.unchanged + malformed
    if accounted != plan.links:
        raise WorkError(
            f"{plan.links:,} links were read and {accounted:,} accounted for; the table is whole, but this is a fault "
            "of the refresh: run it again, and report it"
        )
    ledger.catch_up()
    return RefreshReport(
        links=plan.links,
        ok=tally.outcomes["ok"],
        filtered=tally.outcomes["filtered"],
        failed=tally.outcomes["failed"],
        duplicate=plan.duplicate,
        malformed=malformed,
        unchanged=plan.unchanged + tally.outcomes["unchanged"],
        reasons=dict((tally.reasons + plan.malformed).most_common()),
        recaptioned=plan.num_recaption,
        pruned=num_pruned,
        seconds=round(seconds, 3),
        table_version=ledger.version,
    )
