"""The configuration of an evaluation."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.run_config import Config
from pipelines.tracking import TrackingConfig


class EvaluateConfig(Config):
    """Make pictures for a fixed set of prompts and measure how far they are from the real ones."""

    checkpoint: str = Field(min_length=1)
    """A checkpoint's folder, or a run's, of which the newest is taken: local or s3://…."""
    out: str = Field(default="out/evaluate", min_length=1)
    """Folder for the report and the grids: local or s3://…."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, or those of the last step."""
    table: str = ""
    """The table to compare with; the one that was trained on if empty."""
    version: int | None = Field(default=None, ge=0)
    """Version of the table; the one that was trained on if empty, or the latest of another table."""
    where: str | None = Field(default=None, min_length=1)
    """SQL condition for the rows that count, prompts and others, as `data.where` of a training: true takes all. If
    empty, that of the training where it is the same table, in whatever version, else all rows."""
    num_samples: int = Field(default=256, ge=2)
    """Pictures to make: so many captions of the table are the prompts."""
    num_reference: int = Field(default=50_000, ge=2)
    """Real pictures to compare with, at most; those of the prompts are not among them."""
    seed: int = Field(default=0, ge=0)
    """What the prompts, the noise and the subsets of KID are drawn from."""
    guidance_scale: float = Field(default=3.0, ge=0)
    """How much the captions count; 1 is no guidance."""
    num_inference_steps: int = Field(default=32, ge=1)
    """Network calls a picture."""
    feature_network: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    """Network whose features are compared; it names the metric."""
    grid_pictures: int = Field(default=64, ge=1)
    """Pictures shown in a grid."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures that a worker makes at once."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes; any number makes the same pictures; auto: one a GPU if gpus_per_worker is 1, else one a CPU."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """GPUs of each process: 0 works on the CPU."""
    tracking: TrackingConfig = TrackingConfig()
