"""Shells around a UNet: one network that denoises several resolutions at once (arXiv 2310.15111, section 3.2).

Legend: B batch, C channels, r side of a resolution in pixels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.layers import Context, zeroed
from mdm_core.levels import Level
from mdm_core.temporal import to_frames, to_grid
from mdm_core.unet import UNet


class NestedUNet(UNet):
    """A shell at one resolution around a network for the smaller ones.

    The shell's lowest feature map is added to the inner network's first, and the inner network's last comes back
    before the shell's way up; both through a convolution that is zero at the start, so that at the start the inner
    network computes exactly what it computes alone.
    """

    reads_text = False

    def __init__(self, config: UNetConfig, inner: UNet) -> None:
        super().__init__(config)
        self.inner_unet = inner
        inner_width = inner.config.channels[0]
        self.in_adapter: nn.Conv2d | None = None
        if config.feed_inner:
            self.in_adapter = zeroed(nn.Conv2d(config.channels[-1], inner_width, 3, padding=1))
        self.out_adapter = zeroed(nn.Conv2d(inner_width, config.channels[-1], 3, padding=1))
        # Tiles a side, of the clip as it comes in and as the inner network sees it; a picture is one tile.
        innermost = inner.resolutions[-1]
        inner_tiles = inner.config.resolution // innermost
        outer_tiles = config.resolution // innermost if config.video == "temporal" else inner_tiles
        self.tiles = (outer_tiles, inner_tiles) if config.video != "none" else (1, 1)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the pictures in pixels, finest first."""
        return (self.config.resolution, *self.inner_unet.resolutions)

    @property
    def micro_conditions(self) -> frozenset[str]:
        """See `UNet.micro_conditions`."""
        # Not by way of `super()`: the compiler can't trace a property of a base class.
        own = frozenset(name for name, _ in self.config.micro_conditions)
        return own | self.inner_unet.micro_conditions

    def run(self, x_t: list[Tensor], contexts: list[Context], from_shell: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """See `UNet.run`; the first prediction is the shell's, the others are the inner network's."""
        outer_tiles, inner_tiles = self.tiles
        rows, inner_rows = x_t[0].shape[0], x_t[1].shape[0]
        context = contexts[0] if rows == contexts[0].time_emb.shape[0] else contexts[0].first(rows)
        h = self.conv_in(self._scaled_in(to_frames(x_t[0], outer_tiles)))
        if from_shell is not None:
            h = h + to_frames(from_shell, outer_tiles)
        h, skips = self.down(h, context)
        h = to_grid(h, inner_tiles)
        to_inner = None if self.in_adapter is None else _with_rows(self.in_adapter(h), inner_rows)
        inner_outputs, from_inner = self.inner_unet.run(x_t[1:], contexts[1:], to_inner)
        if rows < inner_rows:
            from_inner = from_inner[:rows]
        h = to_frames(h + self.out_adapter(from_inner), inner_tiles)
        h = self.up(h, skips, context)
        return [to_grid(self.read_out(h), outer_tiles), *inner_outputs], to_grid(h, outer_tiles)

    def contexts(
        self,
        timestep: Tensor,
        text_emb: Tensor | None,
        text_mask: Tensor | None,
        labels: Tensor | None,
        micros: Mapping[str, Tensor],
    ) -> list[Context]:
        """See `UNet.contexts`; a shell has its own time embedding and the innermost network's text."""
        inner = self.inner_unet.contexts(timestep, text_emb, text_mask, labels, micros)
        text = inner[-1]
        time_emb = self.embed_time(timestep, micros)
        if text.pooled_text is not None:
            time_emb = time_emb + text.pooled_text
        context = Context(F.silu(time_emb), text.text, text.text_mask, text.has_text, text.pooled_text)
        return [context, *inner]

    def levels(self) -> dict[str, Level]:
        """See `UNet.levels`."""
        return super().levels() | self.inner_unet.levels()

    def _set_checkpointed(self, names: frozenset[str]) -> None:
        super()._set_checkpointed(names)
        self.inner_unet._set_checkpointed(names)

    def _innermost(self) -> UNet:
        return self.inner_unet._innermost()


def build_network(config: MatryoshkaConfig) -> UNet:
    """The network that `config` describes, freshly initialised: a UNet, or shells nested around one."""
    network = UNet(config.networks[-1])
    for shell in reversed(config.networks[:-1]):
        network = NestedUNet(shell, network)
    return network


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """(b, C, H, W) -> (B, C, H, W): rows of zeros follow where there are fewer than `rows`."""
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])
