"""What a run does when the gradients of a step are not finite."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed
from torch import Tensor

from mdm_core.errors import WorkError
from pipelines.train.place import Place

_MOST_NAMED = 8
_MOST_IN_A_ROW = 100


class AgreedError(WorkError):
    """What all workers find at the same step, so that none of them waits for another."""


@dataclass(frozen=True)
class _Step:
    """Of one step: whether its gradients and the losses of this worker's rows are finite, on the way to the CPU."""

    step: int
    ids: Sequence[bytes]
    flags: Tensor
    arrived: torch.cuda.Event | None


class FiniteCheck:
    """Looks at the gradients of each step when the next one is under way, so that a GPU never waits to be looked at.

    Args:
        place: This worker.
        on_nan: `stop` raises; `skip` counts, and raises after a hundred in a row: such a run has diverged.
        num_skipped: Of the stage so far.
    """

    def __init__(self, place: Place, on_nan: Literal["stop", "skip"], *, num_skipped: int = 0) -> None:
        self._place, self._on_nan = place, on_nan
        self._last: _Step | None = None
        self.num_skipped = num_skipped
        self._num_in_a_row = 0

    def add(self, step: int, *, norm: Tensor, rows: Tensor, ids: Sequence[bytes]) -> None:
        """Takes in a step, which left the weights as they were if `norm` is not finite, and looks at the one before.

        Args:
            step: Its number, from 0.
            norm: () of all workers' gradients.
            rows: (R, B) losses of this worker's rows.
            ids: Of those rows.

        Raises:
            AgreedError: As `check`.
        """
        self.check()
        flags = torch.cat([torch.isfinite(norm)[None], torch.isfinite(rows).all(dim=0)])
        arrived = None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._last = _Step(step, ids, flags, arrived)

    def check(self) -> None:
        """Looks at the last step now.

        Raises:
            AgreedError: Its gradients are not finite, and that is to stop the run. All workers raise.
        """
        last, self._last = self._last, None
        if last is None:
            return
        if last.arrived is not None:
            last.arrived.synchronize()
        if bool(last.flags[0]):
            self._num_in_a_row = 0
            return
        self.num_skipped += 1
        self._num_in_a_row += 1
        if self._on_nan == "stop" or self._num_in_a_row == _MOST_IN_A_ROW:
            bad = [row.hex() for row, finite in zip(last.ids, last.flags[1:].tolist(), strict=True) if not finite]
            raise AgreedError(_message(last.step, self._gathered(bad)))

    def _gathered(self, bad: list[str]) -> list[list[str]]:
        if self._place.workers == 1:
            return [bad]
        by_rank: list[list[str]] = [[] for _ in range(self._place.workers)]
        torch.distributed.all_gather_object(by_rank, bad)
        return by_rank


def _message(step: int, by_rank: list[list[str]]) -> str:
    parts = []
    for rank, bad in enumerate(by_rank):
        if bad:
            more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
            parts.append(f"rank {rank}, rows {', '.join(bad[:_MOST_NAMED])}{more}")
    where = "; ".join(parts) or "the loss of every row is finite, so it is the backward pass that overflows"
    return (
        f"the gradients of step {step} are not finite ({where}); pass over such steps with on_nan=skip, or look at "
        "those rows (`id` of the table) and begin another run (another checkpoint.uri) without them or with a lower lr"
    )
