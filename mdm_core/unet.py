"""The innermost network: a UNet with attention and text.

Legend: B batch, C channels, r side of a resolution in pixels, L text tokens, D width of the text, T width of the
time embedding.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mdm_core.config import UNetConfig
from mdm_core.layers import AttentionBlock, Context, ResidualBlock, TextLayer, sinusoid, zeroed
from mdm_core.levels import DownLevel, Level, MiddleLevel, UpLevel
from mdm_core.recompute import conv_after
from mdm_core.temporal import TemporalBlock, TemporalResample


class UNet(nn.Module):
    """A UNet over one resolution (arXiv 2310.15111, appendix B; keys as in the published checkpoints)."""

    residual_block: type[ResidualBlock] = ResidualBlock
    attention_block: type[AttentionBlock] = AttentionBlock
    reads_text = True
    """Whether it embeds the text itself; a shell leaves that to the innermost network."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        # In the order of the published checkpoints, so that files list the same keys in the same order.
        self._build_time_embedding()
        self.conv_in = nn.Conv2d(3, config.channels[0], 3, padding=1)
        self.norm_out = nn.GroupNorm(config.num_groups, config.channels[0])
        self.conv_out = zeroed(nn.Conv2d(config.channels[0], 3, 3, padding=1))
        skips = self._build_way_down()
        self._build_middle()
        self._build_way_up(skips)
        self._build_text_layers()
        self._checkpointed: frozenset[str] = frozenset()

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the pictures in pixels, finest first."""
        return (self.config.resolution,)

    @property
    def micro_conditions(self) -> frozenset[str]:
        """Names of the micro-conditions that any of the networks has."""
        return frozenset(name for name, _ in self.config.micro_conditions)

    def forward(
        self,
        x_t: list[Tensor],
        timestep: Tensor,
        text_emb: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        micros: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Predicts v, eps or x0 (what the network was trained for) at every resolution.

        Args:
            x_t: One noised picture (B, 3, r, r) a resolution, finest first, about unit variance. A finer resolution
                may have fewer rows than a coarser one: those of the first pictures.
            timestep: (B,) int or float in [0, N).
            text_emb: (B, L, D) token embeddings; None drops the text of every row.
            text_mask: (B, L) bool, True = real token. A row without any is unconditional.
            labels: (B,) int in [0, num_classes), in the place of text; -1 is unconditional.
            micros: (B,) values of micro-conditions, by name; the default of those that are not given.

        Returns:
            One tensor (B, 3, r, r) a resolution, finest first, each with the rows that came in.

        Raises:
            ValueError: If there are not as many pictures as resolutions, if text comes with labels or without a
                network that reads it, or if no network has a micro-condition of that name.
        """
        self._check(x_t, text_emb, labels, micros or {})
        outputs, _ = self.run(x_t, self.contexts(timestep, text_emb, text_mask, labels, micros or {}), None)
        return outputs

    def run(self, x_t: list[Tensor], contexts: list[Context], from_shell: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Predictions and the last feature map.

        Args:
            x_t: As in `forward`.
            contexts: One for each resolution, as `contexts` makes them.
            from_shell: (B, C, r, r) to add to the first feature map; None for none.

        Returns:
            One prediction (B, 3, r, r) a resolution, finest first, and the feature map (B, C, r, r) of the finest.
        """
        h = self.conv_in(self._scaled_in(x_t[0]))
        if from_shell is not None:
            h = h + from_shell
        h, skips = self.down(h, contexts[0])
        for index, level in enumerate(_levels(self.mid_blocks)):
            h = self._run_level(f"mid.{index}", level, h, contexts[0])
        h = self.up(h, skips, contexts[0])
        return [self.read_out(h)], h

    def contexts(
        self,
        timestep: Tensor,
        text_emb: Tensor | None,
        text_mask: Tensor | None,
        labels: Tensor | None,
        micros: Mapping[str, Tensor],
    ) -> list[Context]:
        """What each network is told, finest resolution first; arguments as in `forward`."""
        time_emb = self.embed_time(timestep, micros)
        if labels is not None:
            text_emb = self.label_emb(labels.clamp(min=0))[:, None, :]
            text_mask = (labels >= 0)[:, None]
        if text_emb is None:
            return [Context(F.silu(time_emb))]
        has_text = None if text_mask is None else text_mask.any(dim=1)
        visible = text_mask if self.config.mask_text else None
        if visible is not None and has_text is not None:
            # What a softmax over nothing gives differs from kernel to kernel, NaN among them: a row without text looks
            # at everything, and what it sees is dropped.
            visible = visible | ~has_text[:, None]
        text = text_emb if self.lm_proj is None else self.lm_proj(text_emb)
        for layer in self.lm_head:
            text = layer(text, visible)
        # With text layers and padding in sight, the published networks take padding into the mean as well.
        counted = text_mask if self.config.mask_text or not self.lm_head else None
        pooled = self.cond_emb(_mean(text, counted))
        if has_text is not None:
            pooled = pooled * has_text[:, None]
        return [Context(F.silu(time_emb + pooled), text, visible, has_text, pooled)]

    def embed_time(self, timestep: Tensor, micros: Mapping[str, Tensor]) -> Tensor:
        """(B,) -> (B, T): the timestep's embedding, plus those of the micro-conditions."""
        width = self.config.time_width // 4
        dtype = self.temb_layer1.weight.dtype
        emb = self.temb_layer2(F.silu(self.temb_layer1(sinusoid(timestep, width, dtype))))
        for name, default in self.config.micro_conditions:
            value = micros.get(name)
            if value is None:
                value = torch.full_like(timestep, default, dtype=torch.promote_types(dtype, torch.float32))
            value = value.clamp(max=default) if name == "scale" else value * 1000
            first, second = cast("nn.ModuleList", self.cond_layers[name])
            emb = emb + second(F.silu(first(sinusoid(value, width, dtype))))
        return emb

    def down(self, h: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """The way down: the lowest feature map, and the skips for the way up, in order."""
        skips = [h]
        for depth, level in enumerate(_levels(self.down_blocks)):
            h, added = self._run_level(f"down.{depth}", level, h, context)
            skips += added
        return h, skips

    def up(self, h: Tensor, skips: list[Tensor], context: Context) -> Tensor:
        """The way up, which consumes the skips: the last feature map at full resolution."""
        for index, level in enumerate(_levels(self.up_blocks)):
            latest = [skips.pop() for _ in range(level.num_blocks)]
            h = self._run_level(f"up.{len(self.up_blocks) - 1 - index}", level, h, latest, context)
        return h

    def read_out(self, h: Tensor) -> Tensor:
        """(B, C, r, r) last feature map -> (B, 3, r, r) prediction."""
        return conv_after(self.conv_out, h, norm=self.norm_out, activation="silu")

    def levels(self) -> dict[str, Level]:
        """The levels of all networks, finest first: `256.down.0`, …, `64.mid.0`, `64.up.2`, … (0 is the finest)."""
        down = {f"down.{depth}": level for depth, level in enumerate(_levels(self.down_blocks))}
        middle = {f"mid.{index}": level for index, level in enumerate(_levels(self.mid_blocks))}
        last = len(self.up_blocks) - 1
        up = {f"up.{last - index}": level for index, level in enumerate(_levels(self.up_blocks))}
        return {f"{self.config.resolution}.{name}": level for name, level in (down | middle | up).items()}

    def checkpoint_levels(self, names: Iterable[str]) -> None:
        """Chooses the levels that keep nothing for the backward pass but their input, and run twice instead.

        Args:
            names: Keys of `levels`; each call replaces the choice of the one before.

        Raises:
            ValueError: If there is no such level.
        """
        chosen, known = frozenset(names), self.levels()
        if unknown := sorted(chosen - known.keys()):
            raise ValueError(f"no level {unknown[0]!r} in this network; there are {', '.join(known)}")
        self._set_checkpointed(chosen)

    def _set_checkpointed(self, names: frozenset[str]) -> None:
        self._checkpointed = names

    def _run_level(self, name: str, level: Level, *arguments: Any) -> Any:
        if f"{self.config.resolution}.{name}" in self._checkpointed and torch.is_grad_enabled():
            keeps_rng = self.config.dropout > 0
            return checkpoint(level, *arguments, use_reentrant=False, preserve_rng_state=keeps_rng)
        return level(*arguments)

    def _scaled_in(self, x: Tensor) -> Tensor:
        return x / x.std(dim=(1, 2, 3), keepdim=True) if self.config.normalize_input else x

    def _innermost(self) -> "UNet":
        return self

    def _check(
        self, x_t: list[Tensor], text_emb: Tensor | None, labels: Tensor | None, micros: Mapping[str, Tensor]
    ) -> None:
        if len(x_t) != len(self.resolutions):
            raise ValueError(f"x_t has {len(x_t)} pictures; wanted one for each resolution {self.resolutions}")
        rows = [x.shape[0] for x in x_t]
        if rows != sorted(rows):
            raise ValueError(f"x_t has {rows} rows; a finer resolution can't have more than a coarser one")
        innermost = self._innermost().config
        if text_emb is not None and labels is not None:
            raise ValueError("text_emb and labels can't both be given; a label takes the place of the text")
        if text_emb is not None and (innermost.text_dim is None or text_emb.shape[-1] != innermost.text_dim):
            raise ValueError(f"text_emb is {text_emb.shape[-1]} wide; the network reads text_dim={innermost.text_dim}")
        if labels is not None and innermost.num_classes is None:
            raise ValueError("labels are given to a network without classes; set num_classes")
        if unknown := sorted(micros.keys() - self.micro_conditions):
            raise ValueError(
                f"no micro-condition {unknown[0]!r} in this network; it has {sorted(self.micro_conditions)}"
            )

    def _build_time_embedding(self) -> None:
        config, width = self.config, self.config.time_width
        self.temb_layer1 = nn.Linear(width // 4, width)
        self.temb_layer2 = nn.Linear(width, width)
        if config.text_width is not None and self.reads_text:
            self.cond_emb = nn.Linear(config.text_width, width, bias=False)
        if config.micro_conditions:
            # Zero at the start, so that a condition changes nothing until it is learnt.
            self.cond_layers = nn.ModuleDict(
                {
                    name: nn.ModuleList([nn.Linear(width // 4, width), zeroed(nn.Linear(width, width))])
                    for name, _ in config.micro_conditions
                }
            )

    def _build_text_layers(self) -> None:
        config = self.config
        self.lm_proj: nn.Linear | None = None
        self.lm_head = nn.ModuleList()
        if config.text_dim is None or config.text_width is None or not self.reads_text:
            return
        if config.text_proj_dim is not None:
            self.lm_proj = nn.Linear(config.text_dim, config.text_proj_dim)
        self.lm_head.extend(TextLayer(config.text_width) for _ in range(config.num_text_layers))
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, config.text_dim)

    def _build_way_down(self) -> list[int]:
        config = self.config
        width = config.channels[0]
        skips = [width]
        levels = []
        for depth, channels in enumerate(config.channels):
            blocks = []
            for _ in range(config.num_resnets[depth]):
                blocks.append(self._residual(width, channels))
                width = channels
                skips.append(width)
            resample = None
            if depth < len(config.channels) - 1:
                resample = self._resample(width, up=False)
                skips.append(width)
            levels.append(DownLevel(blocks, *self._attention(depth, len(blocks)), resample))
        self.down_blocks = nn.ModuleList(levels)
        return skips

    def _build_middle(self) -> None:
        width = self.config.channels[-1]
        self.mid_blocks = nn.ModuleList()
        if self.config.mid_blocks:
            self.mid_blocks.append(MiddleLevel([self._residual(width, width)], [self._spatial_attention(width)]))
            self.mid_blocks.append(MiddleLevel([self._residual(width, width)]))

    def _build_way_up(self, skips: list[int]) -> None:
        config = self.config
        width = config.channels[-1]
        levels = []
        for depth in reversed(range(len(config.channels))):
            blocks = []
            for _ in range(config.num_resnets[depth] + 1):
                blocks.append(self._residual(width + skips.pop(), config.channels[depth]))
                width = config.channels[depth]
            resample = self._resample(width, up=True) if depth > 0 else None
            levels.append(UpLevel(blocks, *self._attention(depth, len(blocks)), resample))
        self.up_blocks = nn.ModuleList(levels)

    def _residual(self, channels_in: int, channels_out: int) -> ResidualBlock:
        config = self.config
        return self.residual_block(channels_in, channels_out, config.time_width, config.num_groups, config.dropout)

    def _attention(self, depth: int, num_blocks: int) -> tuple[list[AttentionBlock], list[TemporalBlock]]:
        config, channels = self.config, self.config.channels[depth]
        spatial = [self._spatial_attention(channels) for _ in range(num_blocks * config.num_attention_layers[depth])]
        num_temporal = config.num_temporal_layers[depth] if config.num_temporal_layers else 0
        temporal = [TemporalBlock(channels, rotary=config.rotary_positions) for _ in range(num_blocks * num_temporal)]
        return spatial, temporal

    def _spatial_attention(self, channels: int) -> AttentionBlock:
        config = self.config
        return self.attention_block(
            channels,
            text_dim=config.text_width,
            num_heads=config.num_heads,
            num_groups=config.attention_groups,
            ffn=config.attention_ffn,
        )

    def _resample(self, channels: int, *, up: bool) -> nn.Conv2d | TemporalResample:
        if self.config.video == "temporal":
            return TemporalResample(channels, up=up)
        return nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)


def _levels(blocks: nn.ModuleList) -> Iterable[Any]:
    return cast("Iterable[Any]", blocks)


def _mean(text: Tensor, counted: Tensor | None) -> Tensor:
    """(B, L, D) -> (B, D): the mean over the tokens that count; 0 where there is none."""
    if counted is None:
        return text.mean(dim=1)
    weights = counted[:, :, None].to(text.dtype)
    return (text * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
