"""`mdm sample`: makes pictures from captions."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli import run_job
from pipelines.sample.config import SampleConfig

if TYPE_CHECKING:
    from pipelines.sample.pipeline import SampleReport

CONFIG = SampleConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `mdm sample CAPTION …` is short for `--captions [CAPTION, …]`."""
    return run_job("sample", argv, CONFIG, _run, positional="captions")


def _run(config: SampleConfig) -> "SampleReport":
    # Imported once the configuration is known to be right: Ray alone takes a second.
    from pipelines.sample.pipeline import sample

    return sample(config)


if __name__ == "__main__":
    sys.exit(main())
