"""A process that runs a command, and tells how long it and all that it started took, and how much memory.

    python -m pipelines.benchmark.data.watch '{"argv": […], "cores": [0], …}'

It is a process of its own so that what the command leaves behind, as Ray leaves its servers, comes to it and to no one
else. Reads /proc, so it needs Linux.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mdm_core.errors import WorkError

_PR_SET_CHILD_SUBREAPER = 36
_EVERY_S = 0.05
_MEMORY_EVERY_S = 0.2
_PATIENCE_S = 10.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Watched:
    """What a command took; memory and processor time are those of all its processes together."""

    returncode: int
    timed_out: bool
    began_s: float
    """Seconds since 1970."""
    seconds: float
    """Until the command itself ended."""
    cpu_s: float
    peak_bytes: int
    """Most memory at once: shared pages count once, looked at five times a second."""
    peak_rss_bytes: int
    """The same with shared pages counted in each process that has them."""
    largest_process_bytes: int
    """Peak of the largest process, which the kernel keeps exactly."""
    memory: list[tuple[float, int]]
    """Seconds since the beginning, and bytes."""


def run_watched(
    argv: Sequence[str],
    *,
    cores: Sequence[int],
    watch_cores: Sequence[int],
    log: Path,
    cap_s: float | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[Watched, str]:
    """Runs a command, and returns what it took and what it printed.

    Args:
        argv: The command.
        cores: Those that it runs on.
        watch_cores: Those that this measuring runs on.
        log: Where what it says on stderr goes.
        cap_s: Seconds after which it is ended, with all it started.
        env: Further variables of its environment.

    Raises:
        WorkError: It could not be watched.
    """
    spec = {
        "argv": list(argv),
        "cores": list(cores),
        "watch_cores": list(watch_cores),
        "log": str(log),
        "cap_s": cap_s,
        "env": dict(env or {}),
    }
    command = [sys.executable, "-m", __name__, json.dumps(spec)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate()
        except BaseException:
            # It ends what it watches, then itself.
            process.terminate()
            raise
    if process.returncode != 0:
        raise WorkError(f"the process that watches {argv[0]} ended with exit code {process.returncode}")
    said = json.loads(out)
    printed = said.pop("printed")
    said["memory"] = [tuple(point) for point in said["memory"]]
    return Watched(**said), printed


@dataclass
class _Sums:
    """What was seen of the processes so far."""

    ticks: dict[tuple[int, int], int] = field(default_factory=dict)
    peak_pss: int = 0
    peak_rss: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)


def main(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Runs and watches the command of `spec`; what `Watched` holds, and what was `printed`."""
    signal.signal(signal.SIGTERM, _stop)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sums = _Sums()
    printed = Path(spec["log"]).with_suffix(".out")
    with printed.open("wb") as out, Path(spec["log"]).open("wb") as log:
        # Children begin with the cores of who starts them.
        os.sched_setaffinity(0, spec["cores"])
        began_s, clock_s = time.time(), time.monotonic()
        process = subprocess.Popen(
            spec["argv"], stdout=out, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | spec["env"]
        )
        os.sched_setaffinity(0, spec["watch_cores"])
        try:
            timed_out = _wait(process, clock_s, spec["cap_s"], sums)
            seconds = time.monotonic() - clock_s
        finally:
            _end_all(process, sums)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "returncode": process.returncode,
        "timed_out": timed_out,
        "began_s": began_s,
        "seconds": seconds,
        # Ray's servers forget what the processes they started took, and looking misses the last moments.
        "cpu_s": max(usage.ru_utime + usage.ru_stime, sum(sums.ticks.values()) / _TICKS_PER_S),
        "peak_bytes": max(sums.peak_pss, usage.ru_maxrss * 1024),
        "peak_rss_bytes": sums.peak_rss,
        "largest_process_bytes": usage.ru_maxrss * 1024,
        "memory": sums.memory,
        "printed": printed.read_text(encoding="utf-8", errors="replace"),
    }


def _wait(process: "subprocess.Popen[bytes]", clock_s: float, cap_s: float | None, sums: _Sums) -> bool:
    """Waits for the command, looking at its processes meanwhile; whether its time ran out."""
    handle = os.pidfd_open(process.pid)
    ended = select.poll()
    ended.register(handle, select.POLLIN)
    memory_s = clock_s
    try:
        while not ended.poll(1000 * _EVERY_S):
            now_s = time.monotonic()
            processes = descendants()
            _count_time(processes, sums)
            if now_s >= memory_s:
                memory_s = now_s + _MEMORY_EVERY_S
                _count_memory(list(processes), now_s - clock_s, sums)
            if cap_s is not None and now_s - clock_s > cap_s:
                return True
    finally:
        os.close(handle)
    process.wait()
    return False


def descendants() -> dict[int, list[str]]:
    """The processes below this one, with what /proc/PID/stat says after the name."""
    stats: dict[int, list[str]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                text = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            stats[int(entry.name)] = text.rpartition(")")[2].split()
    found: dict[int, list[str]] = {}
    parents = {os.getpid()}
    while parents:
        children = {pid: stat for pid, stat in stats.items() if int(stat[1]) in parents}
        found |= children
        parents = set(children)
    return found


def _count_time(processes: Mapping[int, Sequence[str]], sums: _Sums) -> None:
    for pid, stat in processes.items():
        # A number is given to another process in time; with its beginning it is one process.
        sums.ticks[pid, int(stat[19])] = int(stat[11]) + int(stat[12])


def _count_memory(pids: Sequence[int], at_s: float, sums: _Sums) -> None:
    pss = rss = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        pss += sizes.get("Pss", 0)
        rss += sizes.get("Rss", 0)
    sums.peak_pss, sums.peak_rss = max(sums.peak_pss, pss), max(sums.peak_rss, rss)
    sums.memory.append((at_s, pss))


def _end_all(process: "subprocess.Popen[bytes]", sums: _Sums) -> None:
    """Waits for what the command left behind, if it has ended itself; kills what is still there then."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    deadline_s = time.monotonic() + (0.0 if process.returncode is None else _PATIENCE_S)
    while processes := descendants():
        _count_time(processes, sums)
        if time.monotonic() >= deadline_s:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.poll()
        for pid, stat in processes.items():
            # What has lost its parent has become a child of this process.
            if pid != process.pid and int(stat[1]) == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(_EVERY_S)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    json.dump(main(json.loads(sys.argv[1])), sys.stdout)
