"""A manifest and tensors of a network of two numbers, for tests of checkpoints that need no training."""

from typing import Any

import torch

from pipelines.train.checkpoint import Manifest, State

NETWORK = {
    "networks": [
        {
            "resolution": 8, "channels": [8, 8], "num_resnets": [1, 1], "num_attention_layers": [0, 1],
            "num_groups": 4, "num_heads": 2, "time_dim": 16, "text_dim": 12, "text_proj_dim": 8,
        }
    ]
}  # fmt: skip


def manifest(images_seen: int, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": 0,
        "images_seen": images_seen,
        "total_images_seen": images_seen,
        "stage_done": False,
        "network": NETWORK,
        "schedule": {"kind": "squared_cosine", "num_timesteps": 1000, "shift_power": 1.0, "shift": "snr"},
        "config": {"name": "small", "seed": 0},
        "table_uri": "table",
        "table_version": 4,
        "text_encoder": "minilm",
        "max_tokens": 8,
        "run_id": "run",
        "code_version": "0",
        "metrics": {"seconds": 1.0},
    }
    return Manifest(**values | changes)


def state(value: float, *, size: int = 2) -> dict[str, State]:
    return {name: {"w": torch.full((size,), value)} for name in ("weights", "ema", "optimizer")}
