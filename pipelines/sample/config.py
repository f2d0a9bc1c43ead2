"""The configuration of making pictures."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipelines.run_config import Config


class SampleConfig(Config):
    """Make pictures from captions."""

    checkpoint: str = Field(min_length=1)
    """A checkpoint's folder, or a run's, of which the newest is taken: local or s3://…."""
    captions: tuple[str, ...] = ()
    """What the pictures show."""
    captions_file: str = ""
    """A text file with a caption a line, made after those of `captions`: local or s3://…."""
    pictures_per_caption: int = Field(default=1, ge=1, le=64)
    """Pictures of each caption, each from other noise."""
    out: str = Field(default="out/sample", min_length=1)
    """Folder for the grids, one a resolution: local or s3://…."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, or those of the last step."""
    seed: int = Field(default=0, ge=0)
    """What the noise is drawn from: the same seed makes the same pictures."""
    guidance_scale: float = Field(default=3.0, ge=0)
    """How much the captions count; 1 is no guidance."""
    num_inference_steps: int = Field(default=32, ge=1)
    """Network calls a picture."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures made at once."""
    device: str = "auto"
    """A torch device; auto is the GPU where there is one."""

    @model_validator(mode="after")
    def _check_captions(self) -> Self:
        if not self.captions and not self.captions_file:
            raise ValueError("no captions: give captions, or a captions_file with one a line")
        return self
