"""How long work tells how far it is: a bar on a terminal, JSON lines everywhere else."""

import json
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Field: TypeAlias = float | int | str


class Progress:
    """Counts finished units of work and shows them on stderr, with a rate and the time left.

        with Progress("refresh", total=2000, unit="links") as progress:
            progress.advance(20, ok=19)

    On a terminal it is one bar. Elsewhere it is a line of JSON every `every_s` seconds and a last one at
    the end, so that a log of a cluster job can be read by a program.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int | None = None,
        unit: str = "items",
        start: int = 0,
        every_s: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describes the work; nothing is shown before the `with` block begins.

        Args:
            name: What is being done, one word.
            total: How many units there are, or None where that is not known.
            unit: What is counted, in the plural.
            start: Units that an earlier run finished; they count as done but not in the rate.
            every_s: Seconds between two JSON lines.
            stream: Where to write; stderr when None.
            clock: Gives seconds, for tests.
        """
        self._name, self._total, self._unit = name, total, unit
        self._start = self._done = start
        self._every_s, self._clock = every_s, clock
        self._stream = stream if stream is not None else sys.stderr
        self._fields: dict[str, Field] = {}
        self._began_s = self._last_line_s = 0.0
        self._bar: RichProgress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._began_s = self._last_line_s = self._clock()
        if self._stream.isatty():
            self._bar = _new_bar(self._stream)
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._done, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        else:
            self._write_line(last=True, ended="done" if kind is None else "stopped")

    def advance(self, n: int = 1, **fields: Field) -> None:
        """Counts `n` more units as done; `fields` (loss=…, ok=…) are shown from now on beside the count."""
        self._done += n
        self._fields.update(fields)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=self._note())
        elif self._clock() - self._last_line_s >= self._every_s:
            self._write_line()

    @property
    def done(self) -> int:
        """Units finished so far, those of earlier runs included."""
        return self._done

    @property
    def rate(self) -> float:
        """Units a second since the `with` block began."""
        elapsed_s = self._clock() - self._began_s
        return (self._done - self._start) / elapsed_s if elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the rate so far, or None where that can't be said yet."""
        if self._total is None or self.rate <= 0:
            return None
        return max(0, self._total - self._done) / self.rate

    def _note(self) -> str:
        shown = [f"{self.rate:,.1f} {self._unit}/s", *(f"{key} {_short(value)}" for key, value in self._fields.items())]
        return "  ".join(shown)

    def _write_line(self, *, last: bool = False, ended: str = "") -> None:
        self._last_line_s = self._clock()
        eta_s = self.eta_s
        line: dict[str, Field | None] = {
            "progress": self._name,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "per_s": round(self.rate, 2),
            "elapsed_s": round(self._last_line_s - self._began_s, 1),
        }
        if last:
            line["state"] = ended
        else:
            line["eta_s"] = None if eta_s is None else round(eta_s, 1)
        line |= {
            key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in self._fields.items()
        }
        print(json.dumps(line), file=self._stream, flush=True)


def _new_bar(stream: TextIO) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=stream),
    )


def _short(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
