"""Shapes of the networks, as frozen dataclasses.

A Matryoshka network is a tuple of `UNetConfig`, finest resolution first: the last is the innermost UNet,
each one before it is a shell around the rest. Progressive training takes suffixes of that tuple.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mdm_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """One UNet: the innermost network, or a shell around a smaller one.

    Raises:
        ConfigError: If the fields contradict each other.
    """

    resolution: int
    """Side of the pictures this network reads and writes, in pixels."""
    channels: tuple[int, ...]
    """Channels at each level, finest first; each level halves the side."""
    num_resnets: tuple[int, ...]
    """Residual blocks at each level of the way down; the way up has one more."""
    num_attention_layers: tuple[int, ...]
    """Attention layers after each residual block of a level; 0 for none."""
    time_dim: int | None = None
    """Width of the time embedding; None is 4 × the first level's channels."""
    text_dim: int | None = None
    """Width of the text embeddings that come in; None makes the network unconditional."""
    text_proj_dim: int | None = None
    """Width to which they are projected first; None leaves them as they are."""
    mask_text: bool = True
    """Whether padding is hidden from attention. The published networks attend to it."""
    scale_condition: int | None = None
    """Largest value of the micro-condition `scale`, which is also its default; None for none."""
    mid_blocks: bool = True
    """Whether the lowest level has two more residual blocks with an attention layer between them."""
    attention_ffn: bool = True
    """Whether a feed-forward of 4 × the channels follows each attention layer."""
    num_heads: int = 8
    """Attention heads."""
    num_groups: int = 32
    """Groups of each GroupNorm."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""
    normalize_input: bool = False
    """Whether a picture is divided by its standard deviation over C, H and W when it comes in."""

    def __post_init__(self) -> None:
        levels = len(self.channels)
        for name in ("num_resnets", "num_attention_layers"):
            if len(getattr(self, name)) != levels:
                raise ConfigError(
                    f"{name}={list(getattr(self, name))} has {len(getattr(self, name))} entries, but "
                    f"channels={list(self.channels)} has {levels}; give one for each level"
                )
        if self.resolution % 2 ** (levels - 1):
            raise ConfigError(
                f"resolution={self.resolution} can't be halved {levels - 1} times, as {levels} levels need; "
                f"use a multiple of {2 ** (levels - 1)} or fewer levels"
            )
        for width in self.channels:
            if width % self.num_groups:
                raise ConfigError(
                    f"channels={list(self.channels)}: {width} is not a multiple of num_groups={self.num_groups}"
                )
        attended = [w for w, n in zip(self.channels, self.num_attention_layers, strict=True) if n]
        for width in [*attended, *([self.channels[-1]] if self.mid_blocks else [])]:
            if width % self.num_heads:
                raise ConfigError(
                    f"channels={list(self.channels)}: {width} is not a multiple of num_heads={self.num_heads}"
                )

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return self.time_dim if self.time_dim is not None else 4 * self.channels[0]

    @property
    def lowest_resolution(self) -> int:
        """Side of the lowest feature map, in pixels."""
        return self.resolution // int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class MatryoshkaConfig:
    """A nested network: its UNets, finest resolution first.

    Raises:
        ConfigError: If a shell's lowest feature map is not as large as the pictures of the next network.
    """

    networks: tuple[UNetConfig, ...]

    def __post_init__(self) -> None:
        if not self.networks:
            raise ConfigError("a network needs at least one UNet, got none")
        for shell, inner in zip(self.networks, self.networks[1:], strict=False):
            if shell.lowest_resolution != inner.resolution:
                raise ConfigError(
                    f"the {shell.resolution} px shell with {len(shell.channels)} levels ends at "
                    f"{shell.lowest_resolution} px, but the network inside it works at {inner.resolution} px; "
                    "change the number of levels"
                )
            if shell.time_width != self.networks[-1].time_width:
                raise ConfigError(
                    f"time width {shell.time_width} of the {shell.resolution} px shell must equal the innermost "
                    f"network's, {self.networks[-1].time_width}; set time_dim={self.networks[-1].time_width}"
                )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the pictures in pixels, finest first."""
        return tuple(network.resolution for network in self.networks)

    @property
    def text_dim(self) -> int | None:
        """Width of the text embeddings; None for an unconditional network."""
        return self.networks[-1].text_dim

    def up_to(self, resolution: int) -> "MatryoshkaConfig":
        """The networks of `resolution` px and smaller: what one stage of progressive training trains."""
        if resolution not in self.resolutions:
            raise ConfigError(f"no network of {resolution} px; there are {list(self.resolutions)}")
        return MatryoshkaConfig(self.networks[self.resolutions.index(resolution) :])

    def to_dict(self) -> dict[str, Any]:
        """Plain containers that `from_dict` reads back."""
        return {"networks": [asdict(network) for network in self.networks]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MatryoshkaConfig":
        """The configuration that `to_dict` wrote."""
        networks: Sequence[Mapping[str, Any]] = values["networks"]
        return cls(tuple(UNetConfig(**_with_tuples(network)) for network in networks))


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows only lists; a frozen configuration holds tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
