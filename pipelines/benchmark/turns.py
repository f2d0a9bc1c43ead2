"""Processes that work in turn, so that what is compared shares the machine's good and bad moments but no memory.

with Worker("ours", functools.partial(make_ours, config)) as ours, Worker("plain", …) as plain:
    ours.ready(), plain.ready()
    for _ in range(5):
        ours.ask("step", doing="in a timed step")
        plain.ask("step", doing="in a timed step")
"""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch

from mdm_core.errors import ConfigError, MdmError, WorkError

Answers = Callable[[str], Any]
"""Does what it is asked by name, and returns plain values."""


class Worker:
    """A process of its own that does one thing at a time, when asked."""

    def __init__(self, label: str, make: Callable[[], Answers]) -> None:
        """Starts the process.

        Args:
            label: What messages call it.
            make: Called in the process; must be picklable.
        """
        self._label = label
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), name=f"benchmark-{label}", daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Waits until the process has made what answers.

        Raises:
            WorkError: If that fails, or the process dies.
            ConfigError: If it raises one.
        """
        self._answer("while it was being built")

    def ask(self, request: str, *, doing: str) -> Any:
        """The process's answer; `doing` says for messages what it is doing meanwhile, as in `in a timed step`.

        Raises:
            WorkError: If it fails, runs out of memory or dies.
        """
        try:
            self._connection.send(request)
        except OSError:
            raise self._death(doing) from None
        return self._answer(doing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        if kind is None:
            # It ends by itself when nobody asks any more.
            self._process.join(timeout=10)
        self._process.kill()
        self._process.join()
        self._process.close()

    def _answer(self, doing: str) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._death(doing) from None
        if kind == "done":
            return value
        if kind == "bad input":
            raise ConfigError(value)
        raise WorkError(f"{self._label}, {doing}: {value}")

    def _death(self, doing: str) -> WorkError:
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            how = "was killed (signal 9), as the system does when memory runs out; make --batch or --channels smaller"
        elif code is not None and code < 0:
            how = f"was ended by signal {-code}"
        else:
            how = f"ended with exit code {code}"
        return WorkError(f"{self._label}: its process {how}, {doing}")


def _serve(connection: Connection, make: Callable[[], Answers]) -> None:
    """The life of the process: makes what answers, then answers until nobody asks any more."""
    # Ctrl-C reaches every process of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr
    try:
        answers = make()
        connection.send(("done", None))
        while True:
            request = connection.recv()
            connection.send(("done", answers(request)))
    except EOFError:
        return
    except ConfigError as error:
        connection.send(("bad input", str(error)))
    except MdmError as error:
        connection.send(("failed", str(error)))
    except Exception as error:
        if _is_out_of_memory(error):
            said = str(error).splitlines()[0][:200]
            connection.send(("failed", f"memory ran out ({said}); make --batch or --channels smaller"))
        else:
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}"))


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
