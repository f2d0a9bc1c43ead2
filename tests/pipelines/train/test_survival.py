"""Training as the command runs it, killed with SIGKILL again and again, then run once more."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mdm_core.errors import WorkError
from pipelines.data.table.sample_table import SampleTable
from pipelines.train import pipeline
from pipelines.train.checkpoint import list_checkpoints, open_checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.hooks import Hooks
from pipelines.train.place import Place
from pipelines.train.run_lock import RunLock
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .command import started
from .conftest import run_config


def config_of(table: SampleTable, folder: Path) -> TrainConfig:
    """A stage of 500 small steps, with a checkpoint every 20."""
    stage = {"resolution": 8, "images": 4000, "global_batch_size": 8, "lr": 1e-3}
    checkpoint = {"uri": str(folder / "run"), "every_images": 160}
    return run_config(table, folder, stages=[stage], checkpoint=checkpoint, log_every_steps=20)


@pytest.fixture(scope="module")
def undisturbed(table: SampleTable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The last checkpoint of the run that nothing happened to, in this process and without Ray."""
    config = config_of(table, tmp_path_factory.mktemp("undisturbed"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=Hooks())
    finally:
        torch.set_num_threads(threads)
    return last_tensors(config)


def last_tensors(config: TrainConfig) -> dict[str, dict[str, torch.Tensor]]:
    """What the last checkpoint of a run holds."""
    checkpoint = open_checkpoint(config.checkpoint.uri)
    return {name: checkpoint.tensors(name) for name in ("weights", "ema", "optimizer")}


def test_killed_worker_driver_and_cluster_cost_nothing_but_time(
    table: SampleTable, tmp_path: Path, undisturbed: dict[str, dict[str, torch.Tensor]]
) -> None:
    config = config_of(table, tmp_path)
    stage = tmp_path / "run" / "stage-0"

    def newest() -> int:
        found = list_checkpoints(config.checkpoint.uri) if stage.exists() else []
        return int(found[-1].rpartition("-")[2]) if found else 0

    def is_uploading() -> bool:
        folders = sorted(stage.glob("images-*"))
        return newest() > 1600 and bool(folders) and not (folders[-1] / "manifest.json").exists()

    with started(config, tmp_path) as command:
        command.wait_until(lambda: newest() >= 320)
        command.kill_worker()
        at = newest()
        command.wait_until(lambda: newest() >= at + 320)
        command.kill_driver()
    with started(config, tmp_path) as command:
        command.wait_until(is_uploading, every_s=0.001)
        command.kill_all()
        assert 1600 < newest() < 4000
    with started(config, tmp_path) as command:
        assert command.result() == 0
    assert newest() == 4000
    ours = last_tensors(config)
    for name, tensors in undisturbed.items():
        assert ours[name].keys() == tensors.keys()
        assert [key for key, value in tensors.items() if not torch.equal(value, ours[name][key])] == []


def test_a_run_ends_when_workers_have_died_more_often_than_it_forgives(
    ray_cluster: None, table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = tmp_path / "deaths"

    def dies(arguments: dict[str, Any]) -> None:
        with deaths.open("a") as file:
            file.write(f"{os.getpid()}\n")
        # Ray Train takes what dies while it is started for a fault of its own.
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(pipeline, "train_worker", dies)
    config = run_config(table, tmp_path, scaling={"max_failures": 1})
    with pytest.raises(WorkError, match=r"^training failed: (.|\n)*Rank 0"):
        pipeline.train(config)
    pids = deaths.read_text().split()
    assert len(pids) == len(set(pids)) == 2
    # Nothing holds the run any more.
    with RunLock(config.checkpoint.uri):
        pass
