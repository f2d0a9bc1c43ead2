"""Building blocks of the UNets.

Legend: B batch, C channels, H W height and width, L text tokens, D width of the text, T width of the time
embedding. Parameter names follow the published checkpoints, so that their keys load as they are.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

M = TypeVar("M", bound=nn.Module)


def sinusoid(value: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of `value` at `width / 2` geometrically spaced frequencies.

    Args:
        value: (B,), any range; the networks pass timesteps in [0, N).
        width: Even number of values a row.

    Returns:
        (B, width) float32 in [-1, 1]; "Attention Is All You Need", section 3.5.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=value.device, dtype=torch.float32) * (-math.log(10_000) / half))
    angles = value.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zeroed(module: M) -> M:
    """The module with every parameter set to zero, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, the second scaled and shifted by the time embedding; zero at the start."""

    def __init__(self, channels_in: int, channels_out: int, time_width: int, num_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_layer = nn.Linear(time_width, 2 * channels_out)
        self.norm2 = nn.GroupNorm(num_groups, channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.conv3 = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, time_emb: Tensor) -> Tensor:
        """(B, C_in, H, W), (B, T) after its SiLU -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time_layer(time_emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), scale + 1)
        h = self.conv2(self.dropout(F.silu(h)))
        return h + (x if self.conv3 is None else self.conv3(x))


class AttentionBlock(nn.Module):
    """Self-attention over positions plus cross-attention to the text, then an optional feed-forward.

    The same queries ask both; the two answers are added, each normalised on its own.
    """

    def __init__(self, channels: int, *, text_dim: int | None, num_heads: int, num_groups: int, ffn: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(num_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        if text_dim is not None:
            self.norm_cond = nn.LayerNorm(text_dim)
            self.kv_cond = nn.Linear(text_dim, 2 * channels)
        self.has_text = text_dim is not None
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))
        self.ffn = (
            nn.Sequential(
                nn.GroupNorm(num_groups, channels),
                nn.Conv2d(channels, 4 * channels, 1),
                nn.GELU(),
                zeroed(nn.Conv2d(4 * channels, channels, 1)),
            )
            if ffn
            else None
        )

    def forward(self, x: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """(B, C, H, W), (B, L, D), (B, L) bool -> (B, C, H, W); a row without any real token gets no text."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H·W, 3C)
        q, k, v = (self._split_heads(part) for part in qkv.chunk(3, dim=2))
        h = F.scaled_dot_product_attention(q, k, v)
        if self.has_text and text is not None:
            h = h + self._attend_to_text(q, text, text_mask)
        h = h.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        x = x + self.proj_out(h)
        return x if self.ffn is None else x + self.ffn(x)

    def _attend_to_text(self, q: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        k, v = (self._split_heads(part) for part in self.kv_cond(self.norm_cond(text)).chunk(2, dim=2))
        if text_mask is None:
            return F.scaled_dot_product_attention(q, k, v)
        some = text_mask.any(dim=1)
        # What a softmax over nothing gives differs from kernel to kernel, NaN among them: rows without text look at
        # everything, and what they see is dropped.
        visible = (text_mask | ~some[:, None])[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible) * some[:, None, None, None]

    def _split_heads(self, part: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads); the last stride stays 1, which the fused kernel needs."""
        batch, length, channels = part.shape
        return part.reshape(batch, length, self.num_heads, channels // self.num_heads).transpose(1, 2).contiguous()


class Level(nn.Module):
    """One level of a UNet's way down, middle or way up: residual blocks, attention after each, a resampling."""

    def __init__(
        self, blocks: list[ResidualBlock], attention: list[AttentionBlock], resample: nn.Conv2d | None
    ) -> None:
        super().__init__()
        self.num_blocks = len(blocks)
        self.resnets = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)
        self.resample = resample
        self.attention_per_block = len(attention) // len(blocks)

    def block(self, index: int, x: Tensor, time_emb: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """Residual block `index` and the attention layers after it: (B, C_in, H, W) -> (B, C, H, W)."""
        x = self.resnets[index](x, time_emb)
        first = index * self.attention_per_block
        for attention in self.attn[first : first + self.attention_per_block]:
            x = attention(x, text, text_mask)
        return x
