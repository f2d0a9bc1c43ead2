"""What a table holds, and how it came about: outcomes, reasons, hosts that fail, sizes, and each refresh's pace."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.table.sample_table import OUTCOMES, SampleTable, Shard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_READERS = 8
_NUM_HOSTS = 20
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
    sides = [np.empty(0, np.int64)]
    shards = table.shards(outcome=None)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for shard, rows in zip(
            shards, pool.map(lambda one: table.read(one, _COLUMNS[one.outcome]), shards), strict=True
        ):
            outcomes[shard.outcome] += shard.num_rows
            if shard.outcome == "ok":
                sides.append(_shorter_sides(rows))
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
        "sides_px": _side_counts(np.concatenate(sides)),
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
    """Returns the statistics as a picture of four charts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    charts = figure.subplots(2, 2)
    reasons = list(stats["reasons"].items())[:12][::-1]
    hosts = [(host["host"], host["failed"]) for host in stats["hosts"]][:12][::-1]
    for axes, title, bars in (
        (charts[0][0], "outcomes", [(name, stats[name]) for name in OUTCOMES][::-1]),
        (charts[0][1], "why rows have no picture", reasons),
        (charts[1][0], "hosts that fail most", hosts),
    ):
        axes.barh([name for name, _ in bars], [count for _, count in bars])
        axes.set_title(title)
        axes.set_xlabel("rows")
    axes = charts[1][1]
    axes.bar(list(stats["sides_px"]), list(stats["sides_px"].values()))
    axes.set_title("pictures by shorter side, from … pixels")
    figure.suptitle(f"{stats['rows']:,} rows at version {stats['table_version']}")
    return figure


def _section(title: str, rows: Any) -> list[str]:
    lines = []
    for name, value, *more in rows:
        shown = f"{value:>12,}" if isinstance(value, int) else f"{value:>12}"
        lines.append("  ".join([f"  {name:<24}{shown}", *map(str, more)]))
    return [title + ":", *lines] if lines else []


def _shorter_sides(rows: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    sides = pc.min_element_wise(rows["original_width"], rows["original_height"])
    return np.asarray(sides.drop_null().to_numpy(), np.int64)


def _side_counts(sides: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, int]:
    counts, _ = np.histogram(sides, bins=[*_SIDE_EDGES_PX, np.iinfo(np.int64).max])
    return {str(edge): int(count) for edge, count in zip(_SIDE_EDGES_PX, counts, strict=True) if count}


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
