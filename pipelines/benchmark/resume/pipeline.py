"""`mdm benchmark resume`: kill -9 of a training worker, the time until the next step, and what became of each row."""

import functools
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mdm_core.errors import WorkError
from mdm_core.nested_unet import build_network
from pipelines.benchmark.config import ResumeBenchmarkConfig
from pipelines.benchmark.ingest import make_training_table
from pipelines.benchmark.peaks import device_name
from pipelines.benchmark.resume.traces import (
    Life,
    last_step,
    new_step_s,
    next_step_s,
    read_lives,
    repeated_and_skipped,
    steps_lost,
    surviving_rows,
    where,
)
from pipelines.benchmark.resume.training import KILLED, UNDISTURBED, Trainings, trace_folder
from pipelines.benchmark.turns import Worker
from pipelines.data.table.sample_table import SampleTable
from pipelines.progress import Progress
from pipelines.train.checkpoint import open_checkpoint

_EVERY_S = 0.05
_SHOWN = 5


def benchmark_resume(config: ResumeBenchmarkConfig) -> dict[str, Any]:
    """What a kill costs, as plain values.

    The training runs twice: on Ray, where its worker is killed, and so that nothing happens to it.

    Returns:
        `seconds` from the kill to the next completed step, `where` they went, `seconds_to_new_step` until the first
        step that had not been completed before; `steps_lost`, done again; `repeated` and `skipped`, images trained on
        twice or never in the history of the last weights; `weights_equal`, whether weights, averages and optimizer are
        to the bit those of the run that nothing happened to.

    Raises:
        ConfigError: The machine has too few CPUs.
        WorkError: A training failed, or was over before its worker could be killed.
    """
    with tempfile.TemporaryDirectory(prefix="mdm-benchmark-") as name:
        folder = Path(name)
        make_training_table(
            folder / "table",
            size_px=max(256, config.matryoshka().resolutions[0]),
            text_tokens=config.text_tokens,
            text_width=config.matryoshka().text_dim or 1,
            rows=config.steps * config.batch,
        )
        killed_s = _train(config, folder)
        lives = read_lives(trace_folder(folder, KILLED))
        return _what(config) | {
            "seconds": next_step_s(lives, killed_s=killed_s) - killed_s,
            "where": where(lives, killed_s=killed_s),
            "seconds_to_new_step": new_step_s(lives, killed_s=killed_s) - killed_s,
            "steps_lost": steps_lost(lives, global_batch_size=config.batch),
            **_rows(config, folder, lives),
            **_compared(folder),
        }


def _train(config: ResumeBenchmarkConfig, folder: Path) -> float:
    """Trains twice, killing the first run's worker; returns when that was, in seconds since 1970."""
    make = functools.partial(Trainings, config, str(folder))
    # The pool ends last: its thread waits for the process, which an error ends.
    with (
        ThreadPoolExecutor(1) as pool,
        Worker("mdm train", make) as worker,
        Progress("resume", total=2 * config.steps, unit="steps") as progress,
    ):
        worker.ready()
        running = pool.submit(worker.ask, KILLED, doing="in the run whose worker is killed")
        disturbed = _Watch(trace_folder(folder, KILLED), running, progress)
        disturbed.wait(config.kill_after_steps)
        killed_s = _kill(disturbed.traces)
        disturbed.wait(config.steps)
        running.result()
        running = pool.submit(worker.ask, UNDISTURBED, doing="in the run that nothing happens to")
        _Watch(trace_folder(folder, UNDISTURBED), running, progress).wait(config.steps)
        running.result()
    return killed_s


class _Watch:
    """Looks at a run through its traces."""

    def __init__(self, traces: Path, running: Future[Any], progress: Progress) -> None:
        self.traces, self._running, self._progress = traces, running, progress
        self._shown = 0

    def wait(self, step: int) -> None:
        """Returns once rank 0 has completed a step, which the run must live to see.

        Raises:
            WorkError: It ended before, with an error or without.
        """
        while (done := last_step(read_lives(self.traces))) < step:
            if self._running.done() and last_step(read_lives(self.traces)) < step:
                self._running.result()
                raise WorkError(f"the training ended after step {done}, and never came to step {step}")
            self._show(done)
            time.sleep(_EVERY_S)
        self._show(done)

    def _show(self, done: int) -> None:
        if done > self._shown:
            self._progress.advance(done - self._shown)
            self._shown = done


def _kill(traces: Path) -> float:
    """Kills rank 0 with SIGKILL; returns when, in seconds since 1970.

    Raises:
        WorkError: It is gone already.
    """
    try:
        worker = psutil.Process(next(life.pid for life in read_lives(traces) if life.rank == 0))
        # A process id is soon another's: only what this process has started is killed.
        is_ours = os.getpid() in (parent.pid for parent in worker.parents())
        killed_s = time.time()
        if is_ours:
            worker.kill()
    except psutil.NoSuchProcess:
        is_ours = False
    if not is_ours:
        raise WorkError("the training was over before its worker could be killed; give it more --steps")
    return killed_s


def _rows(config: ResumeBenchmarkConfig, folder: Path, lives: list[Life]) -> dict[str, Any]:
    """What became of each row of the table, whose ids are read from the table itself."""
    table = SampleTable.open(str(folder / "table"))
    ids = [row.hex() for shard in table.shards() for row in table.read(shard, ["id"])["id"].to_pylist()]
    rows = surviving_rows(lives, global_batch_size=config.batch)
    repeated, skipped = repeated_and_skipped(rows, ids)
    return {"images": len(ids), "repeated": repeated, "skipped": skipped}


def _compared(folder: Path) -> dict[str, Any]:
    """Whether the last checkpoints of both runs are the same, tensor by tensor."""
    ours, theirs = (open_checkpoint(str(folder / name / "run")) for name in (KILLED, UNDISTURBED))
    compared, different = 0, []
    for name in ("weights", "ema", "optimizer"):
        mine, other = ours.tensors(name), theirs.tensors(name)
        compared += len(other)
        different += [f"{name}: {key}" for key in differences(mine, other)]
    return {
        "weights_equal": not different,
        "tensors": compared,
        "tensors_different": len(different),
        "first_different": different[:_SHOWN],
    }


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the bit, or are on one side only."""
    both = ours.keys() & theirs.keys()
    return sorted((ours.keys() ^ theirs.keys()) | {key for key in both if not torch.equal(ours[key], theirs[key])})


def _what(config: ResumeBenchmarkConfig) -> dict[str, Any]:
    matryoshka = config.matryoshka()
    with torch.device("meta"):
        network = build_network(matryoshka)
    return {
        "benchmark": "resume",
        "preset": config.preset,
        "channels": matryoshka.networks[-1].channels,
        "resolutions": matryoshka.resolutions,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "batch": config.batch,
        "steps": config.steps,
        "workers": config.workers,
        "device_name": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "ray": version("ray"),
    }
