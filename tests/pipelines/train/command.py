"""`mdm train` as a process that tests watch and kill."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from pipelines.run_config import dump_config
from pipelines.train.config import TrainConfig


class Command:
    """`mdm train` in a process of its own, and all that it starts."""

    def __init__(self, config: TrainConfig, folder: Path, environment: Mapping[str, str], *, patience_s: float) -> None:
        self._patience_s = patience_s
        path = folder / "train.yaml"
        path.write_text(dump_config(config))
        self._log = folder / "train.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs", "train", "--config", str(path)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
            )
        self._seen: dict[int, psutil.Process] = {}

    def wait_until(self, condition: Callable[[], bool], *, every_s: float = 0.2) -> None:
        """Returns when something has come to be, which the command must live to see; looks `every_s` seconds."""
        deadline_s = time.monotonic() + self._patience_s
        while not condition():
            self._look()
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline_s, self._log.read_text()[-3000:]
            time.sleep(every_s)

    def kill_worker(self) -> None:
        """Kills the process that trains."""
        self._look()
        (worker,) = [p for p in self._seen.values() if _title(p).startswith("ray::") and "RayTrainWorker" in _title(p)]
        worker.kill()

    def kill_driver(self) -> None:
        """Kills the command, and leaves its cluster to itself."""
        self._process.kill()
        self._process.wait()

    def kill_all(self) -> None:
        """Kills the command and its whole cluster at once."""
        self._look()
        self._process.kill()
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def result(self) -> int:
        """Waits for the end; returns the exit code."""
        return self._process.wait(self._patience_s)

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= {p.pid: p for p in psutil.Process(self._process.pid).children(recursive=True)}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@contextlib.contextmanager
def started(
    config: TrainConfig, folder: Path, *, environment: Mapping[str, str] | None = None, patience_s: float = 90.0
) -> Iterator[Command]:
    """Runs the command; whatever is left of it ends with the block, which waits for nothing longer than that."""
    command = Command(config, folder, environment or {}, patience_s=patience_s)
    try:
        yield command
    finally:
        command.kill_all()
