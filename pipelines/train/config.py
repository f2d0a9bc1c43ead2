"""The configuration of a training run."""

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import ConfigError
from mdm_core.loss import LossWeighting
from mdm_core.nested_unet import build_network
from mdm_core.noise_schedule import NoiseSchedule, ScheduleKind, Shift
from mdm_core.parameterization import PredictionType
from pipelines.run_config import Config
from pipelines.tracking import TrackingConfig


class DataConfig(Config):
    """What is trained on."""

    table: str = Field(min_length=1)
    """The sample table: a local folder or s3://…."""
    version: int | Literal["latest"] = "latest"
    """Version of the table; the number that `latest` stood for is kept in each checkpoint."""
    flip: bool = False
    """Whether half of the pictures are mirrored; wrong where captions name sides or letters are shown."""
    shuffle_shards: int = Field(default=16, ge=1)
    """Shards whose rows are mixed with each other; their decoded pictures are held in memory."""


class TextConfig(Config):
    """How captions are given to the network."""

    encoder: str = "minilm"
    """Encoder whose embeddings `mdm embed` made: minilm, open_clip:MODEL or t5:NAME."""
    max_tokens: int = Field(default=32, ge=1, le=512)
    """Tokens of a caption that are kept."""
    drop_prob: float = Field(default=0.1, ge=0, lt=1)
    """Share of captions left out in training, so that guidance has something to guide away from."""


class NetworkConfig(Config):
    """One UNet of the nested network; see `mdm_core.config.UNetConfig`."""

    resolution: int = Field(ge=4)
    """Side of the pictures, in pixels."""
    channels: tuple[int, ...]
    """Channels at each level, finest first."""
    num_resnets: tuple[int, ...]
    """Residual blocks at each level."""
    num_attention_layers: tuple[int, ...]
    """Attention layers after each residual block of a level."""
    time_dim: int | None = None
    """Width of the time embedding; 4 × the first level's channels if empty."""
    text_proj_dim: int | None = None
    """Width to which the innermost network projects the text."""
    mid_blocks: bool = True
    """Whether the lowest level has two more residual blocks around an attention layer."""
    attention_ffn: bool = True
    """Whether a feed-forward follows each attention layer."""
    num_heads: int = Field(default=8, ge=1)
    """Attention heads."""
    num_groups: int = Field(default=32, ge=1)
    """Groups of each GroupNorm."""


class ModelConfig(Config):
    """The nested network and its diffusion process."""

    networks: tuple[NetworkConfig, ...] = Field(min_length=1)
    """The UNets, finest resolution first; each is nested around the next."""
    prediction_type: PredictionType = "v"
    """What the networks answer: the velocity, the noise or the clean picture."""
    schedule: ScheduleKind = "squared_cosine"
    """How the noise grows with the level; `NoiseSchedule` says where each comes from."""
    num_timesteps: int = Field(default=1000, ge=1)
    """Noise levels."""
    shift_power: float = Field(default=1.0, ge=0)
    """The signal-to-noise ratio of a resolution is divided by (side ÷ innermost side) to this power."""
    shift: Shift = "snr"
    """How: snr gives a finer resolution more noise, signal divides its pictures."""

    def schedule_arguments(self) -> dict[str, Any]:
        """Arguments of the `NoiseSchedule`."""
        return {
            "kind": self.schedule,
            "num_timesteps": self.num_timesteps,
            "shift_power": self.shift_power,
            "shift": self.shift,
        }

    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of every resolution."""
        return NoiseSchedule(**self.schedule_arguments())

    def matryoshka(self, text_dim: int) -> MatryoshkaConfig:
        """The networks, the innermost reading text embeddings `text_dim` wide."""
        last = len(self.networks) - 1
        return MatryoshkaConfig(
            tuple(
                UNetConfig(**network.model_dump(), text_dim=text_dim if index == last else None)
                for index, network in enumerate(self.networks)
            )
        )

    @model_validator(mode="after")
    def _check_networks(self) -> Self:
        try:
            self.matryoshka(text_dim=1)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


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
    ema_length: float = Field(default=0.1, gt=0, lt=0.28)
    """Length of the average of the weights, as a share of the stage."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        return -(-self.images // self.global_batch_size)


class ScalingConfig(Config):
    """On what the network is trained."""

    workers: int = Field(default=1, ge=1)
    """Processes that share each batch."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPUs of each."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """GPUs of each: 0 trains on the CPU."""
    max_failures: int = Field(default=3, ge=0)
    """Times that lost workers are replaced before the run fails."""
    checkpoint_levels: tuple[str, ...] = ()
    """Levels of the networks, as in 64.down.0, that keep only their input for the backward pass and run twice: less
    memory, more time, the same losses. [all] takes every level."""


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
    """Pictures made at each checkpoint while training goes on."""

    captions: tuple[str, ...] = ()
    """Their captions; none makes no pictures."""
    guidance_scale: float = Field(default=3.0, ge=0)
    """Guidance."""
    num_inference_steps: int = Field(default=16, ge=1)
    """Network calls."""


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

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.preview.captions and self.preview.num_inference_steps > self.model.num_timesteps:
            raise ValueError(
                f"preview.num_inference_steps={self.preview.num_inference_steps} must be at most "
                f"model.num_timesteps={self.model.num_timesteps}"
            )
        resolutions = [network.resolution for network in self.model.networks]
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
            if stage.global_batch_size % self.scaling.workers:
                lower = stage.global_batch_size - stage.global_batch_size % self.scaling.workers
                raise ValueError(
                    f"{where}.global_batch_size={stage.global_batch_size} must be divisible by "
                    f"scaling.workers={self.scaling.workers}; try {lower or self.scaling.workers} or "
                    f"{lower + self.scaling.workers}"
                )
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

    def _check_levels(self) -> None:
        named = set(self.scaling.checkpoint_levels) - {"all"}
        if not named:
            return
        with torch.device("meta"):
            known = build_network(self.model.matryoshka(text_dim=1)).levels()
        if unknown := sorted(named - known.keys()):
            raise ValueError(
                f"scaling.checkpoint_levels names {unknown[0]!r}, which is no level of the networks; there are "
                f"{', '.join(known)}, or all"
            )

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: a checkpoint is only continued under the same values."""
        values = self.model_dump(mode="json")
        for changeable in ("scaling", "checkpoint", "preview", "tracking", "log_every_steps"):
            values.pop(changeable)
        return values
