"""What a driver logs of its workers, with a tracking server that is away for a while."""

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from mdm_core.errors import WorkError
from pipelines.data.table.sample_table import SampleTable
from pipelines.tracking import Run, child_runs, metric_history, open_run
from pipelines.train.watch import Board, Watch

from .conftest import run_config


@pytest.mark.parametrize("comes_back", [True, False])
def test_what_could_not_be_logged_is_logged_later(
    table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    config = run_config(table, tmp_path)
    board, left, write = Board(), [3 if comes_back else 99], Run.log_metrics

    def log_metrics(run: Run, values: dict[str, float], step: int = 0) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise WorkError("could not write to http://tracking: it is away")
        write(run, values, step)

    monkeypatch.setattr(Run, "log_metrics", log_metrics)

    def posted(images: int) -> dict[str, Any]:
        return {"stage": 0, "images": images, "metrics": {"loss": float(images), "lr": 1.0}}

    with open_run(config.tracking, name="test") as run:
        watch = Watch(board.take, run, "key", config, 0)
        end = contextlib.nullcontext() if comes_back else pytest.raises(WorkError, match="it is away")
        with end, watch:
            board.put(posted(8))
            board.put({"error": "the disk is full"})
            time.sleep(1.2)
            # Neither waits for what can't be logged.
            assert watch.last_error == "the disk is full"
            board.put(posted(16))
            board.put(posted(24))
            if comes_back:
                time.sleep(2.0)
        assert watch.last_error == ""
        expected = [(8, 8.0), (16, 16.0), (24, 24.0)] if comes_back else []
        assert metric_history(config.tracking, run.id, "loss") == expected
        if comes_back:
            (stage,) = child_runs(config.tracking, run.id).values()
            assert metric_history(config.tracking, stage, "loss") == expected
