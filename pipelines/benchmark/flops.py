"""The arithmetic that a network asks for, counted on the plain network without running anything.

An FMA is 2 FLOPs. What is computed twice to save memory is not in the figures: they say what the work needs, not what
a way of doing it spends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from mdm_core.config import MatryoshkaConfig
from pipelines.benchmark.plain import build_plain_network


@dataclass(frozen=True)
class Flops:
    """For one picture at all resolutions."""

    forward: int
    forward_backward: int
    forward_by_level: dict[str, int]
    """The part of `forward` that each level has; what is outside of any is not there."""


def flops_per_picture(config: MatryoshkaConfig, *, text_tokens: int) -> Flops:
    """The FLOPs of matrix products and convolutions for one picture and its caption."""
    with torch.device("meta"):
        network = build_plain_network(config)
        x_t, timestep, text_emb, text_mask = empty_inputs(config, batch=1, text_tokens=text_tokens)
        return count_flops(network, x_t, timestep, text_emb, text_mask, levels=network.levels())


def training_flops(config: MatryoshkaConfig, *, text_tokens: int, mix: Sequence[float] | None = None) -> float:
    """The FLOPs of a training step for one picture, on the mean.

    Args:
        config: The networks.
        text_tokens: Tokens of a caption.
        mix: Share of the pictures that each resolution is trained on, finest first; all have all if None.
    """
    sides = config.resolutions
    whole = [flops_per_picture(config.up_to(side), text_tokens=text_tokens).forward_backward for side in sides]
    shares = mix or (1.0,) * len(sides)
    return sum(share * (one - inner) for share, one, inner in zip(shares, whole, [*whole[1:], 0], strict=True))


def count_flops(network: nn.Module, *inputs: object, levels: Mapping[str, nn.Module]) -> Flops:
    """The FLOPs of one call of `network` (a tensor or a list of them comes out), and of that with its gradients."""
    by_level: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter:
        hooks = [hook for name, level in levels.items() for hook in _around(name, level, counter, by_level)]
        outputs = network(*inputs)
        for hook in hooks:
            hook.remove()
        forward = counter.get_total_flops()
        total(outputs).backward()
    return Flops(forward, counter.get_total_flops(), by_level)


def _around(
    name: str, level: nn.Module, counter: FlopCounterMode, by_level: dict[str, int]
) -> tuple[RemovableHandle, RemovableHandle]:
    """Hooks that write down what a level's forward pass adds to the count."""

    def enter(module: nn.Module, args: object) -> None:
        by_level[name] = -counter.get_total_flops()

    def leave(module: nn.Module, args: object, output: object) -> None:
        by_level[name] += counter.get_total_flops()

    return level.register_forward_pre_hook(enter), level.register_forward_hook(leave)


def empty_inputs(
    config: MatryoshkaConfig, *, batch: int, text_tokens: int
) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:
    """What a network is called with, its values left open: pictures, timesteps, text and its mask."""
    x_t = [torch.empty(batch, 3, side, side) for side in config.resolutions]
    timestep = torch.empty(batch, dtype=torch.int64)
    if config.text_dim is None:
        return x_t, timestep, None, None
    text_emb = torch.empty(batch, text_tokens, config.text_dim)
    return x_t, timestep, text_emb, torch.empty(batch, text_tokens, dtype=torch.bool)


def total(outputs: Tensor | list[Tensor]) -> Tensor:
    """A number that depends on everything that came out."""
    parts = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.stack([part.float().sum() for part in parts]).sum()
