"""The plan of a run as text to read."""

from collections.abc import Callable

from pipelines.benchmark.report import aligned, format_bytes
from pipelines.train.plan import MemoryPlan, StagePlan, TrainPlan

_OTHERWISE = {"nothing_recomputed": "[]", "all_recomputed": "[all]"}


def plan_text(plan: TrainPlan) -> str:
    """The plan, a column for each stage."""
    lines = [_headline(plan), "", *aligned(_work(plan))]
    if all(stage.memory for stage in plan.stages):
        lines += ["", f"memory of each {'GPU' if plan.gpus_per_worker else 'worker'}, besides what the libraries take:"]
        lines += aligned(_memory(plan))
    lines += ["", *_totals(plan), "", "not checked:", *(f"  {said}" for said in plan.not_checked)]
    return "\n".join(lines)


def _headline(plan: TrainPlan) -> str:
    device = f"one {plan.card} each" if plan.card is not None else "on the CPU"
    table = f"{plan.table} version {plan.table_version}: {plan.rows:,} rows" if plan.rows is not None else plan.table
    goes_on = f"; goes on from {plan.continues_from}" if plan.continues_from is not None else ""
    return f"{plan.workers} workers, {device}, {plan.dtype}; {table}; text {plan.text_dim} wide{goes_on}"


def _row(plan: TrainPlan, title: str, shown: Callable[[StagePlan], str]) -> list[str]:
    return [title, *(shown(stage) for stage in plan.stages)]


def _work(plan: TrainPlan) -> list[list[str]]:
    rows = [
        _row(plan, "stage", lambda stage: f"{stage.resolution} px"),
        _row(plan, "parameters", lambda stage: f"{stage.parameters:,}"),
        _row(plan, "optimizer steps", lambda stage: f"{stage.steps:,}"),
        _row(plan, "images", lambda stage: f"{stage.images:,}"),
        _row(plan, "images left", lambda stage: f"{stage.images_left:,}"),
        _row(plan, "epochs", lambda stage: _number(stage.epochs)),
        _row(plan, "images of a forward pass", lambda stage: f"{stage.images_per_pass} × {stage.passes_per_step}"),
        _row(plan, "TFLOP an image", lambda stage: f"{stage.flops_per_image / 1e12:.3f}"),
        _row(plan, "… computed again", lambda stage: f"{stage.recomputed_flops_per_image / 1e12:.3f}"),
        _row(plan, "a checkpoint", lambda stage: format_bytes(stage.checkpoint_bytes)),
    ]
    if plan.deadline_h is not None:
        title = f"images/s for {plan.deadline_h:g} h"
        rows.append(_row(plan, title, lambda stage: _number(stage.images_per_s_for_deadline)))
    if plan.share_of_peak is not None:
        share = f"at {plan.share_of_peak:.0%} of peak"
        rows.append(_row(plan, f"images/s {share}", lambda stage: _number(stage.images_per_s_at_share)))
        rows.append(_row(plan, f"hours {share}", lambda stage: _number(stage.hours_at_share)))
    return rows


def _memory(plan: TrainPlan) -> list[list[str]]:
    parts: dict[str, Callable[[MemoryPlan], int]] = {
        "weights": lambda memory: memory.weights,
        "gradients": lambda memory: memory.gradients,
        "optimizer": lambda memory: memory.optimizer,
        "average": lambda memory: memory.ema,
        "kept for the backward pass": lambda memory: memory.activations,
        "peak of all": lambda memory: memory.peak,
    }

    def row(title: str, key: str, part: Callable[[MemoryPlan], int]) -> list[str]:
        return _row(plan, title, lambda stage: format_bytes(part(stage.memory[key])))

    rows = [row(title, "as_configured", part) for title, part in parts.items()]
    for key, levels in _OTHERWISE.items():
        if any(stage.memory[key] != stage.memory["as_configured"] for stage in plan.stages):
            rows.append(row(f"… with scaling.checkpoint_levels {levels}", key, parts["peak of all"]))
    return rows


def _totals(plan: TrainPlan) -> list[str]:
    lines = [f"checkpoints that are there at the same time: {format_bytes(plan.storage_bytes)}"]
    if plan.hours_at_share is not None:
        lines.append(f"{plan.hours_at_share:,.1f} hours at {plan.share_of_peak:.0%} of the peak of each {plan.card}")
    if plan.share_of_peak_for_deadline is not None:
        lines.append(f"{plan.deadline_h:g} hours ask for {plan.share_of_peak_for_deadline:.1%} of that peak")
    return lines


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
