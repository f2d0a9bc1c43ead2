"""Which attention ran: fused, or with its matrix of weights in memory."""

import os
from collections.abc import Callable, Sequence

import torch

from mdm_core.errors import WorkError

_SLOW = "aten::_scaled_dot_product_attention_math"


def attention_kernels(work: Callable[[], object]) -> list[str]:
    """The attention operators that PyTorch dispatched to while `work` ran, sorted; empty if it called none."""
    # The profiler's own log goes to stderr whatever Python does with that.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        work()
    names = {event.name for event in profile.function_events}
    return sorted(
        name.removeprefix("aten::")
        for name in names
        if name.startswith("aten::_scaled_dot_product_") and not name.endswith("_backward")
    )


def check_fused_attention(kernels: Sequence[str]) -> None:
    """Does nothing if every attention that ran was fused.

    Args:
        kernels: What `attention_kernels` saw.

    Raises:
        WorkError: If none ran, or one that was not fused.
    """
    if not kernels:
        raise WorkError(
            "no attention kernel ran, though the network has attention layers; "
            "they must call scaled_dot_product_attention"
        )
    if _SLOW.removeprefix("aten::") in kernels:
        raise WorkError(
            f"attention ran unfused ({', '.join(kernels)}), with its weights in memory; give "
            "scaled_dot_product_attention q, k and v whose last stride is 1, a head width that the device's kernels "
            "know, and masks of type bool"
        )
