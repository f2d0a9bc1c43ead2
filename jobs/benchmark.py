"""`mdm benchmark NAME`: measures speed and memory, against the same work done the straightforward way."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.cli import guarded, run_job, say
from mdm_core.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.benchmark.config import (
        DataBenchmarkConfig,
        ResumeBenchmarkConfig,
        SampleBenchmarkConfig,
        TrainBenchmarkConfig,
    )

BENCHMARKS = {
    "train": ("Time the training step of a network.", "TrainBenchmarkConfig"),
    "sample": ("Time the making of pictures from noise.", "SampleBenchmarkConfig"),
    "data": ("Time mdm refresh against img2dataset.", "DataBenchmarkConfig"),
    "resume": ("Time how soon a training goes on whose worker was killed.", "ResumeBenchmarkConfig"),
}
"""What can be measured: one line, and the class of its configuration."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; the first word picks the benchmark."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        say(_help())
        raise SystemExit(0)
    name = words[0] if words and not words[0].startswith("-") else ""
    if name not in BENCHMARKS:
        return guarded("mdm benchmark", lambda: _unknown(name), as_json="--json" in words)
    run: Any = {"data": _run_data, "resume": _run_resume}.get(name, _run_network)
    return run_job(f"benchmark {name}", words[1:], config_class(name), run, summary=BENCHMARKS[name][0])


def config_class(name: str) -> Any:
    """The class of a benchmark's configuration."""
    return getattr(importlib.import_module("pipelines.benchmark.config"), BENCHMARKS[name][1])


def _run_network(config: "TrainBenchmarkConfig | SampleBenchmarkConfig") -> dict[str, Any]:
    # Imported once the configuration is known to be right.
    from pipelines.benchmark.pipeline import benchmark
    from pipelines.benchmark.report import table

    result = benchmark(config)
    print(table(result))
    return result


def _run_data(config: "DataBenchmarkConfig") -> dict[str, Any]:
    from pipelines.benchmark.data.pipeline import benchmark_data
    from pipelines.benchmark.data.report import data_table

    result = benchmark_data(config)
    print(data_table(result))
    return result


def _run_resume(config: "ResumeBenchmarkConfig") -> dict[str, Any]:
    from pipelines.benchmark.resume.pipeline import benchmark_resume
    from pipelines.benchmark.resume.report import resume_table

    result = benchmark_resume(config)
    print(resume_table(result))
    return result


def _unknown(name: str) -> dict[str, Any]:
    near = difflib.get_close_matches(name, BENCHMARKS, n=1)
    fix = f"did you mean `mdm benchmark {near[0]}`?" if near else "as in `mdm benchmark train --preset mdm-64`"
    raise ConfigError(f"got {name!r}; wanted {' or '.join(BENCHMARKS)} as the first word; {fix}")


def _help() -> str:
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:<{width}}  {summary}" for name, (summary, _) in BENCHMARKS.items()]
    return "\n".join(["usage: mdm benchmark NAME [--config FILE] [--key VALUE …] [--json]", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
