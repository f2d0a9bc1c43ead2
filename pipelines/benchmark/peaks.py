"""How fast a device could be at best."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

_TFLOPS: dict[str, tuple[float, float, float]] = {
    # Dense bfloat16, TF32 and float32 without tensor cores, from the makers' data sheets. A longer name comes first.
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.5, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.1, 183.2, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
}


def device_name(device: torch.device) -> str:
    """What the maker calls the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def known_cards() -> tuple[str, ...]:
    """The cards whose data sheets `known_peak` has."""
    return tuple(_TFLOPS)


def known_peak(name: str, dtype: str, *, tf32: bool) -> float | None:
    """Dense FLOP/s of a card by its data sheet; None where the card is not in the table, as for every CPU.

    Args:
        name: As `device_name` gives it.
        dtype: float32 or bfloat16.
        tf32: Whether float32 convolutions may run in TF32, as PyTorch lets them unless told otherwise.
    """
    words = name.replace("-", " ")
    for card, (bfloat16, tensor_float32, float32) in _TFLOPS.items():
        if f" {card} " in f" {words} ":
            tera = bfloat16 if dtype == "bfloat16" else tensor_float32 if tf32 else float32
            return tera * 1e12
    return None


def measured_peak(device: torch.device, dtype: torch.dtype, *, side: int = 1024, repeats: int = 10) -> float:
    """FLOP/s of a square matrix product or of a 3×3 convolution, whichever is faster, with the threads that are set.

    The two come from different libraries, and on some processors only one of them is fast.
    """
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    channels = max(16, side // 4)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    x = torch.randn(1, channels, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    product_s = _fastest_s(lambda: a @ b, device, repeats)
    convolution_s = _fastest_s(lambda: torch.nn.functional.conv2d(x, weight, padding=1), device, repeats)
    return max(2.0 * side**3 / product_s, 2.0 * 9 * channels**2 * 32 * 32 / convolution_s)


def _fastest_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    best_s = float("inf")
    for _ in range(repeats + 1):
        _synchronize(device)
        began_s = time.perf_counter()
        work()
        _synchronize(device)
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
