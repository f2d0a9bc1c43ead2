"""Building blocks of the UNets.

Legend: B batch, C channels, H W height and width, L text tokens, D width of the text, T width of the time
embedding. Parameter names follow the published checkpoints, so that their keys load as they are.
"""

import math
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdm_core.recompute import conv_after, linear_after

M = TypeVar("M", bound=nn.Module)


def sinusoid(value: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines, then cosines, of `value` at `width / 2` geometrically spaced frequencies.

    Args:
        value: (B,), any range; the networks pass timesteps in [0, N).
        width: Even number of values a row.
        dtype: Type of the result; computed in float32 at least.

    Returns:
        (B, width) in [-1, 1]; "Attention Is All You Need", section 3.5.
    """
    precise = torch.promote_types(dtype, torch.float32)
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=value.device, dtype=precise) * (-math.log(10_000) / half))
    angles = value.to(precise)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)


def zeroed(module: M) -> M:
    """The module with every parameter set to zero, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@dataclass(frozen=True)
class Context:
    """What the blocks of one network are told besides the picture."""

    time_emb: Tensor
    """(B, T), after its SiLU."""
    text: Tensor | None = None
    """(B, L, D), projected; None where there is no text."""
    text_mask: Tensor | None = None
    """(B, L) bool, True = to be seen; None shows every token."""
    has_text: Tensor | None = None
    """(B,) bool, False = row without text; None if all have some."""
    pooled_text: Tensor | None = None
    """(B, T): the text's part of the time embedding, which a shell adds to its own."""

    def first(self, rows: int) -> "Context":
        """The same for the first `rows` rows."""
        fields = {name: value[:rows] for name, value in vars(self).items() if value is not None}
        return replace(self, **fields)


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
        """(B, C_in, H, W), (B, T) after its SiLU -> (B, C_out, H, W).

        `x` may have a multiple of the rows of `time_emb`: the frames of each clip, one after the other.
        """
        skip = x if self.conv3 is None else conv_after(self.conv3, x)
        h = conv_after(self.conv1, x, norm=self.norm1, activation="silu")
        modulation = self.time_layer(time_emb)[:, :, None, None]
        if x.shape[0] != time_emb.shape[0]:
            modulation = modulation.repeat_interleave(x.shape[0] // time_emb.shape[0], dim=0)
        scale, shift = modulation.chunk(2, dim=1)
        if self.dropout.p and self.training:
            # What is dropped must be the same when it is computed again, so it is kept.
            return skip + self.conv2(self.dropout(F.silu(torch.addcmul(shift, self.norm2(h), scale + 1))))
        return conv_after(self.conv2, h, norm=self.norm2, scale=scale, shift=shift, activation="silu", residual=skip)


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

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); a row without text gets none."""
        batch, channels, height, width = x.shape
        qkv = conv_after(self.qkv, x, norm=self.norm).permute(0, 2, 3, 1)  # channels last: what follows are views
        q, k, v = split_heads(qkv.reshape(batch, height * width, 3 * channels), 3, self.num_heads)
        h = F.scaled_dot_product_attention(q, k, v)
        if self.has_text and context.text is not None:
            h = h + self._attend_to_text(q, context.text, context)  # not in place: the kernels keep their results
        h = h.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        x = conv_after(self.proj_out, h, residual=x)
        if self.ffn is None:
            return x
        norm, widen, _, narrow = cast("tuple[nn.GroupNorm, nn.Conv2d, nn.GELU, nn.Conv2d]", tuple(self.ffn))
        return conv_after(narrow, conv_after(widen, x, norm=norm), activation="gelu", residual=x)

    def _attend_to_text(self, q: Tensor, text: Tensor, context: Context) -> Tensor:
        k, v = split_heads(linear_after(self.kv_cond, text, norm=self.norm_cond), 2, self.num_heads)
        if context.has_text is not None:
            # Whatever a row without text looks at, it sees nothing.
            v = v * context.has_text[:, None, None, None]
        mask = None if context.text_mask is None else context.text_mask[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class TokenAttention(nn.Module):
    """Self-attention over the tokens of a sequence; zero at the start."""

    def __init__(self, width: int, *, num_heads: int, rotary: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj_out = zeroed(nn.Linear(width, width))
        self.pos_emb = RotaryPositions(width // num_heads) if rotary else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D), (B, L) bool with True = to be seen -> (B, L, D)."""
        q, k, v = split_heads(linear_after(self.qkv, x, norm=self.norm), 3, self.num_heads)
        if self.pos_emb is not None:
            q, k = self.pos_emb(q), self.pos_emb(k)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    """Two linear layers with 4 × the width between them, added to what came in; zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), zeroed(nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        return x + self.main(x)


class TextLayer(nn.Module):
    """A transformer layer over the text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = TokenAttention(width, num_heads=8)
        self.mlp = FeedForward(width)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D), (B, L) bool -> (B, L, D)."""
        return self.mlp(self.attn(text, mask))


class RotaryPositions(nn.Module):
    """Turns pairs of neighbouring values by an angle that grows with the position (arXiv 2104.09864, section 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.arange(0, width, 2).float() / width
        self.freqs = nn.Parameter(1 / 10_000**exponents, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, heads, L, D) -> (B, heads, L, D)."""
        precise = torch.promote_types(x.dtype, torch.float32)
        angles = torch.arange(x.shape[2], device=x.device, dtype=precise)[:, None] * self.freqs.to(precise)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(3)


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, L, parts · C) -> `parts` views (B, heads, L, C / heads).

    Their last stride is 1: with any other the fused attention kernels silently give way to a slow one.
    """
    batch, length, width = x.shape
    heads = x.contiguous().view(batch, length, parts, num_heads, width // parts // num_heads)
    return heads.permute(2, 0, 3, 1, 4).unbind(0)
