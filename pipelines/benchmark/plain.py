"""The networks written the straightforward way, as the baseline to measure against.

Ordinary modules in NCHW order, attention as two matrix products with a softmax in float32 between them, everything
that autograd wants to keep kept. The parameters have the names of the published checkpoints, so that one state dict
fits these networks and those of `mdm_core`. For pictures only.

Legend: B batch, C channels, H W height and width, L text tokens, D width of the text, T width of the time embedding,
N positions.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import ConfigError


class PlainResidualBlock(nn.Module):
    """Two 3×3 convolutions, the second scaled and shifted by the time embedding."""

    def __init__(self, channels_in: int, channels_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.num_groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_layer = nn.Linear(config.time_width, 2 * channels_out)
        self.norm2 = nn.GroupNorm(config.num_groups, channels_out)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv3 = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        _zero(self.conv2)

    def forward(self, x: Tensor, time_emb: Tensor) -> Tensor:
        """(B, C_in, H, W), (B, T) -> (B, C_out, H, W)."""
        h = self.conv1(self.act(self.norm1(x)))
        scale, shift = self.time_layer(self.act(time_emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(self.act(h)))
        return self.conv3(x) + h


class PlainAttentionBlock(nn.Module):
    """Attention over positions, and of the same queries over the text; then a feed-forward."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = nn.GroupNorm(config.attention_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        if config.text_width is not None:
            self.norm_cond = nn.LayerNorm(config.text_width)
            self.kv_cond = nn.Linear(config.text_width, 2 * channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.ffn: nn.Sequential | None = None
        _zero(self.proj_out)
        if config.attention_ffn:
            self.ffn = nn.Sequential(
                nn.GroupNorm(config.attention_groups, channels),
                nn.Conv2d(channels, 4 * channels, 1),
                nn.GELU(),
                nn.Conv2d(4 * channels, channels, 1),
            )
            _zero(self.ffn[3])

    def forward(self, x: Tensor, text: Tensor | None, text_mask: Tensor | None, has_text: Tensor | None) -> Tensor:
        """(B, C, H, W), (B, L, D), (B, L) bool, (B,) bool -> (B, C, H, W)."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        h = attend(q, k, v, num_heads=self.num_heads)
        if text is not None:
            k, v = self.kv_cond(self.norm_cond(text)).transpose(1, 2).chunk(2, dim=1)
            from_text = attend(q, k, v, num_heads=self.num_heads, mask=text_mask)
            h = h + (from_text if has_text is None else from_text * has_text[:, None, None])
        x = x + self.proj_out(h.reshape(x.shape))
        return x if self.ffn is None else x + self.ffn(x)


def attend(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention with its matrix of weights in memory: softmax(q · k / √d) · v, d the width of a head.

    Args:
        q: (B, C, N).
        k: (B, C, M).
        v: (B, C, M).
        num_heads: Heads, runs of neighbouring channels.
        mask: (B, M) bool, True = to be seen; None shows everything.

    Returns:
        (B, C, N).
    """
    q, k, v = (part.unflatten(1, (num_heads, -1)) for part in (q, k, v))
    scale = 1 / math.sqrt(math.sqrt(q.shape[2]))
    scores = torch.einsum("bhcn,bhcm->bhnm", q * scale, k * scale)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    weights = torch.softmax(scores.float(), dim=-1).to(scores.dtype)
    return torch.einsum("bhnm,bhcm->bhcn", weights, v).flatten(1, 2)


class PlainLevel(nn.Module):
    """One level: residual blocks with attention after each, then a resampling."""

    def __init__(
        self, blocks: list[PlainResidualBlock], attention: list[PlainAttentionBlock], resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)
        self.resample = resample

    def forward(self, h: Tensor, skips: list[Tensor] | None, context: "PlainContext") -> tuple[Tensor, list[Tensor]]:
        """The map after the level, and every map on the way down; on the way up each block takes one of `skips`."""
        maps: list[Tensor] = []
        per_block = len(self.attn) // len(self.resnets)
        for index, block in enumerate(self.resnets):
            if skips is not None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, context.time_emb)
            for attention in self.attn[index * per_block : (index + 1) * per_block]:
                h = attention(h, context.text, context.text_mask, context.has_text)
            if skips is None:
                maps.append(h)
        if self.resample is not None:
            h = self.resample(h)
            if skips is None:
                maps.append(h)
        return h, maps


class PlainContext:
    """What one network is told besides the picture; shapes as in `PlainAttentionBlock.forward`."""

    def __init__(
        self,
        time_emb: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        has_text: Tensor | None = None,
        pooled_text: Tensor | None = None,
    ) -> None:
        self.time_emb, self.text, self.text_mask, self.has_text = time_emb, text, text_mask, has_text
        self.pooled_text = pooled_text


class PlainUNet(nn.Module):
    """A UNet, alone or as a shell around `inner_unet`."""

    def __init__(self, config: UNetConfig, inner: "PlainUNet | None" = None) -> None:
        super().__init__()
        self.config = config
        self.resolutions: tuple[int, ...] = (config.resolution, *(() if inner is None else inner.resolutions))
        width, first = config.time_width, config.channels[0]
        self.temb_layer1, self.temb_layer2 = nn.Linear(width // 4, width), nn.Linear(width, width)
        self.act = nn.SiLU()
        self.cond_layers = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.Linear(width // 4, width), nn.Linear(width, width)])
                for name, _ in config.micro_conditions
            }
        )
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        self.norm_out = nn.GroupNorm(config.num_groups, first)
        self.conv_out = nn.Conv2d(first, 3, 3, padding=1)
        _zero(self.conv_out)
        self._build_levels()
        self.inner_unet = inner
        if inner is None:
            self._build_text()
        else:
            inner_width = inner.config.channels[0]
            self.in_adapter = nn.Conv2d(config.channels[-1], inner_width, 3, padding=1)
            self.out_adapter = nn.Conv2d(inner_width, config.channels[-1], 3, padding=1)
            _zero(self.in_adapter)
            _zero(self.out_adapter)

    def forward(
        self,
        x_t: list[Tensor],
        timestep: Tensor,
        text_emb: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        micros: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """One prediction (B, 3, r, r) a resolution; arguments as in `mdm_core.unet.UNet.forward`."""
        contexts = self.contexts(timestep, text_emb, text_mask, micros or {})
        outputs, _ = self.run([x.contiguous() for x in x_t], contexts, None)
        return outputs

    def levels(self) -> dict[str, nn.Module]:
        """The levels of all networks, named as in `mdm_core.unet.UNet.levels`."""
        last = len(self.up_blocks) - 1
        named = {f"down.{depth}": level for depth, level in enumerate(self.down_blocks)}
        named |= {f"mid.{index}": level for index, level in enumerate(self.mid_blocks)}
        named |= {f"up.{last - index}": level for index, level in enumerate(self.up_blocks)}
        own = {f"{self.config.resolution}.{name}": level for name, level in named.items()}
        return own if self.inner_unet is None else own | self.inner_unet.levels()

    def run(
        self, x_t: list[Tensor], contexts: list[PlainContext], from_shell: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The predictions, finest first, and the last feature map of the finest."""
        x, context = x_t[0], contexts[0]
        if self.config.normalize_input:
            x = x / x.std(dim=(1, 2, 3), keepdim=True)
        h = self.conv_in(x)
        if from_shell is not None:
            h = h + from_shell
        skips = [h]
        for level in self.down_blocks:
            h, maps = level(h, None, context)
            skips += maps
        inner_outputs: list[Tensor] = []
        if self.inner_unet is not None:
            inner_outputs, from_inner = self.inner_unet.run(x_t[1:], contexts[1:], self.in_adapter(h))
            h = h + self.out_adapter(from_inner)
        for level in self.mid_blocks:
            h, _ = level(h, None, context)
        for level in self.up_blocks:
            h, _ = level(h, skips, context)
        return [self.conv_out(self.act(self.norm_out(h))), *inner_outputs], h

    def contexts(
        self, timestep: Tensor, text_emb: Tensor | None, text_mask: Tensor | None, micros: Mapping[str, Tensor]
    ) -> list[PlainContext]:
        """What each network is told, finest first."""
        time_emb = self.embed_time(timestep, micros)
        if self.inner_unet is not None:
            inner = self.inner_unet.contexts(timestep, text_emb, text_mask, micros)
            pooled = inner[0].pooled_text
            return [PlainContext(time_emb if pooled is None else time_emb + pooled, pooled_text=pooled), *inner]
        if text_emb is None:
            return [PlainContext(time_emb)]
        text = text_emb if self.lm_proj is None else self.lm_proj(text_emb)
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        has_text = text_mask.any(dim=1)
        counts = text_mask[:, :, None].to(text.dtype)
        pooled = self.cond_emb((text * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1))
        visible = text_mask | ~has_text[:, None] if self.config.mask_text else None
        return [PlainContext(time_emb + pooled, text, visible, has_text, pooled)]

    def embed_time(self, timestep: Tensor, micros: Mapping[str, Tensor]) -> Tensor:
        """(B,) -> (B, T): of the timestep, plus those of the micro-conditions."""
        emb = self.temb_layer2(self.act(self.temb_layer1(self._waves(timestep))))
        for name, default in self.config.micro_conditions:
            value = micros.get(name, torch.full_like(timestep, default, dtype=torch.float32))
            value = value.clamp(max=default) if name == "scale" else value * 1000
            first, second = cast("nn.ModuleList", self.cond_layers[name])
            emb = emb + second(self.act(first(self._waves(value))))
        return emb

    def _waves(self, value: Tensor) -> Tensor:
        half = self.config.time_width // 8
        exponents = torch.arange(half, device=value.device, dtype=torch.float32) / half
        angles = value.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)

    def _build_text(self) -> None:
        config = self.config
        self.lm_proj: nn.Linear | None = None
        if config.text_dim is None or config.text_width is None:
            return
        self.cond_emb = nn.Linear(config.text_width, config.time_width, bias=False)
        if config.text_proj_dim is not None:
            self.lm_proj = nn.Linear(config.text_dim, config.text_proj_dim)

    def _build_levels(self) -> None:
        config, width = self.config, self.config.channels[0]
        skips = [width]
        down, up = [], []
        for depth, channels in enumerate(config.channels):
            blocks = []
            for _ in range(config.num_resnets[depth]):
                blocks.append(PlainResidualBlock(width, channels, config))
                width = channels
                skips.append(width)
            resample = None
            if depth < len(config.channels) - 1:
                resample = nn.Conv2d(width, width, 3, stride=2, padding=1)
                skips.append(width)
            down.append(PlainLevel(blocks, self._attention(depth, len(blocks)), resample))
        for depth in reversed(range(len(config.channels))):
            blocks = []
            for _ in range(config.num_resnets[depth] + 1):
                blocks.append(PlainResidualBlock(width + skips.pop(), config.channels[depth], config))
                width = config.channels[depth]
            up.append(PlainLevel(blocks, self._attention(depth, len(blocks)), PlainUpsample(width) if depth else None))
        self.down_blocks, self.up_blocks = nn.ModuleList(down), nn.ModuleList(up)
        self.mid_blocks = nn.ModuleList()
        if config.mid_blocks:
            lowest = config.channels[-1]
            first = PlainLevel([PlainResidualBlock(lowest, lowest, config)], [PlainAttentionBlock(lowest, config)])
            self.mid_blocks.extend([first, PlainLevel([PlainResidualBlock(lowest, lowest, config)], [])])

    def _attention(self, depth: int, num_blocks: int) -> list[PlainAttentionBlock]:
        layers = num_blocks * self.config.num_attention_layers[depth]
        return [PlainAttentionBlock(self.config.channels[depth], self.config) for _ in range(layers)]


class PlainUpsample(nn.Conv2d):
    """Doubles the sides (nearest), then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return super().forward(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))


def build_plain_network(config: MatryoshkaConfig) -> PlainUNet:
    """The network that `config` describes, its state dict that of `mdm_core.nested_unet.build_network`.

    Raises:
        ConfigError: If the network has something that the baseline was not written for.
    """
    for network in config.networks:
        if network.video != "none" or network.num_text_layers or network.num_classes is not None:
            raise ConfigError(
                "the plain baseline knows neither video, nor text layers, nor class labels; use against=none"
            )
    for shell in config.networks[:-1]:
        if shell.text_dim is not None or not shell.feed_inner:
            raise ConfigError("the plain baseline's shells feed what is inside them and see no text; use against=none")
    plain = PlainUNet(config.networks[-1])
    for shell in reversed(config.networks[:-1]):
        plain = PlainUNet(shell, plain)
    return plain


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
