"""What a run would take, worked out without a cluster and without running anything: `mdm train --dry-run`."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import ConfigError
from mdm_core.nested_unet import build_network
from pipelines.benchmark.activations import IN_ALL, Planned, planned_activations, planned_peaks
from pipelines.benchmark.flops import flops_per_picture, training_flops
from pipelines.benchmark.peaks import known_cards, known_peak
from pipelines.data.table.sample_table import SampleTable
from pipelines.progress import Progress
from pipelines.text_encoder import text_width
from pipelines.train.checkpoint import Checkpoint, latest_checkpoint
from pipelines.train.config import StageConfig, TrainConfig
from pipelines.train.ema_snapshots import EMA_LENGTHS
from pipelines.train.preflight import check_same_run, open_table, with_absolute_places

_FLOAT_BYTES = 4
_MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one worker needs, all but what the libraries take for themselves."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    """What a forward pass keeps for the backward pass."""
    peak: int
    """The most of all these, and of what comes and goes, at one moment of a step."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run."""

    resolution: int
    parameters: int
    steps: int
    images: int
    images_left: int
    """What the run's newest checkpoint leaves to do."""
    epochs: float | None
    """Times that each row of the table is trained on; None where the table is not known."""
    images_per_pass: int
    """Images of one forward pass on a worker."""
    passes_per_step: int
    """Forward passes of one optimizer step, on each worker."""
    flops_per_image: int
    """Forward and backward, an FMA as 2."""
    recomputed_flops_per_image: int
    """Once more for levels that run twice."""
    memory: dict[str, MemoryPlan]
    """A worker's: `as_configured`, `nothing_recomputed` and `all_recomputed`; empty without `plan.memory`."""
    checkpoint_bytes: int
    """Of one checkpoint of the stage."""
    images_per_s_for_deadline: float | None
    """Of all workers, if each stage gets the part of the time that its arithmetic is of the run's."""
    images_per_s_at_share: float | None
    """Of all workers, at `plan.share_of_peak` of the card."""
    hours_at_share: float | None

    @property
    def flops_left(self) -> float:
        """Arithmetic of the images that are left."""
        return float(self.images_left * (self.flops_per_image + self.recomputed_flops_per_image))


@dataclass(frozen=True)
class TrainPlan:
    """A run, before it starts."""

    table: str
    table_version: int | None
    rows: int | None
    """Rows of the table that are trained on."""
    text_dim: int
    continues_from: str | None
    """The checkpoint that the run goes on from."""
    workers: int
    gpus_per_worker: int
    dtype: str
    card: str | None
    share_of_peak: float | None
    deadline_h: float | None
    stages: tuple[StagePlan, ...]
    storage_bytes: int
    """Checkpoints that are there at the same time, at most."""
    share_of_peak_for_deadline: float | None
    """The part of the card's peak that the deadline asks for; above 1 it can't be met."""
    hours_at_share: float | None
    not_checked: tuple[str, ...]
    """What the run may still be refused for."""

    def as_dict(self) -> dict[str, Any]:
        """The object of `--json`."""
        return asdict(self)


def plan_training(config: TrainConfig) -> TrainPlan:
    """What the run would take. Starts no Ray, opens no MLflow run and writes nothing.

    Raises:
        ConfigError: A run would be refused for something that can be seen without a cluster.
        CheckpointError: None of the run's checkpoints can be used.
    """
    config = with_absolute_places(config)
    peak = _card_peak(config)
    not_checked = ["whether the cluster has the CPUs and GPUs, tracking.uri answers, and no other run holds the folder"]
    not_checked += [
        f"what stages.{number}.init_from holds" for number, stage in enumerate(config.stages) if stage.init_from
    ]
    start = _newest_checkpoint(config, not_checked)
    table, rows, width = _table(config, start, not_checked)
    if config.preview.captions:
        not_checked.append(f"whether the weights of {config.text.encoder} are there for the captions of the preview")
    stages = []
    with Progress("plan", total=len(config.stages), unit="stages") as progress:
        for index in range(len(config.stages)):
            stages.append(_stage_plan(config, index, start=start, rows=rows, text_dim=width))
            progress.advance(1)
    timed = _timed(stages, config, peak)
    on_gpu = config.scaling.gpus_per_worker > 0
    flops, deadline_h = sum(stage.flops_left for stage in timed), config.plan.deadline_h
    *earlier, last = (stage.checkpoint_bytes for stage in timed)
    return TrainPlan(
        table=config.data.table,
        table_version=None if table is None else table.version,
        rows=rows,
        text_dim=width,
        continues_from=None if start is None else start.uri,
        workers=config.scaling.max_workers,
        gpus_per_worker=config.scaling.gpus_per_worker,
        dtype=config.scaling.dtype(on_gpu=config.scaling.gpus_per_worker > 0),
        card=config.plan.card if on_gpu else None,
        share_of_peak=config.plan.share_of_peak if on_gpu else None,
        deadline_h=deadline_h,
        stages=tuple(timed),
        # One of each stage that has ended, and of the last one more than are kept while it is written.
        storage_bytes=sum(earlier) + (config.checkpoint.keep + 1) * last,
        share_of_peak_for_deadline=None if deadline_h is None or peak is None else flops / (deadline_h * 3600 * peak),
        hours_at_share=None if peak is None else flops / (config.plan.share_of_peak * peak) / 3600,
        not_checked=tuple(not_checked),
    )


def _card_peak(config: TrainConfig) -> float | None:
    """FLOP/s of all workers by the card's data sheet; None where they have no GPU."""
    if not config.scaling.gpus_per_worker:
        return None
    peak = known_peak(config.plan.card, config.scaling.dtype(on_gpu=config.scaling.gpus_per_worker > 0), tf32=True)
    if peak is None:
        raise ConfigError(f"plan.card: got {config.plan.card!r}; wanted one of {', '.join(known_cards())}")
    return peak * config.scaling.max_workers * config.scaling.gpus_per_worker


def _newest_checkpoint(config: TrainConfig, not_checked: list[str]) -> Checkpoint | None:
    try:
        start = latest_checkpoint(config.checkpoint.uri)
    except (ConfigError, OSError) as error:
        not_checked.append(f"whether {config.checkpoint.uri} holds a run to go on with: {error}")
        return None
    if start is not None:
        check_same_run(config, start)
    return start


def _table(
    config: TrainConfig, start: Checkpoint | None, not_checked: list[str]
) -> tuple[SampleTable | None, int | None, int]:
    """The table, its rows and the width of its text; without a table, the width that the encoder is known to have."""
    try:
        SampleTable.open(config.data.table)
    except (ConfigError, OSError) as error:
        not_checked.append(f"the table, its version and its embeddings: {error}")
        width = config.model.text_dim or text_width(config.text.encoder)
        if width is None:
            raise ConfigError(
                f"the table can't be opened, and nobody knows the width of {config.text.encoder} without its weights; "
                "set model.text_dim"
            ) from error
        config.model.matryoshka(text_width(config.text.encoder) or width)
        return None, None, width
    table, store, selection = open_table(config, start)
    return table, selection.num_rows, store.width


def _stage_plan(
    config: TrainConfig, index: int, *, start: Checkpoint | None, rows: int | None, text_dim: int
) -> StagePlan:
    """A stage without what depends on the others."""
    stage, scaling = config.stages[index], config.scaling
    networks = config.model.matryoshka(text_dim).up_to(stage.resolution)
    with torch.device("meta"):
        network = build_network(networks)
    levels = tuple(network.levels())
    chosen = tuple(name for name in levels if name in scaling.checkpoint_levels or "all" in scaling.checkpoint_levels)
    # The fewest workers have the largest shares.
    share = -(-stage.global_batch_size // scaling.min_workers)
    images_per_pass = min(scaling.micro_batch_size or share, share)
    flops = flops_per_picture(networks, text_tokens=config.text.max_tokens)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    state = sum(value.numel() for value in network.state_dict().values())
    moments = sum(_MOMENTS * parameter.numel() + 1 for parameter in network.parameters())
    return StagePlan(
        resolution=stage.resolution,
        parameters=parameters,
        steps=stage.num_steps,
        images=stage.num_images,
        images_left=_images_left(stage, index, start),
        epochs=None if rows is None else stage.num_images / rows,
        images_per_pass=images_per_pass,
        passes_per_step=-(-share // images_per_pass),
        flops_per_image=round(training_flops(networks, text_tokens=config.text.max_tokens, mix=stage.resolution_mix)),
        recomputed_flops_per_image=sum(flops.forward_by_level[name] for name in chosen),
        memory=_memory(config, networks, images=images_per_pass, chosen=chosen, levels=levels)
        if config.plan.memory
        else {},
        # Weights and averages, AdamW's moments and its count of steps; what says so is small beside them.
        checkpoint_bytes=_FLOAT_BYTES * ((1 + _num_averages(config)) * state + moments),
        images_per_s_for_deadline=None,
        images_per_s_at_share=None,
        hours_at_share=None,
    )


def _images_left(stage: StageConfig, index: int, start: Checkpoint | None) -> int:
    images = stage.num_images
    if start is None or start.manifest.stage < index:
        return images
    return images - start.manifest.images_seen if start.manifest.stage == index else 0


def _memory(
    config: TrainConfig, networks: MatryoshkaConfig, *, images: int, chosen: tuple[str, ...], levels: tuple[str, ...]
) -> dict[str, MemoryPlan]:
    bare = Planned(
        config=networks,
        batch=images,
        text_tokens=config.text.max_tokens,
        dtype=config.scaling.dtype(on_gpu=config.scaling.gpus_per_worker > 0),
    )
    each = {"as_configured": chosen, "nothing_recomputed": (), "all_recomputed": levels}
    known = {
        checkpointed: _memory_of(replace(bare, checkpointed=checkpointed), num_averages=_num_averages(config))
        for checkpointed in set(each.values())
    }
    return {name: known[checkpointed] for name, checkpointed in each.items()}


def _num_averages(config: TrainConfig) -> int:
    """Averages of the weights that are kept: the one that is sampled from, and those that snapshots are taken of."""
    return 1 + (len(EMA_LENGTHS) if config.checkpoint.ema_snapshots_every_images else 0)


def _memory_of(planned: Planned, *, num_averages: int) -> MemoryPlan:
    with torch.device("meta"):
        network = build_network(planned.config)
    weights = _FLOAT_BYTES * sum(parameter.numel() for parameter in network.parameters())
    return MemoryPlan(
        weights=weights,
        gradients=weights,
        optimizer=_MOMENTS * weights,
        ema=num_averages * weights,
        activations=sum(planned_activations(planned).values()),
        # It has the weights and one copy of the gradients in it.
        peak=planned_peaks(planned)[IN_ALL] + (_MOMENTS + num_averages) * weights,
    )


def _timed(stages: list[StagePlan], config: TrainConfig, peak: float | None) -> list[StagePlan]:
    """The stages with the pace that the deadline asks for, and with that of the card."""
    deadline_h, flops = config.plan.deadline_h, sum(stage.flops_left for stage in stages)
    timed = []
    for stage in stages:
        per_image = stage.flops_per_image + stage.recomputed_flops_per_image
        at_share = None if peak is None else config.plan.share_of_peak * peak / per_image
        timed.append(
            replace(
                stage,
                images_per_s_for_deadline=None if deadline_h is None else flops / per_image / (deadline_h * 3600),
                images_per_s_at_share=at_share,
                hours_at_share=None if at_share is None else stage.images_left / at_share / 3600,
            )
        )
    return timed
