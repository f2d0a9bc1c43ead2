"""`mdm ema`: averages the weights of a finished or running training over any length, from its snapshots."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from jobs.cli import run_job
from pipelines.run_config import Config

if TYPE_CHECKING:
    from pipelines.train.ema_weights import EmaReport


class EmaConfig(Config):
    """Which average to make."""

    checkpoint: str = Field(min_length=1)
    """Folder of a run that was trained with checkpoint.ema_snapshots_every_images: local or s3://…."""
    length: float = Field(gt=0, lt=0.28)
    """Length of the average: standard deviation of its profile, as a share of the images so far."""
    out: str | None = Field(default=None, min_length=1)
    """Model file to write; ema-LENGTH.safetensors in this folder if empty. `mdm sample --checkpoint` takes it."""
    stage: int | None = Field(default=None, ge=0)
    """Stage, from 0; the last one with snapshots if empty."""
    images: int | None = Field(default=None, ge=1)
    """Images of the stage that the average ends at; those of its last snapshot if empty."""
    max_error: float = Field(default=0.1, gt=0)
    """Largest error of the profile that is accepted, as a share of its norm."""

    @model_validator(mode="after")
    def _check_out(self) -> Self:
        if self.out is not None and not self.out.endswith(".safetensors"):
            raise ValueError(f"out={self.out} must end in .safetensors, as that is what is written")
        return self


CONFIG = EmaConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_job("ema", argv, CONFIG, _run, show_config=False)


def _run(config: EmaConfig) -> "EmaReport":
    # Imported once the configuration is known to be right: torch takes a second.
    from pipelines import storage
    from pipelines.train.ema_weights import rebuild_ema

    return rebuild_ema(
        storage.absolute(config.checkpoint),
        length=config.length,
        out=storage.absolute(config.out or f"ema-{config.length:g}.safetensors"),
        stage=config.stage,
        images=config.images,
        max_error=config.max_error,
    )


if __name__ == "__main__":
    sys.exit(main())
