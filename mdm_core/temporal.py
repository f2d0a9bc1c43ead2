"""Clips: frames tiled on a square grid in one picture, and layers over time.

A clip of n² frames is one picture of n × n tiles, row by row, so that the networks around a temporal shell need not
know of time. Inside the shell the tiles are rows of the batch.

Legend: B clips, C channels, F frames of a clip, H W height and width of a frame, n tiles a side.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdm_core.config import TEMPORAL_HEAD_DIM
from mdm_core.layers import FeedForward, TokenAttention
from mdm_core.recompute import conv_after


def to_frames(grid: Tensor, tiles: int) -> Tensor:
    """(B, C, n·H, n·W) -> (B·n², C, H, W), the frames of each clip one after the other."""
    if tiles == 1:
        return grid
    batch, channels, height, width = grid.shape
    x = grid.reshape(batch, channels, tiles, height // tiles, tiles, width // tiles)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // tiles, width // tiles)


def to_grid(frames: Tensor, tiles: int) -> Tensor:
    """(B·n², C, H, W) -> (B, C, n·H, n·W): undoes `to_frames`."""
    if tiles == 1:
        return frames
    _, channels, height, width = frames.shape
    x = frames.reshape(-1, tiles, tiles, channels, height, width)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, tiles * height, tiles * width)


class TemporalBlock(nn.Module):
    """Attention over the frames of a clip, at each position of a map of half the side."""

    def __init__(self, channels: int, *, rotary: bool) -> None:
        super().__init__()
        self.attn = TokenAttention(channels, num_heads=channels // TEMPORAL_HEAD_DIM, rotary=rotary)
        self.mlp = FeedForward(channels)
        self.down_conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.up_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, num_clips: int) -> Tensor:
        """(B·F, C, H, W) -> (B·F, C, H, W)."""
        h = conv_after(self.down_conv, x)
        tokens = self.mlp(self.attn(_over_time(h, num_clips)))
        return conv_after(self.up_conv, _over_space(tokens, h.shape), activation="upsample", residual=x)


class TemporalResample(nn.Conv1d):
    """Halves or doubles the frames of a clip."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__(channels, channels, 3, stride=1 if up else 2, padding=1)
        self.up = up

    def forward(self, x: Tensor, num_clips: int) -> Tensor:  # type: ignore[override]
        """(B·F, C, H, W) -> (B·2F, C, H, W) going up, (B·F/2, C, H, W) going down."""
        series = _over_time(x, num_clips).transpose(1, 2)  # (B·H·W, C, F)
        if self.up:
            series = F.interpolate(series, scale_factor=2, mode="nearest")
        series = super().forward(series)
        frames = num_clips * series.shape[2]
        return _over_space(series.transpose(1, 2), torch.Size([frames, *x.shape[1:]]))


def _over_time(x: Tensor, num_clips: int) -> Tensor:
    """(B·F, C, H, W) -> (B·H·W, F, C)."""
    frames, channels, height, width = x.shape
    x = x.reshape(num_clips, frames // num_clips, channels, height * width)
    return x.permute(0, 3, 1, 2).reshape(num_clips * height * width, -1, channels)


def _over_space(tokens: Tensor, shape: torch.Size) -> Tensor:
    """(B·H·W, F, C) -> (B·F, C, H, W), which is `shape`."""
    frames, channels, height, width = shape
    num_clips = tokens.shape[0] // (height * width)
    x = tokens.reshape(num_clips, height * width, frames // num_clips, channels)
    return x.permute(0, 2, 3, 1).reshape(shape)
