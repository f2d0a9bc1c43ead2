"""What is measured: a network, and the work that is done with it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import ConfigError
from mdm_core.presets import PRESETS
from mdm_core.samplers import Solver
from pipelines.benchmark.shapes import shaped
from pipelines.run_config import Config, PngUri


class ShapeConfig(Config):
    """The network of a benchmark."""

    preset: Literal["mdm-64", "mdm-256", "mdm-1024"] = "mdm-64"
    """Published shape of the network; the number is its finest resolution."""
    channels: tuple[int, ...] | None = None
    """Channels of the innermost network, as in 64,128,192, to measure a smaller one; shells shrink in proportion."""
    resolution: int | None = Field(default=None, ge=4)
    """Finest resolution in pixels, to measure smaller pictures; the others shrink in proportion."""
    text_tokens: int = Field(default=128, ge=1)
    """Tokens of each caption."""
    text_dim: int | None = Field(default=None, ge=1)
    """Width of the text embeddings; 384 if channels are given, else the preset's."""
    text_proj_dim: int | None = Field(default=None, ge=1)
    """Width they are projected to; 4 × the first channels if channels are given, else the preset's."""

    def matryoshka(self) -> MatryoshkaConfig:
        """The networks, finest resolution first."""
        return shaped(
            PRESETS[self.preset].config,
            channels=self.channels,
            resolution=self.resolution,
            text_dim=self.text_dim,
            text_proj_dim=self.text_proj_dim,
        )

    @field_validator("channels", mode="before")
    @classmethod
    def _split_channels(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(",")
        return tuple(int(part) for part in parts) if all(part.strip().isdecimal() for part in parts) else value

    @model_validator(mode="after")
    def _check_networks(self) -> Self:
        try:
            self.matryoshka()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class NetworkBenchmarkConfig(ShapeConfig):
    """The network of a benchmark, and the machine that it runs on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto is the GPU where there is one."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of PyTorch on the CPU; its own choice if empty."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; bfloat16 is autocast, with weights and optimizer in float32."""
    compile: bool = False
    """Whether torch.compile is used; for the baseline it never is."""
    channels_last: bool = True
    """Whether pictures lie in memory channels last; for the baseline they never do."""
    against: Literal["none", "plain"] = "none"
    """What is measured beside it, in turn: plain is the same network and step written the straightforward way."""
    warmup_steps: int = Field(default=2, ge=0)
    """Steps ahead of the timed ones."""
    plan: bool = False
    """Whether only parameters, FLOPs and memory are worked out, and nothing is run."""


class TrainBenchmarkConfig(NetworkBenchmarkConfig):
    """Time the training step: forward, loss, backward, clipping, AdamW and the average of the weights."""

    batch: int = Field(default=4, ge=1)
    """Pictures of a step; they stay in memory."""
    steps: int = Field(default=5, ge=1)
    """Timed steps."""
    checkpoint: tuple[str, ...] = ()
    """Levels that keep only their input for the backward pass and run twice, as in 64.up.0,64.down.0; all, or none."""
    with_data: bool = False
    """Whether pictures read from a table are trained on as well, to see what that costs: ingest_ratio."""
    data_threads: int | None = Field(default=None, ge=1)
    """Threads that decode them; as many as there are CPUs if empty."""

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _split_levels(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return () if value == "none" else tuple(part.strip() for part in value.split(","))

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.with_data and self.plan:
            raise ValueError("plan runs nothing, so with_data has nothing to measure; leave one of them out")
        return self

    def checkpointed(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The levels meant, of those that the network has.

        Raises:
            ConfigError: If it has no such level.
        """
        if self.checkpoint == ("all",):
            return names
        for name in self.checkpoint:
            if name not in names:
                raise ConfigError(f"--checkpoint: got {name}; wanted all, none, or some of {', '.join(names)}")
        return self.checkpoint


class SampleBenchmarkConfig(NetworkBenchmarkConfig):
    """Time the making of pictures from noise."""

    batch: int = Field(default=1, ge=1)
    """Pictures made at once."""
    steps: int = Field(default=3, ge=1)
    """Timed batches, each from noise to pictures."""
    solver: Solver = "dpmpp_2m"
    """The sampler."""
    num_inference_steps: int = Field(default=32, ge=1, le=1000)
    """Its steps; how often it calls the network is counted."""
    guidance_scale: float = Field(default=3.0, ge=0)
    """How much the captions count; 1 is no guidance, which halves the rows that the network sees."""
    warmup_steps: int = Field(default=1, ge=0)
    """Batches ahead of the timed ones."""


class ResumeBenchmarkConfig(ShapeConfig):
    """Time from kill -9 of a training worker to the next completed step, on CPUs, and count what that does to rows."""

    channels: tuple[int, ...] | None = (32, 64)
    """Channels of the innermost network, as in 64,128,192; null takes the preset's."""
    resolution: int | None = Field(default=16, ge=4)
    """Finest resolution in pixels; null takes the preset's."""
    batch: int = Field(default=4, ge=1)
    """Pictures of a step, over all workers."""
    steps: int = Field(default=24, ge=2)
    """Steps of the training; the table has a picture for each place in them, so that all are one epoch."""
    checkpoint_every_steps: int = Field(default=5, ge=1)
    """Steps between two checkpoints."""
    kill_after_steps: int = Field(default=12, ge=1)
    """Completed steps after which the worker is killed."""
    workers: int = Field(default=1, ge=1)
    """Processes that share each batch, one CPU each; the first of them is killed."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.kill_after_steps >= self.steps:
            raise ValueError(
                f"kill_after_steps={self.kill_after_steps} must be less than steps={self.steps}: the step after it is "
                f"waited for; try {self.steps // 2}"
            )
        if self.batch % self.workers:
            lower = self.batch - self.batch % self.workers
            raise ValueError(
                f"batch={self.batch} must be divisible by workers={self.workers}; "
                f"try {lower or self.workers} or {lower + self.workers}"
            )
        return self


class DataBenchmarkConfig(Config):
    """Time `mdm refresh` against img2dataset, and where img2dataset has nothing to set against it."""

    parts: tuple[Literal["px256", "px64", "bad_links", "noop_refresh", "memory"], ...] = Field(
        default=("px256", "px64", "bad_links", "noop_refresh"), min_length=1
    )
    """What is measured, as in px256,noop_refresh: photos to 256 or 64 pixels, a list with bad links, a refresh that
    finds nothing new, memory for longer and longer lists."""
    against: Literal["img2dataset", "none"] = "img2dataset"
    """What is measured beside it, in turn, at photos and bad links."""
    cores: int = Field(default=1, ge=1)
    """Cores of each contender; the server and the measuring have the others. Parts without a peer use all of them."""
    images: int = Field(default=2000, ge=1)
    """Photos of a run."""
    rounds: int = Field(default=3, ge=1)
    """Runs of each contender, in turn; the medians count."""
    warmup_images: int = Field(default=32, ge=0)
    """Photos of one run of each ahead of the timed ones, so that all programs are read from the disk."""
    sample: int = Field(default=200, ge=1)
    """Photos whose quality is looked at, and whose processor time is taken step by step."""
    connections: int = Field(default=256, ge=1)
    """Links fetched at once."""
    img2dataset_threads: int = Field(default=256, ge=1)
    """Threads that img2dataset fetches with; 256 is its own choice."""
    bad_links: int = Field(default=1000, ge=5)
    """Links of the list with bad ones; one in five is."""
    deadline_s: float = Field(default=10.0, gt=0)
    """Seconds for one link of that list."""
    cap_s: float = Field(default=60.0, gt=0)
    """Seconds after which img2dataset is stopped at that list."""
    rows: int = Field(default=1_000_000, ge=1)
    """Rows of the table in which a refresh finds nothing new."""
    memory_links: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(2000, 20_000, 200_000), min_length=1)
    """Lengths of the lists whose memory is measured."""
    plot: PngUri | None = None
    """A PNG file for the memory of those."""
    folder: str | None = None
    """Where photos, lists and tables lie, to be used again; a temporary folder if empty."""

    @field_validator("parts", mode="before")
    @classmethod
    def _split_parts(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("parts")
    @classmethod
    def _check_parts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{','.join(value)} names a part twice; once is enough")
        return value

    @model_validator(mode="after")
    def _check_plot(self) -> Self:
        if self.plot is not None and "memory" not in self.parts:
            raise ValueError("plot shows the part `memory`, which is not among the parts; add it")
        return self
