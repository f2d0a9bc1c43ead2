"""Weights against the network that they are for: all keys and shapes are compared before any is copied."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mdm_core.errors import CheckpointError

INNER_PREFIX = "inner_unet."
"""What stands before the keys of the network inside a shell; once for each shell around it."""

_NAMED = 3


def check_state(network: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Compares weights with a network, and changes nothing.

    Args:
        network: On any device, `meta` included.
        state: Weights under the network's keys, of its shapes. The dtype may differ, but a number with a fraction
            does not go where a whole one is wanted, or the other way round.
        what: Names the weights in the message.

    Raises:
        CheckpointError: If a key is missing, left over or of another shape. It has the number of each and the first
            few, and says so where the weights are those of the network inside a shell.
    """
    problems = _differences(network.state_dict(), state)
    if problems:
        raise CheckpointError(f"{what} don't fit {_describe(network)}: {'; '.join(problems)}{_hint(network, state)}")


def load_state(network: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Copies weights into a network once all of them are known to fit; they take the network's dtype and device.

    Raises:
        CheckpointError: See `check_state`; nothing is loaded then.
    """
    check_state(network, state, what=what)
    network.load_state_dict(dict(state), strict=True)


def num_shells(keys: Mapping[str, object]) -> int:
    """Shells of the network that a state dict is of: how often the inner prefix is repeated, at most."""
    return max((_depth(key) for key in keys), default=0)


def inner_network(network: nn.Module, num_shells: int) -> nn.Module | None:
    """The network inside that has `num_shells` shells of its own; None if there is none."""
    chain: list[nn.Module] = [network]
    while isinstance(inner := getattr(chain[-1], "inner_unet", None), nn.Module):
        chain.append(inner)
    position = len(chain) - 1 - num_shells
    return chain[position] if 0 < position < len(chain) else None


def _depth(key: str) -> int:
    depth = 0
    while key.startswith(INNER_PREFIX):
        key, depth = key.removeprefix(INNER_PREFIX), depth + 1
    return depth


def _differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    reshaped = []
    for key in sorted(wanted.keys() & given.keys()):
        want, got = wanted[key], given[key]
        if want.shape != got.shape:
            reshaped.append(f"{key} is {tuple(got.shape)}, wanted {tuple(want.shape)}")
        elif want.is_floating_point() != got.is_floating_point():
            reshaped.append(f"{key} is {_kind(got.dtype)}, wanted {_kind(want.dtype)}")
    found = (
        ("missing", sorted(wanted.keys() - given.keys())),
        ("left over", sorted(given.keys() - wanted.keys())),
        ("of another shape", reshaped),
    )
    return [f"{len(names)} {kind}: {_first(names)}" for kind, names in found if names]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(network: nn.Module) -> str:
    side = getattr(getattr(network, "config", None), "resolution", None)
    return "the network" if side is None else f"the {side} px network"


def _hint(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    inner = inner_network(network, num_shells(state))
    if inner is not None and not _differences(inner.state_dict(), state):
        return (
            f". They are those of {_describe(inner)} inside it alone: "
            "put them there with mdm_core.progressive.grow, which starts the shells around it fresh"
        )
    shells = num_shells(state) - num_shells(network.state_dict())
    if shells > 0:
        return f". They are those of a network with {shells} more shell{'s' * (shells > 1)} around it"
    return ""
