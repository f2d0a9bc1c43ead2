"""`mdm train`: trains a Matryoshka Diffusion Model, stage by stage."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli import run_job
from pipelines.train.config import TrainConfig

if TYPE_CHECKING:
    from pipelines.train.pipeline import TrainReport
    from pipelines.train.plan import TrainPlan

CONFIG = TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_job("train", argv, CONFIG, _run)


def _run(config: TrainConfig) -> "TrainReport | TrainPlan":
    # Imported once the configuration is known to be right: Ray alone takes a second.
    if config.dry_run:
        from pipelines.train.plan import plan_training
        from pipelines.train.plan_text import plan_text

        plan = plan_training(config)
        print(plan_text(plan))
        return plan
    from pipelines.train.pipeline import train

    return train(config)


if __name__ == "__main__":
    sys.exit(main())
