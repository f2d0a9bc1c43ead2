"""The whole pipeline on one machine: corpus, refresh, embed, train, evaluate. Every step can be run again."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.data.refresh import refresh
from pipelines.embed.pipeline import embed
from pipelines.evaluate.grids import loss_plot, png_bytes
from pipelines.evaluate.pipeline import evaluate
from pipelines.quickstart.config import QuickstartConfig
from pipelines.quickstart.corpus import Corpus, build_corpus
from pipelines.quickstart.server import serve
from pipelines.tracking import child_runs, metric_history, open_run, run_page
from pipelines.train.pipeline import TrainReport, train


@dataclass(frozen=True)
class QuickstartReport:
    """The content of summary.json."""

    summary: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The object of `--json`."""
        return self.summary


def quickstart(config: QuickstartConfig) -> QuickstartReport:
    """Runs every step that is left to do, and writes summary.json and the pictures into `config.out`.

    Raises:
        ConfigError: The port is taken, or `out` holds something else.
        WorkError: A step failed.
    """
    clock = _Clock()
    with clock.step("corpus"):
        corpus = build_corpus(config.place("corpus"), port=config.port, seed=config.seed, limit=config.pictures)
    with clock.step("refresh"):
        refreshed = _refresh(config, corpus)
    with clock.step("embed"):
        embedded = embed(config.embed())
        _say(f"  {embedded.embedded_rows:,} captions encoded, {embedded.rows - embedded.embedded_rows:,} were before")
    with clock.step("train"):
        trained = train(config.train())
        for stage in trained.stages:
            _say("  {resolution} px: {images_seen:,} images, loss {loss_first:.3f} to {loss_last:.3f}".format(**stage))
        _say("  trained" if trained.trained else "  nothing left to train")
    with clock.step("evaluate"):
        evaluated = evaluate(config.evaluate())
        _plot_loss(config, trained)
    return _finish(config, refreshed, trained, evaluated.as_dict(), clock)


def _refresh(config: QuickstartConfig, corpus: Corpus) -> dict[str, Any]:
    with serve(corpus) as server:
        report = refresh(config.refresh(corpus)).as_dict()
    fetched = sum(server.served.values())
    _say(f"  {report['links']:,} lines of the list became")
    for outcome in ("ok", "filtered", "failed", "duplicate", "malformed", "unchanged"):
        _say(f"    {outcome:<12}{report[outcome]:>6,}")
    for reason, count in sorted(report["reasons"].items(), key=lambda item: -item[1]):
        _say(f"      {reason:<24}{count:>5,}")
    _say(f"  {fetched:,} requests answered; table version {report['table_version']}")
    return report


def _plot_loss(config: QuickstartConfig, trained: TrainReport) -> None:
    """Draws loss.png from what MLflow holds of every stage."""
    curves = {}
    sides = config.train().model.resolutions
    for name, run_id in child_runs(config.tracking, trained.run_id).items():
        for stage in config.train().stages:
            if name == f"stage {stage.resolution} px":
                for side in (side for side in sides if side <= stage.resolution):
                    curves[f"{name}: {side} px"] = metric_history(config.tracking, run_id, f"loss_{side}")
    storage.write_bytes_atomic(config.place("loss.png"), png_bytes(loss_plot(curves)))


def _finish(
    config: QuickstartConfig, refreshed: dict[str, Any], trained: TrainReport, scores: dict[str, Any], clock: "_Clock"
) -> QuickstartReport:
    names = ("fd_efficientnet_lite0", "fd_floor", "fd_untrained", "kid")
    summary = {
        "refresh": refreshed,
        "train": {"stages": list(trained.stages)},
        "evaluate": {name: scores[name] for name in names},
        "mlflow_run_id": trained.run_id,
        "seconds": round(clock.seconds, 1),
        "seconds_by_step": clock.steps,
    }
    storage.write_bytes_atomic(config.place("summary.json"), json.dumps(summary, indent=1).encode())
    with open_run(config.tracking, name="quickstart", run_id=trained.run_id) as run:
        for name in ("summary.json", "loss.png"):
            run.log_file(config.place(name))
    _say(f"done in {clock.seconds:.0f} s: " + ", ".join(f"{name} {s:.0f} s" for name, s in clock.steps.items()))
    _say("distance to the real pictures (lower is better): " + ", ".join(f"{n} {scores[n]:.4g}" for n in names))
    for name in ("summary.json", "samples_16.png", "samples_32.png", "loss.png"):
        _say(f"  {Path(config.out) / name}")
    mlflow = Path(sys.executable).with_name("mlflow")
    _say(f"look at the run in MLflow:\n  {mlflow} ui --backend-store-uri {config.tracking.uri}")
    _say(f"  and open http://127.0.0.1:5000{run_page(config.tracking, trained.run_id)}")
    return QuickstartReport(summary)


class _Clock:
    """Seconds of each step and of all."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self.steps: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began_s

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        began_s = time.monotonic()
        _say(f"{name} …")
        yield
        self.steps[name] = round(time.monotonic() - began_s, 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
