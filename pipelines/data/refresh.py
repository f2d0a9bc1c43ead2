"""Refresh: brings a sample table up to date with a list of links.

    list ──plan──▶ chunks of rows to do ──workers: fetch, decode, write──▶ shards ──driver──▶ commits

The table is the checkpoint. Killed at any point, the next refresh does what was not committed. The workers are a pool
on Ray, or, where one is enough, part of this process.
"""

import contextlib
import dataclasses
import logging
import math
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.config import RefreshConfig
from pipelines.data.filters import CaptionFilter
from pipelines.data.plan import Plan, iter_captions, iter_chunks, make_plan
from pipelines.data.review import Review
from pipelines.data.score import check_scores, score_columns, with_absolute_paths
from pipelines.data.table import keys
from pipelines.data.table.commit import commit
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.rewrite import add_scores, prune, recaption
from pipelines.data.table.sample_table import OUTCOMES
from pipelines.data.table.shards import WrittenShard, pack, unpack
from pipelines.data.table.sweep import sweep
from pipelines.data.table.transaction import Tally
from pipelines.data.worker import RowScorer, check, written_here
from pipelines.progress import Progress

logger = logging.getLogger(__name__)


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
    scored: int
    """Links of the list whose rows got scores that they lacked, without a fetch."""
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
    config = _for_every_process(config)
    source = config.source
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
        num_scored = _score(config, plan, ledger, note) if score_columns(config.score) else 0
        if plan.num_todo:
            tally.update(_run(config, plan, ledger, note, review))
        num_pruned = prune(ledger, source.name, plan.ids, note) if config.run.prune else 0
        report = _report(plan, tally, ledger, num_scored, num_pruned, time.time() - started_s)
        review.tell(report.as_dict(), ledger)
    return report


def _for_every_process(config: RefreshConfig) -> RefreshConfig:
    """Returns the same configuration with local paths that mean the same in every process, and a name of the source."""
    source, filters, score = config.source, config.filters, config.score
    source = source.model_copy(
        update={
            "uri": storage.absolute(source.uri),
            "name": source.name or storage.file_name(source.uri),
        }
    )
    if filters.exclude_hashes is not None:
        filters = filters.model_copy(update={"exclude_hashes": storage.absolute(filters.exclude_hashes)})
    if score.clip is not None:
        score = score.model_copy(update={"clip": with_absolute_paths(score.clip)})
    return config.model_copy(update={"source": source, "filters": filters, "score": score})


def _tell_of_faults(plan: Plan) -> None:
    for row in plan.faults:
        logger.warning("%s line %d is malformed: %s", row.part, row.line, row.fault)
    if (more := plan.malformed.total() - len(plan.faults)) > 0:
        logger.warning("%s has %d more malformed lines", plan.source.uri, more)


def _recaption(config: RefreshConfig, plan: Plan, ledger: Ledger, note: dict[str, object]) -> Tally:
    tally = Tally()
    if plan.num_recaption:
        judge = CaptionFilter(config.filters)
        for captions in iter_captions(plan):
            tally.update(recaption(ledger, captions, judge, note))
    return tally


def _score(config: RefreshConfig, plan: Plan, ledger: Ledger, note: dict[str, object]) -> int:
    """Scores the list's rows that lack a score, as they came before it was asked for, or have another caption."""
    work = _unscored(config, plan, ledger)
    if not work:
        return 0
    check_scores(config.score)
    num_rows = 0
    waiting: list[pa.Table] = []

    def commit_waiting() -> int:
        scores, waiting[:] = pa.concat_tables(waiting), []
        return add_scores(ledger, scores, note)

    with (
        Progress("score", total=sum(rows.num_rows for rows in work), unit="rows") as progress,
        contextlib.closing(_scored(config, work, ledger.uri)) as scored,
    ):
        committed_s = time.monotonic()
        for scores in scored:
            waiting.append(scores)
            if time.monotonic() - committed_s >= config.run.commit_every_s:
                num_rows += commit_waiting()
                committed_s = time.monotonic()
            progress.advance(scores.num_rows)
    return num_rows + (commit_waiting() if waiting else 0)


def _unscored(config: RefreshConfig, plan: Plan, ledger: Ledger) -> list[pa.Table]:
    """Returns `path` and `id` of the rows to score, a table for each file."""
    ledger.catch_up()
    names = score_columns(config.score)
    listed = np.unique(plan.ids)
    work = []
    for shard, rows in ledger.each_shard(["id", *names], "ok"):
        is_lacking = np.any([rows[name].is_null().to_numpy() for name in names], axis=0)
        is_listed = keys.find(listed, keys.from_column(rows["id"])) >= 0
        ids = rows["id"].filter(pa.array(is_lacking & is_listed))
        if len(ids):
            work.append(pa.table({"path": pa.repeat(shard.path, len(ids)), "id": ids}))
    return work


def _scored(config: RefreshConfig, work: list[pa.Table], table_uri: str) -> Generator[pa.Table]:
    if _needs_cluster(config, len(work)):
        from pipelines.data.pipeline import scored_on_cluster

        return scored_on_cluster(config, work, table_uri)
    scorer = RowScorer(score=config.score, table_uri=table_uri)
    return (unpack(scorer(pack(rows))) for rows in work)


def _run(config: RefreshConfig, plan: Plan, ledger: Ledger, note: dict[str, object], review: Review) -> Tally:
    sweep(ledger.uri, now_s=time.time())
    tally = Tally()
    waiting: list[WrittenShard] = []

    def commit_waiting() -> None:
        if not waiting:
            return
        tally.update(commit(ledger, waiting, config.filters, note))
        waiting.clear()

    seen = Counter(dict.fromkeys(OUTCOMES, 0))
    with (
        Progress("refresh", total=plan.num_todo, unit="links") as progress,
        contextlib.closing(_written(config, plan, ledger)) as written,
    ):
        committed_s = time.monotonic()
        for shards in written:
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


def _written(config: RefreshConfig, plan: Plan, ledger: Ledger) -> Generator[list[WrittenShard]]:
    """Yields the shards of each chunk as they are written, in the order of the list."""
    stem_prefix = f"{ledger.version + 1:08d}"
    if _needs_cluster(config, math.ceil(plan.num_todo / config.run.shard_rows)):
        # Ray alone takes a second to import, and a few to start.
        from pipelines.data.pipeline import written_on_cluster

        return written_on_cluster(config, plan, ledger.uri, stem_prefix)
    chunks = iter_chunks(plan, config.run.shard_rows)
    return written_here(config, chunks, ledger.uri, stem_prefix, num_threads=_num_cpus())


def _needs_cluster(config: RefreshConfig, num_chunks: int) -> bool:
    """Returns whether there is a cluster to use, or work for more than one process."""
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        return True
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return True
    wanted = _num_cpus() if config.run.workers == "auto" else config.run.workers
    return min(wanted, num_chunks) > 1


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _report(
    plan: Plan, tally: Tally, ledger: Ledger, num_scored: int, num_pruned: int, seconds: float
) -> RefreshReport:
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
        scored=num_scored,
        pruned=num_pruned,
        seconds=round(seconds, 3),
        table_version=ledger.version,
    )
