"""One process's part of a benchmark: it builds, steps when asked, and says what that took."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipelines.benchmark.config import NetworkBenchmarkConfig
from pipelines.benchmark.contender import Label, NetworkCalls, build_contender
from pipelines.benchmark.kernels import attention_kernels, check_fused_attention
from pipelines.benchmark.peaks import measured_peak


class Measured:
    """Something that is timed, on its device, with what it does counted."""

    def __init__(self, label: Label, config: NetworkBenchmarkConfig, device: str) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._label, self._config, self._device = label, config, torch.device(device)
        self._memory_before = peak_memory_bytes(self._device)
        self._contender = build_contender(label, config, self._device)
        self._calls = NetworkCalls.of(self._contender.network)

    def __call__(self, request: str) -> Any:
        """The answer to `step`, `memory`, `kernels`, `facts` or `peak`."""
        return getattr(self, f"_{request}")()

    def _step(self) -> dict[str, float | int]:
        self._calls.reset()
        self._synchronize()
        before, began_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self._contender.step()
        self._synchronize()
        seconds = time.perf_counter() - began_s
        after = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "seconds": seconds,
            "user_s": after.ru_utime - before.ru_utime,
            "system_s": after.ru_stime - before.ru_stime,
            "network_calls": self._calls.calls,
            "network_rows": self._calls.rows,
        }

    def _memory(self) -> dict[str, int]:
        return {"peak_memory_bytes": peak_memory_bytes(self._device), "memory_before_bytes": self._memory_before}

    def _kernels(self) -> list[str]:
        kernels = attention_kernels(self._contender.step)
        attends = any(network.attended_channels for network in self._config.matryoshka().networks)
        if self._label == "ours" and attends:
            check_fused_attention(kernels)
        return kernels

    def _facts(self) -> dict[str, Any]:
        return {
            "parameters": sum(parameter.numel() for parameter in self._contender.network.parameters()),
            "threads": torch.get_num_threads(),
            "tf32": self._device.type == "cuda" and torch.backends.cudnn.allow_tf32,
        }

    def _peak(self) -> float:
        return measured_peak(self._device, getattr(torch, self._config.dtype))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of tensors on a GPU, of the whole process (Python and libraries too) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # The kernel's other figure, ru_maxrss, starts from that of the process which started this one.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
