"""What a network keeps for the backward pass, level by level, worked out without running it.

Nothing is allocated: the tensors have shapes and storages only (FakeTensorMode).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from mdm_core.config import MatryoshkaConfig
from mdm_core.nested_unet import build_network
from mdm_core.unet import UNet
from pipelines.benchmark.flops import empty_inputs
from pipelines.benchmark.plain import PlainUNet, build_plain_network

OUTSIDE = "outside levels"


def planned_activations(
    config: MatryoshkaConfig,
    *,
    batch: int,
    text_tokens: int,
    dtype: str = "float32",
    channels_last: bool = True,
    checkpointed: Iterable[str] = (),
    plain: bool = False,
) -> dict[str, int]:
    """Bytes that one forward pass keeps, by level, finest first.

    `outside levels` is what is kept between them, the inputs of checkpointed levels among it.

    Args:
        config: The networks.
        batch: Pictures.
        text_tokens: Tokens of each caption.
        dtype: float32, or bfloat16 for autocast, whose casts of the weights count as well.
        channels_last: Whether weights and pictures lie in memory channels last.
        checkpointed: Levels that keep only their input, and run twice.
        plain: Whether the plain network is asked instead.
    """
    names = tuple(checkpointed)
    with FakeTensorMode():
        network: UNet | PlainUNet = build_plain_network(config) if plain else build_network(config)
        if isinstance(network, UNet):
            network.checkpoint_levels(names)
        x_t, *others = empty_inputs(config, batch=batch, text_tokens=text_tokens)
        if channels_last and not plain:
            _lay_channels_last(network)
            x_t = [x.contiguous(memory_format=torch.channels_last) for x in x_t]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return saved_bytes_by_level(
                network, lambda: network(x_t, *others), levels=network.levels(), checkpointed=names
            )


def saved_bytes_by_level(
    network: nn.Module,
    forward: Callable[[], object],
    *,
    levels: Mapping[str, nn.Module],
    checkpointed: Iterable[str] = (),
) -> dict[str, int]:
    """Bytes that `forward` keeps for the backward pass, by the level that was running when they were kept.

    Args:
        network: Its parameters don't count.
        forward: Calls the network.
        levels: Modules that don't contain each other, by name.
        checkpointed: Those that keep their inputs only.

    Returns:
        Every level, and what was kept outside of any. A storage that several keep counts once, for the first.
    """
    count = _Count(network, levels)
    hooks = []
    for name, level in levels.items():
        enter, leave = count.around(name, keeps_inputs=name in set(checkpointed))
        hooks.append(level.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(level.register_forward_hook(leave, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(count.keep, lambda tensor: tensor):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return count.bytes_of


class _Count:
    def __init__(self, network: nn.Module, levels: Mapping[str, nn.Module]) -> None:
        self.bytes_of = dict.fromkeys([*levels, OUTSIDE], 0)
        self._now = OUTSIDE
        # Tensors are held, so that no storage is freed and its number given to another.
        self._seen: dict[int, Tensor] = {_storage_number(parameter): parameter for parameter in network.parameters()}

    def keep(self, tensor: Tensor) -> Tensor:
        number = _storage_number(tensor)
        if number not in self._seen:
            self._seen[number] = tensor.detach()
            self.bytes_of[self._now] += tensor.untyped_storage().nbytes()
        return tensor

    def around(self, name: str, *, keeps_inputs: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._now = name
            if keeps_inputs:
                for tensor in tree_leaves((list(args), kwargs)):
                    if isinstance(tensor, Tensor):
                        self.keep(tensor)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._now = OUTSIDE

        return enter, leave


def _lay_channels_last(network: nn.Module) -> None:
    """As `network.to(memory_format=torch.channels_last)`, which can't convert tensors that are only planned."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 4:
                # `contiguous` would leave 1×1 weights as they are, and with them what convolutions give.
                laid = parameter.detach().to(memory_format=torch.channels_last)
                module.register_parameter(name, nn.Parameter(laid))


def _storage_number(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
