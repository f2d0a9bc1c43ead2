"""The networks a second time: slow and obvious, from the definitions, with no torch.nn.

`plain_forward` computes what `build_network(config)` should, from the configuration and the state dict alone, in the
state's dtype. It shares no code with `mdm_core` but the configuration, so that agreement means something.

Shapes: B rows, C channels, H W sides, L text tokens, D text width, F frames of a clip, N positions or frames.
`sub(w, "conv_in")` is the weights under that name, the name cut off.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_core.config import TEMPORAL_HEAD_DIM, MatryoshkaConfig, UNetConfig

Weights = Mapping[str, Tensor]
EPS = 1e-5
TEXT_HEADS = 8


class Text(NamedTuple):
    """What the innermost network makes of the text, for itself and for the shells around it."""

    tokens: Tensor  # (B, L, D), projected, and through the text layers
    visible: Tensor  # (B, L) bool: what attention may look at
    conditional: Tensor  # (B,) bool: the rows that have any text at all
    pooled: Tensor  # (B, time width): added to the time embedding; 0 in rows without text


class Condition(NamedTuple):
    """All a picture is conditioned on, a row for each of the innermost network's pictures."""

    timestep: Tensor
    text: Text | None
    micros: Mapping[str, Tensor]


def plain_forward(
    config: MatryoshkaConfig,
    state: Weights,
    x_t: Sequence[Tensor],
    timestep: Tensor,
    text_emb: Tensor | None = None,
    text_mask: Tensor | None = None,
    labels: Tensor | None = None,
    micros: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """One prediction per picture of `x_t`, finest resolution first; a finer one may have fewer rows."""
    depth = len(config.networks) - 1
    text = read_text(config.networks[-1], sub(state, ".".join(["inner_unet"] * depth)), text_emb, text_mask, labels)
    outputs, _ = run_network(config, 0, state, list(x_t), None, Condition(timestep, text, micros or {}))
    return outputs


# --- A network and the networks inside it
def run_network(
    config: MatryoshkaConfig, depth: int, w: Weights, x_t: list[Tensor], fed: Tensor | None, condition: Condition
) -> tuple[list[Tensor], Tensor]:
    """The predictions of network `depth` and of all inside it, and its last feature map for the shell around it."""
    net, rows = config.networks[depth], len(x_t[0])
    emb = time_embedding(net, w, condition)[:rows]
    text = Text(*(part[:rows] for part in condition.text)) if net.text_dim is not None and condition.text else None
    outer, inner = frame_grids(config, depth)

    pictures = untile(x_t[0], outer)
    if net.normalize_input:
        pictures = pictures / pictures.std(dim=(1, 2, 3), correction=1, keepdim=True)
    x = tile(conv2d(sub(w, "conv_in"), pictures), outer)
    if fed is not None:
        x = x + fed

    frames, skips = down_path(net, w, untile(x, outer), emb, text)
    x = tile(frames, inner)
    inner_outputs: list[Tensor] = []
    if depth + 1 < len(config.networks):
        feeds = None
        if net.feed_inner:  # rows that this shell has no picture for feed zeros
            feeds = conv2d(sub(w, "in_adapter"), x)
            feeds = torch.cat([feeds, feeds.new_zeros(len(x_t[1]) - rows, *feeds.shape[1:])])
        inner_outputs, feature = run_network(config, depth + 1, sub(w, "inner_unet"), x_t[1:], feeds, condition)
        x = x + conv2d(sub(w, "out_adapter"), feature)[:rows]
    elif net.mid_blocks:
        x = residual_block(net, sub(w, "mid_blocks.0.resnets.0"), x, emb)
        x = attention_layer(net, sub(w, "mid_blocks.0.attn.0"), x, text)
        x = residual_block(net, sub(w, "mid_blocks.1.resnets.0"), x, emb)
    frames = up_path(net, w, untile(x, inner), emb, text, skips)

    output = conv2d(sub(w, "conv_out"), silu(group_norm(sub(w, "norm_out"), frames, net.num_groups)))
    return [tile(output, outer), *inner_outputs], tile(frames, outer)


def down_path(net: UNetConfig, w: Weights, x: Tensor, emb: Tensor, text: Text | None) -> tuple[Tensor, list[Tensor]]:
    """The lowest map, and every map on the way to it: the first, each block's, each downsampled one."""
    skips = [x]
    for level in range(len(net.channels)):
        block = sub(w, f"down_blocks.{level}")
        for i in range(net.num_resnets[level]):
            x = one_block(net, level, block, i, x, emb, text)
            skips.append(x)
        if level + 1 < len(net.channels):
            x = resample(net, sub(block, "resample"), x, len(emb), stride=2)
            skips.append(x)
    return x, skips


def up_path(net: UNetConfig, w: Weights, x: Tensor, emb: Tensor, text: Text | None, skips: list[Tensor]) -> Tensor:
    """The way back; each block reads the last skip not yet read, behind the channels that come from below."""
    for level in reversed(range(len(net.channels))):
        block = sub(w, f"up_blocks.{len(net.channels) - 1 - level}")
        for i in range(net.num_resnets[level] + 1):
            x = one_block(net, level, block, i, torch.cat([x, skips.pop()], dim=1), emb, text)
        if level > 0:
            x = resample(net, sub(block, "resample"), x, len(emb), repeats=2)
    return x


def resample(net: UNetConfig, w: Weights, x: Tensor, rows: int, repeats: int = 1, stride: int = 1) -> Tensor:
    """Half or twice the side; of a temporal shell's maps, half or twice the frames."""
    if net.video != "temporal":
        return conv2d(w, repeat2d(x, repeats), stride)
    return frames_first(conv1d(w, frames_last(x, rows).repeat_interleave(repeats, dim=-1), stride), x)


def one_block(net: UNetConfig, level: int, w: Weights, i: int, x: Tensor, emb: Tensor, text: Text | None) -> Tensor:
    """Residual block `i` of a level, its attention layers, then its layers over time."""
    x = residual_block(net, sub(w, f"resnets.{i}"), x, emb)
    layers = net.num_attention_layers[level]
    for j in range(i * layers, (i + 1) * layers):
        x = attention_layer(net, sub(w, f"attn.{j}"), x, text)
    layers = net.num_temporal_layers[level] if net.num_temporal_layers else 0
    for j in range(i * layers, (i + 1) * layers):
        x = temporal_layer(net, sub(w, f"t_attn.{j}"), x, len(emb))
    return x


# --- Conditioning
def read_text(
    net: UNetConfig, w: Weights, text_emb: Tensor | None, text_mask: Tensor | None, labels: Tensor | None
) -> Text | None:
    """The innermost network's reading of the text, or of the labels: label k is one token, label -1 is no text."""
    if labels is not None:
        if text_emb is not None or text_mask is not None or net.num_classes is None:
            raise ValueError("labels take the place of the text, in a network with num_classes")
        text_emb, text_mask = w["label_emb.weight"][labels.clamp(min=0)][:, None], (labels >= 0)[:, None]
    if text_emb is None:
        return None
    real = text_emb.new_ones(text_emb.shape[:2]).bool() if text_mask is None else text_mask.bool()
    conditional = real.any(dim=1)
    real = real | ~conditional[:, None]  # such a row's numbers are dropped below, but must not be NaN

    tokens = linear(sub(w, "lm_proj"), text_emb) if net.text_proj_dim is not None else text_emb
    everything = torch.ones_like(real)
    visible = real if net.mask_text else everything
    for i in range(net.num_text_layers):
        tokens = layer_1d(sub(w, f"lm_head.{i}"), tokens, TEXT_HEADS, visible)
    # The published networks with text layers and no mask take the mean over padding too.
    counted = everything if net.num_text_layers > 0 and not net.mask_text else real
    counts = (counted & conditional[:, None]).to(tokens.dtype)
    mean = torch.einsum("bl,bld->bd", counts, tokens) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return Text(tokens, visible, conditional, linear(sub(w, "cond_emb"), mean))


def time_embedding(net: UNetConfig, w: Weights, condition: Condition) -> Tensor:
    """(B, time width): of the time, plus the pooled text, plus each micro-condition."""
    wave = sinusoid(condition.timestep, net.time_width).to(w["conv_in.weight"].dtype)
    emb = linear(sub(w, "temb_layer2"), silu(linear(sub(w, "temb_layer1"), wave)))
    if condition.text is not None:
        emb = emb + condition.text.pooled
    for name, default in net.micro_conditions:
        value = condition.micros.get(name, torch.full_like(condition.timestep, default, dtype=torch.float64)).double()
        value = value.clamp(max=default) if name == "scale" else 1000 * value
        wave, layers = sinusoid(value, net.time_width).to(emb.dtype), sub(w, f"cond_layers.{name}")
        emb = emb + linear(sub(layers, "1"), silu(linear(sub(layers, "0"), wave)))
    return emb


def sinusoid(value: Tensor, width: int) -> Tensor:
    """(B, width/4) in float64: sines, then cosines of value × exp(-k·ln(10000)/(width/8)), k = 0 … width/8 - 1."""
    half = width // 8
    angles = [value.double() * math.exp(-k * math.log(10000) / half) for k in range(half)]
    return torch.stack([a.sin() for a in angles] + [a.cos() for a in angles], dim=1)


# --- Blocks
def residual_block(net: UNetConfig, w: Weights, x: Tensor, emb: Tensor) -> Tensor:
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1 x)))·(1 + scale) + shift)), the time giving each row's scale and shift.

    The frames of a clip are neighbouring rows and share their clip's scale and shift; a 1×1 fits the channels of x.
    """
    h = conv2d(sub(w, "conv1"), silu(group_norm(sub(w, "norm1"), x, net.num_groups)))
    scale, shift = linear(sub(w, "time_layer"), silu(emb)).repeat_interleave(len(x) // len(emb), dim=0).chunk(2, dim=1)
    h = group_norm(sub(w, "norm2"), h, net.num_groups) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    h = conv2d(sub(w, "conv2"), silu(h))
    return h + (conv2d(sub(w, "conv3"), x) if "conv3.weight" in w else x)


def attention_layer(net: UNetConfig, w: Weights, x: Tensor, text: Text | None) -> Tensor:
    """Attention over positions, plus attention of the same queries over the text, then the feed-forward."""
    qkv = conv2d(sub(w, "qkv"), group_norm(sub(w, "norm"), x, net.attention_groups)).flatten(2)
    q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)
    h = attend(q, k, v, net.num_heads)
    if text is not None:
        k, v = linear(sub(w, "kv_cond"), layer_norm(sub(w, "norm_cond"), text.tokens)).chunk(2, dim=-1)
        h = h + text.conditional[:, None, None] * attend(q, k, v, net.num_heads, text.visible)
    x = x + conv2d(sub(w, "proj_out"), h.transpose(1, 2).reshape(x.shape))
    if net.attention_ffn:
        h = conv2d(sub(w, "ffn.1"), group_norm(sub(w, "ffn.0"), x, net.attention_groups))
        x = x + conv2d(sub(w, "ffn.3"), gelu(h))
    return x


def temporal_layer(net: UNetConfig, w: Weights, x: Tensor, rows: int) -> Tensor:
    """Attention over the frames at each position of a map of half the side, added to x (rows·F, C, H, W)."""
    small = conv2d(sub(w, "down_conv"), x, stride=2)
    clips = frames_last(small, rows).transpose(1, 2)
    freqs = w["attn.pos_emb.freqs"] if net.rotary_positions else None
    clips = layer_1d(w, clips, x.shape[1] // TEMPORAL_HEAD_DIM, freqs=freqs)
    small = frames_first(clips.transpose(1, 2), small)
    return x + conv2d(sub(w, "up_conv"), repeat2d(small, 2))


def layer_1d(
    w: Weights, x: Tensor, num_heads: int, visible: Tensor | None = None, freqs: Tensor | None = None
) -> Tensor:
    """x (B, N, C) + attention over its N entries, then that + a feed-forward: a layer over text, or over time."""
    q, k, v = linear(sub(w, "attn.qkv"), layer_norm(sub(w, "attn.norm"), x)).chunk(3, dim=-1)
    x = x + linear(sub(w, "attn.proj_out"), attend(q, k, v, num_heads, visible, freqs))
    h = gelu(linear(sub(w, "mlp.main.1"), layer_norm(sub(w, "mlp.main.0"), x)))
    return x + linear(sub(w, "mlp.main.3"), h)


def attend(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, visible: Tensor | None = None, freqs: Tensor | None = None
) -> Tensor:
    """softmax(q·k / √d)·v in each head, a run of d = C / heads neighbouring channels; q, k, v (B, N, C)."""
    heads = []
    for q_h, k_h, v_h in zip(*(part.unflatten(-1, (num_heads, -1)).unbind(-2) for part in (q, k, v)), strict=True):
        if freqs is not None:
            q_h, k_h = rotate(q_h, freqs), rotate(k_h, freqs)
        scores = torch.einsum("bnc,bmc->bnm", q_h, k_h) / math.sqrt(q_h.shape[-1])
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, :], -math.inf)
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        heads.append(torch.einsum("bnm,bmc->bnc", weights / weights.sum(dim=-1, keepdim=True), v_h))
    return torch.cat(heads, dim=-1)


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotary positions: at place n, the pair of channels (2i, 2i + 1) turned by the angle n·freqs[i]."""
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * freqs.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
    return torch.stack(turned, dim=-1).flatten(-2)


# --- Clips
def frame_grids(config: MatryoshkaConfig, depth: int) -> tuple[int, int]:
    """Frames on a side of the picture that comes in, and of the map for the network inside; 1 without a clip."""
    net, frame = config.networks[depth], config.networks[-1].resolution
    if net.video == "none":
        return 1, 1
    inner = config.networks[depth + 1].resolution // frame
    return (net.resolution // frame if net.video == "temporal" else inner), inner  # tiles: the same frames, halved


def untile(x: Tensor, side: int) -> Tensor:
    """(B, C, side·H, side·W) to the frames (B·side², C, H, W), a clip's in reading order next to each other."""
    return x.unflatten(3, (side, -1)).unflatten(2, (side, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def tile(x: Tensor, side: int) -> Tensor:
    """The pictures that `untile` came from."""
    return x.unflatten(0, (-1, side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def frames_last(x: Tensor, rows: int) -> Tensor:
    """(rows·F, C, H, W) to (rows·H·W, C, F): the frames at each position."""
    return x.unflatten(0, (rows, -1)).permute(0, 3, 4, 2, 1).flatten(0, 2)


def frames_first(clips: Tensor, like: Tensor) -> Tensor:
    """(rows·H·W, C, F) back to (rows·F, C, H, W), for any F; H and W as in `like`."""
    height, width = like.shape[-2:]
    return clips.unflatten(0, (-1, height, width)).permute(0, 4, 3, 1, 2).flatten(0, 1)


# --- Definitions
def sub(w: Weights, name: str) -> Weights:
    """The weights under a name, the name cut off; all of them under the empty name."""
    return {key[len(name) + 1 :]: value for key, value in w.items() if key.startswith(name + ".")} if name else w


def linear(w: Weights, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, w["weight"])
    return y + w["bias"] if "bias" in w else y


def conv2d(w: Weights, x: Tensor, stride: int = 1) -> Tensor:
    """y[p] = Σ_d weight[d]·x[stride·p + d - K//2], x being 0 outside, over both directions d of a K×K kernel."""
    kernel = w["weight"].shape[-1]
    height, width = ((side - 1) // stride + 1 for side in x.shape[-2:])
    padded = F.pad(x, [kernel // 2] * 4)
    y = w["bias"][:, None, None].expand(len(x), -1, height, width)
    for dy in range(kernel):
        for dx in range(kernel):
            seen = padded[:, :, dy : dy + stride * height : stride, dx : dx + stride * width : stride]
            y = y + torch.einsum("bihw,oi->bohw", seen, w["weight"][:, :, dy, dx])
    return y


def conv1d(w: Weights, x: Tensor, stride: int = 1) -> Tensor:
    """The same over x (B, C, N): a 2-D kernel of which all but the middle row is 0."""
    weight = w["weight"].new_zeros(*w["weight"].shape[:2], w["weight"].shape[-1], w["weight"].shape[-1])
    weight[:, :, w["weight"].shape[-1] // 2] = w["weight"]
    return conv2d({"weight": weight, "bias": w["bias"]}, x[:, :, None], stride)[:, :, 0]


def group_norm(w: Weights, x: Tensor, groups: int) -> Tensor:
    """Standardised over each group of neighbouring channels and all positions of a row."""
    normal = standardised(x.unflatten(1, (groups, -1)), (2, 3, 4)).flatten(1, 2)
    return normal * w["weight"][:, None, None] + w["bias"][:, None, None]


def layer_norm(w: Weights, x: Tensor) -> Tensor:
    return standardised(x, (-1,)) * w["weight"] + w["bias"]


def standardised(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """(x - mean) / √(mean of (x - mean)² + EPS)."""
    centred = x - x.mean(dim=over, keepdim=True)
    return centred / (centred.square().mean(dim=over, keepdim=True) + EPS).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x), Φ the standard normal distribution function."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def repeat2d(x: Tensor, times: int) -> Tensor:
    """Each position repeated to times × times."""
    return x.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)
