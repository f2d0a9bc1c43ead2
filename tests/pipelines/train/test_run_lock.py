"""One writer in a run's folder: on a local disk and on S3, with real processes and with owners made up elsewhere."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.train.checkpoint import latest_checkpoint
from pipelines.train.checkpoint_writer import CheckpointWriter, save_checkpoint
from pipelines.train.run_lock import Fence, Owner, RunLock, take_fence

from .small_state import manifest, state

PLACES = ["local", "s3"]


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The folder of a run, on a local disk or on S3."""
    return storage.join(request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path), "run")


def elsewhere(name: str) -> Owner:
    """A process on another machine, about which nothing but its signs of life is known."""
    return replace(Owner.this_process(), machine="", host=name, token=name, pid=7)


def leave(run: str, name: str, *, silent_s: float = 0.0) -> RunLock:
    """A lock held from elsewhere, whose holder has died."""
    lock = RunLock(run, beat_s=1e6, owner=replace(elsewhere(name), began_s=time.time() - silent_s))
    lock.__enter__()
    if silent_s:
        storage.delete(storage.join(run, "lock", f"{name}.beat"))
    return lock


@pytest.mark.parametrize("run", PLACES, indirect=True)
def test_a_second_run_is_refused_while_the_first_lives(run: str) -> None:
    message = (
        r"run is being written to by process \d+ of .*, which began at 20.*; two runs can't share a folder: wait .* "
        r"another checkpoint\.uri"
    )
    with RunLock(run) as first:
        with pytest.raises(ConfigError, match=message), RunLock(run):
            pass
        assert not first.is_lost()
    with RunLock(run) as second:
        assert first.is_lost()
        assert not second.is_lost()
    assert len(storage.list_files(storage.join(run, "lock"))) == 2


@pytest.mark.parametrize("run", PLACES, indirect=True)
def test_of_many_at_once_one_is_let_in(run: str) -> None:
    entered, refused, start, end = [], [], threading.Barrier(5), threading.Event()

    def go() -> None:
        start.wait()
        try:
            with RunLock(run) as lock:
                entered.append(lock)
                end.wait()
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=go) for _ in range(5)]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + 30
    while len(entered) + len(refused) < 5 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    holders = [lock for lock in entered if not lock.is_lost()]
    end.set()
    for thread in threads:
        thread.join()
    assert (len(entered), len(holders), len(refused)) == (1, 1, 4)


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    code = "import sys, time; from pipelines.train.run_lock import RunLock\n"
    code += "with RunLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, run], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"is being written to by process {process.pid} of "), RunLock(run):
            pass
        process.kill()
    began_s = time.monotonic()
    with RunLock(run):
        assert time.monotonic() - began_s < 5


def test_another_process_with_the_number_of_the_dead_one_is_not_it(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    dead = RunLock(run, owner=replace(Owner.this_process(), process_began="1"))
    dead.__enter__()
    with RunLock(run) as lock:
        assert dead.is_lost()
        assert not lock.is_lost()
    dead.__exit__(None)


@pytest.mark.parametrize("run", PLACES, indirect=True)
def test_one_from_elsewhere_is_followed_once_it_is_silent(run: str, caplog: pytest.LogCaptureFixture) -> None:
    with RunLock(run, beat_s=0.2, stale_s=30.0, owner=elsewhere("alive")):
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match="written to by process 7 of alive"), RunLock(run, beat_s=0.2):
            pass
        assert time.monotonic() - began_s < 20
    # One that ended in order is not waited for.
    first = leave(run, "dead")
    began_s = time.monotonic()
    with RunLock(run, beat_s=0.2, stale_s=1.0):
        assert 1.0 <= time.monotonic() - began_s < 20
    assert "was last held by process 7 of dead" in caplog.text
    assert first.is_lost()
    # Nor is one that has been silent for hours.
    leave(run, "long gone", silent_s=7200)
    began_s = time.monotonic()
    with RunLock(run):
        assert time.monotonic() - began_s < 10


@pytest.mark.parametrize("run", PLACES, indirect=True)
def test_a_writer_that_was_taken_over_commits_nothing(run: str) -> None:
    paused = leave(run, "paused")
    fence = take_fence(run, paused.owner)
    save_checkpoint(run, manifest(16), state(1.0), fence=fence)
    with RunLock(run, beat_s=0.1, stale_s=0.2) as lock:
        # It wakes up.
        told = rf"{run} was taken over by process \d+ of .*; this process writes nothing more there"
        with pytest.raises(WorkError, match=told), CheckpointWriter(run, keep=1, fence=fence) as writer:
            writer.save(manifest(32), state(2.0))
        with pytest.raises(WorkError, match="is no more this run's to write to; it is held by process"):
            take_fence(run, paused.owner)
        assert paused.is_lost()
        newest = latest_checkpoint(run)
        assert newest is not None
        assert newest.manifest.images_seen == 16
        save_checkpoint(run, manifest(32), state(3.0), fence=take_fence(run, lock.owner))
    newest = latest_checkpoint(run)
    assert newest is not None
    assert newest.tensors("weights")["w"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("taken_after", [1, 2, 3])
def test_the_manifest_is_not_written_once_the_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_after: int
) -> None:
    """The attempt before finishes an upload while the next one has begun."""
    run, num_checks = str(tmp_path / "run"), 0
    check = Fence.check

    def checked(fence: Fence) -> None:
        nonlocal num_checks
        num_checks += 1
        check(fence)
        if num_checks == taken_after:
            take_fence(run, lock.owner)

    with RunLock(run) as lock:
        old = take_fence(run, lock.owner)
        monkeypatch.setattr(Fence, "check", checked)
        with pytest.raises(WorkError, match="was taken over by a later attempt of its run"):
            save_checkpoint(run, manifest(16), state(1.0), fence=old)
        monkeypatch.undo()
        assert latest_checkpoint(run) is None
        assert len(storage.list_files(storage.join(run, "stage-0"))) == taken_after - 1


def test_attempts_of_one_run_follow_each_other_at_once(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with RunLock(run) as lock:
        fences = [take_fence(run, lock.owner) for _ in range(3)]
        assert [fence.number for fence in fences] == [2, 3, 4]
        fences[2].check()
        for fence in fences[:2]:
            with pytest.raises(WorkError, match="was taken over by a later attempt"):
                fence.check()
        assert not lock.is_lost()
    assert [Path(file).suffix for file in storage.list_files(storage.join(run, "lock"))] == [".json", ".beat"]


def test_a_lock_whose_writer_died_over_it_is_nobodys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    (run / "lock").mkdir(parents=True)
    (run / "lock" / "00000004.json").write_bytes(b"")
    with RunLock(str(run)) as lock:
        assert take_fence(str(run), lock.owner).number == 6
    assert "its writer died over it" in caplog.text
