"""Which of the workers a process is, and where it computes."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Place:
    """Which of the workers this is, and where it computes."""

    rank: int = 0
    workers: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
