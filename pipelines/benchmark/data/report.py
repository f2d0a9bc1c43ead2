"""What was measured of the data side, as tables to read."""

from collections.abc import Mapping
from typing import Any

from pipelines.benchmark.data.steps import STEPS
from pipelines.benchmark.report import aligned, format_bytes


def data_table(result: Mapping[str, Any]) -> str:
    """The result as aligned text, one table a part."""
    shown = {
        "px256": _pictures,
        "px64": _pictures,
        "bad_links": _bad_links,
        "noop_refresh": _noop,
        "memory": _memory,
    }
    return "\n\n".join("\n".join(shown[part](record)) for part, record in result.items())


def _pictures(record: Mapping[str, Any]) -> list[str]:
    contenders = {label: record[label] for label in ("native", "img2dataset") if label in record}

    def row(title: str, show: Any) -> list[str]:
        return [title, *(show(one) for one in contenders.values())]

    rows = [
        ["", *contenders],
        row("images/s with start-up", lambda r: f"{r['images_per_s_with_startup']:.1f}"),
        row("images/s without", lambda r: f"{r['images_per_s']:.1f}"),
        row("s before the first request", lambda r: f"{r['before_first_request_s']:.1f}"),
        row("s after the last file", lambda r: f"{r['after_last_file_s']:.1f}"),
        row("processor ms an image, in all", lambda r: f"{1000 * r['cpu_s_per_image']:.2f}"),
        *(row(f"… {step}", lambda r, step=step: f"{1000 * r['cpu_s_by_step'][step]:.2f}") for step in STEPS),
        row("PSNR, dB", lambda r: "lossless" if r["psnr_db"] is None else f"{r['psnr_db']:.2f}"),
        row("peak memory", lambda r: format_bytes(r["peak_bytes"])),
    ]
    lines = [f"{record['images']:,} photos to {record['image_px']} px, median of {len(_first(contenders)['rounds'])}"]
    lines += aligned(rows)
    if "ratio" in record:
        lines.append(f"{record['ratio']:.2f} × the images a second, {record['ratio_with_startup']:.2f} × with start-up")
    return lines


def _bad_links(record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{record['links']:,} links, {record['bad']:,} of them bad, {record['connections']} at once: fetched in "
        f"{record['fetch_s']:.1f} s, {record['seconds_over_deadline']:.2f} × the deadline"
    ]
    if "img2dataset" in record:
        other = record["img2dataset"]
        how = "finished" if other["finished"] else f"not finished after {other['cap_s']:.0f} s"
        lines.append(f"  img2dataset: {how}, fetching took {other['seconds_over_deadline']:.2f} × the deadline")
    return lines


def _noop(record: Mapping[str, Any]) -> list[str]:
    return [
        f"nothing new in {record['rows']:,} rows in {record['files']:,} files: {record['seconds']:.1f} s, "
        f"{format_bytes(record['peak_bytes'])}"
    ]


def _memory(record: Mapping[str, Any]) -> list[str]:
    rows = [["links", "peak memory", "seconds"]]
    for run in record["runs"]:
        rows.append([f"{run['links']:,}", format_bytes(run["peak_bytes"]), f"{run['seconds']:.1f}"])
    return ["memory of all processes", *aligned(rows)]


def _first(contenders: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(iter(contenders.values()))
