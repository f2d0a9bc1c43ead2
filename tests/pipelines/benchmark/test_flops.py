"""FLOPs, against counts by hand and the published networks' figures."""

import pytest
import torch
from torch import nn

from mdm_core.presets import preset
from pipelines.benchmark.flops import count_flops, flops_per_picture
from pipelines.benchmark.peaks import known_peak, measured_peak

FIRST = 2 * 9 * 3 * 8 * 10 * 10  # 3×3 from 3 to 8 channels at 10×10 positions, an FMA as 2
SECOND = 2 * 8 * 5 * 5 * 5  # 1×1 from 8 to 5 channels at 5×5


def test_a_small_network_counts_as_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1))
    flops = count_flops(network, torch.zeros(1, 3, 10, 10), levels={"first": network[0], "last": network[3]})
    assert flops.forward == FIRST + SECOND
    assert flops.forward_by_level == {"first": FIRST, "last": SECOND}
    # Gradients of weight and input cost as much as the forward pass each; nobody asks for the picture's.
    assert flops.forward_backward == 2 * FIRST + 3 * SECOND


@pytest.mark.parametrize(
    ("name", "forward", "forward_backward"),
    [("mdm-64", 385.4e9, 1.155e12), ("mdm-256", 610.6e9, 1.830e12), ("mdm-1024", 1040.1e9, 3.117e12)],
)
def test_published_networks_count_as_in_the_reference(name, forward, forward_backward):
    flops = flops_per_picture(preset(name), text_tokens=128)
    assert flops.forward == pytest.approx(forward, rel=1e-3)
    assert flops.forward_backward == pytest.approx(forward_backward, rel=1e-3)
    assert 0.95 * flops.forward < sum(flops.forward_by_level.values()) < flops.forward


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", True, 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", True, 756.5),
        ("NVIDIA A100-SXM4-80GB", "float32", True, 156.0),
        ("NVIDIA A100-SXM4-80GB", "float32", False, 19.5),
        ("NVIDIA A10G", "bfloat16", True, None),
        ("AMD EPYC 9654", "float32", False, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, dtype, tf32, tera):
    assert known_peak(name, dtype, tf32=tf32) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_measured_peak_is_a_rate():
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32, side=128) < 1e14
