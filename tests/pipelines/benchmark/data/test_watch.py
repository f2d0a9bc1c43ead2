"""Commands that take a known time, memory and number of processes, and what is told of them."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

from pipelines.benchmark.data.watch import Watched, run_watched

CORES = sorted(os.sched_getaffinity(0))[:1]


def watch(tmp_path: Path, program: str, cap_s: float | None = None) -> tuple[Watched, str]:
    argv = [sys.executable, "-c", textwrap.dedent(program)]
    return run_watched(argv, cores=CORES, watch_cores=CORES, log=tmp_path / "log", cap_s=cap_s, env={"GIVEN": "it"})


def test_processor_time_is_that_of_all_processes(tmp_path):
    # Each says what it took, by its own clock; the grandchild is left behind by its parent, as Ray's servers are.
    watched, printed = watch(
        tmp_path,
        """
        import os, time, sys
        def burn():
            while time.process_time() < 0.3: pass
            print(time.process_time(), flush=True)
        if os.fork() == 0:
            if os.fork() == 0:
                burn()
                os._exit(0)
            burn()
            os._exit(0)
        burn()
        os.wait()
        print(os.environ["GIVEN"], len(os.sched_getaffinity(0)), flush=True)
        """,
    )
    *times, last = sorted(printed.split("\n")[:-1])
    assert last == "it 1"
    assert len(times) == 3
    assert watched.returncode == 0
    # The kernel counts in hundredths where it is looked at, and starting Python is on top.
    assert sum(map(float, times)) - 0.05 <= watched.cpu_s < sum(map(float, times)) + 0.5
    assert watched.seconds >= watched.cpu_s - 0.05


def test_memory_of_processes_adds_up_and_shared_pages_count_once(tmp_path):
    size = 60_000_000
    watched, _ = watch(
        tmp_path,
        f"""
        import os, time
        shared = os.urandom({size})
        if os.fork() == 0:
            own = os.urandom({size})
            time.sleep(0.8)
            os._exit(0)
        os.wait()
        """,
    )
    assert 2 * size < watched.peak_bytes < 2.6 * size
    # Both have the shared part, and the parent and the child Python's.
    assert watched.peak_rss_bytes > 2.9 * size
    assert watched.largest_process_bytes == pytest.approx(2 * size, rel=0.2)
    assert max(size for _, size in watched.memory) <= watched.peak_bytes


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path):
    watched, printed = watch(
        tmp_path,
        """
        import subprocess, sys, time
        for _ in range(2):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
            print(child.pid, flush=True)
        time.sleep(60)
        """,
        cap_s=0.7,
    )
    assert watched.timed_out
    assert watched.returncode == -9
    pids = [int(word) for word in printed.split()]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_failure_is_told_with_what_it_said(tmp_path):
    watched, _ = watch(tmp_path, "import sys; sys.exit('no such thing')")
    assert (watched.returncode, watched.timed_out) == (1, False)
    assert (tmp_path / "log").read_text() == "no such thing\n"
