"""What the traces of a disturbed run say: which rows its weights come from, and where the time went.

A killed worker has got further than its last checkpoint. What it did beyond is in no weights, and is done again by the
worker that follows it; all else that was done, up to the checkpoint, is the history that the weights come from.
"""

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mdm_core.errors import WorkError
from pipelines.train.checkpoint import stage_and_images


@dataclass(frozen=True)
class Step:
    """A step that a process completed."""

    number: int
    """From 1."""
    done_s: float
    """When, in seconds since 1970."""
    ids: tuple[str, ...]
    """Rows of its share."""
    waited_s: float
    """Seconds that the process had waited for batches until then."""


@dataclass
class Life:
    """What one process told; times are in seconds since 1970."""

    rank: int
    pid: int
    points: dict[str, float] = field(default_factory=dict)
    """When it reached each of the points of `Hooks.reached`; at `imported` it began to import the training."""
    checkpoint: str | None = None
    """URI of what it went on from."""
    steps: list[Step] = field(default_factory=list)


def read_lives(folder: Path) -> list[Life]:
    """What the processes of a run have told so far, in the order in which they began to."""
    lives = [life for path in folder.glob("*.jsonl") if (life := _life(path)).points]
    return sorted(lives, key=lambda life: life.points["imported"])


def last_step(lives: Sequence[Life]) -> int:
    """The last step that rank 0 has completed; 0 if there is none."""
    return max((step.number for life in lives if life.rank == 0 for step in life.steps), default=0)


def surviving_rows(lives: Sequence[Life], *, global_batch_size: int) -> list[str]:
    """Ids of the rows that the last weights come from, each as often as it was trained on.

    Args:
        lives: As `read_lives` gives them.
        global_batch_size: Images of a step, over all workers.
    """
    kept = (step for step, is_kept in _steps(lives, global_batch_size) if is_kept)
    return [row for step in kept for row in step.ids]


def steps_lost(lives: Sequence[Life], *, global_batch_size: int) -> int:
    """Steps that were completed and are in no weights, so that they were done again."""
    lost: Counter[int] = Counter()
    for rank in {life.rank for life in lives}:
        of_rank = [life for life in lives if life.rank == rank]
        lost[rank] = sum(not is_kept for _, is_kept in _steps(of_rank, global_batch_size))
    return max(lost.values(), default=0)


def repeated_and_skipped(rows: Sequence[str], table: Collection[str]) -> tuple[int, int]:
    """How many images too many and too few there are among `rows`, which should be every row of the table once."""
    counts, wanted = Counter(rows), Counter(table)
    return (counts - wanted).total(), (wanted - counts).total()


def next_step_s(lives: Sequence[Life], *, killed_s: float) -> float:
    """When all workers had completed their first step after the kill, in seconds since 1970."""
    return _last_to_step(lives, killed_s).steps[0].done_s


def new_step_s(lives: Sequence[Life], *, killed_s: float) -> float:
    """When they had completed the first step that no worker had completed before the kill."""
    before = max((step.number for life in lives for step in life.steps if step.done_s < killed_s), default=0)
    after = _last_to_step(lives, killed_s)
    return next(step.done_s for step in after.steps if step.number > before)


def where(lives: Sequence[Life], *, killed_s: float) -> dict[str, float]:
    """Seconds of each part of the way from the kill to the next completed step.

    Of several workers the one is followed that was the last to complete its first step.

    Returns:
        `ray`: until the process of a new worker begins to import the training; `imports`: until all is imported and the
        worker runs, in a group with the others; `run`: until the run is its own and the newest checkpoint is read and
        compared with its checksums; `state`: until the table is open and the network and its state are built; `batch`:
        the wait for the first batch; `step`: the step, and all else.
    """
    last = _last_to_step(lives, killed_s)
    points, first = last.points, last.steps[0]
    return {
        "ray": points["imported"] - killed_s,
        "imports": points["began"] - points["imported"],
        "run": points["opened"] - points["began"],
        "state": points["loaded"] - points["opened"],
        "batch": first.waited_s,
        "step": first.done_s - points["loaded"] - first.waited_s,
    }


def _last_to_step(lives: Sequence[Life], killed_s: float) -> Life:
    after = [life for life in lives if life.points["imported"] >= killed_s and life.steps]
    if not after:
        raise WorkError("no worker completed a step after the kill; the log says why")
    return max(after, key=lambda life: life.steps[0].done_s)


def _steps(lives: Sequence[Life], global_batch_size: int) -> Iterator[tuple[Step, bool]]:
    """Every step of each life, and whether it is in the checkpoint that the next life of its rank went on from."""
    for rank in sorted({life.rank for life in lives}):
        # One that never saw the checkpoints has changed nothing.
        opened = [life for life in lives if life.rank == rank and "opened" in life.points]
        for life, following in itertools.zip_longest(opened, opened[1:]):
            kept = None if following is None else _steps_in(following.checkpoint, global_batch_size)
            for step in life.steps:
                yield step, kept is None or step.number <= kept


def _steps_in(checkpoint: str | None, global_batch_size: int) -> int:
    numbers = None if checkpoint is None else stage_and_images(checkpoint)
    return 0 if numbers is None else numbers[1] // global_batch_size


def _life(path: Path) -> Life:
    _, rank, _, pid = path.stem.split("-")
    life = Life(int(rank), int(pid))
    # What comes after the last line break is a line that is being written.
    for text in path.read_text().rpartition("\n")[0].splitlines():
        line = json.loads(text)
        if "step" in line:
            life.steps.append(Step(line["step"], line["time_s"], tuple(line["ids"]), line["waited_s"]))
            continue
        life.points[line["point"]] = line["time_s"]
        life.checkpoint = line.get("checkpoint", life.checkpoint)
    return life
