"""The configuration of the nested network and its diffusion process."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import ConfigError
from mdm_core.noise_schedule import NoiseSchedule, ScheduleKind, Shift
from mdm_core.parameterization import PredictionType
from mdm_core.presets import PRESETS
from pipelines.run_config import Config


class NetworkConfig(Config):
    """One UNet of the nested network; see `mdm_core.config.UNetConfig`."""

    resolution: int = Field(ge=4)
    """Side of the pictures, in pixels."""
    channels: tuple[int, ...]
    """Channels at each level, finest first."""
    num_resnets: tuple[int, ...]
    """Residual blocks at each level."""
    num_attention_layers: tuple[int, ...]
    """Attention layers after each residual block of a level."""
    time_dim: int | None = None
    """Width of the time embedding; 4 × the first level's channels if empty."""
    text_proj_dim: int | None = None
    """Width to which the innermost network projects the text."""
    mask_text: bool = True
    """Whether padding is hidden from attention; the published networks attend to it."""
    micro_conditions: tuple[tuple[str, float], ...] = ()
    """Name and default of each further number that a picture is conditioned on, as in [[scale, 64]]; training and
    sampling give the default."""
    mid_blocks: bool = True
    """Whether the lowest level has two more residual blocks around an attention layer."""
    attention_ffn: bool = True
    """Whether a feed-forward follows each attention layer."""
    num_heads: int = Field(default=8, ge=1)
    """Attention heads."""
    num_groups: int = Field(default=32, ge=1)
    """Groups of each GroupNorm."""
    num_attention_groups: int | None = Field(default=None, ge=1)
    """Groups of the GroupNorms in attention layers; num_groups if empty."""
    normalize_input: bool = False
    """Whether a picture is divided by its standard deviation when it comes in."""


class ModelConfig(Config):
    """The nested network and its diffusion process.

    `preset` stands for values of the other fields: read, it has become these values, and those given beside it win.
    """

    preset: Literal["mdm-64", "mdm-256", "mdm-1024"] | None = None
    """A published model, whose networks, text and diffusion process are taken; what is given beside it wins."""
    networks: tuple[NetworkConfig, ...] = ()
    """The UNets, finest resolution first; each is nested around the next. Wanted where there is no preset."""
    text_dim: int | None = Field(default=None, ge=1)
    """Width of the text embeddings, which must be that of the encoder; whatever the encoder has if empty."""
    prediction_type: PredictionType = "v"
    """What the networks answer: the velocity, the noise or the clean picture."""
    schedule: ScheduleKind = "squared_cosine"
    """How the noise grows with the level; `NoiseSchedule` says where each comes from."""
    num_timesteps: int = Field(default=1000, ge=1)
    """Noise levels."""
    shift_power: float = Field(default=1.0, ge=0)
    """The signal-to-noise ratio of a resolution is divided by (side ÷ innermost side) to this power."""
    shift: Shift = "snr"
    """How: snr gives a finer resolution more noise, signal divides its pictures."""

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the pictures in pixels, finest first."""
        return tuple(network.resolution for network in self.networks)

    def schedule_arguments(self) -> dict[str, Any]:
        """Arguments of the `NoiseSchedule`."""
        return {
            "kind": self.schedule,
            "num_timesteps": self.num_timesteps,
            "shift_power": self.shift_power,
            "shift": self.shift,
        }

    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of every resolution."""
        return NoiseSchedule(**self.schedule_arguments())

    def matryoshka(self, text_dim: int) -> MatryoshkaConfig:
        """The networks, the innermost reading text embeddings `text_dim` wide.

        Raises:
            ConfigError: The networks don't fit each other, or want text of another width.
        """
        if self.text_dim not in (None, text_dim):
            raise ConfigError(
                f"model.text_dim={self.text_dim}, but the embeddings are {text_dim} wide; use an encoder of that "
                f"width as text.encoder, or set model.text_dim={text_dim}"
            )
        last = len(self.networks) - 1
        return MatryoshkaConfig(
            tuple(
                UNetConfig(**network.model_dump(), text_dim=text_dim if index == last else None)
                for index, network in enumerate(self.networks)
            )
        )

    @model_validator(mode="after")
    def _expand_preset(self) -> Self:
        if self.preset is None:
            if not self.networks:
                raise ValueError(f"wanted networks, or the preset of some: {', '.join(PRESETS)}")
            return self
        if self.networks:
            raise ValueError(f"preset={self.preset} has networks of its own; leave out either preset or networks")
        # A validator that runs ahead of the fields would turn strict JSON into lax Python; so the frozen object is
        # filled in here, where it is still being made.
        for name, value in (_preset_values(self.preset) | {"preset": None}).items():
            if name == "preset" or name not in self.model_fields_set:
                object.__setattr__(self, name, value)
        return self

    @model_validator(mode="after")
    def _check_networks(self) -> Self:
        try:
            self.matryoshka(text_dim=self.text_dim or 1)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


def _preset_values(name: str) -> dict[str, Any]:
    """What a preset stands for, by the fields of `ModelConfig`."""
    preset = PRESETS[name]
    return {
        "networks": tuple(
            NetworkConfig(**{field: getattr(network, field) for field in NetworkConfig.model_fields})
            for network in preset.config.networks
        ),
        "text_dim": preset.config.text_dim,
        "schedule": preset.schedule.kind,
        "num_timesteps": preset.schedule.num_timesteps,
        "shift_power": preset.schedule.shift_power,
        "shift": preset.schedule.shift,
    }
