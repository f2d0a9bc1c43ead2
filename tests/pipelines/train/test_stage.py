"""A run on one machine without Ray: resumed runs, grown networks, damaged checkpoints."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdm_core.errors import CheckpointError
from pipelines.data.table.sample_table import SampleTable
from pipelines.sample.generator import Generator
from pipelines.train.checkpoint import latest_checkpoint, list_checkpoints, open_checkpoint
from pipelines.train.config import PreviewConfig, TrainConfig
from pipelines.train.place import Place
from pipelines.train.preview import Preview
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .conftest import run_config
from .listener import KilledError, Listener


def train(config: TrainConfig, table: SampleTable, *, die_after: int | None = None) -> list[dict[str, Any]]:
    """Trains what is left; dies on the event after `die_after` of them."""
    listener = Listener(die_after)
    train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=listener)
    return listener.events


def tensors(uri: str) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(uri)
    # Copies: tensors are mapped from their file, and this module damages files in place.
    return {
        f"{name}/{k}": v.clone()
        for name in ("weights", "ema", "optimizer")
        for k, v in checkpoint.tensors(name).items()
    }


@pytest.fixture(scope="module")
def unbroken(table: SampleTable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train(run_config(table, folder), table)


def losses(events: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    return {(event["stage"], event["images"]): event["metrics"]["loss"] for event in events if "metrics" in event}


@pytest.mark.parametrize("die_after", [1, 2, 3, 4])
def test_a_run_that_dies_goes_on_as_if_it_had_not(
    table: SampleTable, tmp_path: Path, unbroken: tuple[Path, list[dict[str, Any]]], die_after: int
) -> None:
    config = run_config(table, tmp_path)
    with pytest.raises(KilledError):
        train(config, table, die_after=die_after)
    events = train(config, table)
    expected = losses(unbroken[1])
    assert losses(events).items() <= expected.items()
    assert (1, 32) in losses(events)
    ours, theirs = tensors(config.checkpoint.uri), tensors(str(unbroken[0] / "run"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_finished_run_trains_nothing(unbroken: tuple[Path, list[dict[str, Any]]], table: SampleTable) -> None:
    assert train(run_config(table, unbroken[0]), table) == []


def test_the_second_stage_begins_with_the_averages_of_the_first(
    table: SampleTable, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    stages = [dict(stage) for stage in run_config(table, tmp_path).model_dump()["stages"]]
    stages[1] |= {"lr": 1e-12, "decay": "constant", "weight_decay": 0.0}
    config = run_config(table, tmp_path, stages=stages)
    train(config, table)
    first = open_checkpoint(str(tmp_path / "run" / "stage-0" / "images-000000000048")).tensors("ema")
    second = open_checkpoint(config.checkpoint.uri).tensors("ema")
    for name, value in first.items():
        torch.testing.assert_close(second[f"inner_unet.{name}"], value, atol=1e-6, rtol=0)


def test_training_learns_the_pictures(table: SampleTable, tmp_path: Path) -> None:
    stage = {"resolution": 8, "images": 2400, "global_batch_size": 8, "lr": 3e-3, "loss_weighting": "v"}
    config = run_config(table, tmp_path, stages=[stage], log_every_steps=20)
    values = list(losses(train(config, table)).values())
    assert values[-1] < 0.75 * values[0]


def test_checkpoints_are_kept_and_pruned_as_configured(unbroken: tuple[Path, list[dict[str, Any]]]) -> None:
    names = [Path(uri).parts[-2:] for uri in list_checkpoints(str(unbroken[0] / "run"))]
    assert names == [
        ("stage-0", "images-000000000048"),
        ("stage-1", "images-000000000016"),
        ("stage-1", "images-000000000032"),
    ]
    manifest = open_checkpoint(str(unbroken[0] / "run")).manifest
    assert (manifest.stage, manifest.images_seen, manifest.total_images_seen) == (1, 32, 80)
    assert manifest.stage_done


def test_a_damaged_checkpoint_is_passed_over_and_said(
    table: SampleTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(table, tmp_path)
    train(config, table)
    undisturbed = tensors(config.checkpoint.uri)
    weights = tmp_path / "run" / "stage-1" / "images-000000000032" / "ema.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is damaged: its checksum is not the manifest's"):
        open_checkpoint(str(weights.parent)).tensors("ema")
    newest = latest_checkpoint(config.checkpoint.uri)
    assert newest is not None
    assert newest.manifest.images_seen == 16
    assert "going back to the checkpoint before" in caplog.text
    train(config, table)
    again = tensors(config.checkpoint.uri)
    assert all(torch.equal(again[name], value) for name, value in undisturbed.items())


def test_an_upload_that_was_cut_is_no_checkpoint(table: SampleTable, tmp_path: Path) -> None:
    config = run_config(table, tmp_path)
    train(config, table)
    (tmp_path / "run" / "stage-1" / "images-000000000032" / "manifest.json").unlink()
    newest = latest_checkpoint(config.checkpoint.uri)
    assert newest is not None
    assert newest.manifest.images_seen == 16


def test_a_run_whose_checkpoints_are_all_unreadable_does_not_start_over(table: SampleTable, tmp_path: Path) -> None:
    config = run_config(table, tmp_path)
    train(config, table)
    for uri in list_checkpoints(config.checkpoint.uri):
        (Path(uri) / "manifest.json").write_text('{"stage": 0, "layout": "of another version"}')
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints of .* can be used: they are damaged, or of"):
        train(config, table)
    assert len(list_checkpoints(config.checkpoint.uri)) == 3


def test_levels_that_run_twice_give_the_same_bits(
    table: SampleTable, tmp_path: Path, unbroken: tuple[Path, list[dict[str, Any]]]
) -> None:
    """Named levels of the shell are no fault in the stage that has no shell yet."""
    expected, theirs = losses(unbroken[1]), tensors(str(unbroken[0] / "run"))
    for number, levels in enumerate((["all"], ["16.down.0", "8.down.1", "8.mid.0", "16.up.1"])):
        config = run_config(table, tmp_path / str(number), scaling={"checkpoint_levels": levels})
        assert losses(train(config, table)) == expected
        ours = tensors(config.checkpoint.uri)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_levels_that_run_twice_are_no_part_of_a_run(
    table: SampleTable, tmp_path: Path, unbroken: tuple[Path, list[dict[str, Any]]]
) -> None:
    config = run_config(table, tmp_path, scaling={"checkpoint_levels": ["16.up.0"]})
    with pytest.raises(KilledError):
        train(config, table, die_after=3)
    assert config.identity() == run_config(table, tmp_path).identity()
    events = train(run_config(table, tmp_path), table)
    assert losses(events).items() <= losses(unbroken[1]).items()


def test_a_level_that_no_network_has_is_refused(table: SampleTable, tmp_path: Path) -> None:
    message = (
        r"scaling\.checkpoint_levels names '32\.down\.0', which is no level of the networks; there are 16\.down\.0, "
    )
    with pytest.raises(ValueError, match=message):
        run_config(table, tmp_path, scaling={"checkpoint_levels": ["16.down.0", "32.down.0"]})


@pytest.mark.parametrize(
    ("changes", "weighting"),
    [
        ({"prediction_type": "x0", "schedule": "cosine", "shift": "signal", "shift_power": 2.0}, "min_snr"),
        ({"prediction_type": "eps", "schedule": "sigmoid"}, "eps"),
    ],
)
def test_a_run_keeps_its_prediction_type_and_schedule(
    table: SampleTable, tmp_path: Path, changes: dict[str, Any], weighting: str
) -> None:
    values = run_config(table, tmp_path).model_dump()
    stages = [stage | {"loss_weighting": weighting} for stage in values["stages"]]
    config = run_config(table, tmp_path, model=values["model"] | changes, stages=stages)
    train(config, table)
    manifest = open_checkpoint(config.checkpoint.uri).manifest
    assert manifest.prediction_type == changes["prediction_type"]
    schedule = {"kind": changes["schedule"], "shift": changes.get("shift", "snr")}
    assert manifest.schedule == schedule | {"num_timesteps": 1000, "shift_power": changes.get("shift_power", 1.0)}


def test_a_preview_shows_what_the_checkpoint_makes(unbroken: tuple[Path, list[dict[str, Any]]]) -> None:
    uri = open_checkpoint(str(unbroken[0] / "run")).uri
    text = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, dtype=torch.bool)
    posted: list[dict[str, Any]] = []
    preview = Preview(
        PreviewConfig(guidance_scale=2.0, num_inference_steps=4),
        seed=3,
        text=text,
        run_task=Preview.pictures,
        post=posted.append,
    )
    preview(None, uri=uri, stage=1, images=32)
    preview(None, uri=f"{uri}0", stage=1, images=320)
    shown, gone = posted
    assert re.fullmatch(
        r"no preview of .*00320: .*00320 holds no checkpoint; give the folder of a run, .*", gone["warning"]
    )
    assert (shown["stage"], shown["images"]) == (1, 32)
    generator = Generator.from_checkpoint(uri, device="cpu")
    made = generator.generate_from_text(*text, noise_ids=[0], seed=3, guidance_scale=2.0, num_inference_steps=4)
    for side, level in zip((16, 8), made, strict=True):
        np.testing.assert_array_equal(shown["pictures"][side], level)


@pytest.mark.parametrize("mask_text", [True, False])
def test_a_batch_in_pieces_is_the_batch(table: SampleTable, tmp_path: Path, mask_text: bool) -> None:
    """Whether or not attention sees the padding, which is longer where captions of other pieces are."""
    values = run_config(table, tmp_path).model_dump(include={"model", "stages"})
    values["model"]["networks"][1]["mask_text"] = mask_text
    values["stages"][0]["images"] = 160
    whole, *others = (
        losses(train(run_config(table, tmp_path / str(size), **values, scaling={"micro_batch_size": size}), table))
        for size in (None, 3, 1)
    )
    assert len(whole) == 12
    for pieces in others:
        assert pieces == pytest.approx(whole, rel=1e-6)


def test_of_a_mix_the_gradients_are_those_of_the_rows_that_are_there(table: SampleTable, tmp_path: Path) -> None:
    """However a batch is cut, and with pieces that have no row of the finer resolution."""
    values = run_config(table, tmp_path).model_dump(include={"model", "stages"})
    values["stages"] = [values["stages"][0], values["stages"][1] | {"resolution_mix": [0.25, 1.0]}]
    whole, pieces = (
        losses(train(run_config(table, tmp_path / str(size), **values, scaling={"micro_batch_size": size}), table))
        for size in (None, 2)
    )
    assert pieces == pytest.approx(whole, rel=1e-6)
