"""Hypothesis strategies: small networks of every kind that `MatryoshkaConfig` can describe, with inputs for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from mdm_core.config import TEMPORAL_HEAD_DIM, MatryoshkaConfig, UNetConfig

Video = Literal["none", "tiles", "temporal"]
VIDEOS: tuple[Video, ...] = ("none", "tiles", "temporal")
MICROS = {"scale": 32.0, "aesthetic": 0.25, "watermark": 0.01}


@dataclass(frozen=True)
class Inputs:
    """What a network is called with, and the seed of its weights."""

    seed: int
    x_t: list[Tensor]
    timestep: Tensor
    text_emb: Tensor | None = None
    text_mask: Tensor | None = None
    labels: Tensor | None = None
    micros: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What a failing example shows: shapes in place of pictures."""
        text = None if self.text_emb is None else tuple(self.text_emb.shape)
        return (
            f"Inputs(seed={self.seed}, x_t={[tuple(x.shape) for x in self.x_t]}, timestep={self.timestep.tolist()}, "
            f"text_emb={text}, text_mask={None if self.text_mask is None else self.text_mask.tolist()}, "
            f"labels={None if self.labels is None else self.labels.tolist()}, micros={self.micros})"
        )


@st.composite
def matryoshka_configs(draw: st.DrawFn, shell: Video | None = None) -> MatryoshkaConfig:
    """One to three networks, of at most 16 px; `shell` is what the shell next to the innermost network must be."""
    side = draw(st.sampled_from([2, 4] if shell is not None else [2, 4, 8]))
    innermost = draw(innermost_networks(side))
    networks = [innermost]
    for index in range(draw(st.integers(0 if shell is None else 1, 2))):
        around = draw(shells(networks[0].resolution, innermost, shell if index == 0 else None))
        if around.resolution <= 16:
            networks.insert(0, around)
    return MatryoshkaConfig(tuple(networks))


@st.composite
def innermost_networks(draw: st.DrawFn, side: int) -> UNetConfig:
    text = draw(st.sampled_from([None, "plain", "projected", "labels", "projected labels"]))
    levels = draw(st.integers(1, {2: 2, 4: 3, 8: 3}[side]))
    text_dim = draw(st.sampled_from([8, 16])) if text is not None else None
    return UNetConfig(
        resolution=side,
        **draw(levels_of(levels, mid_blocks=draw(st.booleans()))),
        time_dim=draw(st.sampled_from([None, 16, 24])),
        text_dim=text_dim,
        text_proj_dim=draw(st.sampled_from([8, 24])) if text is not None and "projected" in text else None,
        num_text_layers=draw(st.integers(0, 2)) if text is not None else 0,
        num_classes=draw(st.integers(1, 4)) if text is not None and "labels" in text else None,
        mask_text=draw(st.booleans()),
        **draw(common_fields()),
    )


@st.composite
def shells(draw: st.DrawFn, inner_side: int, innermost: UNetConfig, kind: Video | None) -> UNetConfig:
    """A shell around a network of inner_side px; a temporal one needs two levels more, not one, to double the side."""
    video: Video = kind if kind is not None else draw(st.sampled_from(VIDEOS))
    levels = draw(st.sampled_from([3, 3, 1])) if video == "temporal" else draw(st.sampled_from([2, 2, 1, 3]))
    side = inner_side * 2 ** ((levels - 1) // 2 if video == "temporal" else levels - 1)
    fields = draw(levels_of(levels, mid_blocks=False, temporal=video == "temporal"))
    attends = any(fields["num_attention_layers"])
    text_dim = innermost.text_width if video == "none" or not attends else None
    return UNetConfig(
        resolution=side,
        **fields,
        time_dim=innermost.time_width,
        text_dim=draw(st.sampled_from([text_dim, text_dim, None])),
        feed_inner=draw(st.sampled_from([True, True, False])),
        video=video,
        rotary_positions=draw(st.booleans()) if video == "temporal" else False,
        **draw(common_fields()),
    )


@st.composite
def common_fields(draw: st.DrawFn) -> dict[str, Any]:
    names = [name for name in sorted(MICROS) if draw(st.booleans())]
    return {
        "micro_conditions": tuple((name, MICROS[name]) for name in names),
        "attention_ffn": draw(st.booleans()),
        "normalize_input": draw(st.booleans()),
    }


@st.composite
def levels_of(draw: st.DrawFn, levels: int, mid_blocks: bool, temporal: bool = False) -> dict[str, Any]:
    """The fields that have an entry for each level, and the divisors that must fit the channels."""
    over_time = draw(st.lists(st.sampled_from([1, 0, 2] if temporal else [0]), min_size=levels, max_size=levels))
    over_time = over_time if draw(st.sampled_from([True, True, False])) else []
    widths = st.sampled_from([16, 24])  # two channels or more to a group: torch normalises no single number
    return {
        "channels": tuple(TEMPORAL_HEAD_DIM if any(over_time) else draw(widths) for _ in range(levels)),
        "num_resnets": tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(levels)),
        "num_attention_layers": tuple(draw(st.sampled_from([0, 0, 1, 2])) for _ in range(levels)),
        "num_temporal_layers": tuple(over_time),
        "mid_blocks": mid_blocks,
        "num_heads": draw(st.sampled_from([2, 4, 8])),
        "num_groups": draw(st.sampled_from([1, 4, 8])),
        "num_attention_groups": draw(st.sampled_from([None, 2, 8])),
    }


@st.composite
def inputs_of(draw: st.DrawFn, config: MatryoshkaConfig) -> Inputs:
    """Inputs for a network: fewer rows at finer resolutions, rows without text, micro-conditions given or left."""
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    rows = sorted(draw(st.lists(st.integers(1, 3), min_size=len(config.networks), max_size=len(config.networks))))
    batch = rows[-1]
    x_t = [
        torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64)
        for n, side in zip(rows, config.resolutions, strict=True)
    ]
    timestep = torch.tensor(draw(st.lists(st.integers(0, 999), min_size=batch, max_size=batch)))
    names = sorted({name for network in config.networks for name, _ in network.micro_conditions})
    numbers = {name: 2 * MICROS[name] * torch.rand(batch, generator=generator, dtype=torch.float64) for name in names}
    micros = {name: number for name, number in numbers.items() if draw(st.booleans())}
    return Inputs(seed, x_t, timestep, **draw(texts_of(config.networks[-1], batch, generator)), micros=micros)


@st.composite
def texts_of(draw: st.DrawFn, innermost: UNetConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Text with any mask, without one, or none at all; or labels, of which -1 is none."""
    if innermost.text_dim is None:
        return {}
    kinds = ["masked", "masked", "masked", "unmasked", "none"]
    kind = draw(st.sampled_from(kinds if innermost.num_classes is None else ["labels", "labels", *kinds]))
    if kind == "none":
        return {}
    if kind == "labels":
        label = st.integers(-1, (innermost.num_classes or 0) - 1)
        return {"labels": torch.tensor(draw(st.lists(label, min_size=batch, max_size=batch)))}
    tokens = draw(st.integers(1, 4))
    text_emb = torch.randn(batch, tokens, innermost.text_dim, generator=generator, dtype=torch.float64)
    if kind == "unmasked":
        return {"text_emb": text_emb}
    mask = [draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)) for _ in range(batch)]
    return {"text_emb": text_emb, "text_mask": torch.tensor(mask)}


@st.composite
def networks_and_inputs(draw: st.DrawFn, shell: Video | None = None) -> tuple[MatryoshkaConfig, Inputs]:
    """A configuration, and inputs that fit it; `shell` as in `matryoshka_configs`."""
    config = draw(matryoshka_configs(shell))
    return config, draw(inputs_of(config))


def randomize(parameters: Sequence[Tensor], seed: int) -> None:
    """Weights of which none is zero: normal for matrices and biases, about 1 where they were 1, as in norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            spread = 0.1 if parameter.ndim == 1 else (parameter[0].numel()) ** -0.5
            parameter.copy_(spread * noise + (1 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0))
