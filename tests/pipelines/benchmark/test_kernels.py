"""Which attention kernels run."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from mdm_core.errors import WorkError
from mdm_core.nested_unet import build_network
from mdm_core.presets import preset
from pipelines.benchmark.kernels import attention_kernels, check_fused_attention
from pipelines.benchmark.shapes import shaped


def attend(q: torch.Tensor) -> Callable[[], object]:
    return lambda: F.scaled_dot_product_attention(q, q, q)


def test_the_slow_path_is_seen():
    kernels = attention_kernels(attend(torch.randn(1, 2, 8, 16).transpose(2, 3)))
    assert kernels == ["_scaled_dot_product_attention_math"]
    with pytest.raises(WorkError, match=r"attention ran unfused \(_scaled_dot_product_attention_math\)"):
        check_fused_attention(kernels)


def test_the_fused_kernel_passes():
    kernels = attention_kernels(attend(torch.randn(1, 2, 16, 8)))
    assert len(kernels) == 1
    check_fused_attention(kernels)


def test_no_attention_at_all_is_told():
    with pytest.raises(WorkError, match="no attention kernel ran"):
        check_fused_attention(attention_kernels(lambda: torch.ones(2) + 1))


def test_the_network_runs_fused_forward_and_backward():
    config = shaped(preset("mdm-64"), channels=(32, 64), resolution=16)
    network = build_network(config).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    text = torch.randn(2, 5, 384)
    check_fused_attention(
        attention_kernels(lambda: network([x], torch.tensor([1, 2]), text)[0].square().mean().backward())
    )
