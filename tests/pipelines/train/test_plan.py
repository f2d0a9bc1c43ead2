"""`mdm train --dry-run`: what it says is what a run then takes, and what it refuses is what a run would."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from jobs import train as job
from mdm_core.errors import ConfigError
from mdm_core.nested_unet import build_network
from pipelines.benchmark.report import format_bytes
from pipelines.data.table.sample_table import SampleTable
from pipelines.run_config import dump_config
from pipelines.train.checkpoint import list_checkpoints, open_checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.hooks import Hooks
from pipelines.train.ingest.batch import Batch
from pipelines.train.place import Place
from pipelines.train.plan import plan_training
from pipelines.train.plan_text import plan_text
from pipelines.train.stage import RunContext
from pipelines.train.step import losses, new_state, optimizer_step
from pipelines.train.worker import train_stages

from .conftest import WIDTH, run_config

NO_MEMORY = {"memory": False}


class Stopped(BaseException):
    """Ends a run between two steps."""


def train(config: TrainConfig, table: SampleTable, *, stop_at: tuple[int, int] | None = None) -> None:
    """Trains what is left, or until a stage has reported a number of images."""

    class Listener(Hooks):
        def post(self, event: dict[str, Any]) -> None:
            if (event["stage"], event["images"]) == stop_at:
                raise Stopped

    train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=Listener())


def tensor_bytes(folder: Path) -> int:
    """What the tensors of a checkpoint take on disk, without the safetensors files' headers."""
    files = [file.read_bytes() for file in folder.glob("*.safetensors")]
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in files)


def test_a_run_takes_what_was_planned(table: SampleTable, tmp_path: Path) -> None:
    config = run_config(table, tmp_path, plan=NO_MEMORY)
    planned = plan_training(config)
    train(config, table)
    ends = [open_checkpoint(uri) for uri in list_checkpoints(config.checkpoint.uri)]
    for index, stage in enumerate(planned.stages):
        last = [end for end in ends if end.manifest.stage == index][-1]
        assert stage.parameters == sum(value.numel() for value in last.tensors("weights").values())
        assert stage.images == last.manifest.images_seen
        assert stage.checkpoint_bytes == tensor_bytes(Path(last.uri))
    assert [stage.steps for stage in planned.stages] == [6, 4]
    assert [stage.epochs for stage in planned.stages] == [48 / 40, 32 / 40]
    assert (planned.rows, planned.table_version, planned.text_dim) == (40, table.version, WIDTH)
    assert planned.continues_from is None
    # One of the first stage, two that are kept of the second, and a third while it is written.
    assert planned.storage_bytes == planned.stages[0].checkpoint_bytes + 3 * planned.stages[1].checkpoint_bytes


def test_the_images_left_are_those_that_a_stopped_run_has_not_saved(table: SampleTable, tmp_path: Path) -> None:
    config = run_config(table, tmp_path, plan=NO_MEMORY)
    with pytest.raises(Stopped):
        train(config, table, stop_at=(1, 32))
    stopped = plan_training(config)
    assert [stage.images_left for stage in stopped.stages] == [0, 16]
    assert stopped.continues_from is not None
    assert stopped.continues_from.endswith("stage-1/images-000000000016")
    train(config, table)
    assert [stage.images_left for stage in plan_training(config).stages] == [0, 0]


def test_the_memory_is_that_of_a_real_step(table: SampleTable, tmp_path: Path) -> None:
    stage = {"resolution": 16, "images": 64, "global_batch_size": 64, "lr": 1e-3}
    # 64 images on two workers, 20 at a time: passes of 20 and 12.
    scaling = {"workers": 2, "micro_batch_size": 20, "checkpoint_levels": ["all"]}
    config = run_config(table, tmp_path, stages=[stage], scaling=scaling)
    plan = plan_training(config)
    (planned,) = plan.stages
    assert (planned.images_per_pass, planned.passes_per_step) == (20, 2)
    assert planned.memory["as_configured"] == planned.memory["all_recomputed"]
    for name in ("nothing_recomputed", "all_recomputed"):
        network = build_network(config.model.matryoshka(WIDTH))
        network.checkpoint_levels(network.levels() if name == "all_recomputed" else [])
        state = new_state(network, weight_decay=0.0, ema_length=0.1)
        _step(state, config)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            _step(state, config)
        changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        weights = sum(value.nbytes for value in network.parameters())
        moments = sum(v[key].nbytes for v in state.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        average = sum(value.nbytes for value in state.ema.state_dict().values())
        memory = planned.memory[name]
        assert (memory.weights, memory.optimizer, memory.ema) == (weights, moments, average)
        assert memory.gradients == weights
        # The loss's pictures are not planned; they are much beside so small a network.
        measured = weights + moments + average + max(itertools.accumulate(changes))
        assert memory.peak == pytest.approx(measured, rel=0.1)
    shown = [line.split() for line in plan_text(plan).splitlines()]
    assert [*["peak", "of", "all"], *format_bytes(planned.memory["all_recomputed"].peak).split()] in shown
    bare, less = planned.memory["nothing_recomputed"], planned.memory["all_recomputed"]
    assert less.activations < bare.activations
    assert less.peak < bare.peak


def _step(state: Any, config: TrainConfig) -> None:
    batch = Batch(
        x0=torch.zeros(20, 3, 16, 16, dtype=torch.uint8),
        text_emb=torch.zeros(20, config.text.max_tokens, WIDTH),
        text_mask=torch.ones(20, config.text.max_tokens, dtype=torch.bool),
        timestep=torch.arange(20),
        noise=[torch.randn(20, 3, side, side) for side in (16, 8)],
        ids=[],
        rows_per_resolution=(20, 20),
    )
    rows = losses(
        state.network,
        batch,
        alpha_bars=config.model.noise_schedule().alpha_bars((16, 8)),
        resolutions=(16, 8),
        resolution_weights=(1.0, 1.0),
        weighting="eps",
    )
    rows.sum(dim=0).mean().backward()
    optimizer_step(state, lr=1e-3, max_grad_norm=1.0)


def test_the_pace_meets_the_deadline_and_the_hours_are_arithmetic_over_speed(
    table: SampleTable, tmp_path: Path
) -> None:
    plan = {"deadline_h": 6, "card": "A100", "share_of_peak": 0.5, "memory": False}
    scaling = {"workers": 4, "gpus_per_worker": 1, "checkpoint_levels": ["8.down.0"]}
    planned = plan_training(run_config(table, tmp_path, plan=plan, scaling=scaling))
    paces = [(stage.images_per_s_for_deadline, stage.images_per_s_at_share) for stage in planned.stages]
    assert sum(stage.images / pace[0] for stage, pace in zip(planned.stages, paces, strict=True) if pace[0]) == (
        pytest.approx(6 * 3600)
    )
    # The data sheet's 312 TFLOP/s of dense bfloat16.
    work = sum(stage.images * (stage.flops_per_image + stage.recomputed_flops_per_image) for stage in planned.stages)
    hours = work / (4 * 312e12 * 0.5) / 3600
    assert planned.hours_at_share == pytest.approx(hours)
    assert sum(stage.hours_at_share or 0 for stage in planned.stages) == pytest.approx(hours)
    assert planned.share_of_peak_for_deadline == pytest.approx(0.5 * hours / 6)
    assert all(stage.recomputed_flops_per_image > 0 for stage in planned.stages)
    assert planned.dtype == "bfloat16"
    assert plan_training(run_config(table, tmp_path, plan=NO_MEMORY)).hours_at_share is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"version": 99}}, "has no version 99; the latest is 2"),
        ({"text": {"encoder": "t5:small", "max_tokens": 8}}, "has no embeddings by t5:small; run `mdm embed"),
        ({"text": {"max_tokens": 16}}, "have max_tokens=8, wanted 16"),
        ({"model": {"text_dim": 24}}, r"model\.text_dim=24, but the embeddings are 12 wide"),
        ({"scaling": {"gpus_per_worker": 1}, "plan": {"card": "H1OO"}}, "plan.card: got 'H1OO'; wanted one of H200"),
    ],
)
def test_what_a_run_would_be_refused_for_is_refused(
    table: SampleTable, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = run_config(table, tmp_path).model_dump()
    whole = {section: given[section] | values for section, values in changes.items()}
    with pytest.raises(ConfigError, match=message):
        plan_training(run_config(table, tmp_path, **whole))


def test_another_run_in_the_same_place_is_refused(table: SampleTable, tmp_path: Path) -> None:
    train(run_config(table, tmp_path), table)
    with pytest.raises(ConfigError, match="holds a run with another seed"):
        plan_training(run_config(table, tmp_path, seed=7))


def test_a_place_that_does_not_answer_is_told_and_the_rest_is_planned(
    table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    data, checkpoint = {"table": "s3://nowhere/table"}, {"uri": "s3://nowhere/run"}
    planned = plan_training(run_config(table, tmp_path, data=data, checkpoint=checkpoint, plan=NO_MEMORY))
    told = "\n".join(planned.not_checked)
    assert (
        "the table, its version and its embeddings: s3://nowhere at http://127.0.0.1:1 can't be used: there are no "
        "credentials in the environment" in told
    )
    assert "whether s3://nowhere/run holds a run to go on with: s3://nowhere" in told
    assert (planned.rows, planned.stages[0].epochs, planned.text_dim) == (None, None, 384)
    near = plan_training(run_config(table, tmp_path, plan=NO_MEMORY))
    assert planned.stages[1].parameters - near.stages[1].parameters == (384 - WIDTH) * 8  # the text's projection
    unknown = {"encoder": "t5:some/where", "max_tokens": 8}
    with pytest.raises(ConfigError, match=r"nobody knows the width of t5:some/where .*; set model\.text_dim"):
        plan_training(run_config(table, tmp_path, data=data, text=unknown, plan=NO_MEMORY))


@pytest.mark.parametrize("switch", [["--dry-run"], ["--dry-run", "true"], ["--dry_run=true"]])
def test_the_command_prints_a_column_a_stage_and_one_object(
    table: SampleTable, tmp_path: Path, capsys: pytest.CaptureFixture[str], switch: list[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(dump_config(run_config(table, tmp_path, plan=NO_MEMORY)))
    assert job.main(["--config", str(file), *switch, "--on-nan", "skip", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "on_nan: skip" in err.splitlines()
    assert [stage["steps"] for stage in json.loads(out)["stages"]] == [6, 4]
    rows = [line.split() for line in err.splitlines()]
    assert ["optimizer", "steps", "6", "4"] in rows
    assert ["epochs", "1.20", "0.80"] in rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.yaml"]


def test_a_dry_run_loads_neither_ray_nor_mlflow(table: SampleTable, tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(dump_config(run_config(table, tmp_path, plan=NO_MEMORY)))
    code = f"import sys; from jobs.train import main; code = main(['--config', {str(file)!r}, '--dry-run'])\n"
    code += "print(code, *{'ray', 'mlflow'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
