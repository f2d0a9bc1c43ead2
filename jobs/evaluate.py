"""`mdm evaluate`: scores a checkpoint against the pictures of a table."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli import run_job
from pipelines.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from pipelines.evaluate.report import EvaluateReport

CONFIG = EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_job("evaluate", argv, CONFIG, _run)


def _run(config: EvaluateConfig) -> "EvaluateReport":
    # Imported once the configuration is known to be right: Ray alone takes a second.
    from pipelines.evaluate.pipeline import evaluate

    return evaluate(config)


if __name__ == "__main__":
    sys.exit(main())
