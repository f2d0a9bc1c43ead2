"""The published recipes: the networks of the paper, at its batch sizes, and as large as it says."""

import json
import pathlib
import re

import pytest

from jobs import train
from mdm_core.presets import PRESETS
from pipelines.run_config import load_file
from pipelines.train.config import TrainConfig

CONFIGS = pathlib.Path(train.__file__).parent / "configs"
# Parameters, and forward and backward TFLOP an image, counted on Apple's code at 128 tokens of FLAN-T5-XL.
PUBLISHED = {64: (461_359_107, 1.155), 256: (476_613_958, 1.830), 1024: (480_970_057, 3.117)}
# Their files' images a GPU, times the paper's 32 GPUs.
BATCHES = {64: 32 * 32, 256: 32 * 24, 1024: 32 * 4}


@pytest.mark.parametrize("side", PUBLISHED)
def test_a_recipe_trains_the_published_network_stage_by_stage(side: int) -> None:
    config = load_file(TrainConfig, str(CONFIGS / f"cc12m-{side}.yaml"), command="train")
    published = PRESETS[f"mdm-{side}"]
    assert config.model.matryoshka(2048) == published.config
    assert config.model.noise_schedule() == published.schedule
    assert [stage.resolution for stage in config.stages] == [finest for finest in PUBLISHED if finest <= side]
    assert (config.text.encoder, config.text.max_tokens) == ("t5:google/flan-t5-xl", 128)
    for stage in config.stages:
        assert stage.global_batch_size == BATCHES[stage.resolution]
        assert stage.warmup_images == 10_000 * stage.global_batch_size
        assert (stage.lr, stage.max_grad_norm, stage.loss_weighting) == (5e-5, 2.0, "eps")
        # The power function of relative length s spans s × steps; 0.9999 a step spans 10,000 steps.
        assert stage.ema * stage.num_steps == pytest.approx(10_000, rel=0.07)


def test_the_dry_run_counts_what_the_reference_code_has(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(CONFIGS / "cc12m-1024.yaml")
    assert train.main(["--config", file, "--dry-run", "--plan.memory", "false", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert {stage["resolution"]: stage["parameters"] for stage in planned["stages"]} == {
        side: parameters for side, (parameters, _) in PUBLISHED.items()
    }
    for stage in planned["stages"]:
        assert stage["flops_per_image"] / 1e12 == pytest.approx(PUBLISHED[stage["resolution"]][1], abs=6e-4)
        # 16 bytes a parameter: weights, average and two moments.
        assert stage["checkpoint_bytes"] == pytest.approx(16 * stage["parameters"], rel=1e-5)
    assert any("the table, its version and its embeddings" in said for said in planned["not_checked"])


@pytest.mark.parametrize("side", PUBLISHED)
def test_every_field_of_a_recipe_is_explained_where_it_first_stands(side: int) -> None:
    explained = set()
    for line in (CONFIGS / f"cc12m-{side}.yaml").read_text(encoding="utf-8").splitlines():
        if field := re.match(r"[\s-]*(\w+): *[^\s#]", line):
            assert field[1] in explained or " # " in line, line
            explained.add(field[1])
    assert explained > {"table", "preset", "lr", "micro_batch_size", "every_images", "share_of_peak"}
