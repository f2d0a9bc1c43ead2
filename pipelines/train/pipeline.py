"""Training on Ray: one run, its stages one after the other, watched and logged from the driver."""

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass
from typing import Any

import ray
import torch
from pydantic import ValidationError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from mdm_core.errors import ConfigError, WorkError
from pipelines import cluster, storage
from pipelines.data.table import SampleTable
from pipelines.embed.store import EmbeddingStore
from pipelines.evaluate.grids import picture_grid
from pipelines.progress import Progress
from pipelines.text_encoder import load_text_encoder
from pipelines.tracking import Run, open_run
from pipelines.train.batches import pad_text
from pipelines.train.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint, stage_ends
from pipelines.train.config import TrainConfig
from pipelines.train.initial import find_initial_weights
from pipelines.train.run_lock import RunLock
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_worker

_POLL_S = 0.5


@dataclass(frozen=True)
class TrainReport:
    """What a run has come to."""

    checkpoint: str
    """URI of the last checkpoint."""
    run_id: str
    """MLflow run."""
    stages: tuple[dict[str, float], ...]
    """For each stage: resolution, images_seen, loss_first, loss_last, images_per_s."""
    trained: bool
    """Whether anything was left to train."""

    def as_dict(self) -> dict[str, Any]:
        """The object of `--json`."""
        return {
            "stages": list(self.stages),
            "checkpoint": self.checkpoint,
            "mlflow_run_id": self.run_id,
            "trained": self.trained,
        }


def train(config: TrainConfig) -> TrainReport:
    """Trains every stage of a run, continuing from its newest checkpoint if it has one.

    Raises:
        ConfigError: Something can't work; found before any worker starts.
        WorkError: Training failed more often than `scaling.max_failures`.
    """
    config = _with_absolute_places(config)
    start = latest_checkpoint(config.checkpoint.uri)
    if start is not None:
        _check_same_run(config, start)
        _check_snapshots(config, start)
        if start.manifest.stage_done and start.manifest.stage == len(config.stages) - 1:
            return _report(config, start, trained=False)
    table, store = _open_table(config, start)
    first_stage = 0 if start is None else start.manifest.stage + 1
    initial = find_initial_weights(config, store.width, first_stage=first_stage)
    cluster.connect(min_cpus=config.scaling.workers * config.scaling.cpus_per_worker)
    tags = {"table": table.uri, "table_version": table.version}
    key = _key(config, table)
    lock = RunLock(config.checkpoint.uri)
    with lock, open_run(config.tracking, name=config.name, key=key, tags=tags) as run:
        run.log_params(
            {
                "seed": config.seed,
                "table": table.uri,
                "table_version": table.version,
                "resolutions": [stage.resolution for stage in config.stages],
                "text_encoder": config.text.encoder,
            }
        )
        run.log_dict(config.model_dump(mode="json"), "config.yaml")
        context = RunContext(config, table.version, run.id, _encode_preview(config), initial, lock.owner)
        _fit(context, run, key, start)
    return _report(config, open_checkpoint(config.checkpoint.uri), trained=True)


def _with_absolute_places(config: TrainConfig) -> TrainConfig:
    """Workers run in other folders, on other machines: local paths must mean the same there."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"table": storage.absolute(config.data.table)}),
            "checkpoint": config.checkpoint.model_copy(update={"uri": storage.absolute(config.checkpoint.uri)}),
            "stages": tuple(
                stage.model_copy(update={"init_from": stage.init_from and storage.absolute(stage.init_from)})
                for stage in config.stages
            ),
        }
    )


def _check_same_run(config: TrainConfig, start: Checkpoint) -> None:
    try:
        was, now = TrainConfig.model_validate(start.manifest.config).identity(), config.identity()
    except ValidationError as error:
        raise ConfigError(
            f"{start.uri} was made by mdm {start.manifest.code_version} with a configuration that this version can't "
            "read; use that version, or give the run another checkpoint.uri"
        ) from error
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"{config.checkpoint.uri} holds a run with another {', '.join(changed)}; a run is continued as it began: "
            "put the old values back, or give the new run another checkpoint.uri"
        )


def _check_snapshots(config: TrainConfig, start: Checkpoint) -> None:
    """A stage keeps snapshots of averages from its beginning, or none: they count every step."""
    under_way = not start.manifest.stage_done
    if config.checkpoint.ema_snapshots_every_images and under_way and not start.has("averages"):
        raise ConfigError(
            f"checkpoint.ema_snapshots_every_images={config.checkpoint.ema_snapshots_every_images}, but stage "
            f"{start.manifest.stage} of {config.checkpoint.uri} began without averages for them; leave it out until "
            "the stage is done, or give the run another checkpoint.uri"
        )


def _open_table(config: TrainConfig, start: Checkpoint | None) -> tuple[SampleTable, EmbeddingStore]:
    version = None if config.data.version == "latest" else config.data.version
    table = SampleTable.open(config.data.table, start.manifest.table_version if start is not None else version)
    if not table.shards("ok"):
        raise ConfigError(f"{table.uri} has no ok row at version {table.version}; run `mdm refresh` first")
    store = EmbeddingStore.open(table, config.text.encoder, max_tokens=config.text.max_tokens)
    config.model.matryoshka(store.width)
    return table, store


def _encode_preview(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not config.preview.captions:
        return None
    encoder = load_text_encoder(config.text.encoder, max_tokens=config.text.max_tokens)
    captions = encoder.encode(config.preview.captions)
    return pad_text(captions, width=encoder.width, length=config.text.max_tokens)


def _key(config: TrainConfig, table: SampleTable) -> str:
    """What makes two calls the same run in MLflow: the same place, configuration and table version."""
    identity = json.dumps([config.checkpoint.uri, config.identity(), table.version], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _fit(context: RunContext, run: Run, key: str, start: Checkpoint | None) -> None:
    config = context.config
    board = ray.remote(Board).options(num_cpus=0).remote()
    seen = 0 if start is None else start.manifest.total_images_seen
    resources = {"CPU": float(config.scaling.cpus_per_worker), "GPU": float(config.scaling.gpus_per_worker)}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"context": context, "board": board},
        scaling_config=ScalingConfig(
            num_workers=config.scaling.workers,
            use_gpu=config.scaling.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        torch_config=TorchConfig(backend="nccl" if config.scaling.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=config.name,
            storage_path=storage.join(config.checkpoint.uri, "ray_train"),
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
        ),
    )
    with Watch(board, run, key, config, seen) as watch:
        try:
            cluster.call_interruptibly(trainer.fit)
        except ray.train.TrainingFailedError as error:
            raise WorkError(watch.last_error or f"training failed: {error}") from error
    if watch.last_error:
        raise WorkError(watch.last_error)


class Board:
    """An actor to which workers pin events, and from which the driver takes them."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        """Adds an event."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events


class Watch:
    """Shows progress and logs to MLflow what the workers pin to the board, until the block ends."""

    def __init__(self, board: Any, run: Run, key: str, config: TrainConfig, images_seen: int) -> None:
        self._board, self._run, self._key, self._config = board, run, key, config
        self._before = [0]
        for stage in config.stages:
            self._before.append(self._before[-1] + stage.num_steps * stage.global_batch_size)
        self._progress = Progress("train", total=self._before[-1], unit="images", start=images_seen)
        self._stage_runs = contextlib.ExitStack()
        self._stages: dict[int, Run] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._failure: BaseException | None = None
        self.last_error = ""

    def __enter__(self) -> "Watch":
        self._progress.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._progress.__exit__(*error)
        self._stage_runs.__exit__(*error)
        if self._failure is not None and error[0] is None:
            raise self._failure

    def _pump(self) -> None:
        try:
            while not self._ended.wait(_POLL_S):
                self._take()
            self._take()
        except BaseException as failure:  # raised again where the block ends
            self._failure = failure

    def _take(self) -> None:
        for event in ray.get(self._board.take.remote()):
            if "error" in event:
                self.last_error = event["error"]
                continue
            total = self._before[event["stage"]] + event["images"]
            if "metrics" in event:
                self.last_error = ""  # a later attempt got past it
                self._stage(event["stage"]).log_metrics(event["metrics"], step=event["images"])
                self._run.log_metrics({"loss": event["metrics"]["loss"]}, step=total)
                shown = {"stage_px": self._config.stages[event["stage"]].resolution, "loss": event["metrics"]["loss"]}
                self._progress.advance(total - self._progress.done, **shown)
            if "pictures" in event:
                self._log_pictures(event, total)

    def _log_pictures(self, event: dict[str, Any], total: int) -> None:
        """A series a resolution in the stage's run, and one of the finest so far in the run of all stages."""
        for side, pictures in event["pictures"].items():
            title = f"{self._config.name}: {side} px after {total:,} images"
            grid = picture_grid(pictures, self._config.preview.captions, title=title)
            self._stage(event["stage"]).log_image(grid, key=f"preview_{side}", step=event["images"])
            begins_later_stage = event["stage"] > 0 and event["images"] == 0
            if side == self._config.stages[event["stage"]].resolution and not begins_later_stage:
                self._run.log_image(grid, key="preview", step=total)

    def _stage(self, index: int) -> Run:
        if index not in self._stages:
            stage = self._config.stages[index]
            opened = open_run(
                self._config.tracking,
                name=f"stage {stage.resolution} px",
                parent_run_id=self._run.id,
                key=f"{self._key}:{index}",
            )
            self._stages[index] = self._stage_runs.enter_context(opened)
            shared = self._config.model_dump(mode="json", include={"data", "text", "model"})
            self._stages[index].log_params({"stage": stage.model_dump(mode="json"), **shared})
        return self._stages[index]


def _report(config: TrainConfig, last: Checkpoint, *, trained: bool) -> TrainReport:
    stages = []
    for manifest in stage_ends(config.checkpoint.uri):
        measured = {name: manifest.metrics[name] for name in ("loss_first", "loss_last", "images_per_s")}
        stages.append(
            {"resolution": manifest.matryoshka().resolutions[0], "images_seen": manifest.images_seen} | measured
        )
    return TrainReport(last.uri, last.manifest.run_id, tuple(stages), trained)
