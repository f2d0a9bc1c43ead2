"""What is told of a link that gives no picture."""

from dataclasses import dataclass
from typing import Literal

STATUSES_THAT_PASS = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524})
"""HTTP statuses that another try, now or in a later refresh, may not meet again."""


@dataclass(frozen=True)
class Failure:
    """Why a link has no picture."""

    reason: str
    retryable: bool = False
    outcome: Literal["failed", "filtered"] = "failed"
    retry_after_s: float = 0.0
    """What its host asked to wait, where it did."""
