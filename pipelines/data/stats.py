"""What a table holds, and how it came about: outcomes, reasons, hosts that fail, sizes, and each refresh's pace."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.table.sample_table import OUTCOMES, SampleTable, Shard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_HOSTS = 20
_NUM_REFRESHES_DRAWN = 30
_SIDE_EDGES_PX = (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096)
_COLUMNS = {
    "ok": ["original_width", "original_height"],
    "filtered": ["reason"],
    "failed": ["reason", "url"],
}


def table_stats(uri: str) -> dict[str, Any]:
    """Returns what the table at `uri` holds, as plain values.

    `hosts` are those with the most failures, `sides_px` counts pictures by their shorter side before resizing,
    `refreshes` has the versions that each refresh made, its links, its seconds and its pace.

    Raises:
        ConfigError: There is no such table.
    """
    table = SampleTable.open(uri)
    outcomes = dict.fromkeys(OUTCOMES, 0)
    reasons: Counter[str] = Counter()
    hosts: dict[str, Counter[str]] = {}
    sides: Counter[int] = Counter()
    shards = table.shards(outcome=None)
    for shard, rows in table.read_each(shards, _COLUMNS):
        outcomes[shard.outcome] += shard.num_rows
        if shard.outcome == "ok":
            _count_sides(sides, rows)
            continue
        reasons.update(rows["reason"].to_pylist())
        if shard.outcome == "failed":
            _count_hosts(hosts, rows)
    return {
        "uri": table.uri,
        "table_version": table.version,
        "rows": sum(outcomes.values()),
        **outcomes,
        "reasons": dict(reasons.most_common()),
        "hosts": _worst(hosts),
        "sides_px": {str(edge): sides[edge] for edge in _SIDE_EDGES_PX if sides[edge]},
        "size_bytes": sum(shard.size_bytes for shard in shards),
        "ok_bytes": _bytes_of(shards, "ok"),
        "refreshes": refreshes(table),
    }


def refreshes(table: SampleTable) -> list[dict[str, Any]]:
    """Returns one record for each refresh that changed the table, oldest first."""
    records: dict[str, dict[str, Any]] = {}
    for note in table.notes():
        if note.get("operation") != "refresh":
            continue
        record = records.setdefault(
            note["run"],
            {"source": note["source"], "started_s": note["started_s"], "commits": 0, **dict.fromkeys(OUTCOMES, 0)},
        )
        record["commits"] += 1
        record["table_version"] = note["version"]
        record["seconds"] = round(note["timestamp_s"] - note["started_s"], 3)
        for outcome in OUTCOMES:
            record[outcome] += note["outcomes"].get(outcome, 0)
        record["links_per_s"] = round(sum(record[name] for name in OUTCOMES) / max(record["seconds"], 1e-3), 2)
    return list(records.values())


def stats_text(stats: Mapping[str, Any]) -> str:
    """Returns the statistics as tables to read."""
    total = max(1, stats["rows"])
    size = f"{stats['rows']:,} rows, {stats['size_bytes'] / 1e6:,.1f} MB"
    lines = [f"{stats['uri']} at version {stats['table_version']}: {size}"]
    lines += [f"  {name:<24}{stats[name]:>12,}{stats[name] / total:>8.1%}" for name in OUTCOMES]
    lines += _section("reasons", stats["reasons"].items())
    lines += _section(
        "hosts that fail most", ((host["host"], f"{host['failed']:,}", host["mostly"]) for host in stats["hosts"])
    )
    lines += _section("shorter side in pixels, from", stats["sides_px"].items())
    lines += _section(
        "refreshes (version, source, links, links/s)",
        (
            (
                str(each["table_version"]),
                each["source"],
                sum(each[name] for name in OUTCOMES),
                each["links_per_s"],
            )
            for each in stats["refreshes"]
        ),
    )
    return "\n".join(lines)


def stats_figure(stats: Mapping[str, Any]) -> "Figure":
    """Returns the statistics as a picture of five charts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 10), layout="constrained")
    charts = figure.subplot_mosaic([["outcomes", "reasons"], ["hosts", "sides"], ["pace", "pace"]])
    reasons = list(stats["reasons"].items())[:12][::-1]
    hosts = [(host["host"], host["failed"]) for host in stats["hosts"]][:12][::-1]
    for name, title, bars in (
        ("outcomes", "outcomes", [(name, stats[name]) for name in OUTCOMES][::-1]),
        ("reasons", "why rows have no picture", reasons),
        ("hosts", "hosts that fail most", hosts),
    ):
        axes = charts[name]
        axes.barh([label for label, _ in bars], [count for _, count in bars])
        axes.set_title(title)
        axes.set_xlabel("rows")
    axes = charts["sides"]
    axes.bar(list(stats["sides_px"]), list(stats["sides_px"].values()))
    axes.set_title("pictures by shorter side, from … pixels")
    last = stats["refreshes"][-_NUM_REFRESHES_DRAWN:]
    axes = charts["pace"]
    axes.bar([str(each["table_version"]) for each in last], [each["links_per_s"] for each in last])
    axes.set_title("links a second of each refresh, by the version that it made")
    figure.suptitle(f"{stats['rows']:,} rows at version {stats['table_version']}")
    return figure


def _section(title: str, rows: Any) -> list[str]:
    lines = []
    for name, value, *more in rows:
        shown = f"{value:>12,}" if isinstance(value, int) else f"{value:>12}"
        lines.append("  ".join([f"  {name:<24}{shown}", *map(str, more)]))
    return [title + ":", *lines] if lines else []


def _count_sides(counts: Counter[int], rows: pa.Table) -> None:
    sides = pc.min_element_wise(rows["original_width"], rows["original_height"]).drop_null().to_numpy()
    found, _ = np.histogram(sides, bins=[*_SIDE_EDGES_PX, np.iinfo(np.int64).max])
    counts.update(dict(zip(_SIDE_EDGES_PX, found.tolist(), strict=True)))


def _count_hosts(hosts: dict[str, Counter[str]], rows: pa.Table) -> None:
    for url, reason in zip(rows["url"].to_pylist(), rows["reason"].to_pylist(), strict=True):
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            host = ""
        hosts.setdefault(host, Counter())[reason] += 1


def _worst(hosts: Mapping[str, Counter[str]]) -> list[dict[str, Any]]:
    worst = sorted(hosts.items(), key=lambda item: (-item[1].total(), item[0]))[:_NUM_HOSTS]
    return [{"host": host, "failed": why.total(), "mostly": why.most_common(1)[0][0]} for host, why in worst]


def _bytes_of(shards: Sequence[Shard], outcome: str) -> int:
    return sum(shard.size_bytes for shard in shards if shard.outcome == outcome)
