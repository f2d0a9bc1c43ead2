"""`mdm embed`: encodes the captions of a table, beside its pictures."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli import run_job
from pipelines.embed.config import EmbedConfig

if TYPE_CHECKING:
    from pipelines.embed.pipeline import EmbedReport

CONFIG = EmbedConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_job("embed", argv, CONFIG, _run)


def _run(config: EmbedConfig) -> "EmbedReport":
    # Imported once the configuration is known to be right: Ray alone takes a second.
    from pipelines.embed.pipeline import embed

    return embed(config)


if __name__ == "__main__":
    sys.exit(main())
