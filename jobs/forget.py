"""`mdm forget`: takes links out of a table for good, as after a takedown notice."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli import run_job
from pipelines.data.config import ForgetConfig

if TYPE_CHECKING:
    from pipelines.data.forget import ForgetReport

CONFIG = ForgetConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_job("forget", argv, CONFIG, _run, show_config=False)


def _run(config: ForgetConfig) -> "ForgetReport":
    from pipelines.data.forget import forget

    return forget(config)


if __name__ == "__main__":
    sys.exit(main())
