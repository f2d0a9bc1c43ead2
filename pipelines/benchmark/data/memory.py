"""Memory of a refresh, for lists ten and a hundred times as long."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdm_core.errors import WorkError
from pipelines.benchmark.data.contenders import Cores, refresh_config, run_native, write_links
from pipelines.benchmark.data.server import PhotoServer


def measure_memory(folder: Path, server: PhotoServer, counts: Sequence[int], cores: Cores) -> dict[str, Any]:
    """The memory of whole refreshes of so many tiny pictures, most of it and over time, on all cores.

    Raises:
        WorkError: A picture did not arrive.
    """
    runs: list[dict[str, Any]] = []
    for count in counts:
        links = write_links(folder, f"memory-{count}", [server.url("tiny", number) for number in range(count)])
        table = folder / f"memory-{count}-table"
        shutil.rmtree(table, ignore_errors=True)
        run = run_native(
            refresh_config(links.tsv, table, filters={"min_side_px": 0}), folder / "memory", cores, pinned=False
        )
        shutil.rmtree(table)
        if run.report["ok"] != count:
            raise WorkError(f"of {count:,} pictures the refresh says: {run.report}")
        runs.append(
            {
                "links": count,
                "peak_bytes": run.watched.peak_bytes,
                "seconds": run.watched.seconds,
                "cpu_s": run.watched.cpu_s,
                "over_time": _thinned(run.watched.memory),
            }
        )
    return {"runs": runs, "growth": runs[-1]["peak_bytes"] / runs[0]["peak_bytes"]}


def plot_memory(record: Mapping[str, Any], path: Path) -> None:
    """Draws memory over the course of each refresh, and the most of each, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    course, peaks = figure.subplots(1, 2, sharey=True)
    for run in record["runs"]:
        whole_s = run["seconds"]
        course.plot(
            [at_s / whole_s for at_s, _ in run["over_time"]],
            [size / 1e9 for _, size in run["over_time"]],
            label=f"{run['links']:,} links, {whole_s:.0f} s",
        )
    course.set(xlabel="part of the time of the refresh", ylabel="memory of all processes, GB", xlim=(0, 1))
    course.legend()
    counts = [run["links"] for run in record["runs"]]
    peaks.plot(counts, [run["peak_bytes"] / 1e9 for run in record["runs"]], marker="o")
    peaks.set(xscale="log", xlabel="links", title="most memory", ylim=(0, None))
    peaks.set_xticks(counts, [f"{count:,}" for count in counts])
    peaks.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _thinned(points: Sequence[tuple[float, int]], most: int = 200) -> list[list[float]]:
    """Every so manieth point, so that the result stays readable."""
    step = max(1, len(points) // most)
    return [[round(at_s, 2), size] for at_s, size in points[::step]]
