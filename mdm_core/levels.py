"""The levels of a UNet: residual blocks, attention after each, a resampling.

Legend: B batch, C channels, H W height and width; in a temporal shell the rows are the frames of B clips.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdm_core.layers import AttentionBlock, Context, ResidualBlock
from mdm_core.recompute import conv_after
from mdm_core.temporal import TemporalBlock, TemporalResample


class Level(nn.Module):
    """What the levels of the way down, the middle and the way up have in common."""

    def __init__(
        self,
        blocks: Sequence[ResidualBlock],
        attention: Sequence[AttentionBlock] = (),
        temporal: Sequence[TemporalBlock] = (),
        resample: nn.Conv2d | TemporalResample | None = None,
    ) -> None:
        super().__init__()
        self.num_blocks = len(blocks)
        self.resnets = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)
        self.t_attn = nn.ModuleList(temporal)
        self.resample = resample

    def block(self, index: int, x: Tensor, context: Context) -> Tensor:
        """Residual block `index` and the attention layers after it: (B, C_in, H, W) -> (B, C, H, W)."""
        x = self.resnets[index](x, context.time_emb)
        for attention in self._of_block(self.attn, index):
            x = attention(x, context)
        for attention in self._of_block(self.t_attn, index):
            x = attention(x, context.time_emb.shape[0])
        return x

    def last_module(self, index: int) -> nn.Module:
        """The module whose output is that of block `index`."""
        modules = [self.resnets[index], *self._of_block(self.attn, index), *self._of_block(self.t_attn, index)]
        return modules[-1]

    def _of_block(self, layers: nn.ModuleList, index: int) -> list[nn.Module]:
        each = len(layers) // self.num_blocks
        return [*layers][index * each : (index + 1) * each]


class DownLevel(Level):
    """A level of the way down."""

    def forward(self, h: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """The map for the next level, and this one's skips in order: each block's output, then the resampled map."""
        skips = []
        for index in range(self.num_blocks):
            h = self.block(index, h, context)
            skips.append(h)
        if isinstance(self.resample, TemporalResample):
            h = self.resample(h, context.time_emb.shape[0])
        elif self.resample is not None:
            h = conv_after(self.resample, h)
        if self.resample is not None:
            skips.append(h)
        return h, skips


class MiddleLevel(Level):
    """A level without skips or resampling."""

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        for index in range(self.num_blocks):
            h = self.block(index, h, context)
        return h


class UpLevel(Level):
    """A level of the way up."""

    def forward(self, h: Tensor, skips: Sequence[Tensor], context: Context) -> Tensor:
        """The map for the level above; `skips` are one a block, the latest of the way down first."""
        for index, skip in enumerate(skips):
            h = self.block(index, torch.cat([h, skip], dim=1), context)
        if isinstance(self.resample, TemporalResample):
            return self.resample(h, context.time_emb.shape[0])
        return h if self.resample is None else conv_after(self.resample, h, activation="upsample")
