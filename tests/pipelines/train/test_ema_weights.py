"""Averages of any length from the snapshots of a training, against averages kept while it went on."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.__main__ import main
from mdm_core.ema import PowerEmaTracker, power_exponent, reconstruction_weights
from mdm_core.errors import ConfigError
from mdm_core.model_file import load_model
from mdm_core.nested_unet import build_network
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.sample.generator import Generator
from pipelines.train.checkpoint import checkpoint_uri, open_checkpoint
from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.config import TrainConfig
from pipelines.train.ema_snapshots import EMA_LENGTHS, list_snapshots, snapshot_name, to_stored
from pipelines.train.ema_weights import rebuild_ema
from pipelines.train.hooks import Hooks
from pipelines.train.pipeline import train
from pipelines.train.place import Place
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .conftest import run_config
from .listener import KilledError, Listener
from .small_state import manifest

BATCH, STEPS, EVERY = 8, 128, 8


@dataclass
class Line:
    """A run whose weights moved along a straight line, a + b·step, and kept snapshots."""

    run: str
    a: dict[str, Tensor]
    b: dict[str, Tensor]

    def expected(self, length: float, step: int) -> dict[str, Tensor]:
        """The average as a sum over all steps: shares of t^(gamma+1) telescope."""
        t = (np.arange(step + 1) / step) ** (power_exponent(length) + 1)
        mean_step = float(np.diff(t) @ np.arange(1, step + 1))
        return {name: (a.double() + self.b[name].double() * mean_step).float() for name, a in self.a.items()}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    network, generator = build_network(manifest(0).matryoshka()), torch.Generator().manual_seed(0)
    a = {name: torch.randn(value.shape, generator=generator) for name, value in network.named_parameters()}
    b = {name: torch.randn(value.shape, generator=generator) / STEPS for name, value in network.named_parameters()}
    made = Line(str(tmp_path_factory.mktemp("line") / "run"), a, b)
    tracker = PowerEmaTracker(network, relative_lengths=EMA_LENGTHS)
    with CheckpointWriter(made.run, keep=1) as writer:
        for step in range(1, STEPS + 1):
            for name, parameter in network.named_parameters():
                parameter.data.copy_(a[name] + b[name] * step)
            tracker.update(network, step)
            if step % EVERY == 0:
                told = manifest(step * BATCH, total_images_seen=1000 + step * BATCH)
                writer.save_snapshot(told, tracker.state_dict())
    return made


def mdm_ema(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, result and messages of `mdm ema`."""
    code = main(["ema", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), err


@pytest.mark.parametrize(("length", "step"), [(0.05, STEPS), (0.10, STEPS // 2)])
def test_a_stored_length_comes_back_as_it_is(line: Line, tmp_path: Path, length: float, step: int) -> None:
    out = str(tmp_path / "ema.safetensors")
    report = rebuild_ema(line.run, length=length, out=out, images=step * BATCH, max_error=0.1)
    assert (report.error, report.images, report.stage, report.left_out) == (0.0, step * BATCH, 0, ())
    weights = load_model(out).network.state_dict()
    for name, value in line.expected(length, step).items():
        # Rounded once, to float16.
        torch.testing.assert_close(weights[name], value, rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize(("length", "step"), [(0.03, STEPS), (0.07, STEPS), (0.15, STEPS), (0.12, STEPS // 2)])
def test_any_length_is_the_average_kept_while_training(line: Line, tmp_path: Path, length: float, step: int) -> None:
    out = str(tmp_path / "ema.safetensors")
    report = rebuild_ema(line.run, length=length, out=out, images=step * BATCH, max_error=0.1)
    steps = np.repeat(np.arange(EVERY, step + 1, EVERY), 2)
    shares, error = reconstruction_weights(
        steps.tolist(), [0.05, 0.10] * (step // EVERY), relative_length=length, step=step
    )
    assert report.error == pytest.approx(error)
    assert report.snapshots == len(steps)
    assert report.rounding == pytest.approx(np.linalg.norm(shares) / 4096)
    wanted = np.diff((np.arange(step + 1) / step) ** (power_exponent(length) + 1))
    # Cauchy and Schwarz: profiles at a distance d give a straight line's mean step to d · |s - mean s|.
    mean_step_off = 1.1 * error * np.linalg.norm(wanted) * np.sqrt(step**3 / 12)
    model = load_model(out)
    for name, value in line.expected(length, step).items():
        # Each snapshot is rounded to float16, by 2^-12 at most, of numbers up to 6.
        rounding = 6 * 2**-12 * float(np.abs(shares).sum())
        off = (model.network.state_dict()[name] - value).abs()
        assert (off <= line.b[name].abs() * mean_step_off + rounding).all()
    assert model.metadata["ema_length"] == length
    assert model.metadata["ema_error"] == report.error
    assert (model.metadata["images_seen"], model.metadata["total_images_seen"]) == (step * BATCH, 1000 + step * BATCH)
    assert {value.dtype for value in model.network.state_dict().values()} == {torch.float32}


def test_without_a_name_the_file_is_named_by_the_length(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, result, _ = mdm_ema(capsys, "--length", "0.10", "--checkpoint", line.run)
    assert (code, result["out"]) == (0, str(tmp_path / "ema-0.1.safetensors"))
    mdm_ema(capsys, "--length", "0.10", "--checkpoint", line.run, "--out", "named.safetensors")
    assert (tmp_path / "ema-0.1.safetensors").read_bytes() == (tmp_path / "named.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", 0.3], "--length: got 0.3; wanted less than 0.28"),
        (
            ["--length", 0.01],
            r"with an error of 0\.\d+, more than max_error=0.1; lengths from 0.0\d+ to 0.2\d* can be made",
        ),
        (["--length", 0.1, "--images", 5000], "images=5000 must be between 1 and 1024"),
        (["--length", 0.1, "--stage", 1], "stage 1 of .* has no snapshots of averages; .*ema_snapshots_every_images"),
        (["--length", 0.1, "--out", "x.pth"], "must end in .safetensors"),
    ],
)
def test_what_cannot_be_made_is_refused(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[object], message: str
) -> None:
    out = [] if "--out" in words else ["--out", tmp_path / "ema.safetensors"]
    code, result, _ = mdm_ema(capsys, "--checkpoint", line.run, *out, *words)
    assert code == 2
    assert re.search(message, result["error"])
    assert not list(tmp_path.iterdir())


def test_damaged_snapshots_are_named_and_done_without(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "ema.safetensors"
    shutil.copytree(line.run, run)
    whole = rebuild_ema(line.run, length=0.07, out=str(out), max_error=0.1)
    snapshots = [Path(snapshot.uri) for snapshot in list_snapshots(str(run), stage=0)]
    assert len(snapshots) == STEPS // EVERY
    damaged = snapshots[-2] / "ema-0.05.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x11")
    (snapshots[-4] / "manifest.json").unlink()  # a half, as of a writer that was killed
    (snapshots[-5] / "manifest.json").write_text("{")
    code, result, _ = mdm_ema(capsys, "--checkpoint", run, "--length", 0.07, "--out", out)
    assert code == 0
    assert result["left_out"] == [f"{damaged} is damaged: its checksum is not the manifest's"]
    assert result["snapshots"] == whole.snapshots - 5
    assert whole.error < result["error"] < 0.1
    for name, value in line.expected(0.07, STEPS).items():
        torch.testing.assert_close(load_model(out).network.state_dict()[name], value, rtol=0, atol=0.02)
    for file in snapshots[-1].glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x11")
    code, result, _ = mdm_ema(capsys, "--checkpoint", run, "--length", 0.07, "--out", out)
    assert code == 1
    assert "has no snapshot of 1024 images or more once 3 damaged ones are left out; ask for fewer" in result["error"]


def test_numbers_beyond_float16_stay_float32() -> None:
    averages = {"0.05/large": torch.tensor([1e5, 1.0]), "0.05/small": torch.tensor([0.1]), "0.1/count": torch.tensor(3)}
    files = to_stored(averages)
    assert files["ema-0.05"]["large"].tolist() == [1e5, 1.0]
    assert files["ema-0.05"]["small"].dtype == torch.float16
    assert files["ema-0.1"]["count"].dtype == torch.int64
    assert averages == {}


def test_a_training_keeps_snapshots_that_give_its_own_average(table: SampleTable, tmp_path: Path) -> None:
    """The averages in a checkpoint are kept step by step; those of `mdm ema` come from the snapshots."""
    snapshots = {"uri": str(tmp_path / "run"), "every_images": 32, "keep": 1, "ema_snapshots_every_images": 24}
    stages = [
        {"resolution": 8, "images": 160, "global_batch_size": 8, "lr": 2e-3, "ema": 0.15},
        {"resolution": 16, "images": 40, "global_batch_size": 8, "lr": 2e-3},
    ]
    config = run_config(table, tmp_path, stages=stages, checkpoint=snapshots)
    train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=Hooks())
    kept = [[s.manifest.images_seen for s in list_snapshots(config.checkpoint.uri, stage=stage)] for stage in (0, 1)]
    assert kept == [[24, 48, 72, 96, 120, 144, 160], [24, 40]]
    out = str(tmp_path / "ema.safetensors")
    rebuild_ema(config.checkpoint.uri, length=0.15, out=out, stage=0, max_error=0.1)
    folder = checkpoint_uri(config.checkpoint.uri, stage=0, images_seen=160)
    own, last = open_checkpoint(folder).tensors("ema"), open_checkpoint(folder).tensors("weights")
    made = load_model(out).network.state_dict()
    distance = sum((made[name] - value).square().sum() for name, value in own.items()) ** 0.5
    moved = sum((last[name] - value).square().sum() for name, value in own.items()) ** 0.5
    assert distance < 0.05 * moved
    # It is a model like any other.
    text = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, dtype=torch.bool)
    (pictures,) = Generator.from_checkpoint(out, device="cpu").generate_from_text(
        *text, noise_ids=[0], seed=0, guidance_scale=2.0, num_inference_steps=2
    )
    assert pictures.shape == (1, 8, 8, 3)


def test_a_run_that_died_keeps_the_same_snapshots_to_the_bit(table: SampleTable, tmp_path: Path) -> None:
    def snapshots(config: TrainConfig) -> dict[tuple[int, float, str], Tensor]:
        return {
            (snapshot.manifest.images_seen, length, name): value
            for snapshot in list_snapshots(config.checkpoint.uri, stage=0)
            for length in EMA_LENGTHS
            for name, value in snapshot.tensors(snapshot_name(length)).items()
        }

    made = []
    for name, die_after in (("unbroken", None), ("killed", 1)):
        checkpoint = {"uri": str(tmp_path / name), "every_images": 16, "ema_snapshots_every_images": 8}
        stages = [{"resolution": 8, "images": 48, "global_batch_size": 8, "lr": 2e-3}]
        config = run_config(table, tmp_path, stages=stages, checkpoint=checkpoint)
        context = RunContext(config, table.version, "run")
        if die_after is not None:
            with pytest.raises(KilledError):
                train_stages(context, place=Place(), hooks=Listener(die_after))
            assert max(images for images, *_ in snapshots(config)) < 48
        train_stages(context, place=Place(), hooks=Hooks())
        made.append(snapshots(config))
    assert made[0].keys() == made[1].keys()
    assert {images for images, *_ in made[0]} == {8, 16, 24, 32, 40, 48}
    assert [key for key, value in made[0].items() if not torch.equal(made[1][key], value)] == []


def test_snapshots_are_kept_from_the_beginning_of_a_stage_or_not_at_all(table: SampleTable, tmp_path: Path) -> None:
    stages = [{"resolution": 8, "images": 48, "global_batch_size": 8, "lr": 2e-3}]
    config = run_config(table, tmp_path, stages=stages)
    train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=Hooks())
    storage.delete(checkpoint_uri(config.checkpoint.uri, stage=0, images_seen=48))
    asked = config.checkpoint.model_copy(update={"ema_snapshots_every_images": 8})
    with pytest.raises(ConfigError, match=r"ema_snapshots_every_images=8, but stage 0 of .* began without averages"):
        train(config.model_copy(update={"checkpoint": asked}))
