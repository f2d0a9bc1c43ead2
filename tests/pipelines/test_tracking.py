"""What a run leaves in MLflow, read back with MLflow's own client."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdm_core.errors import ConfigError, WorkError
from pipelines.tracking import TrackingConfig, child_runs, metric_history, open_run


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}", experiment="tests")


def client(tracking: TrackingConfig) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking.uri)


def test_a_run_with_a_key_is_continued(tracking: TrackingConfig) -> None:
    with open_run(tracking, name="first", key="a:1", tags={"table_version": 3}) as run:
        run.log_params({"stage": {"lr": 0.1}, "stages": [{"lr": 1}, {"lr": 2}]})
        run.log_metrics({"loss": 2.0}, step=10)
    with open_run(tracking, name="ignored", key="a:1") as again:
        again.log_params({"stage": {"lr": 0.1}, "more": 5})
        again.log_metrics({"loss": 1.5}, step=20)
        again.log_metrics({"loss": 1.25}, step=20)
    with open_run(tracking, name="other", key="a:2") as other:
        pass
    assert again.id == run.id != other.id
    found = client(tracking).get_run(run.id)
    assert found.info.run_name == "first"
    assert found.info.status == "FINISHED"
    assert found.data.tags["table_version"] == "3"
    assert found.data.params == {"stage.lr": "0.1", "stages.0.lr": "1", "stages.1.lr": "2", "more": "5"}
    assert metric_history(tracking, run.id, "loss") == [(10, 2.0), (20, 1.25)]


def test_more_parameters_than_one_call_takes(tracking: TrackingConfig) -> None:
    values = {f"p{index}": index for index in range(250)}
    with open_run(tracking, name="many") as run:
        run.log_params(values)
    found = client(tracking).get_run(run.id)
    assert found.data.params == {key: str(value) for key, value in values.items()}


def test_children_are_shown_under_their_parent_and_failures_as_such(tracking: TrackingConfig) -> None:
    with open_run(tracking, name="parent") as parent:
        with open_run(tracking, name="good", parent_run_id=parent.id) as good:
            pass
        with pytest.raises(RuntimeError), open_run(tracking, name="bad", parent_run_id=parent.id) as bad:
            raise RuntimeError
        with pytest.raises(KeyboardInterrupt), open_run(tracking, name="cut", parent_run_id=parent.id) as cut:
            raise KeyboardInterrupt
    assert child_runs(tracking, parent.id) == {"good": good.id, "bad": bad.id, "cut": cut.id}
    states = [client(tracking).get_run(run.id).info.status for run in (good, bad, cut)]
    assert states == ["FINISHED", "FAILED", "KILLED"]


def test_pictures_of_one_key_form_a_series(tracking: TrackingConfig) -> None:
    with open_run(tracking, name="pictures") as run:
        for step in (100, 200):
            run.log_image(np.full((8, 8, 3), step, dtype=np.uint8), key="preview_8", step=step)
    files = [item.path for item in client(tracking).list_artifacts(run.id, "images")]
    full = sorted(path for path in files if path.endswith(".png"))
    assert len(full) == 2
    assert ["%step%100%" in full[0].replace("+", "%"), "%step%200%" in full[1].replace("+", "%")] == [True, True]


def test_a_store_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database\n" * 100)
    uri = f"sqlite:///{tmp_path / 'notes.txt'}"
    with pytest.raises(ConfigError, match=r"tracking\.uri=.* can't be used: .*give sqlite:///FILE in a folder"):
        metric_history(TrackingConfig(uri=uri), "x", "loss")
    good = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(ConfigError, match="has no run 0123"), open_run(good, name="x", run_id="0123"):
        pass


def test_an_error_is_not_hidden_by_a_store_that_is_gone(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    tracking = TrackingConfig(uri=f"sqlite:///{database}")

    def work() -> None:
        with open_run(tracking, name="x") as run:
            database.write_text("overwritten\n" * 1000)
            with pytest.raises(WorkError, match=r"could not write to sqlite:.*; mend it and run again"):
                run.log_metrics({"loss": 1.0})
            raise WorkError("the disk is full")

    with pytest.raises(WorkError, match="the disk is full"):
        work()
