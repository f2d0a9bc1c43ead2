"""Checkpoints that are one file: published ones, ours, and those of a run's folder on their own."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdm_core.apple_config import config_from_apple
from mdm_core.apple_weights import AppleCheckpoint, load_apple_checkpoint, load_apple_weights, save_apple_checkpoint
from mdm_core.conditioning import Condition
from mdm_core.denoiser import Diffusion
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.guidance import Guidance
from mdm_core.model_file import load_model, save_model
from mdm_core.nested_unet import build_network
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.presets import PRESETS, Preset
from mdm_core.samplers import Sampling, sample
from pipelines.sample import models
from pipelines.sample.generator import Generator, Options, Pictures
from pipelines.sample.noise import PictureNoise
from pipelines.sample.published import published_shape
from pipelines.train.checkpoint import Checkpoint, Manifest
from pipelines.train.checkpoint_writer import save_checkpoint
from tests.pipelines.s3_server import S3Server

from .conftest import WIDTH, embedding, random_network, small_config

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference numbers (../shared/reference) are absent"
)
CAPTION = "a red fish in the sea"
CALL: dict[str, Any] = {"noise_ids": [3], "seed": 7, "guidance_scale": 3.0, "num_inference_steps": 3}
SAMPLER = {"num_diffusion_steps": 100, "schedule_type": "DEEPFLOYD", "prediction_type": "V_PREDICTION"}


def published(name: str) -> tuple[Path, dict[str, Any]]:
    case = json.loads((REFERENCE / "index_forward.json").read_text())["cases"][name]
    return REFERENCE / case["pth"], case["unet_config"]


def by_hand(config: Any, weights: Path, schedule: NoiseSchedule, negative: np.ndarray[Any, Any]) -> list[torch.Tensor]:
    """Pictures of CAPTION as the published code pads it: zeros up to the longer of both texts."""
    network = build_network(config).eval()
    load_apple_weights(network, weights)
    tokens = embedding(CAPTION)
    length = max(len(tokens), len(negative))

    def condition(text: np.ndarray[Any, Any]) -> Condition:
        padded = np.zeros((1, length, text.shape[1]), np.float32)
        padded[0, : len(text)] = text
        mask = torch.arange(length)[None] < len(text)
        return Condition(text_emb=torch.from_numpy(padded), text_mask=mask)

    resolutions = config.resolutions
    return sample(
        Diffusion(network, schedule),
        PictureNoise(seed=7, noise_ids=[3], resolutions=resolutions, device=torch.device("cpu")).initial(),
        sampling=Sampling(num_inference_steps=3, guidance=Guidance(scale=3.0, negative=condition(negative))),
        condition=condition(tokens),
    )


def assert_same(made: list[Pictures], x0: list[torch.Tensor]) -> None:
    for level, wanted in zip(made, x0, strict=True):
        expected = ((wanted + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        # Orders of memory and of rows may round differently.
        assert np.abs(level.astype(int) - expected.astype(int)).max() <= 1
        assert level.std() > 20


@needs_reference
@pytest.mark.parametrize(
    ("name", "side", "sampler", "schedule"),
    [
        ("a_unet", 16, SAMPLER, {"num_timesteps": 100}),
        (
            "b_nested",
            32,
            SAMPLER | {"schedule_shifted": True, "schedule_shifted_power": 2},
            {"num_timesteps": 100, "shift_power": 2.0},
        ),
        (
            "c_nested2",
            64,
            # As pickled enumerations come out; without a shift the finer pictures are divided.
            SAMPLER | {"schedule_type": {"class": "ScheduleType", "arguments": [3]}},
            {"num_timesteps": 100, "shift": "signal", "shift_power": 2.0},
        ),
    ],
)
def test_a_published_file_with_its_configuration(
    words: list[tuple[str, int]], tmp_path: Path, name: str, side: int, sampler: Any, schedule: dict[str, Any]
) -> None:
    source, unet_config = published(name)
    config = config_from_apple(unet_config, text_dim=24, resolution=side)
    network = build_network(config)
    load_apple_weights(network, source)
    path = tmp_path / "model.pth"
    arguments = {
        "unet_config": unet_config,
        "diffusion_config": {"sampler_config": sampler},
        "sample_image_size": -1,
        "reader_config": {"image_size": side},
    }
    save_apple_checkpoint(network, path, batch_num=7, args=arguments)
    generator = Generator.from_checkpoint(str(path), device="cpu")
    made = generator.generate([CAPTION], **CALL)
    assert words == [("t5:google/flan-t5-xl", 128)]
    assert_same(made, by_hand(config, source, NoiseSchedule(**schedule), embedding("")))


@needs_reference
def test_a_published_file_that_a_preset_fits(words: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    source, unet_config = published("b_nested")
    config = config_from_apple(unet_config, text_dim=24, resolution=32)
    schedule = NoiseSchedule(num_timesteps=50)
    monkeypatch.setitem(PRESETS, "mdm-32", Preset(config, schedule))
    generator = Generator.from_checkpoint(str(source), device="cpu", encoder="words:24", max_tokens=99)
    generator.options = Options(negative_caption="a caption that is longer than the other one")
    made = generator.generate([CAPTION], **CALL)
    assert words == [("words:24", 99)]
    assert_same(made, by_hand(config, source, schedule, embedding("a caption that is longer than the other one")))


@needs_reference
def test_a_published_file_that_nothing_fits_says_what_was_tried() -> None:
    source, _ = published("b_nested")
    with pytest.raises(CheckpointError) as raised:
        models.load(str(source), weights="ema")
    said = str(raised.value)
    assert f"no network is known for the weights in {source}. Tried:\n" in said
    assert "mdm-64: it has 0 shells, the file has 1" in said
    assert "mdm-256: the file's weights don't fit the 256 px network: " in said
    assert 'args["unet_config"]: the file has none' in said


@needs_reference
def test_a_published_configuration_without_noise_or_resolution_is_refused(tmp_path: Path) -> None:
    source, unet_config = published("a_unet")
    network = build_network(config_from_apple(unet_config, text_dim=24, resolution=16))
    path = tmp_path / "model.pth"
    for arguments, message in (
        ({}, "the file says no resolution"),
        ({"sample_image_size": 16}, "the file has none, so its noise is not known"),
        (
            {"sample_image_size": 16, "diffusion_config": {"sampler_config": SAMPLER | {"schedule_type": "SIGMOID"}}},
            "sampler_config.schedule_type='SIGMOID' must be one of",
        ),
        (
            {"sample_image_size": 16, "diffusion_config": {"sampler_config": SAMPLER | {"schedule": "DDPM"}}},
            r"sampler_config has unknown keys \['schedule'\]",
        ),
        (
            {
                "sample_image_size": 16,
                "diffusion_config": {"sampler_config": SAMPLER | {"num_diffusion_steps": "1000"}},
            },
            "sampler_config.num_diffusion_steps='1000' must be int",
        ),
        (
            {"sample_image_size": 16, "diffusion_config": {"sampler_config": SAMPLER, "model_output_scale": 2.0}},
            "held in range by tanh are not supported",
        ),
    ):
        save_apple_checkpoint(network, path, batch_num=7, args={"unet_config": unet_config} | arguments)
        with pytest.raises(CheckpointError, match=message):
            models.load(str(path), weights="ema")
    assert load_apple_checkpoint(source).args is None


def test_a_model_file_of_ours(words: list[tuple[str, int]], tmp_path: Path) -> None:
    network, path = random_network(small_config()), tmp_path / "model.safetensors"
    schedule = NoiseSchedule(num_timesteps=80, kind="cosine")
    save_model(path, network, schedule=schedule, prediction_type="x0", metadata={"max_tokens": "lots"})
    with pytest.raises(ConfigError, match=r"doesn't say what encodes its captions; give --text\.encoder"):
        Generator.from_checkpoint(str(path))
    with pytest.raises(ConfigError, match=r"weights=raw is of a run's checkpoints; .* has only its own, leave weights"):
        Generator.from_checkpoint(str(path), weights="raw")
    with pytest.raises(ConfigError, match=r"says max_tokens='lots'; give --text\.max_tokens"):
        Generator.from_checkpoint(str(path), encoder="words")
    generator = Generator.from_checkpoint(str(path), device="cpu", encoder="words", max_tokens=5)
    made = generator.generate([CAPTION], **CALL)
    assert words == [("words", 5)]
    x0 = sample(
        Diffusion(network, schedule, "x0"),
        PictureNoise(seed=7, noise_ids=[3], resolutions=(16, 8), device=torch.device("cpu")).initial(),
        sampling=Sampling(num_inference_steps=3, guidance=Guidance(scale=3.0)),
        condition=Condition(text_emb=torch.from_numpy(embedding(CAPTION, 5).astype(np.float32))[None]),
    )
    assert_same(made, x0)
    with pytest.raises(ConfigError, match="gives text 30 wide, and the network reads 24"):
        Generator.from_checkpoint(str(path), encoder="words:30", max_tokens=5).generate([CAPTION], **CALL)
    with pytest.raises(ConfigError, match=r"none\.safetensors: there is no such file"):
        models.find_source(str(tmp_path / "none.safetensors"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A run's, whose network answers the noise."""
    config = small_config()
    manifest = Manifest(
        stage=1,
        images_seen=32,
        total_images_seen=80,
        stage_done=True,
        network=config.to_dict(),
        schedule={"num_timesteps": 90, "kind": "linear"},
        config={"seed": 3, "name": "run"},
        table_uri="table",
        table_version=4,
        text_encoder="words",
        max_tokens=8,
        run_id="run",
        code_version="0",
        metrics={},
        prediction_type="eps",
    )
    tensors = {name: random_network(config, seed).state_dict() for name, seed in (("weights", 1), ("ema", 2))}
    return save_checkpoint(str(tmp_path), manifest, tensors | {"optimizer": {"step": torch.zeros(1)}})


def test_the_files_of_a_run_are_model_files(words: list[tuple[str, int]], checkpoint: Checkpoint) -> None:
    for weights, file in (("ema", "ema"), ("raw", "weights")):
        path = f"{checkpoint.uri}/{file}.safetensors"
        model = load_model(path)
        assert model.config == small_config()
        assert model.schedule == checkpoint.manifest.noise_schedule()
        assert model.metadata["total_images_seen"] == 80
        for key, value in checkpoint.tensors(file).items():
            assert torch.equal(model.network.state_dict()[key], value)
        whole = Generator.from_checkpoint(checkpoint.uri, weights=weights, device="cpu")  # type: ignore[arg-type]
        alone = Generator.from_checkpoint(path, device="cpu")
        for one, other in zip(whole.generate([CAPTION], **CALL), alone.generate([CAPTION], **CALL), strict=True):
            np.testing.assert_array_equal(one, other)
    assert words == [("words", 8)] * 4
    with pytest.raises(CheckpointError, match="holds tensors, but no configuration"):
        load_model(f"{checkpoint.uri}/optimizer.safetensors")


def test_a_run_keeps_its_own_encoder(checkpoint: Checkpoint) -> None:
    assert models.load(checkpoint.uri, weights="ema", encoder="words", max_tokens=8).text.text_dim == WIDTH
    with pytest.raises(ConfigError, match=r"are of single files; .* was trained with words and 8, leave them out"):
        models.load(checkpoint.uri, weights="ema", encoder="minilm")


def test_a_manifest_from_before_there_was_a_choice_means_v(checkpoint: Checkpoint) -> None:
    path = Path(checkpoint.uri) / "manifest.json"
    values = json.loads(path.read_text())
    del values["prediction_type"]
    values["schedule"] = {"num_timesteps": 90, "shift_power": 1.0}
    path.write_text(json.dumps(values))
    model = models.load(checkpoint.uri, weights="ema")
    assert (model.prediction_type, model.schedule) == ("v", NoiseSchedule(num_timesteps=90))


def test_a_file_on_object_storage_is_copied_for_the_time_of_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bucket: str, s3_server: S3Server
) -> None:
    local = tmp_path / "model.safetensors"
    network = random_network(small_config())
    save_model(local, network, schedule=NoiseSchedule(num_timesteps=80), prediction_type="v")
    s3_server.filesystem().pipe_file(f"{bucket}/some/model.safetensors", local.read_bytes())
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    model = models.load(f"{bucket}/some/model.safetensors", weights="ema", encoder="words")
    assert list(copies.iterdir()) == []
    for key, value in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[key], value)
    assert model.text.max_tokens == 128


@pytest.mark.parametrize("name", list(PRESETS))
def test_each_preset_is_known_by_its_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        state = build_network(PRESETS[name].config).state_dict()
    nothing: dict[str, Any] = dict.fromkeys(("batch_num", "loss", "best_avg_loss", "exp_avg_loss", "exp_avg_loss_var"))
    shape = published_shape(AppleCheckpoint(state_dict=state, args=None, **nothing), what="file")
    assert (shape.name, shape.config, shape.schedule) == (name, PRESETS[name].config, PRESETS[name].schedule)
    # One layer of another width, and it is none of them.
    key = next(key for key in state if key.endswith("lm_proj.weight"))
    state[key] = torch.empty(7, 7, device="meta")
    with pytest.raises(CheckpointError, match=r"lm_proj\.weight is \(7, 7\), wanted \(2048, 2048\)"):
        published_shape(AppleCheckpoint(state_dict=state, args=None, **nothing), what="file")
