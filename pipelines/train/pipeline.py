"""Training on Ray: one run, its stages one after the other, watched and logged from the driver."""

import contextlib
import functools
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, ValidationConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from mdm_core.errors import MdmError, WorkError
from pipelines import cluster, storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.text_encoder import load_text_encoder
from pipelines.tracking import Run, open_run
from pipelines.train.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint, stage_ends
from pipelines.train.config import TrainConfig
from pipelines.train.ingest.batch import pad_text
from pipelines.train.initial import find_initial_weights
from pipelines.train.preflight import check_same_run, open_table, with_absolute_places
from pipelines.train.preview import Preview
from pipelines.train.run_lock import RunLock
from pipelines.train.stage import RunContext
from pipelines.train.watch import Board, Watch
from pipelines.train.worker import make_pictures, train_worker


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


def train(config: TrainConfig, *, trace: str | None = None) -> TrainReport:
    """Trains every stage of a run, continuing from its newest checkpoint if it has one.

    Args:
        config: The run.
        trace: Local folder in which each worker writes down what it does, to be measured; none does if None.

    Raises:
        ConfigError: Something can't work; found before any worker starts.
        WorkError: Training failed more often than `scaling.max_failures`.
    """
    config = with_absolute_places(config)
    start = latest_checkpoint(config.checkpoint.uri)
    if start is not None:
        # The workers read it, each for itself.
        start.release()
        check_same_run(config, start)
        if start.manifest.stage_done and start.manifest.stage == len(config.stages) - 1:
            return _report(config, start, trained=False)
    table, store, selection = open_table(config, start)
    first_stage = 0 if start is None else start.manifest.stage + 1
    initial = find_initial_weights(config, store.width, first_stage=first_stage)
    # Here, as the weights of the encoder may not be there.
    preview_text = _preview_text(config) if config.preview.captions else None
    _join_cluster(config)
    tags = {"table": table.uri, "table_version": table.version, "rows": selection.num_rows}
    if start is not None and start.passed_over:
        tags["checkpoints_passed_over"] = "\n".join(start.passed_over)
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
        context = RunContext(config, table.version, run.id, initial, lock.owner, selection, trace)
        _fit(context, run, key, start, preview_text)
    return _report(config, open_checkpoint(config.checkpoint.uri), trained=True)


def _key(config: TrainConfig, table: SampleTable) -> str:
    """What makes two calls the same run in MLflow: the same place, configuration and table version."""
    identity = json.dumps([config.checkpoint.uri, config.identity(), table.version], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _join_cluster(config: TrainConfig) -> None:
    scaling, preview = config.scaling, config.preview
    workers, cpus, gpus = scaling.min_workers, scaling.cpus_per_worker, scaling.gpus_per_worker
    cluster.connect(min_cpus=workers * cpus, min_gpus=workers * gpus)
    cluster.check_room(cpus, gpus, what="scaling.cpus_per_worker and scaling.gpus_per_worker", count=workers)
    if preview.captions:
        cluster.check_room(preview.cpus, preview.gpus, what="preview.cpus and preview.gpus")


def _fit(
    context: RunContext, run: Run, key: str, start: Checkpoint | None, preview_text: tuple[Tensor, Tensor] | None
) -> None:
    config, scaling = context.config, context.config.scaling
    # On the driver's machine, which the run needs anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    # What Ray Train writes down of a run is of no use to the next one, which knows its own checkpoints.
    notes = storage.join(config.checkpoint.uri, "ray_train", secrets.token_hex(8))
    filesystem, path = storage.arrow_filesystem(notes)
    folder, _, name = path.rpartition("/")
    resources = {"CPU": float(scaling.cpus_per_worker), "GPU": float(scaling.gpus_per_worker)}
    trainer = TorchTrainer(  # type: ignore[call-arg]
        train_worker,
        train_loop_config={"context": context, "board": board},
        # mypy sees the classes of Ray Train's first version, where at run time there are those of the second.
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=scaling.workers,  # type: ignore[arg-type]
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
            elastic_resize_monitor_interval_s=scaling.resize_every_s,
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
        ),
        validation_config=_validation(config, preview_text, board),
    )
    if scaling.min_workers < scaling.max_workers:
        # Ray Train counts on a machine for some seconds after it is gone, and would wait a minute for it.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    seen = 0 if start is None else start.manifest.total_images_seen
    try:
        with Watch(lambda: list(ray.get(board.take.remote())), run, key, config, seen) as watch:
            try:
                cluster.call_interruptibly(trainer.fit)
            except ray.train.TrainingFailedError as error:
                raise WorkError(watch.last_error or f"training failed: {error}") from error
    finally:
        # What was trained counts, not that a folder stays.
        with contextlib.suppress(MdmError):
            storage.delete(notes)
    if watch.last_error:
        raise WorkError(watch.last_error)


def _preview_text(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The captions of the previews, as the network takes them."""
    encoder = load_text_encoder(config.text.encoder, max_tokens=config.text.max_tokens)
    fill = not config.model.matryoshka(encoder.width).networks[-1].mask_text
    embeddings = encoder.encode(config.preview.captions)
    return pad_text(embeddings, width=encoder.width, length=config.text.max_tokens, fill=fill)


def _validation(config: TrainConfig, text: tuple[Tensor, Tensor] | None, board: Any) -> ValidationConfig | None:
    """Has Ray Train make previews of each checkpoint, in a task beside the training."""
    if text is None:
        return None
    post = functools.partial(_post, board)
    preview = Preview(config.preview, config.seed, text, run_task=make_pictures, post=post)
    return ValidationConfig(fn=preview, ray_remote_kwargs={"num_cpus": 0})


def _post(board: Any, event: dict[str, Any]) -> None:
    ray.get(board.put.remote(event))


def _report(config: TrainConfig, last: Checkpoint, *, trained: bool) -> TrainReport:
    stages = []
    for manifest in stage_ends(config.checkpoint.uri):
        measured = {name: manifest.metrics[name] for name in ("loss_first", "loss_last", "images_per_s")}
        stages.append(
            {"resolution": manifest.matryoshka().resolutions[0], "images_seen": manifest.images_seen} | measured
        )
    return TrainReport(last.uri, last.manifest.run_id, tuple(stages), trained)
