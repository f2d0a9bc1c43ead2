"""What a stage tells and asks while it runs, so that it need not know of Ray."""

from collections.abc import Callable, Sequence
from typing import Any


class Hooks:
    """Listens to nothing; a class of its own says otherwise."""

    def post(self, event: dict[str, Any]) -> None:
        """Takes an event for the driver: `metrics` of the run. Called on rank 0 only."""

    def reported(self, stage: int, images: int) -> None:
        """Called on every rank after each report of the losses."""

    def reached(self, point: str, **further: Any) -> None:
        """Called on every rank on its way to its first step: at `began`, `opened` and `loaded`.

        Args:
            point: The worker has begun; the run is its own, and its newest checkpoint is known; a stage's network and
                state are there.
            further: What is said beside it: at `opened` the `checkpoint`, a URI, or None where there is none.
        """

    def stepped(self, step: int, ids: Sequence[bytes], waited_s: float) -> None:
        """Called on every rank after each step; the device may still be at it.

        Args:
            step: Steps of the stage that are done with it.
            ids: Rows of the step that this rank took.
            waited_s: Seconds that this process has waited for batches of the stage.
        """

    def saved(self, uri: str, stage: int, images: int, wait: Callable[[], None]) -> None:
        """Called on every rank at each checkpoint, while it is written.

        Args:
            uri: Of the checkpoint.
            stage: Its number.
            images: Of the stage so far.
            wait: Returns once the checkpoint is whole; on rank 0.
        """

    def preemption(self) -> str:
        """Says which machines are about to go, if any; every rank asks at the same steps, and gets the same answer."""
        return ""
