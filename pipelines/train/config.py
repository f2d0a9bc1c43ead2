"""The configuration of a training run."""

from typing import Any, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator

from mdm_core.loss import LossWeighting
from mdm_core.nested_unet import build_network
from pipelines.run_config import Config
from pipelines.tracking import TrackingConfig
from pipelines.train.model_config import ModelConfig


class DataConfig(Config):
    """What is trained on."""

    table: str = Field(min_length=1)
    """The sample table: a local folder or s3://…."""
    version: int | Literal["latest"] = "latest"
    """Version of the table; the number that `latest` stood for is kept in each checkpoint."""
    where: str | None = Field(default=None, min_length=1)
    """Which rows are trained on: an SQL condition over the table's columns, as in clip_similarity >= 0.28 and
    width >= 256; all of them if empty."""
    crop: Literal["center", "random"] = "center"
    """Which square of a picture is shown: the middle one, or any along its longer side, drawn anew each time."""
    flip: bool = False
    """Whether half of the pictures are mirrored; wrong where captions name sides or letters are shown."""
    shuffle_row_groups: int = Field(default=64, ge=1)
    """Row groups, of 100 rows or so, whose rows are mixed with each other; their files' bytes are held in memory."""
    prefetch_steps: int = Field(default=2, ge=0)
    """Steps that are read and decoded ahead of the one that is trained on; they are held in memory."""


class TextConfig(Config):
    """How captions are given to the network."""

    encoder: str = "minilm"
    """Encoder whose embeddings `mdm embed` made: minilm, open_clip:MODEL/WEIGHTS or t5:NAME_OR_FOLDER."""
    max_tokens: int = Field(default=32, ge=1, le=512)
    """Tokens of a caption that are kept."""
    precomputed: bool = True
    """Whether training reads what `mdm embed` has made; if not, each worker holds the encoder, and encodes the captions
    as it reads them: nothing to make first, and all of it again in each epoch."""
    drop_prob: float = Field(default=0.1, ge=0, lt=1)
    """Share of captions left out in training, so that guidance has something to guide away from."""


class StageConfig(Config):
    """One stage of progressive training: a resolution, and how it is trained."""

    resolution: int
    """Finest resolution of the stage; the networks of this side and below are trained."""
    images: int = Field(ge=1)
    """Images to train on, repeats included; rounded up to whole batches."""
    global_batch_size: int = Field(ge=1)
    """Images of one optimizer step, over all workers."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    warmup_images: int = Field(default=0, ge=0)
    """Images over which the learning rate rises from 0."""
    decay: Literal["constant", "linear"] = "constant"
    """Whether the learning rate falls to 0 at the end of the stage."""
    resolution_weights: tuple[float, ...] | None = None
    """Weight of each resolution's loss, finest first; all 1 if empty."""
    resolution_mix: tuple[float, ...] | None = None
    """Share of each batch's images that each resolution is trained on, finest first, as in [0.5, 1]: the others cost no
    more than in the stage before. All of them if empty."""
    loss_weighting: LossWeighting = "eps"
    """Whose plain squared error is meant, whatever the networks answer: eps, the published one, v or x0; min_snr is
    that of x0 times min(SNR, min_snr_gamma)."""
    min_snr_gamma: float = Field(default=5.0, gt=0)
    """Where min_snr stops growing."""
    init_from: str | None = Field(default=None, min_length=1)
    """What the stage begins from: a run (its newest checkpoint), a checkpoint, a .safetensors or a published .pth, of
    the stage's networks or of those inside; their averaged weights. If empty, the averages of the stage before, or a
    new network."""
    freeze_inner_images: int = Field(default=0, ge=0)
    """Images over which the networks inside the stage's new one keep their weights."""
    ema: float = Field(default=0.1, gt=0, lt=0.28)
    """Length of the average of the weights, as a share of the stage."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        return -(-self.images // self.global_batch_size)

    @property
    def num_images(self) -> int:
        """Images that these steps take."""
        return self.num_steps * self.global_batch_size

    def learning_rate(self, images_seen: int) -> float:
        """The learning rate of the step that begins after `images_seen` images of the stage."""
        rise = min(1.0, (images_seen + 1) / self.warmup_images) if self.warmup_images else 1.0
        fall = 1 - images_seen / self.num_images if self.decay == "linear" else 1.0
        return self.lr * rise * fall


class ScalingConfig(Config):
    """On what the network is trained; none of it changes which rows a step takes."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Processes that share each batch: a number, or [least, most] to go on with whatever the cluster has in between."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPUs of each."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """GPUs of each: 0 trains on the CPU."""
    resize_every_s: float = Field(default=60.0, gt=0)
    """Seconds between two looks at whether the cluster has room for more workers; taking them in costs the steps since
    the last checkpoint."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Images that a worker takes at once; the gradients of a larger share of a batch are added up. All of its share if
    empty."""
    max_failures: int = Field(default=3, ge=0)
    """Times that lost workers are replaced before the run fails; preempted ones are not counted."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """In what the networks compute, the weights being float32: auto is bfloat16 on a GPU and float32 on the CPU."""
    compile: bool = False
    """Whether the networks are compiled (`torch.compile`): minutes at the start, faster steps."""
    checkpoint_levels: tuple[str, ...] = ()
    """Levels of the networks, as in 64.down.0, that keep only their input for the backward pass and run twice: less
    memory, more time, the same losses. [all] takes every level."""

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run takes."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def dtype(self, *, on_gpu: bool) -> Literal["float32", "bfloat16"]:
        """In what the networks compute there."""
        if self.precision == "auto":
            return "bfloat16" if on_gpu else "float32"
        return self.precision

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"workers=[{self.min_workers}, {self.max_workers}] must be [least, most]; turn them round")
        return self


class CheckpointConfig(Config):
    """Where the run is kept."""

    uri: str = Field(min_length=1)
    """Folder of the run's checkpoints: local or s3://…."""
    every_images: int = Field(default=100_000, ge=1)
    """Images between two checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints of the current stage that are kept."""
    ema_snapshots_every_images: int | None = Field(default=None, ge=1)
    """Images between two snapshots of averages, which are kept for good: `mdm ema` makes an average of any length from
    them. None keeps none; 1/50 of the stage is plenty."""


class PreviewConfig(Config):
    """Pictures made at each checkpoint, by a task of its own while training goes on."""

    captions: tuple[str, ...] = ()
    """Their captions; none makes no pictures."""
    guidance_scale: float = Field(default=3.0, ge=0)
    """Guidance."""
    num_inference_steps: int = Field(default=16, ge=1)
    """Network calls."""
    cpus: int = Field(default=0, ge=0)
    """CPUs that the task asks of the cluster; with 0 it begins at once, and runs on one that others have."""
    gpus: int = Field(default=0, ge=0, le=1)
    """GPUs that it asks for; with 0 it computes on the CPU."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds after which a preview is given up."""


class PlanConfig(Config):
    """What a dry run reckons with."""

    deadline_h: float | None = Field(default=None, gt=0)
    """Hours in which the run has to end; the images a second that it takes are worked out."""
    card: str = Field(default="H100", min_length=1)
    """The GPU, as its data sheet calls it, that the hours are worked out for; not asked where workers have no GPU."""
    share_of_peak: float = Field(default=0.4, gt=0, le=1)
    """The part of the card's bfloat16 peak that the training step is taken to reach."""
    memory: bool = True
    """Whether the memory of a worker is worked out, which takes some ten seconds a stage."""


class TrainConfig(Config):
    """A training run: `mdm train`."""

    name: str = Field(min_length=1)
    """Name of the run."""
    seed: int = Field(default=0, ge=0)
    """What the order of the rows, noise and initial weights are drawn from."""
    data: DataConfig
    text: TextConfig = TextConfig()
    model: ModelConfig
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """The stages, in the order of training: each a larger resolution."""
    scaling: ScalingConfig = ScalingConfig()
    checkpoint: CheckpointConfig
    preview: PreviewConfig = PreviewConfig()
    tracking: TrackingConfig = TrackingConfig()
    log_every_steps: int = Field(default=20, ge=1)
    """Steps between two reports of the loss."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a step does whose gradients are not finite: end the run and name the rows, or leave the weights as they
    are and be counted."""
    dry_run: bool = False
    """Whether nothing is trained or written, and only what the run takes is worked out."""
    plan: PlanConfig = PlanConfig()

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.preview.captions and self.preview.num_inference_steps > self.model.num_timesteps:
            raise ValueError(
                f"preview.num_inference_steps={self.preview.num_inference_steps} must be at most "
                f"model.num_timesteps={self.model.num_timesteps}"
            )
        resolutions = list(self.model.resolutions)
        for index, stage in enumerate(self.stages):
            where = f"stages.{index}"
            if stage.resolution not in resolutions:
                raise ValueError(f"{where}.resolution={stage.resolution} has no network; there are {resolutions}")
            if (
                index
                and resolutions.index(stage.resolution) != resolutions.index(self.stages[index - 1].resolution) - 1
            ):
                raise ValueError(
                    f"{where}.resolution={stage.resolution} must be one network larger than the stage before, "
                    f"{self.stages[index - 1].resolution}; the networks are {resolutions}"
                )
            self._check_batch(where, stage.global_batch_size)
            self._check_mix(where, stage, num_resolutions=len(resolutions) - resolutions.index(stage.resolution))
            count = len(resolutions) - resolutions.index(stage.resolution)
            if stage.freeze_inner_images and count == 1:
                raise ValueError(
                    f"{where}.freeze_inner_images={stage.freeze_inner_images} must be 0: the {stage.resolution} px "
                    "network has none inside"
                )
            if stage.resolution_weights is not None and len(stage.resolution_weights) != count:
                raise ValueError(
                    f"{where}.resolution_weights={list(stage.resolution_weights)} has "
                    f"{len(stage.resolution_weights)} entries; the stage trains {count} resolutions"
                )
        self._check_levels()
        return self

    def _check_batch(self, where: str, batch: int) -> None:
        workers = self.scaling.max_workers
        if self.scaling.min_workers < workers:
            # Whatever number there is in between shares a batch as evenly as it can.
            if batch < workers:
                raise ValueError(
                    f"{where}.global_batch_size={batch} leaves some of scaling.workers={workers} without an image; "
                    f"try {workers} images or {batch} workers"
                )
        elif batch % workers:
            lower = batch - batch % workers
            raise ValueError(
                f"{where}.global_batch_size={batch} must be divisible by scaling.workers={workers}; "
                f"try {lower or workers} or {lower + workers}"
            )

    @staticmethod
    def _check_mix(where: str, stage: StageConfig, *, num_resolutions: int) -> None:
        mix = stage.resolution_mix
        if mix is None:
            return
        if len(mix) != num_resolutions or mix[-1] != 1 or list(mix) != sorted(mix) or mix[0] <= 0:
            raise ValueError(
                f"{where}.resolution_mix={list(mix)} must have {num_resolutions} shares above 0, finest first, none "
                "smaller than the one before it, and end in 1: the innermost network trains on every image"
            )
        if round(mix[0] * stage.global_batch_size) < 1:
            raise ValueError(
                f"{where}.resolution_mix={list(mix)} leaves {stage.resolution} px without an image in a batch of "
                f"{stage.global_batch_size}; use a larger share or batch"
            )

    def _check_levels(self) -> None:
        named = set(self.scaling.checkpoint_levels) - {"all"}
        if not named:
            return
        with torch.device("meta"):
            known = build_network(self.model.matryoshka(text_dim=self.model.text_dim or 1)).levels()
        if unknown := sorted(named - known.keys()):
            raise ValueError(
                f"scaling.checkpoint_levels names {unknown[0]!r}, which is no level of the networks; there are "
                f"{', '.join(known)}, or all"
            )

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: a checkpoint is only continued under the same values."""
        values = self.model_dump(mode="json")
        changeable = (
            "scaling", "checkpoint", "preview", "tracking", "log_every_steps", "on_nan", "dry_run", "plan",
        )  # fmt: skip
        for name in changeable:
            values.pop(name)
        # A preset and the same networks written out are one model; the width is that of the table's embeddings anyway.
        del values["model"]["preset"], values["model"]["text_dim"], values["data"]["prefetch_steps"]
        return values
