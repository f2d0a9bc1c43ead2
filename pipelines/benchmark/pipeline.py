"""Benchmarks of the network: its training step, and the making of pictures."""

import contextlib
import functools
from dataclasses import replace
from typing import Any

import torch

from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import ConfigError
from mdm_core.nested_unet import build_network
from pipelines.benchmark.activations import IN_ALL, Planned, planned_activations, planned_peaks
from pipelines.benchmark.config import SampleBenchmarkConfig, TrainBenchmarkConfig
from pipelines.benchmark.contender import Label
from pipelines.benchmark.flops import Flops, flops_per_picture
from pipelines.benchmark.ingest import measure_ingest
from pipelines.benchmark.measuring import Measured
from pipelines.benchmark.peaks import device_name, known_peak
from pipelines.benchmark.report import measured_record, ratios
from pipelines.benchmark.turns import Worker
from pipelines.progress import Progress

BYTES_PER_PARAMETER = 4 * 5
"""Weight, gradient, AdamW's two moments and the average, in float32."""


def benchmark(config: TrainBenchmarkConfig | SampleBenchmarkConfig) -> dict[str, Any]:
    """What `config` asks for was measured, as plain values.

    Raises:
        ConfigError: The device or a level is not there.
        WorkError: A process died or ran out of memory, or attention ran unfused.
    """
    networks = config.matryoshka()
    if isinstance(config, TrainBenchmarkConfig):
        with torch.device("meta"):
            config.checkpointed(tuple(build_network(networks).levels()))
    flops = flops_per_picture(networks, text_tokens=config.text_tokens)
    if config.plan:
        return plan(config, networks, flops)
    return _measured(config, networks, flops)


def plan(
    config: TrainBenchmarkConfig | SampleBenchmarkConfig, networks: MatryoshkaConfig, flops: Flops
) -> dict[str, Any]:
    """Parameters, FLOPs and memory, worked out without running anything."""
    with torch.device("meta"):
        network = build_network(networks)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    result = _what(config, networks) | {
        "parameters": parameters,
        "forward_flops_per_image": flops.forward,
        "forward_backward_flops_per_image": flops.forward_backward,
    }
    if isinstance(config, TrainBenchmarkConfig):
        again = config.checkpointed(tuple(network.levels()))
        result |= {
            "recomputed_flops_per_image": sum(flops.forward_by_level[name] for name in again),
            "state_bytes": parameters * BYTES_PER_PARAMETER,
        } | saved_bytes(config, networks)
    return result


def saved_bytes(config: TrainBenchmarkConfig, networks: MatryoshkaConfig) -> dict[str, Any]:
    """What the forward pass of a step keeps, level by level, with the levels checkpointed that are to be, and without.

    The plain network's is there for comparison where it is measured against.
    """
    with torch.device("meta"):
        names = tuple(build_network(networks).levels())
    as_it_is = Planned(
        config=networks,
        batch=config.batch,
        text_tokens=config.text_tokens,
        dtype=config.dtype,
        channels_last=config.channels_last,
    )
    chosen = config.checkpointed(names)
    as_chosen = replace(as_it_is, checkpointed=tuple(chosen))
    kept = planned_activations(as_chosen)
    result: dict[str, Any] = {"saved_bytes": sum(kept.values()), "saved_bytes_by_level": kept}
    if chosen:
        result["saved_bytes_without_checkpoint"] = sum(planned_activations(as_it_is).values())
    if config.against == "plain":
        result["saved_bytes_of_plain"] = sum(planned_activations(replace(as_it_is, plain=True)).values())
    if config.plan:
        peaks = planned_peaks(as_chosen)
        result |= {"peak_bytes": peaks.pop(IN_ALL), "peak_bytes_by_level": peaks}
        if chosen:
            result["peak_bytes_without_checkpoint"] = planned_peaks(as_it_is)[IN_ALL]
    return result


def _measured(
    config: TrainBenchmarkConfig | SampleBenchmarkConfig, networks: MatryoshkaConfig, flops: Flops
) -> dict[str, Any]:
    device = _device(config.device)
    labels: tuple[Label, ...] = ("ours", "plain") if config.against == "plain" else ("ours",)
    with contextlib.ExitStack() as stack:
        workers = {
            label: stack.enter_context(Worker(label, functools.partial(Measured, label, config, str(device))))
            for label in labels
        }
        for worker in workers.values():
            worker.ready()
        steps = _in_turn(config, workers)
        memory = {label: worker.ask("memory", doing="after the steps") for label, worker in workers.items()}
        kernels = {
            label: worker.ask("kernels", doing="while attention was looked at") for label, worker in workers.items()
        }
        facts = workers["ours"].ask("facts", doing="after the steps")
        measured = workers["ours"].ask("peak", doing="in a matrix product") if device.type == "cpu" else None
    name = device_name(device)
    known = known_peak(name, config.dtype, tf32=facts["tf32"])
    a_row = flops.forward_backward if isinstance(config, TrainBenchmarkConfig) else flops.forward
    result = _what(config, networks) | {
        "device": device.type,
        "device_name": name,
        "torch": torch.__version__,
        "threads": facts["threads"],
        "parameters": facts["parameters"],
        "peak_flops_per_s": known,
        "measured_peak_flops_per_s": measured,
    }
    for label in labels:
        result[label] = measured_record(
            steps[label],
            batch=config.batch,
            flops_per_row=a_row,
            memory=memory[label],
            kernels=kernels[label],
            known_peak=known,
            measured_peak=measured,
        )
    if isinstance(config, TrainBenchmarkConfig):
        result |= saved_bytes(config, networks)
        if config.with_data:
            result |= measure_ingest(config, device)
    return result | (ratios(result["ours"], result["plain"]) if "plain" in result else {})


def _in_turn(
    config: TrainBenchmarkConfig | SampleBenchmarkConfig, workers: dict[Label, Worker]
) -> dict[Label, list[dict[str, Any]]]:
    """What each timed step said: one step of each, then the next of each."""
    timed: dict[Label, list[dict[str, Any]]] = {label: [] for label in workers}
    total = (config.warmup_steps + config.steps) * len(workers)
    with Progress("benchmark", total=total, unit="steps") as progress:
        for number in range(-config.warmup_steps, config.steps):
            doing = f"in timed step {number + 1}" if number >= 0 else "in a step to warm up"
            for label, worker in workers.items():
                said = worker.ask("step", doing=doing)
                if number >= 0:
                    timed[label].append(said)
                progress.advance(1, **{f"{label}_s": said["seconds"]})
    return timed


def _what(config: TrainBenchmarkConfig | SampleBenchmarkConfig, networks: MatryoshkaConfig) -> dict[str, Any]:
    return {
        "benchmark": "train" if isinstance(config, TrainBenchmarkConfig) else "sample",
        "preset": config.preset,
        "resolutions": list(networks.resolutions),
        "channels": list(networks.networks[-1].channels),
        "batch": config.batch,
        "dtype": config.dtype,
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda can't be used: PyTorch finds no GPU here; use auto or cpu")
    return torch.device(name)
