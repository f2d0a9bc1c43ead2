"""The networks that Apple published, trained on CC12M with the text of FLAN-T5-XL (arXiv 2310.15111, appendix B)."""

from dataclasses import dataclass

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import ConfigError
from mdm_core.noise_schedule import NoiseSchedule

_TEXT_DIM = 2048  # FLAN-T5-XL

_INNERMOST = UNetConfig(
    resolution=64,
    channels=(256, 512, 768),
    num_resnets=(2, 2, 2),
    num_attention_layers=(0, 1, 5),
    text_dim=_TEXT_DIM,
    text_proj_dim=2048,
    mask_text=False,
    micro_conditions=(("scale", 64.0),),
    attention_ffn=True,
    num_heads=8,
    num_groups=32,
    num_attention_groups=32,
)


def _shell(resolution: int, channels: tuple[int, ...], *, normalize_input: bool) -> UNetConfig:
    return UNetConfig(
        resolution=resolution,
        channels=channels,
        num_resnets=(2, 2, 1),
        num_attention_layers=(0, 0, 0),
        time_dim=1024,
        mask_text=False,
        micro_conditions=(("scale", float(resolution)),),
        mid_blocks=False,
        attention_ffn=False,
        num_heads=8,
        num_groups=32,
        num_attention_groups=32,
        normalize_input=normalize_input,
    )


@dataclass(frozen=True)
class Preset:
    """A published model, before its weights."""

    config: MatryoshkaConfig
    """Its networks."""
    schedule: NoiseSchedule
    """The noise that it was trained with."""


PRESETS: dict[str, Preset] = {
    "mdm-64": Preset(
        MatryoshkaConfig((_INNERMOST,)),
        NoiseSchedule(num_timesteps=1000, shift_power=1.0),
    ),
    "mdm-256": Preset(
        MatryoshkaConfig((_shell(256, (64, 128, 256), normalize_input=False), _INNERMOST)),
        NoiseSchedule(num_timesteps=1000, shift_power=1.0),
    ),
    "mdm-1024": Preset(
        # The middle shell divides its input by its standard deviation, unlike the same shell in the 256 px model.
        MatryoshkaConfig(
            (
                _shell(1024, (32, 32, 64), normalize_input=False),
                _shell(256, (64, 128, 256), normalize_input=True),
                _INNERMOST,
            )
        ),
        NoiseSchedule(num_timesteps=1000, shift_power=2.0),
    ),
}
"""By name: `mdm-64`, `mdm-256` and `mdm-1024`, called by their finest resolution."""


def preset(name: str) -> MatryoshkaConfig:
    """The networks of a published model; `PRESETS` has its noise schedule as well.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name].config
