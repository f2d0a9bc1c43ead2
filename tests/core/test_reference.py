"""Every case of ../shared/reference, which the published code computed; and that the replay can fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.replay_reference import main, replays

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference numbers (../shared/reference) are absent")
REPLAYS = replays(REFERENCE) if REFERENCE.is_dir() else {}


@pytest.mark.parametrize("name", REPLAYS or ["none"])
def test_case_is_what_the_published_code_computed(name: str) -> None:
    result = REPLAYS[name]()
    assert result.error <= result.tolerance


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the same layout with two small cases, which can be tampered with."""
    index = json.loads((REFERENCE / "index_forward.json").read_text())
    index["cases"] = {name: index["cases"][name] for name in ("a_unet", "e3_unet_uncond")}
    (tmp_path / "index_forward.json").write_text(json.dumps(index))
    for case in index["cases"].values():
        for file in (case["file"], case.get("pth")):
            if file:
                shutil.copyfile(REFERENCE / file, tmp_path / file)
    diffusion = json.loads((REFERENCE / "index_diffusion.json").read_text())
    diffusion["cases"] = {"traj_a_ddim4": diffusion["cases"]["traj_a_ddim4"]}
    (tmp_path / "index_diffusion.json").write_text(json.dumps(diffusion))
    shutil.copyfile(REFERENCE / "traj_a_ddim4.safetensors", tmp_path / "traj_a_ddim4.safetensors")
    return tmp_path


def tamper(path: Path, key: str, value: float) -> None:
    tensors = load_file(path)
    tensors[key].view(-1)[0] = value
    save_file(tensors, path)


def test_a_line_a_case_and_exit_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["a_unet", "a_unet_vis_model_000007.pth", "e3_unet_uncond", "traj_a_ddim4"]
    assert [line.split()[0] for line in lines[:-1]] == names
    for line in lines[:-1]:
        _, error, word, tolerance = line.split()
        assert word == "tolerance"
        assert float(error) <= float(tolerance) <= 2e-5
    assert lines[-1] == "all within their tolerance"


@pytest.mark.parametrize(
    ("file", "key", "value", "failing"),
    [
        ("forward_a_unet.safetensors", "out.micros.y0", 3.0, "a_unet "),
        ("forward_e3_unet_uncond.safetensors", "grad.total_norm", 1.4217, "e3_unet_uncond "),
        ("forward_a_unet.safetensors", "in.x0", float("nan"), "a_unet "),
        ("traj_a_ddim4.safetensors", "step2.xs_0", 3.0, "traj_a_ddim4 "),
    ],
)
def test_one_number_that_differs_fails_its_case_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, key: str, value: float, failing: str
) -> None:
    tamper(folder / file, key, value)
    assert main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("FAILED")] == [line for line in lines if line.startswith(failing)]
    assert lines[-1] == "1 failed"


def test_weights_that_are_not_the_recorded_ones_are_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((folder / "index_forward.json").read_text())
    index["cases"]["e3_unet_uncond"]["state_sha256"] = "0" * 64
    (folder / "index_forward.json").write_text(json.dumps(index))
    checkpoint = torch.load(folder / "a_unet_vis_model_000007.pth", weights_only=True)
    checkpoint["state_dict"]["conv_in.bias"][0] += 1e-6
    torch.save(checkpoint, folder / "a_unet_vis_model_000007.pth")
    assert main([str(folder)]) == 1
    captured = capsys.readouterr()
    assert "e3_unet_uncond                       can't be replayed: ValueError: the rebuilt weights have the hash" in (
        captured.out
    )
    assert [line.split()[0] for line in captured.out.splitlines() if line.endswith("FAILED")] == [
        "a_unet_vis_model_000007.pth"
    ]


def test_a_folder_of_another_layout_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "usage" in capsys.readouterr().err
