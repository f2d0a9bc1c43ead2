"""`model.preset`: the published networks, by a name in a configuration."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mdm_core.errors import ConfigError
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.presets import PRESETS
from pipelines.run_config import dump_config, load_config
from pipelines.train.config import TrainConfig
from pipelines.train.model_config import ModelConfig

RUN = """\
command: train
name: run
data: {table: t}
stages: [{resolution: 64, images: 64, global_batch_size: 8, lr: 1e-4}]
checkpoint: {uri: out}
"""


def load(folder: Path, model: str, *flags: str) -> TrainConfig:
    file = folder / "train.yaml"
    file.write_text(RUN + model)
    return load_config(TrainConfig, ["--config", str(file), *flags], prog="mdm train", description="")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_published_model(name: str) -> None:
    model = ModelConfig.model_validate({"preset": name})
    assert model.matryoshka(2048) == PRESETS[name].config
    assert model.noise_schedule() == PRESETS[name].schedule
    assert model.prediction_type == "v"


def test_what_is_given_beside_a_preset_wins_even_where_it_is_a_default(tmp_path: Path) -> None:
    model = load(tmp_path, "model: {preset: mdm-1024, prediction_type: eps, shift_power: 1.0, text_dim: null}").model
    assert (model.prediction_type, model.text_dim) == ("eps", None)
    assert model.noise_schedule() == NoiseSchedule(num_timesteps=1000, shift_power=1.0)
    innermost = dataclasses.replace(PRESETS["mdm-1024"].config.networks[-1], text_dim=384)
    assert model.matryoshka(384).networks == (*PRESETS["mdm-1024"].config.networks[:-1], innermost)
    assert load(tmp_path, "model: {preset: mdm-1024}", "--model.preset", "mdm-256").model.resolutions == (256, 64)


def test_a_preset_and_its_networks_written_out_are_the_same_run(tmp_path: Path) -> None:
    short = load(tmp_path, "model: {preset: mdm-256}")
    networks = [
        {
            key: value
            for key, value in dataclasses.asdict(network).items()
            if key in ("resolution", "channels", "num_resnets", "num_attention_layers", "micro_conditions")
            or value not in (None, "none", ())
        }
        for network in PRESETS["mdm-256"].config.networks
    ]
    for network in networks:
        for key in ("text_dim", "num_text_layers", "dropout", "feed_inner", "video", "rotary_positions"):
            network.pop(key, None)
    values = short.model_dump() | {"model": {"networks": networks, "shift_power": 1.0}}
    assert TrainConfig.model_validate(values).identity() == short.identity()
    other = short.model_dump() | {"model": {"preset": "mdm-256", "shift_power": 2.0}}
    assert TrainConfig.model_validate(other).identity() != short.identity()


def test_the_resolved_configuration_reads_as_itself(tmp_path: Path) -> None:
    config = load(tmp_path, "model: {preset: mdm-1024, shift_power: 1.5}")
    written = tmp_path / "resolved.yaml"
    written.write_text(dump_config(config))
    assert load_config(TrainConfig, ["--config", str(written)], prog="mdm train", description="") == config
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.model.preset is None
    assert config.model.shift_power == 1.5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "model: {}",
            r"train.yaml: line 6: model: wanted networks, or the preset of some: mdm-64, mdm-256, mdm-1024",
        ),
        (
            "model: {preset: mdm-64, networks: [{resolution: 64, channels: [32], num_resnets: [1], "
            "num_attention_layers: [0]}]}",
            "model: preset=mdm-64 has networks of its own; leave out either preset or networks",
        ),
        (
            "model: {preset: mdm-265}",
            "model.preset: got \"mdm-265\"; wanted 'mdm-64', 'mdm-256' or 'mdm-1024'; did you",
        ),
        ("model: {preset: mdm-256, shift_power: -1}", "model.shift_power: got -1; wanted 0 or more"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, model)


def test_text_of_another_width_is_refused_with_both_ways_out() -> None:
    model = ModelConfig.model_validate({"preset": "mdm-64"})
    with pytest.raises(ConfigError, match=r"model\.text_dim=2048, but the embeddings are 384 wide; .*text_dim=384"):
        model.matryoshka(384)
    free: dict[str, Any] = {"preset": "mdm-64", "text_dim": None}
    assert ModelConfig.model_validate(free).matryoshka(384).text_dim == 384
