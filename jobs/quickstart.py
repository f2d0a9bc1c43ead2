"""`mdm quickstart`: runs the whole pipeline on real captioned pictures, on this machine alone."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli import run_job
from pipelines.quickstart.config import QuickstartConfig

if TYPE_CHECKING:
    from pipelines.quickstart.pipeline import QuickstartReport

CONFIG = QuickstartConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_job("quickstart", argv, CONFIG, _run)


def _run(config: QuickstartConfig) -> "QuickstartReport":
    # Imported once the configuration is known to be right: Ray alone takes a second.
    from pipelines.quickstart.pipeline import quickstart

    return quickstart(config)


if __name__ == "__main__":
    sys.exit(main())
