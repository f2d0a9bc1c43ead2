"""Solvers and guidance as configured, against the sampler called by hand; a picture does not depend on its batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdm_core.conditioning import Condition
from mdm_core.denoiser import Diffusion
from mdm_core.errors import ConfigError
from mdm_core.guidance import Guidance
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType
from mdm_core.samplers import Sampling, sample
from mdm_core.thresholding import Threshold
from pipelines.run_config import dump_config, load_config
from pipelines.sample.config import SampleConfig
from pipelines.sample.generator import Generator, Options, Pictures
from pipelines.sample.noise import PictureNoise
from pipelines.sample.text import TextSettings

from .conftest import WIDTH, embedding, random_network, small_config

CAPTIONS = ["a red fish", "house", "one two three four five six"]
NUMBERS = [4, 1, 2**32 + 9]
CALL: dict[str, Any] = {"seed": 7, "guidance_scale": 2.0, "num_inference_steps": 4}


def configured(*, innermost: dict[str, Any] | None = None, prediction_type: PredictionType = "v", **fields: Any) -> Any:
    """A generator that samples as a configuration with these fields says."""
    network = random_network(small_config(**innermost or {}))
    mask_text = network.inner_unet.config.mask_text  # type: ignore[union-attr]
    text = TextSettings(
        encoder="words",
        max_tokens=16,
        text_dim=WIDTH,
        hides_padding=bool(mask_text),
        negative_is_empty_caption=not mask_text,
    )
    generator = Generator(network, NoiseSchedule(), prediction_type=prediction_type, text=text)
    config = SampleConfig(checkpoint="x", captions=("x",), **fields)
    generator.options = Options(sampling=config.sampling(), negative_caption=config.negative_caption)
    return generator


def largest_difference(first: Pictures, second: Pictures) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.mark.parametrize(
    ("fields", "innermost"),
    [
        ({"solver": "ddpm"}, {}),
        ({"solver": "ddim", "eta": 0.7}, {}),
        ({"solver": "ddpm", "negative_caption": "a blue bird in the sky"}, {}),
        # Padding is in sight: it must not depend on the captions beside.
        ({"solver": "ddpm"}, {"mask_text": False}),
        ({"solver": "dpmpp_2m", "negative_caption": "too dark"}, {"mask_text": False}),
    ],
)
def test_a_picture_is_the_same_in_any_batch(
    words: list[tuple[str, int]], fields: dict[str, Any], innermost: dict[str, Any]
) -> None:
    generator = configured(innermost=innermost, **fields)
    together = generator.generate(CAPTIONS, noise_ids=NUMBERS, **CALL)
    backwards = generator.generate(CAPTIONS[::-1], noise_ids=NUMBERS[::-1], **CALL)
    for row, (caption, number) in enumerate(zip(CAPTIONS, NUMBERS, strict=True)):
        alone = generator.generate([caption], noise_ids=[number], **CALL)
        for whole, other, one in zip(together, backwards, alone, strict=True):
            # Convolutions over one row and over three may round differently.
            assert largest_difference(whole[row], one[0]) <= 1
            assert largest_difference(whole[row], other[len(CAPTIONS) - 1 - row]) <= 1
    assert largest_difference(together[0][0], together[0][1]) > 20


def test_steps_add_noise_of_the_seed_only_where_the_solver_adds_any(words: list[tuple[str, int]]) -> None:
    pictures = {
        eta: configured(solver="ddim", eta=eta).generate(CAPTIONS[:1], noise_ids=[1], **CALL)[0]
        for eta in (0.0, 0.3, 1.0)
    }
    assert largest_difference(pictures[0.0], pictures[0.3]) > 5
    assert largest_difference(pictures[0.3], pictures[1.0]) > 5
    ancestral = configured(solver="ddpm").generate(CAPTIONS[:1], noise_ids=[1], **CALL)[0]
    # With eta 1 ddim is ddpm, but for rounding.
    assert largest_difference(pictures[1.0], ancestral) <= 1
    other = configured(solver="ddpm").generate(CAPTIONS[:1], noise_ids=[1], **CALL | {"seed": 8})[0]
    assert largest_difference(other, ancestral) > 20


@pytest.mark.parametrize("prediction_type", ["v", "eps", "x0"])
def test_every_field_reaches_the_sampler(words: list[tuple[str, int]], prediction_type: PredictionType) -> None:
    generator = configured(
        prediction_type=prediction_type,
        solver="ddim",
        eta=0.5,
        spacing="reference",
        guidance_rescale=0.7,
        guidance_interval=(0.1, 0.6),
        negative_caption="a blue bird",
        threshold={"kind": "dynamic", "ratio": 0.9, "max_value": 1.5},
    )
    made = generator.generate(CAPTIONS[:1], noise_ids=[5], seed=2, guidance_scale=[4.0, 2.5], num_inference_steps=5)

    def condition(text: str) -> Condition:
        return Condition(text_emb=torch.from_numpy(embedding(text).astype(np.float32))[None])

    noise = PictureNoise(seed=2, noise_ids=[5], resolutions=(16, 8), device=torch.device("cpu"))
    x0 = sample(
        Diffusion(random_network(small_config()), NoiseSchedule(), prediction_type),
        noise.initial(),
        condition=condition(CAPTIONS[0]),
        step_noise=[noise.of_step(step) for step in range(4)],
        sampling=Sampling(
            num_inference_steps=5,
            solver="ddim",
            eta=0.5,
            spacing="reference",
            threshold=Threshold(kind="dynamic", ratio=0.9, max_value=1.5),
            guidance=Guidance(scale=(4.0, 2.5), rescale=0.7, interval=(0.1, 0.6), negative=condition("a blue bird")),
        ),
    )
    for level, wanted in zip(made, x0, strict=True):
        expected = ((wanted[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        assert largest_difference(level[0], expected) <= 1


@pytest.mark.parametrize("mask_text", [True, False])
def test_guidance_away_from_the_caption_itself_changes_nothing(words: list[tuple[str, int]], mask_text: bool) -> None:
    generator = configured(innermost={"mask_text": mask_text}, negative_caption=CAPTIONS[0])
    plain, guided = (
        generator.generate(CAPTIONS[:1], noise_ids=[5], **CALL | {"guidance_scale": scale})[0] for scale in (1.0, 6.0)
    )
    assert largest_difference(plain, guided) <= 1


def test_what_does_not_fit_the_network_is_refused_before_work(words: list[tuple[str, int]]) -> None:
    generator = configured()
    with pytest.raises(ConfigError, match=r"guidance scale=\(3\.0, 2\.0, 1\.0\) has 3 entries for 2 resolutions"):
        generator.check(guidance_scale=[3.0, 2.0, 1.0], num_inference_steps=4)
    with pytest.raises(ConfigError, match="num_inference_steps=1001 must be between 1 and 1000, the noise levels"):
        generator.check(guidance_scale=1.0, num_inference_steps=1001)
    generator.options = replace(generator.options, sampling=Sampling(num_inference_steps=1, solver="heun"))
    with pytest.raises(ConfigError, match="num_inference_steps=999 must be between 1 and 9"):
        generator.check(guidance_scale=1.0, num_inference_steps=999)
    assert words == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eta": 0.5}, "eta=0.5 is of solver='ddim' only, got 'dpmpp_2m'; leave eta at 0"),
        ({"solver": "ddim", "eta": 1.5}, "eta=1.5 must be between 0"),
        ({"guidance_rescale": 2.0}, "guidance rescale=2.0 must be between 0"),
        ({"guidance_interval": (0.9, 0.1)}, r"guidance interval=\(0.9, 0.1\) must rise within \[0, 1\]"),
        ({"threshold": {"kind": "dynamic", "ratio": 0.0}}, r"threshold ratio=0.0 must be in \(0, 1\]"),
        ({"upscale_from": "a.png", "start_from": "b.png"}, "upscale_from and start_from can't be combined"),
        ({"inpaint": "a.png"}, "inpaint and mask belong together, and mask is missing"),
        ({"mask": "a.png"}, "inpaint and mask belong together, and inpaint is missing"),
        ({"solver": "euler"}, "'ddpm', 'ddim', 'heun' or 'dpmpp_2m'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleConfig(checkpoint="x", captions=("x",), **fields)


def test_the_printed_configuration_is_the_same_configuration(tmp_path: Path) -> None:
    flags = [
        "--checkpoint",
        "x",
        "--captions",
        "[a]",
        "--guidance_scale",
        "[3, 2.5]",
        "--guidance_interval",
        "[0, 0.5]",
    ]
    config = load_config(SampleConfig, flags, prog="mdm sample", description="")
    assert (config.guidance_scale, config.guidance_interval) == ((3.0, 2.5), (0.0, 0.5))
    (tmp_path / "printed.yaml").write_text(dump_config(config))
    again = load_config(SampleConfig, ["--config", str(tmp_path / "printed.yaml")], prog="mdm sample", description="")
    assert again == config
    assert SampleConfig(checkpoint="x", captions=("a",)).sampling() == Sampling(
        num_inference_steps=32, guidance=Guidance(scale=3.0)
    )
