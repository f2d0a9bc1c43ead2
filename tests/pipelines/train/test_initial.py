"""Stages that begin from a run, a checkpoint, a model file or a published file; networks inside that keep still."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mdm_core.apple_weights import save_apple_checkpoint
from mdm_core.errors import CheckpointError, ConfigError, WorkError
from mdm_core.model_file import save_model
from mdm_core.nested_unet import build_network
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.train.checkpoint import State, checkpoint_uri, latest_checkpoint, open_checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.hooks import Hooks
from pipelines.train.initial import find_initial_weights
from pipelines.train.pipeline import train
from pipelines.train.place import Place
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages
from tests.pipelines.s3_server import S3Server

from .conftest import WIDTH, run_config
from .listener import KilledError, Listener


def stage(side: int, **changes: Any) -> dict[str, Any]:
    return {"resolution": side, "images": 32, "global_batch_size": 8, "lr": 2e-3} | changes


def still(side: int, **changes: Any) -> dict[str, Any]:
    """A stage that hardly moves what it begins from."""
    return stage(side, images=8, lr=1e-12, weight_decay=0.0, **changes)


def go(config: TrainConfig, table: SampleTable, *, die_after: int | None = None) -> None:
    context = RunContext(config, table.version, "run", initial=find_initial_weights(config, WIDTH))
    if die_after is None:
        train_stages(context, place=Place(), hooks=Hooks())
    else:
        with pytest.raises(KilledError):
            train_stages(context, place=Place(), hooks=Listener(die_after))


def network(config: TrainConfig, side: int, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    built = build_network(config.model.matryoshka(WIDTH).up_to(side))
    for parameter in built.parameters():
        parameter.data.normal_(std=0.1)
    return built


def assert_close(ours: State, theirs: dict[str, torch.Tensor], prefix: str = "") -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(ours[prefix + name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "model file", "published"])
def test_a_stage_begins_from_whatever_has_its_weights(table: SampleTable, tmp_path: Path, kind: str) -> None:
    first = run_config(table, tmp_path / "first", stages=[stage(8)])
    if kind in ("run", "checkpoint"):
        go(first, table)
        uri = first.checkpoint.uri
        file = Path(checkpoint_uri(uri, stage=0, images_seen=32)) / "ema.safetensors"
        uri = uri if kind == "run" else str(file.parent)
        weights = open_checkpoint(uri).tensors("ema")
    else:
        inner = network(first, 8)
        weights = inner.state_dict()
        file = tmp_path / ("inner.pth" if kind == "published" else "inner.safetensors")
        uri = str(file)
        if kind == "published":
            save_apple_checkpoint(inner, file, batch_num=1)
        else:
            save_model(file, inner, schedule=first.model.noise_schedule(), prediction_type="v")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    # The same networks, and those around them.
    for side, prefix in ((8, ""), (16, "inner_unet.")):
        config = run_config(table, tmp_path / str(side), stages=[still(side, init_from=uri)])
        go(config, table)
        made = open_checkpoint(config.checkpoint.uri)
        assert_close(made.tensors("ema"), weights, prefix)
        assert made.manifest.initial_weights == {"uri": str(file), "sha256": digest}


def test_a_later_stage_begins_from_weights_of_its_own_networks(table: SampleTable, tmp_path: Path) -> None:
    file = tmp_path / "outer.safetensors"
    config = run_config(table, tmp_path, stages=[still(8), still(16, init_from=str(file))])
    outer = network(config, 16)
    save_model(file, outer, schedule=config.model.noise_schedule(), prediction_type="v")
    go(config, table)
    assert_close(open_checkpoint(config.checkpoint.uri).tensors("ema"), outer.state_dict())
    before = open_checkpoint(checkpoint_uri(config.checkpoint.uri, stage=0, images_seen=8))
    assert before.manifest.initial_weights is None


def test_keys_without_a_match_are_all_logged(
    table: SampleTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = str(tmp_path / "other.safetensors")
    config = run_config(table, tmp_path, stages=[still(8, init_from=file)])
    values = config.model.model_dump(mode="json")
    values["networks"][1] |= {"num_resnets": [2, 1], "mid_blocks": False}
    other = run_config(table, tmp_path, stages=[still(8)], model=values)
    given, wanted = network(other, 8), network(config, 8)
    save_model(file, given, schedule=config.model.noise_schedule(), prediction_type="eps")
    go(config, table)
    ours, theirs = set(wanted.state_dict()), set(given.state_dict())
    logged = {record.message.partition(": ")[2] for record in caplog.records}
    assert (
        f"{len(ours - theirs)} keys begin anew: " + ", ".join(k for k in wanted.state_dict() if k not in theirs)
        in logged
    )
    left = ", ".join(sorted(theirs - ours))
    assert f"{len(theirs - ours)} keys of it are left out: {left}" in logged
    assert "answers eps, and is trained on to answer v" in caplog.text
    made = open_checkpoint(config.checkpoint.uri).tensors("ema")
    assert_close(made, {name: given.state_dict()[name] for name in ours & theirs})


@pytest.mark.parametrize("kind", [".safetensors", ".pth"])
def test_weights_that_do_not_fit_are_refused_before_any_worker_starts(
    table: SampleTable, tmp_path: Path, kind: str
) -> None:
    def save(name: str, built: Any) -> str:
        file = tmp_path / (name + kind)
        if kind == ".pth":
            save_apple_checkpoint(built, file, batch_num=1)
        else:
            save_model(file, built, schedule=config.model.noise_schedule(), prediction_type="v")
        return str(file)

    def refused(uri: str, message: str) -> None:
        beginning = run_config(table, tmp_path, stages=[still(8, init_from=uri)])
        with pytest.raises(ConfigError, match=rf"^stages\.0\.init_from={uri}: " + message):
            train(beginning)
        assert not (tmp_path / "run").exists()

    config = run_config(table, tmp_path)
    wide = build_network(config.model.matryoshka(WIDTH + 4).up_to(8))
    refused(save("wide", wide), r".*the networks \[8\]: lm_proj\.weight is \(8, 16\), wanted \(8, 12\); give")
    refused(
        save("outer", network(config, 16)), "the weights have 1 shells .* the stage's networks have 0; begin a later"
    )
    missing = str(tmp_path / ("no" + kind))
    refused(missing, "there is no such file; give a run, a checkpoint")
    damaged = tmp_path / ("damaged" + kind)
    damaged.write_bytes(b"no weights" * 10)
    refused(str(damaged), ".*(no safetensors file|it is no|can't be read)")
    refused(str(tmp_path / "nothing"), ".*/nothing holds no checkpoint")
    if kind == ".safetensors":
        for said, message in (
            ("[2]", "the configuration in .* can't be used: .*wanted a JSON object, got list"),
            ('{"format": 3}', ".* has format version 3, and this code reads up to 2; update it"),
        ):
            save_file(wide.state_dict(), damaged, {"mdm_model": said})
            refused(str(damaged), message)


def test_a_file_that_changed_after_it_was_found_is_refused(table: SampleTable, tmp_path: Path) -> None:
    first = run_config(table, tmp_path / "first", stages=[still(8)])
    go(first, table)
    config = run_config(table, tmp_path, stages=[still(8, init_from=first.checkpoint.uri)])
    context = RunContext(config, table.version, "run", initial=find_initial_weights(config, WIDTH))
    file = Path(context.initial[0].uri)
    file.write_bytes(file.read_bytes()[:-1] + b"\x11")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is damaged: its checksum is not the manifest's"):
        train_stages(context, place=Place(), hooks=Hooks())
    assert latest_checkpoint(config.checkpoint.uri) is None


def test_a_stage_that_begins_anew_against_expectation_is_one_message(table: SampleTable, tmp_path: Path) -> None:
    # As where the checkpoint that the run was to go on from is found damaged by the worker.
    config = run_config(table, tmp_path, stages=[stage(8, init_from=str(tmp_path / "weights.safetensors"))])
    with pytest.raises(WorkError, match=r"stage 0 has to begin anew.* is damaged; run it again"):
        train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=Hooks())


def test_weights_on_object_storage(table: SampleTable, tmp_path: Path, bucket: str, s3_server: S3Server) -> None:
    config = run_config(table, tmp_path)
    local = tmp_path / "inner.safetensors"
    inner = network(config, 8)
    save_model(local, inner, schedule=config.model.noise_schedule(), prediction_type="v")
    uri = storage.join(bucket, "inner.safetensors")
    s3_server.filesystem().pipe_file(uri, local.read_bytes())
    config = run_config(table, tmp_path, stages=[still(8, init_from=uri)])
    go(config, table)
    assert_close(open_checkpoint(config.checkpoint.uri).tensors("ema"), inner.state_dict())


def frozen(table: SampleTable, folder: Path, images: int, **changes: Any) -> TrainConfig:
    stages = [still(8), stage(16, freeze_inner_images=images, max_grad_norm=1e9, images=48)]
    checkpoint = {"uri": str(folder / "run"), "every_images": 8, "keep": 9, "ema_snapshots_every_images": 8}
    return run_config(table, folder, stages=stages, checkpoint=checkpoint, log_every_steps=1, **changes)


def weights_at(config: TrainConfig, images: int, name: str = "weights") -> State:
    return open_checkpoint(checkpoint_uri(config.checkpoint.uri, stage=1, images_seen=images)).tensors(name)


@pytest.fixture(scope="module")
def freezing(table: SampleTable, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run whose second stage trains the network inside from its 24th image on, 20 rounded to whole steps."""
    config = frozen(table, tmp_path_factory.mktemp("freezing"), 20)
    go(config, table)
    return config


def test_the_network_inside_keeps_its_weights_for_so_long(
    table: SampleTable, tmp_path: Path, freezing: TrainConfig
) -> None:
    first = open_checkpoint(checkpoint_uri(freezing.checkpoint.uri, stage=0, images_seen=8)).tensors("ema")
    after = {images: weights_at(freezing, images) for images in range(8, 49, 8)}
    for images, state in after.items():
        same = [torch.equal(state[f"inner_unet.{name}"], value) for name, value in first.items()]
        assert all(same) if images <= 24 else sum(same) < len(same) / 4
    # Its own step counter begins with it.
    moments = weights_at(freezing, 48, "optimizer")
    steps = {name: int(value) for name, value in moments.items() if name.startswith("step.")}
    assert {steps[name] for name in steps if "inner_unet" in name} == {3}
    assert {steps[name] for name in steps if "inner_unet" not in name} == {6}
    assert not [name for name in weights_at(freezing, 24, "optimizer") if "inner_unet" in name]
    # The shell's first step is that of a run without a frozen network.
    free = frozen(table, tmp_path, 0)
    go(free, table)
    ours, theirs = after[8], weights_at(free, 8)
    shell = [name for name in ours if not name.startswith("inner_unet.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in shell)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("die_after", [3, 4, 5])
def test_a_run_that_dies_about_the_thaw_goes_on_as_if_it_had_not(
    table: SampleTable, tmp_path: Path, freezing: TrainConfig, die_after: int
) -> None:
    config = frozen(table, tmp_path, 20)
    go(config, table, die_after=die_after)
    newest = latest_checkpoint(config.checkpoint.uri)
    assert newest is not None
    assert (newest.manifest.stage, newest.manifest.images_seen) == (1, 8 * (die_after - 1))
    go(config, table)
    for name in ("weights", "ema", "optimizer", "averages"):
        ours, theirs = weights_at(config, 48, name), weights_at(freezing, 48, name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_levels_that_run_twice_are_frozen_as_well(table: SampleTable, tmp_path: Path, freezing: TrainConfig) -> None:
    config = frozen(table, tmp_path, 20, scaling={"checkpoint_levels": ["all"]})
    go(config, table)
    ours, theirs = weights_at(config, 48), weights_at(freezing, 48)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


WORKER = """
import json, sys, torch, torch.distributed
from pipelines.train.config import TrainConfig
from pipelines.train.hooks import Hooks
from pipelines.train.place import Place
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages
rank, version, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = TrainConfig.model_validate_json(sys.argv[4])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
train_stages(RunContext(config, version, "run"), place=Place(rank, 2), hooks=Hooks())
torch.distributed.destroy_process_group()
"""


def test_two_workers_thaw_the_network_as_one_does(table: SampleTable, tmp_path: Path, freezing: TrainConfig) -> None:
    """They go on from a checkpoint that one worker made."""
    config = frozen(table, tmp_path, 20, scaling={"workers": 2})
    shutil.copytree(freezing.checkpoint.uri, config.checkpoint.uri)
    for images in (24, 32, 40, 48):
        storage.delete(checkpoint_uri(config.checkpoint.uri, stage=1, images_seen=images))
    words = [str(table.version), str(tmp_path / "meeting"), json.dumps(config.model_dump(mode="json"))]
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *words]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    begin, ours, theirs = weights_at(freezing, 16), weights_at(config, 48), weights_at(freezing, 48)
    distance, moved = 0.0, 0.0
    for name, value in theirs.items():
        distance += float((ours[name] - value).square().sum())
        moved += float((begin[name] - value).square().sum())
    assert distance**0.5 < 0.01 * moved**0.5
    steps = weights_at(config, 48, "optimizer")
    assert {int(value) for name, value in steps.items() if name.startswith("step.inner_unet")} == {3}


def test_a_network_without_one_inside_has_nothing_to_freeze(table: SampleTable, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"stages\.0\.freeze_inner_images=8 must be 0: the 8 px network has none inside"
    ):
        run_config(table, tmp_path, stages=[stage(8, freeze_inner_images=8)])
