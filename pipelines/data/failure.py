"""What is told of a link that gives no picture."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Failure:
    """Why a link has no picture."""

    reason: str
    retryable: bool = False
    outcome: Literal["failed", "filtered"] = "failed"
    retry_after_s: float = 0.0
    """What its host asked to wait, where it did."""
