"""The networks that are measured: a published shape, or a smaller one in its proportions."""

from dataclasses import replace

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import ConfigError

SMALL_TEXT_DIM = 384
"""Width of the text of a smaller network: that of the MiniLM encoder."""


def shaped(
    config: MatryoshkaConfig,
    *,
    channels: tuple[int, ...] | None = None,
    resolution: int | None = None,
    text_dim: int | None = None,
    text_proj_dim: int | None = None,
) -> MatryoshkaConfig:
    """`config` with other channels, pictures or text.

    Args:
        config: The networks, finest resolution first.
        channels: Of the innermost network, a level each, as many as it has or fewer; the shells shrink in the
            proportion of the first. The text is then 384 wide and projected to 4 × the first channels.
        resolution: The finest, in pixels; the others shrink in proportion.
        text_dim: Width of the text embeddings, ahead of what is said above.
        text_proj_dim: Width they are projected to, likewise.

    Raises:
        ConfigError: If the networks don't fit each other then.
    """
    networks = list(config.networks)
    if channels is not None:
        networks = _with_channels(networks, channels)
    if resolution is not None:
        networks = _with_resolution(networks, resolution)
    innermost = networks[-1]
    text = text_dim if text_dim is not None else innermost.text_dim
    projected = text_proj_dim if text_proj_dim is not None else innermost.text_proj_dim
    networks[-1] = replace(innermost, text_dim=text, text_proj_dim=projected)
    return MatryoshkaConfig(tuple(networks))


def _with_channels(networks: list[UNetConfig], channels: tuple[int, ...]) -> list[UNetConfig]:
    innermost, levels = networks[-1], len(channels)
    if not 1 <= levels <= len(innermost.channels) or min(channels) < 1:
        wanted = ", ".join(map(str, innermost.channels))
        raise ConfigError(
            f"channels={list(channels)}: wanted 1 to {len(innermost.channels)} positive numbers, one a level of the "
            f"innermost network, which has [{wanted}]"
        )
    smaller = replace(
        innermost,
        channels=channels,
        num_resnets=innermost.num_resnets[:levels],
        num_attention_layers=innermost.num_attention_layers[:levels],
        time_dim=None,
        text_dim=SMALL_TEXT_DIM,
        text_proj_dim=4 * channels[0],
    )
    share = channels[0] / innermost.channels[0]
    shells = [replace(shell, channels=_scaled(shell, share), time_dim=smaller.time_width) for shell in networks[:-1]]
    return [*shells, smaller]


def _scaled(shell: UNetConfig, share: float) -> tuple[int, ...]:
    """The shell's channels times `share`, as whole groups."""
    return tuple(max(1, round(width * share / shell.num_groups)) * shell.num_groups for width in shell.channels)


def _with_resolution(networks: list[UNetConfig], resolution: int) -> list[UNetConfig]:
    finest, innermost = networks[0].resolution, networks[-1].resolution
    if resolution % (finest // innermost):
        raise ConfigError(
            f"resolution={resolution} must be a multiple of {finest // innermost}: the innermost network's pictures "
            f"are that much smaller"
        )
    return [replace(network, resolution=network.resolution * resolution // finest) for network in networks]
