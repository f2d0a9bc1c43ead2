"""`mdm refresh`: brings a table of pictures up to date with a list of links."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli import run_job
from pipelines.data.config import RefreshConfig

if TYPE_CHECKING:
    from pipelines.data.refresh import RefreshReport

CONFIG = RefreshConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `--prune` is short for `--run.prune`."""
    words = ["--run.prune" if word == "--prune" else word for word in (sys.argv[1:] if argv is None else argv)]
    return run_job("refresh", words, CONFIG, _run)


def _run(config: RefreshConfig) -> "RefreshReport":
    # Imported once the configuration is known to be right: Ray alone takes a second.
    from pipelines.data.refresh import refresh

    return refresh(config)


if __name__ == "__main__":
    sys.exit(main())
