"""What part of the devices' arithmetic a run is said to use."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdm_core.config import MatryoshkaConfig
from mdm_core.nested_unet import build_network
from pipelines.benchmark.flops import empty_inputs, total
from pipelines.train import speed
from pipelines.train.model_config import ModelConfig
from pipelines.train.place import Place
from pipelines.train.speed import Speed

TOKENS = 8


@pytest.fixture
def networks() -> MatryoshkaConfig:
    """16 and 8 px."""
    network = {"num_resnets": [1, 1], "num_groups": 4, "num_heads": 2, "time_dim": 16}
    outer = {"resolution": 16, "channels": [4, 8], "num_attention_layers": [0, 0], "mid_blocks": False}
    inner = {"resolution": 8, "channels": [8, 8], "num_attention_layers": [0, 1], "text_proj_dim": 8}
    return ModelConfig.model_validate({"networks": [outer | network, inner | network]}).matryoshka(12)


def counted(networks: MatryoshkaConfig) -> float:
    """FLOPs of a picture there and back, of the network that is trained and a batch of two."""
    network = build_network(networks)
    # PyTorch's counter does not know the kernel of attention that the CPU has.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total(network(*empty_inputs(networks, batch=2, text_tokens=TOKENS))).backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("mix", [None, (0.25, 1.0)])
def test_the_share_of_the_peak_is_arithmetic_done_over_arithmetic_possible(
    networks: MatryoshkaConfig, monkeypatch: pytest.MonkeyPatch, mix: tuple[float, ...] | None
) -> None:
    asked = []

    def peak(name: str, dtype: str, *, tf32: bool) -> float:
        asked.append((name, dtype))
        return 4e9

    monkeypatch.setattr(speed, "device_name", lambda device: "some card")
    monkeypatch.setattr(speed, "known_peak", peak)
    monkeypatch.setattr(speed, "peak_memory_bytes", lambda device: 3_500_000_000)
    place = Place(0, 3, torch.device("cuda"))
    shown = Speed(networks, place, bfloat16=True, text_tokens=TOKENS, mix=mix).metrics(150.0)
    whole, inner = counted(networks), counted(networks.up_to(8))
    flops = whole if mix is None else inner + 0.25 * (whole - inner)
    assert shown == pytest.approx(
        {"images_per_s": 150.0, "peak_memory_gb": 3.5, "peak_share": 150.0 * flops / (3 * 4e9)}
    )
    assert asked == [("some card", "bfloat16")]


def test_of_a_processor_no_share_is_said(networks: MatryoshkaConfig) -> None:
    shown = Speed(networks, Place(), bfloat16=False, text_tokens=TOKENS, mix=None).metrics(2.0)
    assert shown.keys() == {"images_per_s", "peak_memory_gb"}
