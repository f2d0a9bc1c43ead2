"""Pictures made finer, partly anew and changed, from files to files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs.sample import main
from mdm_core.errors import ConfigError
from mdm_core.model_file import save_model
from mdm_core.noise_schedule import NoiseSchedule
from pipelines.sample.config import SampleConfig
from pipelines.sample.edits import read_edit
from pipelines.sample.pipeline import _make, sample

from .conftest import png, random_network, random_pixels, small_config

CAPTIONS = ["a red fish", "house"]
CALL: dict[str, Any] = {"seed": 7, "guidance_scale": 2.0, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("edits") / "model.safetensors"
    save_model(
        path,
        random_network(small_config()),
        schedule=NoiseSchedule(num_timesteps=200),
        prediction_type="v",
        metadata={"text_encoder": "words"},
    )
    return str(path)


def file(tmp_path: Path, pixels: NDArray[np.uint8], name: str = "given.png") -> str:
    (tmp_path / name).write_bytes(png(pixels))
    return str(tmp_path / name)


def made(model: str, **fields: Any) -> list[NDArray[np.uint8]]:
    """16 and 8 px for two captions, as `mdm sample` makes them."""
    config = SampleConfig(checkpoint=model, captions=("x",), num_inference_steps=4, **fields)
    return _make(config, model, weights="ema", device="cpu").generate(CAPTIONS, noise_ids=[0, 1], **CALL)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_an_upscaled_picture_pools_to_the_given_one(
    words: list[tuple[str, int]], model: str, tmp_path: Path, solver: str
) -> None:
    low = random_pixels(8)
    fine, coarse = made(model, upscale_from=file(tmp_path, low), solver=solver)
    for row in range(2):
        np.testing.assert_array_equal(coarse[row], low)
        pooled = fine[row].astype(float).reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
        assert np.abs(pooled - low).max() <= 0.5
    assert np.abs(fine[0].astype(int) - fine[1].astype(int)).mean() > 0.5


def test_other_sizes_are_cut_square_and_brought_to_a_side_of_the_network(
    words: list[tuple[str, int]], model: str, tmp_path: Path
) -> None:
    wide = random_pixels(40, 60)
    middle = wide[:, 10:50].reshape(8, 5, 8, 5, 3).mean(axis=(1, 3))
    _, coarse = made(model, upscale_from=file(tmp_path, wide))
    # Pillow rounds after each axis.
    assert np.abs(coarse[0] - middle).max() <= 1


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_what_is_black_in_the_mask_comes_back(
    words: list[tuple[str, int]], model: str, tmp_path: Path, solver: str
) -> None:
    picture, mask = random_pixels(16), np.zeros((16, 16, 3), np.uint8)
    mask[4:9, 6:16] = 255
    given, where = file(tmp_path, picture), file(tmp_path, mask, "mask.png")
    fine, coarse = made(model, inpaint=given, mask=where, solver=solver)
    new = mask[..., 0] > 0
    below = new.reshape(8, 2, 8, 2).any(axis=(1, 3))
    pooled = picture.astype(float).reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    for row in range(2):
        np.testing.assert_array_equal(fine[row][~new], picture[~new])
        assert np.abs(fine[row][new].astype(int) - picture[new]).mean() > 10
        assert np.abs(coarse[row][~below] - pooled[~below]).max() <= 0.5
    assert np.abs(fine[0][new].astype(int) - fine[1][new]).mean() > 2


def test_the_more_strength_the_less_comes_back(words: list[tuple[str, int]], model: str, tmp_path: Path) -> None:
    given = random_pixels(16)
    path = file(tmp_path, given)
    distances = [
        np.abs(made(model, start_from=path, strength=strength)[0].astype(float) - given).mean()
        for strength in (0.02, 0.3, 1.0)
    ]
    assert distances[0] < 0.5 * distances[1] < 0.5 * distances[2]
    plain = made(model)[0].astype(float)
    assert np.abs(made(model, start_from=path, strength=1.0)[0] - plain).mean() < 3


def test_what_does_not_fit_is_said(words: list[tuple[str, int]], model: str, tmp_path: Path) -> None:
    picture = file(tmp_path, random_pixels(30, 20))
    black = file(tmp_path, np.zeros((30, 20, 3), np.uint8), "black.png")
    other = file(tmp_path, random_pixels(10, 20), "other.png")
    (tmp_path / "page.png").write_text("<html>")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"inpaint": picture, "mask": other},
            r"mask=.* is 20 × 10 px and inpaint=.* is 20 × 30 px; give a mask of the",
        ),
        ({"inpaint": picture, "mask": black}, "has nothing white in its middle square"),
        ({"start_from": str(tmp_path / "none.png")}, "start_from=.* is not a file; give a picture"),
        ({"upscale_from": str(tmp_path / "page.png")}, r"can't be read as a picture \(not_an_image\); give a PNG"),
    ]
    for fields, message in cases:
        with pytest.raises(ConfigError, match=message):
            made(model, **fields)
    with pytest.raises(ConfigError, match="upscale_from needs a network of several resolutions; this one makes 8 px"):
        read_edit(SampleConfig(checkpoint=model, captions=("x",), upscale_from=picture), [8])
    with pytest.raises(ValueError, match="strength is of start_from, which is missing"):
        SampleConfig(checkpoint=model, captions=("x",), strength=0.5)
    with pytest.raises(ConfigError, match="must be between 1 and 2, the noise levels there are from strength"):
        made(model, start_from=picture, strength=0.01)


def test_the_command_line(
    words: list[tuple[str, int]], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = file(tmp_path, random_pixels(8))
    out = str(tmp_path / "out")
    argv = ["a red fish", "--checkpoint", model, "--out", out, "--device", "cpu", "--num_inference_steps", "2"]
    flags = ["--upscale_from", low, "--guidance_scale", "[3, 2]", "--solver", "ddim", "--eta", "1"]
    assert main([*argv, *flags, "--threshold.kind", "dynamic", "--guidance_interval", "[0, 0.7]"]) == 0
    with Image.open(tmp_path / "out" / "samples_16.png") as grid:
        assert grid.width > 100
    capsys.readouterr()
    loaded = list(words)
    for wrong in (["--guidance_scale", "[3, 2, 1]"], ["--num_inference_steps", "300"], ["--mask", low], ["--eta", "1"]):
        assert main([*argv, *wrong]) == 2
    said = capsys.readouterr().err
    for part in ("3 entries for 2 resolutions", "between 1 and 200", "inpaint is missing", "solver='ddim' only"):
        assert part in said
    assert words == loaded  # nothing was loaded for what could not work


def test_the_report_of_a_file_leaves_out_what_it_does_not_say(
    words: list[tuple[str, int]], model: str, tmp_path: Path
) -> None:
    config = SampleConfig(checkpoint=model, captions=("fish",), out=str(tmp_path), num_inference_steps=1)
    report = sample(config)
    assert (report.checkpoint, report.images_seen, report.pictures) == (model, None, 1)
    assert sorted(report.grids) == ["16", "8"]
