"""`mdm benchmark NAME`: measures speed and memory, against the same work done the straightforward way."""

import contextlib
import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from jobs.cli import guarded, say
from mdm_core.errors import ConfigError

BENCHMARKS = {
    "train": ("Time the training step of a network.", "pipelines.benchmark.config:TrainBenchmarkConfig"),
    "sample": ("Time the making of pictures from noise.", "pipelines.benchmark.config:SampleBenchmarkConfig"),
}
"""What can be measured: one line, and the class of its configuration."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; the first word picks the benchmark."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        say(_help())
        raise SystemExit(0)
    name = words[0] if words and not words[0].startswith("-") else ""
    return guarded(f"mdm benchmark {name}".rstrip(), lambda: _run(name, words[1:]), as_json="--json" in words)


def _run(name: str, words: list[str]) -> dict[str, Any]:
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        fix = f"did you mean `mdm benchmark {near[0]}`?" if near else "as in `mdm benchmark train --preset mdm-64`"
        raise ConfigError(f"got {name!r}; wanted {' or '.join(BENCHMARKS)} as the first word; {fix}")
    from pipelines.run_config import load_config

    summary, where = BENCHMARKS[name]
    module, _, class_name = where.partition(":")
    config_class = getattr(importlib.import_module(module), class_name)
    flags = [word for word in words if word != "--json"]
    config = load_config(config_class, flags, prog=f"mdm benchmark {name}", description=summary)
    # Imported once the configuration is known to be right.
    from pipelines.benchmark.pipeline import benchmark
    from pipelines.benchmark.report import table

    with contextlib.redirect_stdout(sys.stderr):
        result = benchmark(config)
        print(table(result))
    return dict(json.loads(json.dumps(result)))


def _help() -> str:
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:<{width}}  {summary}" for name, (summary, _) in BENCHMARKS.items()]
    return "\n".join(["usage: mdm benchmark NAME [--config FILE] [--key VALUE …] [--json]", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
