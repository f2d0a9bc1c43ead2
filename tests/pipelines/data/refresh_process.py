"""`mdm refresh` as a process, with everything that it starts: watched, killed in part, and cleaned up after."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_WATCH_S = 0.1
_WORKER = "FetchWorker"


@dataclass(frozen=True)
class _Process:
    """One process of this machine, as /proc tells of it."""

    parent: int
    started: int
    is_alive: bool


class RefreshProcess:
    """A refresh in a session of its own; the end of the `with` block leaves nothing of it.

    Args:
        config: Its configuration file; what it prints goes beside it.
        environment: What it sees of this process's, and what else.
    """

    def __init__(self, config: Path, environment: Mapping[str, str]) -> None:
        self._config = config
        self._log = config.with_suffix(".log")
        self._out = config.with_suffix(".json")
        self._environment = dict(environment)
        self._known: dict[int, int] = {}
        self._is_over = threading.Event()
        self._worked_since_s = math.inf
        self.peak_driver_bytes = 0
        self.peak_worker_bytes = 0

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "jobs.refresh", "--config", str(self._config), "--json"]
        with self._log.open("wb") as log, self._out.open("wb") as out:
            self._driver = subprocess.Popen(
                command, stdout=out, stderr=log, env=self._environment, start_new_session=True
            )
        self._known[self._driver.pid] = _processes()[self._driver.pid].started
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._watcher.join()
        self._kill_all()
        self._driver.wait()

    @property
    def work_s(self) -> float:
        """Seconds since a worker was seen first."""
        return max(0.0, time.monotonic() - self._worked_since_s)

    @property
    def is_running(self) -> bool:
        """Whether its driver is there."""
        return self._driver.poll() is None

    def wait(self, timeout_s: float) -> tuple[int, dict[str, Any]]:
        """Returns its exit code, and the last line that it printed as JSON; nothing if that is something else.

        Raises:
            TimeoutExpired: It took longer.
        """
        code = self._driver.wait(timeout_s)
        try:
            return code, dict(json.loads(self._out.read_text().splitlines()[-1]))
        except (IndexError, ValueError):
            return code, {}

    def log(self) -> str:
        """Returns what it told on stderr and on stdout."""
        return self._log.read_text() + self._out.read_text()

    def workers(self) -> list[int]:
        """Returns the ids of the processes that fetch."""
        return sorted(pid for pid in self._family() if _WORKER in _command(pid))

    def kill(self, victim: str, draw: random.Random) -> int | None:
        """Kills its driver, or one of its workers if there is one, and returns which process that was."""
        pid = self._driver.pid
        if victim == "worker":
            workers = self.workers()
            if not workers:
                return None
            pid = draw.choice(workers)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return pid

    def _watch(self) -> None:
        while not self._is_over.wait(_WATCH_S):
            for pid in self._family():
                peak = _peak_bytes(pid)
                if pid == self._driver.pid:
                    self.peak_driver_bytes = max(self.peak_driver_bytes, peak)
                elif _WORKER in _command(pid):
                    self._worked_since_s = min(self._worked_since_s, time.monotonic())
                    self.peak_worker_bytes = max(self.peak_worker_bytes, peak)

    def _family(self) -> list[int]:
        """Returns the driver and all that descend from it, those too whose parents have ended since."""
        found = _processes()
        family = {pid for pid, started in self._known.items() if pid in found and found[pid].started == started}
        while more := {pid for pid, process in found.items() if process.parent in family} - family:
            family |= more
        self._known = {pid: found[pid].started for pid in family}
        return [pid for pid in family if found[pid].is_alive]

    def _kill_all(self) -> None:
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s and (family := self._family()):
            for pid in family:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)


def _processes() -> dict[int, _Process]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold anything.
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(path.parent.name)] = _Process(int(fields[1]), int(fields[19]), fields[0] not in "ZX")
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
