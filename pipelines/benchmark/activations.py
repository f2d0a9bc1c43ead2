"""What a network keeps for the backward pass, and the memory at its peak, level by level, without running it.

Nothing is allocated: the tensors have shapes and storages only (FakeTensorMode).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

OUTSIDE, IN_ALL = "outside levels", "in all"
_TOTAL = "Total"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A forward pass that is worked out only."""

    config: MatryoshkaConfig
    batch: int
    """Pictures."""
    text_tokens: int
    """Tokens of each caption."""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast, whose casts of the weights count as well."""
    channels_last: bool = True
    """Whether weights and pictures lie in memory channels last."""
    checkpointed: tuple[str, ...] = ()
    """Levels that keep only their input, and run twice."""
    plain: bool = False
    """Whether the plain network is asked instead."""

    @contextmanager
    def network(self) -> Iterator[tuple[UNet | PlainUNet, Callable[[], list[Tensor]]]]:
        """The network without memory, and what calls it."""
        with FakeTensorMode():
            network: UNet | PlainUNet = build_plain_network(self.config) if self.plain else build_network(self.config)
            if isinstance(network, UNet):
                network.checkpoint_levels(self.checkpointed)
            x_t, *others = empty_inputs(self.config, batch=self.batch, text_tokens=self.text_tokens)
            if self.channels_last and not self.plain:
                _lay_channels_last(network)
                x_t = [x.contiguous(memory_format=torch.channels_last) for x in x_t]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
                yield network, lambda: network(x_t, *others)


def planned_activations(planned: Planned) -> dict[str, int]:
    """Bytes that the forward pass keeps, by level, finest first.

    `outside levels` is what is kept between them, the inputs of checkpointed levels among it.
    """
    with planned.network() as (network, forward):
        return saved_bytes_by_level(network, forward, levels=network.levels(), checkpointed=planned.checkpointed)


def planned_peaks(planned: Planned) -> dict[str, int]:
    """The most bytes there are while each level runs, forward or backward, finest first; `in all` is the step's most.

    Weights, their gradients and all that is kept at that moment count, the optimizer and the average don't. Against a
    real step it was within 0.5 % at 25.8 M parameters, with and without checkpointed levels; networks with shells,
    whose levels are all checkpointed, came out up to 16 % too high where they were small.
    """
    # Private to torch, and pinned with it; imported where it is used, since it loads torch.distributed.
    from torch.distributed._tools.mem_tracker import MemTracker

    with planned.network() as (network, forward):
        tracker = MemTracker()
        tracker.track_external(network)
        with tracker:
            torch.stack([output.float().square().mean() for output in forward()]).sum().backward()
        names = {id(level): name for name, level in network.levels().items()}
        peaks = {
            names[id(module)]: max(stats.local_peak.values())
            for module, stats in tracker.memory_tracking.items()
            if id(module) in names
        }
        whole = tracker.get_tracker_snapshot("peak")
    in_all = sum(int(parts[_TOTAL]) for parts in whole.values())
    return {name: peaks[name] for name in names.values()} | {IN_ALL: in_all}


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
