"""The published models: their sizes, and the published configuration files read as ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mdm_core.apple_config import config_from_apple
from mdm_core.errors import ConfigError
from mdm_core.nested_unet import build_network
from mdm_core.presets import PRESETS, preset

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
CASES = ["a_unet", "b_nested", "c_nested2", "d_temporal", "d2_temporal_rope", "d4_spatial_ds"]
CASES += ["e_unet_reallayout", "e3_unet_uncond"]

INNERMOST: dict[str, Any] = {
    "attention_levels": [1, 2],
    "conditioning_feature_dim": -1,
    "conditioning_feature_proj_dim": 2048,
    "masked_cross_attention": 0,
    "micro_conditioning": "scale:64",
    "nesting": True,
    "num_attention_layers": [0, 1, 5],
    "num_lm_head_layers": 0,
    "num_resnets_per_resolution": [2, 2, 2],
    "num_temporal_attention_layers": None,
    "resnet_config": {"dropout": 0.0, "num_channels": -1, "num_groups_norm": 32, "output_channels": -1}
    | {"use_attention_ffn": True},
    "resolution_channels": [256, 512, 768],
    "skip_cond_emb": False,
    "skip_mid_blocks": False,
    "temporal_dim": None,
    "temporal_mode": False,
    "temporal_positional_encoding": False,
    "temporal_spatial_ds": False,
}


def shell(side: int, channels: list[int], inner: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """What the published YAML files say of a shell."""
    return {
        "attention_levels": [],
        "conditioning_feature_dim": -1,
        "conditioning_feature_proj_dim": -1,
        "freeze_inner_unet": False,
        "initialize_inner_with_pretrained": None,
        "inner_config": inner,
        "interp_conditioning": False,
        "masked_cross_attention": 1,
        "micro_conditioning": f"scale:{side}",
        "nesting": False,
        "num_attention_layers": [0, 0, 0],
        "num_lm_head_layers": 0,
        "num_resnets_per_resolution": [2, 2, 1],
        "num_temporal_attention_layers": None,
        "resnet_config": {"num_groups_norm": 32, "use_attention_ffn": False},
        "resolution_channels": channels,
        "skip_cond_emb": True,
        "skip_inner_unet_input": False,
        "skip_mid_blocks": True,
        "skip_normalization": True,
        "temporal_dim": 1024,
        "temporal_mode": False,
        "temporal_positional_encoding": False,
        "temporal_spatial_ds": False,
    } | changed


PUBLISHED = {
    "mdm-64": INNERMOST | {"nesting": False},
    "mdm-256": shell(256, [64, 128, 256], INNERMOST),
    "mdm-1024": shell(
        1024,
        [32, 32, 64],
        shell(256, [64, 128, 256], INNERMOST, conditioning_feature_proj_dim=2048, skip_normalization=False),
        conditioning_feature_proj_dim=2048,
        initialize_inner_with_pretrained="8rwvbg85tt",
    ),
}


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [("mdm-64", 461_359_107, 713), ("mdm-256", 476_613_958, 889), ("mdm-1024", 480_970_057, 1_063)],
)
def test_presets_have_the_published_sizes(name: str, parameters: int, keys: int) -> None:
    with torch.device("meta"):
        network = build_network(preset(name))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == keys


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_read_as_the_presets(name: str) -> None:
    config = config_from_apple(PUBLISHED[name], text_dim=2048, resolution=int(name.removeprefix("mdm-")))
    assert config == preset(name)


def test_presets_shift_the_noise_as_published() -> None:
    assert {name: item.schedule.shift_power for name, item in PRESETS.items() if name != "mdm-64"} == {
        "mdm-256": 1,
        "mdm-1024": 2,
    }
    alpha_bars = PRESETS["mdm-1024"].schedule.alpha_bars((1024, 256, 64)).double()
    assert alpha_bars.shape == (3, 1001)
    # Sides of 16 and 4 times the innermost one, to the power of 2.
    ratios = (alpha_bars / (1 - alpha_bars))[:, 500]
    assert (ratios[2] / ratios[:2]).tolist() == pytest.approx([256, 16], rel=1e-4)


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'mdm-512'; there are mdm-64, mdm-256, mdm-1024"):
        preset("mdm-512")


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference numbers (../shared/reference) are absent")
@pytest.mark.parametrize("name", CASES)
def test_reference_cases_have_the_recorded_keys_and_shapes(name: str) -> None:
    case = json.loads((REFERENCE / "index_forward.json").read_text())["cases"][name]
    inputs = load_file(REFERENCE / case["file"])
    width = case["conditioning_feature_dim_passed"]
    config = config_from_apple(
        case["unet_config"], text_dim=width if width > 0 else None, resolution=inputs["in.x0"].shape[-1]
    )
    sides = [value.shape[-1] for key, value in sorted(inputs.items()) if key.startswith("in.x")]
    assert list(config.resolutions) == sides
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in build_network(config).state_dict().items()}
    assert shapes == case["state_shapes"]


def test_strings_read_as_the_lists_they_stand_for() -> None:
    written = {
        "resolution_channels": "32,64,96",
        "num_resnets_per_resolution": "3",
        "num_attention_layers": "0,1,2",
        "attention_levels": "2",
        "micro_conditioning": "scale:64,watermark_score:0.5",
    }
    (network,) = config_from_apple(written, text_dim=None, resolution=64).networks
    assert network.channels == (32, 64, 96)
    assert network.num_resnets == (3, 3, 3)
    assert network.num_attention_layers == (0, 0, 2)
    assert network.micro_conditions == (("scale", 64.0), ("watermark_score", 0.5))
    assert config_from_apple(written | {"attention_levels": ""}, text_dim=None, resolution=64).networks[
        0
    ].num_attention_layers == (0, 0, 0)


def test_configuration_inside_a_checkpoint_reads_as_the_file_s() -> None:
    # As `load_apple_checkpoint` gives args["unet_config"]; building the network has overwritten the text's width.
    inner = INNERMOST | {"class": "ml_mdm.models.unet.UNetConfig", "conditioning_feature_dim": 2048}
    inner["resnet_config"] = INNERMOST["resnet_config"] | {"class": "ml_mdm.models.unet.ResNetConfig"}
    outer = shell(256, [64, 128, 256], inner, **{"class": "ml_mdm.models.nested_unet.NestedUNetConfig"})
    assert config_from_apple(outer, text_dim=2048, resolution=256) == preset("mdm-256")


def test_outer_projection_is_the_width_that_comes_in_further_inside() -> None:
    written = shell(256, [64, 128, 256], INNERMOST, conditioning_feature_proj_dim=1024)
    assert config_from_apple(written, text_dim=4096, resolution=256).text_dim == 1024


def test_shell_that_attends_sees_the_text_as_projected() -> None:
    seeing = shell(256, [64, 128, 256], INNERMOST, attention_levels=[2], num_attention_layers=[0, 0, 1]) | {
        "conditioning_feature_proj_dim": 2048
    }
    config = config_from_apple(seeing, text_dim=2048, resolution=256)
    assert (config.networks[0].text_dim, config.networks[0].num_attention_layers) == (2048, (0, 0, 1))
    # The published code builds this one, and fails when it runs: 4,096 channels are wanted where 2,048 come.
    with pytest.raises(ConfigError, match="text width 4096 of the 256 px shell must be"):
        config_from_apple(seeing | {"conditioning_feature_proj_dim": -1}, text_dim=4096, resolution=256)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mixed_ratio": "2:1"}, r"unet_config has unknown keys \['mixed_ratio'\]"),
        ({"skip_normalization": True}, r"unknown keys \['skip_normalization'\]"),
        ({"resnet_config": {"groups": 8}}, r"unet_config\.resnet_config has unknown keys \['groups'\]"),
        ({"resolution_channels": "32;64"}, r"resolution_channels='32;64' must be whole numbers"),
        ({"num_attention_layers": [0, 1.5, 5]}, "num_attention_layers=.* must be whole numbers"),
        ({"micro_conditioning": "scale"}, "micro_conditioning='scale' must be like"),
        ({"micro_conditioning": 3}, "micro_conditioning=3 must be like"),
        ({"temporal_dim": "128"}, "unet_config.temporal_dim='128' must be int or float or NoneType"),
        ({"conditioning_feature_proj_dim": None}, "conditioning_feature_proj_dim=None must be int"),
        ({"num_lm_head_layers": "2"}, "num_lm_head_layers='2' must be int"),
        ({"num_lm_head_layers": True}, "num_lm_head_layers=True must be int"),
        ({"skip_mid_blocks": "false"}, "skip_mid_blocks='false' must be bool or int"),
        ({"resnet_config": {"num_groups_norm": None}}, r"resnet_config\.num_groups_norm=None must be int"),
        ({"resnet_config": {"num_groups_norm": 0}}, "num_groups=0 must be at least 1"),
        ({"resnet_config": {"dropout": "0"}}, "dropout='0' must be int or float"),
        ({"resolution_channels": []}, "must be at least one number"),
        ({"skip_cond_emb": True}, "skip_cond_emb=true: the innermost network must embed"),
        ({"temporal_mode": True, "temporal_spatial_ds": True}, "innermost network must have video"),
    ],
)
def test_what_cannot_be_read_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_apple(INNERMOST | changed, text_dim=2048, resolution=64)


def test_a_message_stays_short_whatever_the_file_holds() -> None:
    doubled: Any = [0]
    for _ in range(25):
        doubled = [doubled, doubled]  # 33 million numbers when written out
    for key in ("resolution_channels", "micro_conditioning", "temporal_dim", "resnet_config"):
        with pytest.raises(ConfigError) as raised:
            config_from_apple(INNERMOST | {key: doubled}, text_dim=2048, resolution=64)
        assert len(str(raised.value)) < 1000


def test_unknown_keys_are_refused_at_any_depth() -> None:
    written = shell(256, [64, 128, 256], INNERMOST | {"skip_inner_unet_input": False})
    with pytest.raises(ConfigError, match=r"unet_config\.inner_config has unknown keys \['skip_inner_unet_input'\]"):
        config_from_apple(written, text_dim=2048, resolution=256)
