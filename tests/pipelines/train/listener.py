"""What hears a stage's events in the place of a driver, and can end the run in the middle of one."""

from typing import Any

from pipelines.train.hooks import Hooks


class KilledError(BaseException):
    """Stands for a process that dies between two steps."""


class Listener(Hooks):
    """Keeps the events; dies in the place of the one after `die_after` of them."""

    def __init__(self, die_after: int | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self._die_after = die_after

    def post(self, event: dict[str, Any]) -> None:
        if len(self.events) == self._die_after:
            raise KilledError
        self.events.append(event)
