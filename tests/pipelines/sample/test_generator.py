"""Pictures of a checkpoint: a picture's noise is its own, and the weights are those asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.nested_unet import build_network
from pipelines.sample.generator import Generator, Pictures
from pipelines.train.checkpoint import Checkpoint, Manifest
from pipelines.train.checkpoint_writer import save_checkpoint
from pipelines.train.model_config import ModelConfig

MODEL = ModelConfig.model_validate(
    {
        "networks": [
            {
                "resolution": 16,
                "channels": [4, 8],
                "num_resnets": [1, 1],
                "num_attention_layers": [0, 0],
                "mid_blocks": False,
                "num_groups": 4,
                "num_heads": 2,
                "time_dim": 16,
            },
            {
                "resolution": 8,
                "channels": [8, 8],
                "num_resnets": [1, 1],
                "num_attention_layers": [0, 1],
                "num_groups": 4,
                "num_heads": 2,
                "time_dim": 16,
            },
        ]
    }
)
SAMPLING: dict[str, Any] = {"seed": 7, "guidance_scale": 2.0, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Raw weights all 0.02, averaged ones random."""
    network = build_network(MODEL.matryoshka(text_dim=384))
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    averaged = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    manifest = Manifest(
        stage=1,
        images_seen=32,
        total_images_seen=80,
        stage_done=True,
        network=MODEL.matryoshka(text_dim=384).to_dict(),
        schedule=MODEL.schedule_arguments(),
        config={"seed": 3},
        table_uri="table",
        table_version=4,
        text_encoder="minilm",
        max_tokens=8,
        run_id="run",
        code_version="0",
        metrics={},
    )
    folder = str(tmp_path_factory.mktemp("generator"))
    return save_checkpoint(
        folder, manifest, {"weights": {k: torch.full_like(v, 0.02) for k, v in state.items()}, "ema": averaged}
    )


def pictures(generator: Generator, numbers: list[int]) -> list[Pictures]:
    text = torch.stack([torch.randn(5, 384, generator=torch.Generator().manual_seed(number)) for number in numbers])
    mask = torch.ones(len(numbers), 5, dtype=torch.bool)
    return generator.generate_from_text(text, mask, noise_ids=numbers, **SAMPLING)


def test_a_picture_is_the_same_in_any_batch(checkpoint: Checkpoint) -> None:
    generator = Generator.from_checkpoint(checkpoint.uri, device="cpu")
    together = pictures(generator, [4, 1, 9])
    apart = [pictures(generator, [number]) for number in (4, 1, 9)]
    for level, (side, whole) in enumerate(zip((16, 8), together, strict=True)):
        assert whole.shape == (3, side, side, 3)
        assert whole.dtype == np.uint8
        for row, one in enumerate(apart):
            # Convolutions over one row and over three may round differently.
            assert np.abs(whole[row].astype(int) - one[level][0].astype(int)).max() <= 1
        assert np.abs(whole[0].astype(int) - whole[1].astype(int)).mean() > 5


def test_each_kind_of_weights_draws_its_own_pictures(checkpoint: Checkpoint) -> None:
    drawn = [
        pictures(Generator.from_checkpoint(checkpoint.uri, weights=weights, device="cpu"), [1])[0].astype(int)
        for weights in ("ema", "raw", "untrained")
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(drawn[first] - drawn[second]).mean() > 1


def test_captions_are_encoded_and_change_the_picture(checkpoint: Checkpoint) -> None:
    generator = Generator.from_checkpoint(checkpoint.uri, device="cpu")
    cat, same, dog = (generator.generate([c], noise_ids=[5], **SAMPLING)[0].astype(int) for c in ("cat", "cat", "dog"))
    np.testing.assert_array_equal(cat, same)
    assert np.abs(cat - dog).mean() > 0.5


def test_a_folder_without_checkpoint_and_a_damaged_one_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint; give the folder of a run"):
        Generator.from_checkpoint(str(tmp_path))
    copy = tmp_path / "stage-1" / "images-000000000032"
    copy.mkdir(parents=True)
    for file in Path(checkpoint.uri).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has lost its ema\.safetensors"):
        Generator.from_checkpoint(str(copy))


def test_more_steps_than_noise_levels_and_unknown_devices_are_refused(checkpoint: Checkpoint) -> None:
    generator = Generator.from_checkpoint(checkpoint.uri, device="cpu")
    with pytest.raises(ConfigError, match=r"num_inference_steps=2000 must be between 1 and 1000, the noise levels"):
        generator.generate(["cat"], noise_ids=[1], seed=0, guidance_scale=1.0, num_inference_steps=2000)
    with pytest.raises(ConfigError, match=r"device=abacus can't be used: .*; try auto or cpu"):
        Generator.from_checkpoint(checkpoint.uri, device="abacus")
