"""How often a run asks whether machines are called back."""

from pipelines.train.hooks import Hooks

_ASK_EVERY_S = 5.0


class PreemptionNotice:
    """Asks at each report, and every five seconds in between.

    Asking waits for all workers, who must do so at the same steps, and their clocks differ: the seconds are counted in
    steps of a length that the workers have agreed on in their last report. Until there is one they ask at each step.

    Args:
        hooks: What is asked.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._every_steps, self._num_since = 1, 0
        self._last = ""

    def measured(self, step_s: float) -> None:
        """Takes how long a step takes, which must be the same number on every worker."""
        self._every_steps = max(1, int(_ASK_EVERY_S / max(step_s, 1e-6)))

    def is_new(self, *, is_reported: bool) -> bool:
        """Whether a machine has been called back since the last time that was so; called after each step."""
        self._num_since += 1
        if not is_reported and self._num_since < self._every_steps:
            return False
        self._num_since = 0
        notice = self._hooks.preemption()
        is_new = bool(notice) and notice != self._last
        self._last = notice or self._last
        return is_new
