"""What was measured: one record a contender, the ratios of two, and both as a table to read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def measured_record(
    steps: Sequence[Mapping[str, Any]],
    *,
    batch: int,
    flops_per_row: int,
    memory: Mapping[str, int],
    kernels: Sequence[str],
    known_peak: float | None,
    measured_peak: float | None,
) -> dict[str, Any]:
    """The record of one contender.

    Args:
        steps: What each timed step said: `seconds`; `user_s` and `system_s`, the processor time of all threads in the
            process's own code and in the kernel, which gives out memory; `network_calls` and `network_rows`.
        batch: Pictures of a step.
        flops_per_row: FLOPs that the network needs for one row of what it is called with.
        memory: `peak_memory_bytes`, the most that the process had, and `memory_before_bytes`, the most before there was
            a network: on the CPU Python and its libraries.
        kernels: Attention kernels that ran.
        known_peak: FLOP/s of the device by its data sheet; None where it is not known.
        measured_peak: FLOP/s of a matrix product on the same device and threads; None where it was not measured.
    """
    first, median, third = (
        float(value) for value in np.quantile([step["seconds"] for step in steps], [0.25, 0.5, 0.75])
    )
    fastest = float(min(step["seconds"] for step in steps))
    flops = flops_per_row * int(np.median([step["network_rows"] for step in steps]))
    flops_per_s = flops / median
    return {
        "steps": len(steps),
        "step_s": {"median": median, "first_quartile": first, "third_quartile": third, "fastest": fastest},
        "user_s": float(np.median([step["user_s"] for step in steps])),
        "system_s": float(np.median([step["system_s"] for step in steps])),
        "steps_per_s": 1 / median,
        "images_per_s": batch / median,
        "flops_per_step": flops,
        "flops_per_s": flops_per_s,
        "share_of_peak": None if known_peak is None else flops_per_s / known_peak,
        "share_of_measured_peak": None if measured_peak is None else flops_per_s / measured_peak,
        **memory,
        "network_calls_per_step": int(np.median([step["network_calls"] for step in steps])),
        "attention_kernels": list(kernels),
    }


def ratios(ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    """How many times faster a step of ours is, and our peak memory as a part of the baseline's."""
    return {
        "step_ratio": baseline["step_s"]["median"] / ours["step_s"]["median"],
        "memory_ratio": ours["peak_memory_bytes"] / baseline["peak_memory_bytes"],
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as aligned text, a column for each contender."""
    lines = [_headline(result)]
    contenders = {label: result[label] for label in ("ours", "plain") if label in result}
    if contenders:
        lines += aligned([["", *contenders], *_rows(contenders)])
    if "step_ratio" in result:
        lines.append(f"{result['step_ratio']:.2f} × the speed, {result['memory_ratio']:.2f} × the memory")
    if "ingest_ratio" in result:
        fed, wait = result["with_data"], result["data_wait_fraction"]
        lines.append(
            f"{result['ingest_ratio']:.1%} of the rate with pictures from a table, {fed['step_s']:.3g} s a step, "
            f"{wait:.1%} of it waiting; {fed['decoding_threads']} threads decode"
        )
    if "saved_bytes_by_level" in result:
        peaks = result.get("peak_bytes_by_level", {})
        lines += [
            "",
            "kept for the backward pass" + (", and memory at its peak while the level runs:" if peaks else ":"),
        ]
        lines += aligned(
            [
                [name, format_bytes(kept), *([format_bytes(peaks[name]) if name in peaks else ""] if peaks else [])]
                for name, kept in result["saved_bytes_by_level"].items()
            ]
        )
        lines += aligned(
            [
                [title, format_bytes(result[key])]
                for title, key in (
                    ("in all", "saved_bytes"),
                    ("without --checkpoint", "saved_bytes_without_checkpoint"),
                    ("plain network", "saved_bytes_of_plain"),
                    ("weights, gradients, optimizer, average", "state_bytes"),
                    ("peak of weights, gradients and what is kept", "peak_bytes"),
                    ("… without --checkpoint", "peak_bytes_without_checkpoint"),
                )
                if key in result
            ]
        )
    return "\n".join(lines)


def _headline(result: Mapping[str, Any]) -> str:
    parts = [
        f"{result['benchmark']}: {result['preset']} with {','.join(map(str, result['channels']))} channels",
        f"{'/'.join(map(str, result['resolutions']))} px",
        f"{result['parameters'] / 1e6:,.1f} M parameters",
        f"batch {result['batch']}",
        result["dtype"],
    ]
    if "device_name" in result:
        parts += [result["device_name"], f"{result['threads']} threads", f"torch {result['torch']}"]
    if "forward_flops_per_image" in result:
        parts.append(f"{result['forward_flops_per_image'] / 1e9:,.1f} GFLOP an image forward")
        parts.append(f"{result['forward_backward_flops_per_image'] / 1e12:.3f} TFLOP with the backward pass")
    if result.get("recomputed_flops_per_image"):
        parts.append(f"{result['recomputed_flops_per_image'] / 1e9:,.1f} GFLOP once more for --checkpoint")
    return ", ".join(parts)


def _rows(contenders: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    def row(title: str, shown: Any) -> list[str]:
        return [title, *(shown(record) for record in contenders.values())]

    return [
        row("seconds a step", lambda r: f"{r['step_s']['median']:.3g}"),
        row(
            "first to third quartile",
            lambda r: f"{r['step_s']['first_quartile']:.3g}–{r['step_s']['third_quartile']:.3g}",
        ),
        row("fastest", lambda r: f"{r['step_s']['fastest']:.3g}"),
        row("processor: own code", lambda r: f"{r['user_s']:.3g}"),
        row("processor: kernel", lambda r: f"{r['system_s']:.3g}"),
        row("images/s", lambda r: f"{r['images_per_s']:.3g}"),
        row("GFLOP/s", lambda r: f"{r['flops_per_s'] / 1e9:,.4g}"),
        row("of the device's peak", lambda r: _share(r["share_of_peak"])),
        row("of the measured peak", lambda r: _share(r["share_of_measured_peak"])),
        row("peak memory", lambda r: format_bytes(r["peak_memory_bytes"])),
        row("of it before the network", lambda r: format_bytes(r["memory_before_bytes"])),
        row("network calls a step", lambda r: str(r["network_calls_per_step"])),
        row("attention", lambda r: ", ".join(r["attention_kernels"]).replace("_scaled_dot_product_", "") or "unfused"),
    ]


def _share(share: float | None) -> str:
    return "not known" if share is None else f"{share:.1%}"


def format_bytes(count: int) -> str:
    """Returns a size to read."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line for each row, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
