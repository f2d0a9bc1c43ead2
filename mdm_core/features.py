"""Feature maps of a network by name, for probes and for seeing what each resolution has learnt.

A name is a level and a block of it, as in `256.down.1.0` or `64.mid.0.0`: what residual block 0 and the attention
after it give. Levels are numbered from the finest.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mdm_core.unet import UNet


def feature_names(network: UNet) -> tuple[str, ...]:
    """Names of all feature maps of a network, in the order of its levels."""
    return tuple(_modules(network))


def features(
    network: UNet, names: Iterable[str], x_t: list[Tensor], timestep: Tensor, **conditions: Any
) -> dict[str, Tensor]:
    """The feature maps that a network makes of noised pictures.

    Args:
        network: Any network; gradients are not recorded.
        names: Which maps; see `feature_names`.
        x_t: As in `UNet.forward`. Clean pictures are noised for a timestep with `add_noise`.
        timestep: (B,), as in `UNet.forward`.
        conditions: Text, labels and micro-conditions, as in `UNet.forward`.

    Returns:
        (B, C, H, W) by name, in the order of `names`; (B·F, C, H, W) from a shell that sees F frames of each clip
        apart.

    Raises:
        ValueError: If there is no feature map of a name.
    """
    wanted = tuple(names)
    with torch.no_grad(), recorded(network, wanted) as found:
        network(x_t, timestep, **conditions)
    return {name: found[name] for name in wanted}


@contextmanager
def recorded(network: UNet, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that each call of the network inside the context fills with its feature maps, gradients included.

    Raises:
        ValueError: If there is no feature map of a name.
    """
    modules, wanted = _modules(network), tuple(names)
    found: dict[str, Tensor] = {}
    if unknown := [name for name in wanted if name not in modules]:
        raise ValueError(f"no feature map {unknown[0]!r} in this network; there are {', '.join(modules)}")
    with ExitStack() as hooks:
        for name in wanted:
            hooks.callback(modules[name].register_forward_hook(_keeper(found, name)).remove)
        yield found


def _modules(network: UNet) -> dict[str, nn.Module]:
    return {
        f"{name}.{index}": level.last_module(index)
        for name, level in network.levels().items()
        for index in range(level.num_blocks)
    }


def _keeper(found: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        found[name] = output

    return keep
