"""What a kill cost, as text to read."""

from collections.abc import Mapping
from typing import Any

from pipelines.benchmark.report import aligned

_PARTS = {
    "ray": "Ray Train notices, and has a new process",
    "imports": "imports, and joining the other workers",
    "run": "the run is its own, checkpoint read",
    "state": "table open, network and state built",
    "batch": "waiting for the first batch",
    "step": "the step",
}


def resume_table(result: Mapping[str, Any]) -> str:
    """The result as aligned text."""
    lines = [
        f"resume: {result['preset']} with {','.join(map(str, result['channels']))} channels, "
        f"{'/'.join(map(str, result['resolutions']))} px, {result['parameters'] / 1e6:,.1f} M parameters, "
        f"batch {result['batch']}, {result['workers']} workers, {result['device_name']}, {result['cores']} cores, "
        f"ray {result['ray']}, torch {result['torch']}",
        f"{result['seconds']:.1f} s from kill -9 of a worker to the next step, "
        f"{result['seconds_to_new_step']:.1f} s to the first that had not been done before",
    ]
    lines += aligned([[_PARTS[part], f"{seconds:.2f} s"] for part, seconds in result["where"].items()])
    lines.append(
        f"{result['steps_lost']} steps done again; of {result['images']:,} images {result['repeated']:,} trained on "
        f"twice and {result['skipped']:,} never"
    )
    tensors = f"{result['tensors']:,} tensors of weights, averages and optimizer"
    if result["weights_equal"]:
        lines.append(f"{tensors}: the same to the bit as without the kill")
    else:
        named = ", ".join(result["first_different"])
        lines.append(f"{tensors}: {result['tensors_different']:,} are NOT as without the kill: {named}, …")
    return "\n".join(lines)
