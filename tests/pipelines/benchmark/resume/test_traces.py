"""What is made of the traces of a killed worker and the one after it, on traces written by hand."""

from dataclasses import replace

import pytest

from mdm_core.errors import WorkError
from pipelines.benchmark.resume.traces import (
    Life,
    Step,
    last_step,
    new_step_s,
    next_step_s,
    read_lives,
    repeated_and_skipped,
    steps_lost,
    surviving_rows,
    where,
)
from pipelines.train.trace import Trace

TABLE = [f"{number:02x}" for number in range(12)]
KILLED_S = 107.5


def step(number: int, done_s: float, *, rows: int | None = None, waited_s: float = 0.25) -> Step:
    """A step of two rows, those of step `rows` if it is another."""
    first = 2 * ((rows or number) - 1)
    return Step(number, done_s, tuple(TABLE[first : first + 2]), waited_s)


def life(steps: list[Step], *, checkpoint: str | None = None, rank: int = 0, imported_s: float = 90.0) -> Life:
    points = {"imported": imported_s, "began": imported_s + 4, "opened": imported_s + 4.5, "loaded": imported_s + 6}
    return Life(rank, 1, points, checkpoint, steps)


def killed(**changes: list[Step]) -> list[Life]:
    """Six steps of two rows, killed after the fifth; the checkpoint was made after the third."""
    first = changes.get("first", [step(n, 100 + n) for n in range(1, 6)])
    second = changes.get("second", [step(n, 120 + n) for n in range(4, 7)])
    return [life(first), life(second, checkpoint="/run/stage-0/images-000000000006", imported_s=110)]


def counted(lives: list[Life]) -> tuple[int, int]:
    return repeated_and_skipped(surviving_rows(lives, global_batch_size=2), TABLE)


def test_a_step_that_is_done_again_is_no_image_twice():
    lives = killed()
    assert surviving_rows(lives, global_batch_size=2) == TABLE
    assert counted(lives) == (0, 0)
    assert steps_lost(lives, global_batch_size=2) == 2
    assert last_step(lives[:1]) == 5


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([step(5, 125), step(6, 126)], (0, 2)),  # began one step late
        ([step(n, 120 + n) for n in range(3, 7)], (2, 0)),  # began one step early
        ([step(4, 124, rows=5), step(5, 125, rows=6), step(6, 126, rows=1)], (2, 2)),  # the reader was ahead
        ([step(4, 124, rows=4), step(5, 125, rows=4), step(6, 126, rows=4)], (4, 4)),  # stood still
    ],
)
def test_a_resume_at_the_wrong_place_is_counted(second, expected):
    assert counted(killed(second=second)) == expected


def test_without_a_checkpoint_all_is_done_again():
    lives = [life([step(1, 101), step(2, 102)]), life([step(n, 120 + n) for n in range(1, 7)], imported_s=110)]
    assert counted(lives) == (0, 0)
    assert steps_lost(lives, global_batch_size=2) == 2


def test_of_several_workers_each_has_its_share_and_its_own_history():
    def share(lives: list[Life], rank: int) -> list[Life]:
        for one in lives:
            one.rank = rank
            one.steps = [replace(step, ids=step.ids[rank : rank + 1]) for step in one.steps]
        return lives

    lives = share(killed(), 0) + share(killed(first=[step(n, 100 + n) for n in range(1, 5)]), 1)
    assert counted(lives) == (0, 0)
    # The other worker had not completed the last step of the killed one.
    assert steps_lost(lives, global_batch_size=2) == 2


def test_a_worker_that_never_saw_the_checkpoints_changes_nothing():
    lives = killed()
    lives.insert(1, Life(0, 2, {"imported": 108.0, "began": 109.0}))
    assert counted(lives) == (0, 0)


def test_where_the_time_went_adds_up():
    lives = killed()
    parts = where(lives, killed_s=KILLED_S)
    assert parts == {"ray": 2.5, "imports": 4.0, "run": 0.5, "state": 1.5, "batch": 0.25, "step": 7.75}
    assert next_step_s(lives, killed_s=KILLED_S) == 124
    assert sum(parts.values()) == 124 - KILLED_S
    # Steps 4 and 5 had been done before.
    assert new_step_s(lives, killed_s=KILLED_S) == 126


def test_the_worker_that_is_last_is_the_one_that_counts():
    lives = killed()
    lives.append(life([step(4, 124.5)], rank=1, checkpoint=lives[1].checkpoint, imported_s=112))
    assert next_step_s(lives, killed_s=KILLED_S) == 124.5
    assert where(lives, killed_s=KILLED_S)["ray"] == 4.5


def test_no_step_after_the_kill_is_an_error():
    with pytest.raises(WorkError, match="no worker completed a step after the kill"):
        where(killed()[:1], killed_s=KILLED_S)


def test_what_a_worker_writes_is_what_is_read(tmp_path):
    trace = Trace(str(tmp_path), rank=3)
    trace.reached("began")
    trace.reached("opened", checkpoint="/run/stage-0/images-000000000006")
    trace.reached("loaded")
    trace.stepped(4, [b"\x06", b"\x07"], 0.5)
    (tmp_path / "rank-0-pid-1.jsonl").touch()
    with next(tmp_path.glob("rank-3-*")).open("a") as file:
        file.write('{"step": 5, "time_s": 17')
    (one,) = read_lives(tmp_path)
    assert (one.rank, one.checkpoint) == (3, "/run/stage-0/images-000000000006")
    assert list(one.points) == ["imported", "began", "opened", "loaded"]
    assert sorted(one.points.values()) == list(one.points.values())
    assert [(s.number, s.ids, s.waited_s) for s in one.steps] == [(4, ("06", "07"), 0.5)]
    assert one.steps[0].done_s >= one.points["loaded"]
