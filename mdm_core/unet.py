"""The innermost network: a UNet with attention and text.

Legend: B batch, C channels, H W height and width, L text tokens, D width of the text, T width of the time
embedding.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdm_core.config import UNetConfig
from mdm_core.layers import AttentionBlock, Level, ResidualBlock, sinusoid


@dataclass(frozen=True)
class Conditioning:
    """What the blocks of one network are told besides the picture."""

    time_emb: Tensor
    """(B, T), after its SiLU."""
    text: Tensor | None
    """(B, L, D), projected; None for an unconditional network."""
    text_mask: Tensor | None
    """(B, L) bool, True = real token; None attends to padding as well."""
    pooled_text: Tensor | None
    """(B, T): the text's part of the time embedding, which a shell adds to its own."""


class UNet(nn.Module):
    """A UNet over one resolution (arXiv 2310.15111, appendix B; keys as in the published checkpoints)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self._build_conditioning()
        self.conv_in = nn.Conv2d(3, config.channels[0], 3, padding=1)
        skips = self._build_way_down()
        self._build_way_up(skips)
        self.norm_out = nn.GroupNorm(config.num_groups, config.channels[0])
        self.conv_out = nn.Conv2d(config.channels[0], 3, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the pictures in pixels, finest first."""
        return (self.config.resolution,)

    def forward(
        self,
        x_t: list[Tensor],
        timestep: Tensor,
        text_emb: Tensor | None = None,
        text_mask: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> list[Tensor]:
        """Predicts v, eps or x0 (what the network was trained for) at every resolution.

        Args:
            x_t: One noised picture (B, 3, r, r) a resolution, finest first, about unit variance.
            timestep: (B,) int in [0, N).
            text_emb: (B, L, D) token embeddings; None drops the text of every row.
            text_mask: (B, L) bool, True = real token. A row without any is unconditional.
            scale: (B,) micro-condition `scale` of each row; None is the default.

        Returns:
            One tensor (B, 3, r, r) a resolution, finest first.
        """
        outputs, _ = self.run(x_t, self.conditions(timestep, text_emb, text_mask, scale), None)
        return outputs

    def run(
        self, x_t: list[Tensor], conditions: list[Conditioning], from_shell: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Predictions and the last feature map.

        Args:
            x_t: As in `forward`.
            conditions: One for each resolution, as `conditions` makes them.
            from_shell: (B, C, r, r) to add to the first feature map; None for none.

        Returns:
            One prediction (B, 3, r, r) a resolution, finest first, and the feature map (B, C, r, r) of the finest.
        """
        h = self.conv_in(self._scaled_in(x_t[0]))
        if from_shell is not None:
            h = h + from_shell
        h, skips = self.down(h, conditions[0])
        h = self.up(self.mid(h, conditions[0]), skips, conditions[0])
        return [self.read_out(h)], h

    def conditions(
        self, timestep: Tensor, text_emb: Tensor | None, text_mask: Tensor | None, scale: Tensor | None
    ) -> list[Conditioning]:
        """What each network is told, finest resolution first; arguments as in `forward`."""
        time_emb = self.embed_time(timestep, scale)
        if text_emb is None or self.text_width is None:
            return [Conditioning(F.silu(time_emb), None, None, None)]
        text = text_emb if self.lm_proj is None else self.lm_proj(text_emb)
        if text_mask is None:
            mean = text.mean(dim=1)
        else:
            real = text_mask[:, :, None].to(text.dtype)
            mean = (text * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        pooled = self.cond_emb(mean)
        visible = text_mask if self.config.mask_text else None
        return [Conditioning(F.silu(time_emb + pooled), text, visible, pooled)]

    def embed_time(self, timestep: Tensor, scale: Tensor | None) -> Tensor:
        """(B,) -> (B, T): the timestep's embedding, plus the micro-condition's."""
        width = self.config.time_width // 4
        dtype = self.temb_layer1.weight.dtype
        emb = self.temb_layer2(F.silu(self.temb_layer1(sinusoid(timestep, width).to(dtype))))
        if self.config.micro_conditions:
            largest = float(self.config.micro_conditions[0][1])
            value = (
                torch.full_like(timestep, largest, dtype=torch.float32) if scale is None else scale.clamp(max=largest)
            )
            first, second = cast("nn.ModuleList", self.cond_layers["scale"])
            emb = emb + second(F.silu(first(sinusoid(value, width).to(dtype))))
        return emb

    def down(self, h: Tensor, condition: Conditioning) -> tuple[Tensor, list[Tensor]]:
        """The way down: the lowest feature map, and the skips for the way up, in order."""
        skips = [h]
        for level in _levels(self.down_blocks):
            for index in range(level.num_blocks):
                h = level.block(index, h, condition.time_emb, condition.text, condition.text_mask)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        return h, skips

    def mid(self, h: Tensor, condition: Conditioning) -> Tensor:
        """The middle blocks, where there are any."""
        for level in _levels(self.mid_blocks):
            h = level.block(0, h, condition.time_emb, condition.text, condition.text_mask)
        return h

    def up(self, h: Tensor, skips: list[Tensor], condition: Conditioning) -> Tensor:
        """The way up, which consumes the skips: the last feature map at full resolution."""
        for level in _levels(self.up_blocks):
            for index in range(level.num_blocks):
                h = torch.cat([h, skips.pop()], dim=1)
                h = level.block(index, h, condition.time_emb, condition.text, condition.text_mask)
            if level.resample is not None:
                h = level.resample(F.interpolate(h, scale_factor=2, mode="nearest"))
        return h

    def read_out(self, h: Tensor) -> Tensor:
        """(B, C, r, r) last feature map -> (B, 3, r, r) prediction."""
        return self.conv_out(F.silu(self.norm_out(h)))

    def _scaled_in(self, x: Tensor) -> Tensor:
        return x / x.std(dim=(1, 2, 3), keepdim=True) if self.config.normalize_input else x

    def _build_conditioning(self) -> None:
        config = self.config
        width = config.time_width
        self.temb_layer1 = nn.Linear(width // 4, width)
        self.temb_layer2 = nn.Linear(width, width)
        self.lm_proj: nn.Linear | None = None
        self.text_width = config.text_dim
        if config.text_dim is not None:
            if config.text_proj_dim is not None:
                self.lm_proj = nn.Linear(config.text_dim, config.text_proj_dim)
                self.text_width = config.text_proj_dim
            self.cond_emb = nn.Linear(self.text_width or 0, width, bias=False)
        if config.micro_conditions:
            layers = nn.ModuleList([nn.Linear(width // 4, width), nn.Linear(width, width)])
            self.cond_layers = nn.ModuleDict({"scale": layers})

    def _build_way_down(self) -> list[int]:
        config = self.config
        skips = [config.channels[0]]
        width = config.channels[0]
        self.down_blocks = nn.ModuleList()
        last = len(config.channels) - 1
        for depth, channels in enumerate(config.channels):
            blocks = []
            for _ in range(config.num_resnets[depth]):
                blocks.append(self._residual(width, channels))
                width = channels
                skips.append(width)
            resample = nn.Conv2d(width, width, 3, stride=2, padding=1) if depth < last else None
            if resample is not None:
                skips.append(width)
            attention = [self._attention(width) for _ in range(len(blocks) * config.num_attention_layers[depth])]
            self.down_blocks.append(Level(blocks, attention, resample))
        self.mid_blocks = nn.ModuleList()
        if config.mid_blocks:
            self.mid_blocks.append(Level([self._residual(width, width)], [self._attention(width)], None))
            self.mid_blocks.append(Level([self._residual(width, width)], [], None))
        return skips

    def _build_way_up(self, skips: list[int]) -> None:
        config = self.config
        width = config.channels[-1]
        self.up_blocks = nn.ModuleList()
        for depth in reversed(range(len(config.channels))):
            blocks = []
            for _ in range(config.num_resnets[depth] + 1):
                blocks.append(self._residual(width + skips.pop(), config.channels[depth]))
                width = config.channels[depth]
            attention = [self._attention(width) for _ in range(len(blocks) * config.num_attention_layers[depth])]
            resample = nn.Conv2d(width, width, 3, padding=1) if depth > 0 else None
            self.up_blocks.append(Level(blocks, attention, resample))

    def _residual(self, channels_in: int, channels_out: int) -> ResidualBlock:
        config = self.config
        return ResidualBlock(channels_in, channels_out, config.time_width, config.num_groups, config.dropout)

    def _attention(self, channels: int) -> AttentionBlock:
        config = self.config
        return AttentionBlock(
            channels,
            text_dim=self.text_width,
            num_heads=config.num_heads,
            num_groups=config.num_groups,
            ffn=config.attention_ffn,
        )


def _levels(blocks: nn.ModuleList) -> Iterable[Level]:
    return cast("Iterable[Level]", blocks)
