"""Scores a checkpoint: pictures for a fixed prompt set, their features, distances to the table's pictures.

All distances are to the same reference, real pictures that are not among the prompts: of the pictures made with the
trained weights, of those that an untrained network makes for the same prompts and noise, and, as the floor, of the
real pictures of the prompts. So (fd - floor) / (untrained - floor), `fd_relative`, is 1 without training and 0 when
pictures are as far from the reference as other real ones.
"""

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.evaluate import metrics
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.grids import grid_title, picture_grid, png_bytes
from pipelines.evaluate.prompts import TableRow, by_shard, draw_rows, read_captions
from pipelines.evaluate.report import EvaluateReport, delete_report, fingerprint, read_report, write_report
from pipelines.progress import Progress
from pipelines.tracking import open_run
from pipelines.train.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from pipelines.evaluate.worker import MakerFactory

_REAL_A_TASK = 200
_REFERENCE_FILE = "reference_features.npz"

Features = NDArray[np.float32]


@dataclass
class _Found:
    """What the workers have given so far, by kind (ema, raw, untrained, real) and number."""

    features: dict[str, dict[int, Features]] = field(default_factory=dict)
    pictures: dict[int, dict[int, NDArray[np.uint8]]] = field(default_factory=dict)
    """Of the trained weights, by resolution."""

    def add(self, kind: str, data: bytes) -> int:
        with np.load(io.BytesIO(data)) as arrays:
            numbers = arrays["numbers"].tolist()
            self.features.setdefault(kind, {}).update(zip(numbers, arrays["features"], strict=True))
            if kind in ("ema", "raw"):
                for name in arrays.files:
                    if name.startswith("pictures_"):
                        level = self.pictures.setdefault(int(name.removeprefix("pictures_")), {})
                        level.update(zip(arrays["shown"].tolist(), arrays[name], strict=True))
        return len(numbers)

    def stacked(self, kind: str, numbers: Sequence[int]) -> Features:
        return np.stack([self.features[kind][number] for number in numbers])


def evaluate(config: EvaluateConfig, *, make: "MakerFactory | None" = None) -> EvaluateReport:
    """Returns the scores of a checkpoint, its grids written and all of it logged to MLflow.

    With the same checkpoint, table version and configuration as the report in `config.out`, that one is returned.

    Args:
        config: What to evaluate.
        make: Makes a generator from a checkpoint; `Generator.from_checkpoint` if empty.

    Raises:
        ConfigError: There is no checkpoint or no table, or it has too few rows.
        WorkError: The work failed later.
    """
    began_s = time.monotonic()
    out = storage.absolute(config.out)
    checkpoint = open_checkpoint(storage.absolute(config.checkpoint))
    table = _open_table(config, checkpoint)
    where, key = _where(config, checkpoint, table)
    wanted = fingerprint(config, checkpoint, table, where)
    if report := read_report(out, wanted):
        return report
    prompts, reference = draw_rows(
        table,
        where=where,
        key=key,
        num_samples=config.num_samples,
        num_reference=config.num_reference,
        seed=config.seed,
    )
    captions = read_captions(table, prompts)
    found = _run(config, checkpoint, table, prompts, reference, captions, make)
    # The matrices are small: several threads would wait for each other longer than they work.
    with threadpool_limits(limits=1, user_api="blas"):
        values, intervals = _measure(config, found, prompts, reference)
    delete_report(out)  # it names grids that are written anew from here on
    grids = _grids(config, checkpoint, found, captions)
    run_id = _log(config, checkpoint, table, where, wanted, values, grids)
    report = EvaluateReport(
        fingerprint=wanted,
        metrics=values,
        intervals=intervals,
        checkpoint=checkpoint.uri,
        images_seen=checkpoint.manifest.total_images_seen,
        table=table.uri,
        table_version=table.version,
        where=where,
        num_samples=len(prompts),
        num_reference=len(reference),
        grids={str(side): storage.join(out, f"samples_{side}.png") for side in grids},
        mlflow_run_id=run_id,
        seconds=round(time.monotonic() - began_s, 1),
    )
    write_report(out, report)
    return report


def _open_table(config: EvaluateConfig, checkpoint: Checkpoint) -> SampleTable:
    uri = storage.absolute(config.table or checkpoint.manifest.table_uri)
    version = config.version
    if version is None and _was_trained_on(uri, checkpoint):
        version = checkpoint.manifest.table_version
    return SampleTable.open(uri, version)


def _where(config: EvaluateConfig, checkpoint: Checkpoint, table: SampleTable) -> tuple[str | None, str]:
    """Which rows count, and what messages call that: of the table that was trained on, those that the training took."""
    if config.where is not None or not _was_trained_on(table.uri, checkpoint):
        return config.where, "where"
    return checkpoint.manifest.config.get("data", {}).get("where"), "the training's data.where"


def _was_trained_on(uri: str, checkpoint: Checkpoint) -> bool:
    return storage.resolve(uri) == storage.resolve(checkpoint.manifest.table_uri)


def _run(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    table: SampleTable,
    prompts: list[TableRow],
    reference: list[TableRow],
    captions: list[str],
    make: "MakerFactory | None",
) -> _Found:
    """Makes the pictures and takes all features; those of real pictures may be there from an earlier run."""
    from pipelines.evaluate.worker import made_task, real_task

    resolution = checkpoint.manifest.matryoshka().resolutions[0]
    key = f"{table.uri}@{table.version} {config.feature_network} {resolution} px"
    found = _Found()
    found.features["real"] = _read_reference(config, key)
    tasks = []
    for weights in (config.weights, "untrained"):
        for first in range(0, len(captions), config.batch_size):
            numbers = range(first, min(first + config.batch_size, len(captions)))
            tasks.append(made_task(weights, numbers, [captions[number] for number in numbers]))
    missing = [row for row in prompts + reference if row.number not in found.features["real"]]
    for group in by_shard(missing, at_most=_REAL_A_TASK):
        tasks.append(real_task(group[0].shard.path, [row.row for row in group], [row.number for row in group]))
    with Progress("evaluate", total=2 * len(captions) + len(missing), unit="pictures") as progress:
        for row in _results(config, checkpoint, table, resolution, tasks, make):
            progress.advance(found.add(row["kind"], row["arrays"]))
    if missing:
        _write_reference(config, key, found.features["real"])
    return found


def _results(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    table: SampleTable,
    resolution: int,
    tasks: list[str],
    make: "MakerFactory | None",
) -> Iterator[dict[str, Any]]:
    import ray
    import ray.data

    from pipelines import cluster
    from pipelines.evaluate.worker import EvaluateWorker
    from pipelines.sample.generator import Generator

    cluster.connect()
    resource = "GPU" if config.gpus_per_worker else "CPU"
    has = int(ray.cluster_resources().get(resource, 0))
    if not has:
        raise ConfigError("gpus_per_worker=1, but the Ray cluster has no GPU; set it to 0 or join another cluster")
    num_workers = min(has if config.workers == "auto" else config.workers, len(tasks))
    cluster.connect(min_cpus=num_workers)
    results = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks)).map_batches(
        EvaluateWorker,
        fn_constructor_kwargs={
            "make": make or Generator.from_checkpoint,
            "checkpoint": checkpoint.uri,
            "table_uri": table.uri,
            "table_version": table.version,
            "feature_network": config.feature_network,
            "resolution": resolution,
            "sampling": {
                "seed": config.seed,
                "guidance_scale": config.guidance_scale,
                "num_inference_steps": config.num_inference_steps,
            },
            "num_shown": config.grid_pictures,
            "device": "cuda" if config.gpus_per_worker else "cpu",
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        num_gpus=config.gpus_per_worker,
    )
    with cluster.data_context():
        for row in results.iter_rows():
            if row["error"]:
                raise (ConfigError if row["error_kind"] == "config" else WorkError)(row["error"])
            yield row


def _measure(
    config: EvaluateConfig, found: _Found, prompts: list[TableRow], reference: list[TableRow]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    numbers = range(len(prompts))
    compared = found.stacked("real", [row.number for row in reference])
    sets = {
        "": found.stacked(config.weights, numbers),
        "_floor": found.stacked("real", [row.number for row in prompts]),
        "_untrained": found.stacked("untrained", numbers),
    }
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for suffix, features in sets.items():
        estimates = {
            f"fd{suffix}" if suffix else f"fd_{config.feature_network}": metrics.frechet_estimate(
                features, compared, seed=config.seed
            ),
            f"kid{suffix}": metrics.kernel_distance(features, compared, seed=config.seed),
        }
        for name, estimate in estimates.items():
            values[name] = estimate.value
            intervals[name] = (estimate.low, estimate.high)
    # An untrained network may beat the floor where there are hardly any pictures: then there is no scale.
    scale = values["fd_untrained"] - values["fd_floor"]
    if scale > 0:
        values["fd_relative"] = (values[f"fd_{config.feature_network}"] - values["fd_floor"]) / scale
    return values, intervals


def _grids(
    config: EvaluateConfig, checkpoint: Checkpoint, found: _Found, captions: list[str]
) -> dict[int, Image.Image]:
    """Returns a grid a resolution, finest first, and writes them into `config.out`."""
    manifest = checkpoint.manifest
    grids = {}
    for side, pictures in sorted(found.pictures.items(), reverse=True):
        count = min(config.grid_pictures, len(captions))
        title = grid_title(
            str(manifest.config.get("name", "checkpoint")),
            side,
            weights=config.weights,
            images_seen=manifest.total_images_seen,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
        )
        grids[side] = picture_grid([pictures[number] for number in range(count)], captions[:count], title=title)
        uri = storage.join(storage.absolute(config.out), f"samples_{side}.png")
        storage.write_bytes_atomic(uri, png_bytes(grids[side]))
    return grids


def _log(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    table: SampleTable,
    where: str | None,
    key: str,
    values: dict[str, float],
    grids: dict[int, Image.Image],
) -> str:
    manifest = checkpoint.manifest
    step = manifest.total_images_seen
    with open_run(
        config.tracking,
        name="evaluate",
        parent_run_id=manifest.run_id or None,
        # An evaluation that was stopped before its report was written is not logged twice.
        key=f"evaluate {key}",
        tags={"mdm.checkpoint": checkpoint.uri, "mdm.table": table.uri, "mdm.table_version": table.version},
    ) as run:
        settings = config.model_dump(mode="json", exclude={"tracking"}) | {"where": where}
        run.log_params({"evaluate": settings, "stage": manifest.stage})
        run.log_dict(manifest.config, "training_config.yaml")
        run.log_metrics(values, step=step)
        for side, grid in grids.items():
            run.log_image(grid, key=f"samples_{side}", step=step)
        return run.id


def _read_reference(config: EvaluateConfig, key: str) -> dict[int, Features]:
    uri = storage.join(storage.absolute(config.out), _REFERENCE_FILE)
    if not storage.exists(uri):
        return {}
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri))) as arrays:
            if str(arrays["key"]) != key:
                return {}
            return dict(zip(arrays["numbers"].tolist(), arrays["features"], strict=True))
    except (ValueError, KeyError, OSError):
        # Another version's: it is made again.
        return {}


def _write_reference(config: EvaluateConfig, key: str, features: dict[int, Features]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), numbers=np.array(list(features)), features=np.stack(list(features.values())))
    storage.write_bytes_atomic(storage.join(storage.absolute(config.out), _REFERENCE_FILE), buffer.getvalue())
