"""`mdm stats`: shows what a table holds: outcomes, reasons, sizes."""

import sys
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from jobs.cli import run_job
from pipelines.run_config import Config


class StatsConfig(Config):
    """What to look at."""

    table: str = Field(min_length=1)
    """The sample table: a local folder or s3://…."""


CONFIG = StatsConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `mdm stats TABLE` is short for `--table TABLE`."""
    return run_job("stats", argv, CONFIG, _run, positional="table", show_config=False)


def _run(config: StatsConfig) -> dict[str, Any]:
    # Imported once the configuration is known to be right: it loads Arrow and Delta.
    from pipelines.data.table import table_stats

    return table_stats(config.table)


if __name__ == "__main__":
    sys.exit(main())
