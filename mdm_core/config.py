"""Shapes of the networks, as frozen dataclasses.

A Matryoshka network is a tuple of `UNetConfig`, finest resolution first: the last is the innermost UNet,
each one before it is a shell around the rest. Progressive training takes suffixes of that tuple.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mdm_core.errors import ConfigError

TEMPORAL_HEAD_DIM = 32
"""Width of each head of temporal attention, as in the published code."""


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
    """Width of the text embeddings that come in; None for no text. A shell needs it only where it attends to text,
    and gets the text as the innermost network projected it."""
    text_proj_dim: int | None = None
    """Width to which the innermost network projects them first; None leaves them as they are."""
    num_text_layers: int = 0
    """Self-attention layers over the text, on top of the projection."""
    num_classes: int | None = None
    """Class labels of the innermost network; each is one learned token, text_dim wide. None for no labels."""
    mask_text: bool = True
    """Whether padding is hidden from attention. The published networks attend to it."""
    micro_conditions: tuple[tuple[str, float], ...] = ()
    """Name and default of each further number a picture is conditioned on. `scale` is clipped to its default, which
    is its largest value; any other is multiplied by 1,000, as the published networks do."""
    mid_blocks: bool = True
    """Whether the lowest level has two more residual blocks with an attention layer between them; a shell has none,
    the network inside it is its middle."""
    attention_ffn: bool = True
    """Whether a feed-forward of 4 × the channels follows each attention layer."""
    num_heads: int = 8
    """Attention heads."""
    num_groups: int = 32
    """Groups of each GroupNorm."""
    num_attention_groups: int | None = None
    """Groups of the GroupNorms in attention layers; None is num_groups. The published networks have 32 everywhere."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""
    normalize_input: bool = False
    """Whether a picture is divided by its standard deviation over C, H and W when it comes in."""
    feed_inner: bool = True
    """Whether a shell's lowest feature map goes into the network inside it."""
    video: Literal["none", "tiles", "temporal"] = "none"
    """How a shell sees a clip, whose frames are tiled on a square grid in one picture: as one picture, as frames each
    on its own, or as frames with layers over time, its levels halving the frames instead of the sides."""
    num_temporal_layers: tuple[int, ...] = ()
    """Temporal attention layers after each residual block of a level; only with video="temporal"."""
    rotary_positions: bool = False
    """Whether temporal attention knows the frames' order by rotary positions; without them it does not."""

    def __post_init__(self) -> None:
        self._check_levels()
        self._check_widths()
        self._check_video()
        if self.num_classes is not None and self.text_dim is None:
            raise ConfigError(
                f"num_classes={self.num_classes} needs text_dim, the width of a label's token; set text_dim"
            )

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return self.time_dim if self.time_dim is not None else 4 * self.channels[0]

    @property
    def text_width(self) -> int | None:
        """Width of the text as attention sees it; None for no text."""
        return self.text_proj_dim if self.text_dim is not None and self.text_proj_dim is not None else self.text_dim

    @property
    def attention_groups(self) -> int:
        """Groups of the GroupNorms in attention layers."""
        return self.num_attention_groups if self.num_attention_groups is not None else self.num_groups

    @property
    def attended_channels(self) -> tuple[int, ...]:
        """Channels wherever there is attention over positions."""
        attended = [width for width, n in zip(self.channels, self.num_attention_layers, strict=True) if n]
        return (*attended, *([self.channels[-1]] if self.mid_blocks else []))

    @property
    def lowest_resolution(self) -> int:
        """Side of the lowest feature map, in pixels; of its grid of frames, where the levels halve the frames."""
        halvings = len(self.channels) - 1
        return self.resolution // 2 ** (halvings // 2 if self.video == "temporal" else halvings)

    def _check_levels(self) -> None:
        levels = len(self.channels)
        if not self.channels or min(self.channels) < 1:
            raise ConfigError(f"channels={list(self.channels)} must be at least one number, each at least 1")
        for name in ("num_resnets", "num_attention_layers", "num_temporal_layers"):
            given = getattr(self, name)
            if len(given) != levels and not (name == "num_temporal_layers" and not given):
                raise ConfigError(
                    f"{name}={list(given)} has {len(given)} entries, but channels={list(self.channels)} has {levels}; "
                    "give one for each level"
                )
        if min(self.num_resnets) < 1:
            raise ConfigError(f"num_resnets={list(self.num_resnets)}: each level needs at least one residual block")
        halvings = (levels - 1) // 2 if self.video == "temporal" else levels - 1
        if self.resolution % 2**halvings:
            raise ConfigError(
                f"resolution={self.resolution} can't be halved {halvings} times, as {levels} levels need; "
                f"use a multiple of {2**halvings} or fewer levels"
            )

    def _check_widths(self) -> None:
        checks = [("num_groups", self.num_groups, self.channels), ("num_heads", self.num_heads, self.attended_channels)]
        checks.append(("num_attention_groups", self.attention_groups, self.attended_channels))
        if self.time_width % 8:
            raise ConfigError(f"time width {self.time_width} must be a multiple of 8; set time_dim")
        for name, divisor, widths in checks:
            if divisor < 1:
                raise ConfigError(f"{name}={divisor} must be at least 1")
            for width in widths:
                if width % divisor:
                    raise ConfigError(f"channels={list(self.channels)}: {width} is not a multiple of {name}={divisor}")

    def _check_video(self) -> None:
        if self.video != "temporal":
            if any(self.num_temporal_layers):
                raise ConfigError(
                    f'num_temporal_layers={list(self.num_temporal_layers)} needs video="temporal", got "{self.video}"'
                )
            return
        if len(self.channels) % 2 == 0:
            raise ConfigError(
                f"channels={list(self.channels)}: a temporal shell halves the frames at each level but the last, and "
                f"the grid of frames must stay square, so it needs an odd number of levels, got {len(self.channels)}"
            )
        for width, layers in zip(self.channels, self.num_temporal_layers, strict=False):
            if layers and width % TEMPORAL_HEAD_DIM:
                raise ConfigError(
                    f"channels={list(self.channels)}: {width} is not a multiple of {TEMPORAL_HEAD_DIM}, the width of "
                    "a temporal attention head"
                )


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
        innermost = self.networks[-1]
        if innermost.video != "none":
            raise ConfigError(f'the innermost network must have video="none", got "{innermost.video}"')
        for shell, inner in zip(self.networks, self.networks[1:], strict=False):
            self._check_shell(shell, inner)

    def _check_shell(self, shell: UNetConfig, inner: UNetConfig) -> None:
        innermost = self.networks[-1]
        where = f"the {shell.resolution} px shell"
        if shell.lowest_resolution != inner.resolution:
            raise ConfigError(
                f"{where} with {len(shell.channels)} levels ends at {shell.lowest_resolution} px, but the network "
                f"inside it works at {inner.resolution} px; change the number of levels"
            )
        if shell.resolution % innermost.resolution:
            raise ConfigError(f"{where} is no whole multiple of the innermost network's {innermost.resolution} px")
        if shell.time_width != innermost.time_width:
            raise ConfigError(
                f"time width {shell.time_width} of {where} must equal the innermost network's, "
                f"{innermost.time_width}; set time_dim={innermost.time_width}"
            )
        if shell.mid_blocks:
            raise ConfigError(f"{where} has the network inside it for its middle; set mid_blocks=false")
        if shell.text_dim is not None and shell.text_width != innermost.text_width:
            raise ConfigError(
                f"text width {shell.text_width} of {where} must be the width of the innermost network's text, "
                f"{innermost.text_width}; set text_dim={innermost.text_width}"
            )
        if any(shell.num_temporal_layers) and innermost.resolution % 2:
            raise ConfigError(
                f"{where} attends over time on frames of half the side, and its frames are {innermost.resolution} px; "
                "use an innermost network of an even side"
            )
        if shell.video != "none" and any(shell.num_attention_layers) and shell.text_dim is not None:
            raise ConfigError(f"{where} sees frames one by one and can't attend to text; set text_dim=null")

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
        """The configuration that `to_dict` wrote, in this version or an earlier one.

        Raises:
            ConfigError: If a field is unknown, or the networks contradict each other.
        """
        networks: Sequence[Mapping[str, Any]] = values["networks"]
        return cls(tuple(_network_from(network) for network in networks))


def _network_from(values: Mapping[str, Any]) -> UNetConfig:
    given = _with_tuples(values)
    # Earlier files have a field of its own for the one micro-condition that there could be.
    scale = given.pop("scale_condition", None)
    if scale is not None:
        given["micro_conditions"] = (("scale", float(scale)),)
    known = {field.name for field in fields(UNetConfig)}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"a network has the unknown field {unknown[0]!r}; it was written by a newer version of mdm")
    return UNetConfig(**given)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows only lists; a frozen configuration holds tuples."""

    def frozen(value: Any) -> Any:
        return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value

    return {key: frozen(value) for key, value in values.items()}
