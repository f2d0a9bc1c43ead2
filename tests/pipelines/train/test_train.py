"""`train` on Ray, with real worker processes, and what MLflow shows of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray

from mdm_core.errors import ConfigError
from pipelines.data.table.sample_table import SampleTable
from pipelines.tracking import child_runs, metric_history
from pipelines.train import pipeline
from pipelines.train.config import TrainConfig
from pipelines.train.pipeline import TrainReport, train
from pipelines.train.place import Place
from pipelines.train.run_lock import RunLock
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .conftest import WIDTH, run_config
from .listener import KilledError, Listener


@pytest.fixture(scope="module")
def alone(
    ray_cluster: None, table: SampleTable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, TrainReport]:
    """A run with one worker."""
    config = run_config(table, tmp_path_factory.mktemp("alone"))
    return config, train(config)


def test_any_number_of_workers_makes_the_same_steps(ray_cluster: None, table: SampleTable, tmp_path: Path) -> None:
    """Of 20 steps: losses, and the norms of the gradients, which tell of a wrong scale what AdamW hides."""
    stages = [{"resolution": 8, "images": 160, "global_batch_size": 8, "lr": 1e-4}]
    histories = []
    for workers in (1, 2, [1, 3]):
        folder = tmp_path / str(workers)
        scaling = {"workers": workers, "micro_batch_size": None if workers == 1 else 2}
        config = run_config(table, folder, stages=stages, scaling=scaling, log_every_steps=1)
        (stage,) = child_runs(config.tracking, train(config).run_id).values()
        histories.append({name: metric_history(config.tracking, stage, name) for name in ("loss", "grad_norm")})
    alone, *shared = histories
    assert [step for step, _ in alone["loss"]] == list(range(8, 161, 8))
    for history in shared:
        for name, values in alone.items():
            assert [value for _, value in history[name]] == pytest.approx([value for _, value in values], rel=2e-6)
    # And where two go on with what one has begun.
    checkpoint = {"uri": str(tmp_path / "resumed"), "every_images": 80}
    config = run_config(
        table, tmp_path, stages=stages, checkpoint=checkpoint, scaling={"workers": 2}, log_every_steps=1
    )
    with pytest.raises(KilledError):
        train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=Listener(die_after=12))
    (stage,) = child_runs(config.tracking, train(config).run_id).values()
    for name, values in alone.items():
        assert dict(metric_history(config.tracking, stage, name)) == pytest.approx(dict(values[10:]), rel=2e-6)


def test_mlflow_shows_a_run_with_a_child_a_stage(alone: tuple[TrainConfig, TrainReport]) -> None:
    config, report = alone
    children = child_runs(config.tracking, report.run_id)
    assert set(children) == {"stage 8 px", "stage 16 px"}
    assert [step for step, _ in metric_history(config.tracking, report.run_id, "loss")] == [16, 32, 48, 64, 80]
    history = metric_history(config.tracking, children["stage 16 px"], "loss")
    assert [step for step, _ in history] == [16, 32]
    parts = [metric_history(config.tracking, children["stage 16 px"], f"loss_{side}") for side in (16, 8)]
    for (_, whole), *halves in zip(history, *parts, strict=True):
        assert whole == pytest.approx(sum(value for _, value in halves))
    assert report.stages[1]["loss_last"] == pytest.approx(history[-1][1])
    assert report.stages[0]["images_seen"] == 48
    _check_further_metrics(config, report, children)


def _check_further_metrics(config: TrainConfig, report: TrainReport, children: dict[str, str]) -> None:
    """What is logged beside the losses of the resolutions, of the stage of 32 images in four steps."""
    run = children["stage 16 px"]
    logged = {
        name: dict(metric_history(config.tracking, run, name))
        for name in MlflowClient(config.tracking.uri).get_run(run).data.metrics
    }
    quarters = {name for name in logged if name.startswith("loss_quarter_")}
    assert quarters <= {f"loss_quarter_{number}" for number in (1, 2, 3, 4)}
    assert logged.keys() - quarters == {
        *("loss", "loss_16", "loss_8", "lr", "grad_norm", "steps_skipped", "workers"),
        *("data_wait_fraction", "checkpoint_blocked_s", "images_per_s", "peak_memory_gb"),
    }
    # The mean of all rows lies among the means of parts of them.
    for images, loss in logged["loss"].items():
        parts = [logged[name][images] for name in quarters if images in logged[name]]
        assert min(parts) < loss < max(parts)
    # Of the last step of each report: a linear fall from 2e-3, and a rise over two steps.
    assert logged["lr"] == pytest.approx({16: 2e-3 * 24 / 32, 32: 2e-3 * 8 / 32})
    warm = dict(metric_history(config.tracking, children["stage 8 px"], "lr"))
    assert warm == pytest.approx({16: 2e-3 * 9 / 16, 32: 2e-3, 48: 2e-3})
    assert all(0 <= fraction <= 1 for fraction in logged["data_wait_fraction"].values())
    # The seconds of the reports add up to those of the stage.
    assert sum(16 / rate for rate in logged["images_per_s"].values()) == pytest.approx(
        32 / report.stages[1]["images_per_s"]
    )
    assert (logged["workers"], logged["steps_skipped"]) == ({16: 1, 32: 1}, {16: 0, 32: 0})


def test_a_finished_run_says_that_nothing_is_left(alone: tuple[TrainConfig, TrainReport]) -> None:
    config, report = alone
    again = train(config)
    assert not again.trained
    assert (again.checkpoint, again.run_id, again.stages) == (report.checkpoint, report.run_id, report.stages)


def test_another_run_is_not_continued(alone: tuple[TrainConfig, TrainReport]) -> None:
    config, _ = alone
    changed = config.model_copy(update={"seed": 5, "text": config.text.model_copy(update={"drop_prob": 0.5})})
    with pytest.raises(ConfigError, match=r"holds a run with another seed, text; .* another checkpoint\.uri"):
        train(changed)


def test_a_run_in_progress_is_not_joined(ray_cluster: None, table: SampleTable, tmp_path: Path) -> None:
    config = run_config(table, tmp_path)
    with (
        RunLock(config.checkpoint.uri),
        pytest.raises(ConfigError, match=r"being written to by process \d+ of .* can't share"),
    ):
        train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"table": "{table}", "version": 99}}, "has no version 99; the latest is 2"),
        ({"data": {"where": "widht > 3"}}, "names widht, which is no column to choose by; did you mean width"),
        ({"data": {"where": "width > 99"}}, "is true of none of the 40 ok rows"),
        ({"text": {"encoder": "t5:small", "max_tokens": 8}}, "has no embeddings by t5:small; run `mdm embed"),
        ({"text": {"max_tokens": 16}}, "have max_tokens=8, wanted 16"),
        ({"scaling": {"workers": 8}}, "needs 8 CPUs at once, but the Ray cluster has 4"),
        (
            {"scaling": {"cpus_per_worker": 4}, "preview": {"captions": ["a cat"], "cpus": 5}},
            r"preview\.cpus and preview\.gpus ask 1 times for 5 CPUs and 0 GPUs",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(
    ray_cluster: None, table: SampleTable, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "data" in changes:
        changes = {"data": changes["data"] | {"table": table.uri}}
    with pytest.raises(ConfigError, match=message):
        train(run_config(table, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_an_encoder_that_is_gone_is_told_before_there_is_a_run(
    ray_cluster: None, table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has its embeddings; the captions of the previews have none yet."""

    def gone(name: str, *, max_tokens: int) -> None:
        raise ConfigError(f"the weights of {name} are gone")

    monkeypatch.setattr(pipeline, "load_text_encoder", gone)
    config = run_config(table, tmp_path, preview={"captions": ["a cat"]})
    with pytest.raises(ConfigError, match="the weights of minilm are gone"):
        train(config)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_stage_must_fit_the_workers_and_the_networks(table: SampleTable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"global_batch_size=8 must be divisible by scaling\.workers=3; try 6 or 9"):
        run_config(table, tmp_path, scaling={"workers": 3})
    stage = {"resolution": 32, "images": 8, "global_batch_size": 8, "lr": 1e-3}
    with pytest.raises(ValueError, match=r"stages\.0\.resolution=32 has no network; there are \[16, 8\]"):
        run_config(table, tmp_path, stages=[stage])


@pytest.mark.parametrize("mix", [[0.5], [1.0, 0.5], [0.5, 0.9], [0.0, 1.0], [0.05, 1.0]])
def test_a_mix_gives_every_resolution_its_images(table: SampleTable, tmp_path: Path, mix: list[float]) -> None:
    stages = run_config(table, tmp_path).model_dump(mode="json")["stages"]
    stages[1]["resolution_mix"] = mix
    message = (
        r"2 shares above 0, finest first" if mix != [0.05, 1.0] else r"leaves 16 px without an image in a batch of 8"
    )
    with pytest.raises(ValueError, match=message):
        run_config(table, tmp_path, stages=stages)


def test_some_workers_to_many_share_what_no_number_of_them_divides(table: SampleTable, tmp_path: Path) -> None:
    assert run_config(table, tmp_path, scaling={"workers": [1, 3]}).scaling.max_workers == 3
    with pytest.raises(ValueError, match=r"global_batch_size=8 leaves some of scaling\.workers=9 without an image"):
        run_config(table, tmp_path, scaling={"workers": [1, 9]})
    with pytest.raises(ValueError, match=r"workers=\[3, 2\] must be \[least, most\]; turn them round"):
        run_config(table, tmp_path, scaling={"workers": [3, 2]})


class _Encoder:
    """As wide as the table's embeddings."""

    width = WIDTH

    def encode(self, captions: Sequence[str]) -> list[NDArray[np.float16]]:
        return [np.full((3, WIDTH), len(caption), np.float16) for caption in captions]


def test_each_checkpoint_has_a_grid_of_pictures_in_mlflow(
    ray_cluster: None, table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_text_encoder", lambda name, *, max_tokens: _Encoder())
    stages = [{"resolution": 8, "images": 48, "global_batch_size": 8, "lr": 2e-3}]
    preview = {"captions": ["red", "a blue one"], "num_inference_steps": 2}
    # Previews are made when there is time for them, of checkpoints that are still there.
    checkpoint = {"uri": str(tmp_path / "run"), "every_images": 16, "keep": 9}
    scaling = {"workers": 2}
    config = run_config(table, tmp_path, stages=stages, preview=preview, checkpoint=checkpoint, scaling=scaling)
    report = train(config)
    (stage,) = child_runs(config.tracking, report.run_id).values()
    for run, key in ((report.run_id, "preview"), (stage, "preview_8")):
        found = MlflowClient(config.tracking.uri).list_artifacts(run, "images")
        names = sorted(file.path.split("+timestamp+")[0] for file in found if file.path.endswith(".png"))
        assert names == [f"images/{key}+step+{images}" for images in (16, 32, 48)]
    system = metric_history(config.tracking, report.run_id, "system/node-0/cpu_utilization_percentage")
    assert [step for step, _ in system] == [16, 32, 48]
    assert all(0 <= value <= 100 for _, value in system)
    # Nothing of Ray's own is left in the run's folder.
    assert not list((tmp_path / "run").glob("ray_train/*"))
