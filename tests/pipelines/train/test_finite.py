"""A row that makes the gradients infinite: who says so, and what becomes of the run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mdm_core.errors import WorkError
from pipelines.data.table.sample_table import SampleTable
from pipelines.train.checkpoint import list_checkpoints, open_checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.pipeline import train
from pipelines.train.place import Place
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .conftest import make_table, row_id, run_config
from .listener import Listener
from .reading import steps

SPOILED = 23
BATCH = 8


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> SampleTable:
    """40 rows, one of them with a caption whose embedding is infinite."""
    return make_table(tmp_path_factory.mktemp("spoiled"), (17, 13, 10), infinite=SPOILED)


def config_of(table: SampleTable, folder: Path, **changes: Any) -> TrainConfig:
    stage = {"resolution": 8, "images": 80, "global_batch_size": BATCH, "lr": 2e-3}
    return run_config(table, folder, stages=[stage], log_every_steps=1, **changes)


def expected(config: TrainConfig, table: SampleTable) -> list[tuple[int, int]]:
    """The steps that the row is in, and its place in each."""
    window = config.data.shuffle_row_groups
    ids = [batch.ids for (batch,) in steps(table, 10, batch=BATCH, seed=config.seed, shuffle_row_groups=window)]
    return [(step, of_step.index(row_id(SPOILED))) for step, of_step in enumerate(ids) if row_id(SPOILED) in of_step]


def test_the_step_the_rank_and_the_row_are_named(spoiled: SampleTable, tmp_path: Path) -> None:
    config = config_of(spoiled, tmp_path)
    step, _ = expected(config, spoiled)[0]
    message = (
        rf"the gradients of step {step} are not finite \(rank 0, rows {row_id(SPOILED).hex()}\); pass over such steps"
    )
    with pytest.raises(WorkError, match=message):
        train_stages(RunContext(config, spoiled.version, "run"), place=Place(), hooks=Listener())
    # No checkpoint passes over the step in silence.
    assert all(int(uri.rpartition("-")[2]) <= BATCH * step for uri in list_checkpoints(config.checkpoint.uri))


def test_of_two_workers_both_stop_and_the_one_is_named(ray_cluster: None, spoiled: SampleTable, tmp_path: Path) -> None:
    config = config_of(spoiled, tmp_path, scaling={"workers": 2})
    step, place = expected(config, spoiled)[0]
    with pytest.raises(WorkError) as raised:
        train(config)
    named = re.findall(r"rank (\d), rows ([0-9a-f, ]+)", str(raised.value))
    assert named == [(str(place // (BATCH // 2)), row_id(SPOILED).hex())]
    assert f"the gradients of step {step} are not finite" in str(raised.value)
    # The driver's, and one attempt's: nothing was tried again.
    assert [file.name for file in (tmp_path / "run" / "lock").glob("*.json")] == ["00000002.json"]


def test_steps_that_are_passed_over_are_counted_and_change_nothing(spoiled: SampleTable, tmp_path: Path) -> None:
    config = config_of(
        spoiled, tmp_path, on_nan="skip", checkpoint={"uri": str(tmp_path / "run"), "every_images": 8, "keep": 99}
    )
    listener = Listener()
    train_stages(RunContext(config, spoiled.version, "run"), place=Place(), hooks=listener)
    bad = [step for step, _ in expected(config, spoiled)]
    assert 1 <= len(bad) < 5
    # Each is seen when the next step is under way.
    skipped = [event["metrics"]["steps_skipped"] for event in listener.events]
    assert skipped == [sum(step < at for step in bad) for at in range(10)]
    folder = config.checkpoint.uri
    weights = [open_checkpoint(uri).tensors("weights") for uri in list_checkpoints(folder)]
    for step in range(1, 10):
        same = all(torch.equal(weights[step][name], value) for name, value in weights[step - 1].items())
        assert same == (step in bad)
    assert all(bool(value.isfinite().all()) for value in weights[-1].values())
    assert all(value == value for event in listener.events for value in event["metrics"].values())


def test_gradients_too_large_for_floats_stop_the_run(table: SampleTable, tmp_path: Path) -> None:
    stage = {"resolution": 8, "images": 800, "global_batch_size": 8, "lr": 1e38}
    config = run_config(table, tmp_path, stages=[stage])
    with pytest.raises(WorkError, match=r"the gradients of step \d+ are not finite .* or with a lower lr"):
        train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=Listener())
