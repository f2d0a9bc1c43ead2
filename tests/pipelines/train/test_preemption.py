"""How soon a run sees that a machine is called back, whatever its steps take and however seldom it reports."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import torch.distributed

from pipelines.data.table.sample_table import SampleTable
from pipelines.train.checkpoint import list_checkpoints
from pipelines.train.hooks import Hooks
from pipelines.train.loss_window import LossWindow
from pipelines.train.place import Place
from pipelines.train.preemption import PreemptionNotice
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .conftest import run_config
from .listener import Listener


class Cloud(Listener):
    """Calls a machine back after some steps; keeps the steps at which it was asked."""

    def __init__(self, *, called_back_after: int) -> None:
        super().__init__()
        self.asked: list[int] = []
        self._step, self._called_back_after = 0, called_back_after

    def stepped(self, step: int, ids: object, waited_s: float) -> None:
        self._step = step

    def preemption(self) -> str:
        self.asked.append(self._step)
        return "node a" if self._step >= self._called_back_after else ""


def test_a_notice_between_two_reports_makes_one_checkpoint_at_once(table: SampleTable, tmp_path: Path) -> None:
    stage = {"resolution": 8, "images": 160, "global_batch_size": 8, "lr": 1e-3}
    checkpoint = {"uri": str(tmp_path / "run"), "every_images": 1000}
    config = run_config(table, tmp_path, stages=[stage], checkpoint=checkpoint, log_every_steps=20)
    cloud = Cloud(called_back_after=7)
    train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=cloud)
    assert cloud.asked == list(range(1, 21))
    assert [int(uri.rpartition("-")[2]) for uri in list_checkpoints(config.checkpoint.uri)] == [56, 160]


@pytest.mark.parametrize(
    ("step_s", "expected"),
    [
        (0.1, [1, 2, 3, 4, 54, 60, 110, 120]),
        (1.2, [1, 2, 3, 4, *range(8, 60, 4), 60, *range(64, 120, 4), 120]),
        (9.0, list(range(1, 121))),
    ],
)
def test_five_seconds_pass_between_two_questions_at_most(step_s: float, expected: list[int]) -> None:
    """Of 120 steps with a report after 4, 60 and 120, or a step that takes longer."""
    cloud = Cloud(called_back_after=1000)
    notice = PreemptionNotice(cloud)
    for step in range(1, 121):
        cloud.stepped(step, (), 0.0)
        is_reported = step in (4, 60, 120)
        if is_reported:
            notice.measured(step_s)
        notice.is_new(is_reported=is_reported)
    assert cloud.asked == expected


def test_each_notice_counts_once() -> None:
    class Said(Hooks):
        words = iter(["", "a", "a", "", "a", "a, b", "a, b"])

        def preemption(self) -> str:
            return next(self.words)

    notice = PreemptionNotice(Said())
    assert [notice.is_new(is_reported=True) for _ in range(7)] == [False, True, False, False, False, True, False]


def _agree(rank: int, store: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    window = LossWindow(Place(rank, 3, torch.device("cpu")), num_timesteps=4)
    time.sleep(0.7 * (rank + 1))
    for _ in range(7):
        window.add(torch.ones(1, 2), torch.tensor([0, 3]), torch.tensor(1.0))
    Path(results, str(rank)).write_text(window.take(waited_s=0.0).agreed_step_s.hex())
    torch.distributed.destroy_process_group()


def test_workers_with_clocks_of_their_own_agree_on_the_length_of_a_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = str(tmp_path / "store"), str(tmp_path)
    processes = [context.Process(target=_agree, args=(rank, *arguments)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    values = {float.fromhex((tmp_path / str(rank)).read_text()) for rank in range(3)}
    assert len(values) == 1
    # Rank 0 slept least; the others have 0.2 and 0.3.
    assert 0.1 <= values.pop() < 0.2
