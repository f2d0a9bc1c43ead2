"""`mdm stats`: shows what a table holds: outcomes, reasons, hosts that fail, sizes, and each refresh's pace."""

import io
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from jobs.cli import run_job
from pipelines.run_config import Config, PngUri


class StatsConfig(Config):
    """What to look at."""

    table: str = Field(min_length=1)
    """The sample table: a local folder or s3://…."""
    plot: PngUri | None = None
    """Where to draw a picture of it: a path or s3://…, as in stats.png."""


CONFIG = StatsConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `mdm stats TABLE` is short for `--table TABLE`."""
    return run_job("stats", argv, CONFIG, _run, positional="table", show_config=False)


def _run(config: StatsConfig) -> dict[str, Any]:
    # Imported once the configuration is known to be right: it loads Arrow and Delta.
    from pipelines import storage
    from pipelines.data.stats import stats_figure, stats_text, table_stats

    stats = table_stats(config.table)
    print(stats_text(stats))
    if config.plot is not None:
        drawn = io.BytesIO()
        stats_figure(stats).savefig(drawn, format="png")
        storage.write_bytes_atomic(storage.absolute(config.plot), drawn.getvalue())
    return stats


if __name__ == "__main__":
    sys.exit(main())
