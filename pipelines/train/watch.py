"""What the driver of a run sees of its workers: progress, metrics and pictures."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from mdm_core.errors import MdmError
from pipelines.evaluate.grids import picture_grid
from pipelines.progress import Progress
from pipelines.tracking import Run, open_run
from pipelines.train.config import TrainConfig

log = logging.getLogger(__name__)

_POLL_S = 0.5
# That wait to be logged; a tracking server that is away for days loses the oldest.
_MOST_EVENTS = 10_000


class Board:
    """An actor to which workers pin events, and from which the driver takes them."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        """Adds an event."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events


class Watch:
    """Shows progress and logs to MLflow what the workers pin to the board, until the block ends.

    Args:
        take: Returns the events since the last call (`Board.take`).
        run: MLflow run of all stages.
        key: What the run is about; see `open_run`.
        config: The run's configuration.
        images_seen: Images of all stages before this call.
    """

    def __init__(
        self, take: Callable[[], list[dict[str, Any]]], run: Run, key: str, config: TrainConfig, images_seen: int
    ) -> None:
        self._take_events, self._run, self._key, self._config = take, run, key, config
        self._before = [0]
        for stage in config.stages:
            self._before.append(self._before[-1] + stage.num_images)
        self._progress = Progress("train", total=self._before[-1], unit="images", start=images_seen)
        self._stage_runs = contextlib.ExitStack()
        self._stages: dict[int, Run] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._failure: BaseException | None = None
        self._queue: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)
        self.last_error = ""

    def __enter__(self) -> "Watch":
        self._progress.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._progress.__exit__(*error)
        self._stage_runs.__exit__(*error)
        if self._failure is not None and error[0] is None:
            raise self._failure

    def _pump(self) -> None:
        try:
            while not self._ended.wait(_POLL_S):
                self._take()
            self._take()
        except BaseException as failure:  # raised again where the block ends
            self._failure = failure

    def _take(self) -> None:
        for event in self._take_events():
            if "error" in event:
                self.last_error = event["error"]
                continue
            if "warning" in event:
                log.warning("%s", event["warning"])
                continue
            if "metrics" in event:
                self.last_error = ""  # a later attempt got past it
                total = self._before[event["stage"]] + event["images"]
                shown = {"stage_px": self._config.stages[event["stage"]].resolution, **_loss(event)}
                self._progress.advance(total - self._progress.done, **shown)
            self._queue.append(event)
        while self._queue:
            try:
                self._log(self._queue[0])
            except MdmError as failure:
                # The training is worth more than its curves: they are logged as soon as that can be done again.
                if self._failure is None:
                    log.warning("%s; training goes on, and it is tried again", failure)
                self._failure = failure
                return
            self._failure = None
            self._queue.popleft()

    def _log(self, event: dict[str, Any]) -> None:
        total = self._before[event["stage"]] + event["images"]
        if "metrics" in event:
            self._stage(event["stage"]).log_metrics(event["metrics"], step=event["images"])
            self._run.log_metrics(_loss(event), step=total)
        if "system" in event:
            self._run.log_metrics(event["system"], step=total)
        if "pictures" in event:
            self._log_pictures(event, total)

    def _log_pictures(self, event: dict[str, Any], total: int) -> None:
        """A series a resolution in the stage's run, and one of the finest in the run of all stages."""
        for side, pictures in event["pictures"].items():
            title = f"{self._config.name}: {side} px after {total:,} images"
            grid = picture_grid(pictures, self._config.preview.captions, title=title)
            self._stage(event["stage"]).log_image(grid, key=f"preview_{side}", step=event["images"])
            if side == self._config.stages[event["stage"]].resolution:
                self._run.log_image(grid, key="preview", step=total)

    def _stage(self, index: int) -> Run:
        if index not in self._stages:
            stage = self._config.stages[index]
            opened = open_run(
                self._config.tracking,
                name=f"stage {stage.resolution} px",
                parent_run_id=self._run.id,
                key=f"{self._key}:{index}",
            )
            self._stages[index] = self._stage_runs.enter_context(opened)
            shared = self._config.model_dump(mode="json", include={"data", "text", "model"})
            self._stages[index].log_params({"stage": stage.model_dump(mode="json"), **shared})
        return self._stages[index]


def _loss(event: dict[str, Any]) -> dict[str, float]:
    """The loss of all resolutions, where there was a row whose loss is finite."""
    return {name: value for name, value in event["metrics"].items() if name == "loss"}
