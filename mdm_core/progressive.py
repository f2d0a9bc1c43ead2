"""Growing a network: the weights of one stage inside the next, larger one."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mdm_core.errors import CheckpointError
from mdm_core.nested_unet import NestedUNet
from mdm_core.state import INNER_PREFIX, inner_network, load_state, num_shells


@dataclass(frozen=True)
class Growth:
    """Which of the larger network's keys came from the smaller one, and which start fresh."""

    inherited: tuple[str, ...]
    """Keys of the larger network, in its order."""
    fresh: tuple[str, ...]
    """The others, in its order: those of the shells, their adapters among them."""


def grow(network: NestedUNet, inner_state: Mapping[str, Tensor]) -> Growth:
    """Puts the weights of the previous stage into the inner network of the next.

    The adapters are zero at the start, so the grown network's predictions at the inner resolutions are those of the
    network that the weights came from, however many shells are added at once.

    Args:
        network: The larger network, freshly built.
        inner_state: Weights of a network that it is nested around, at any depth; of a published checkpoint, its
            `weights`.

    Returns:
        The keys that were inherited and those that start fresh.

    Raises:
        CheckpointError: If a key is missing, left over or of another shape; nothing is loaded then.
    """
    own, given = num_shells(network.state_dict()), num_shells(inner_state)
    inner = inner_network(network, given)
    if inner is None:
        raise CheckpointError(
            f"the previous stage's weights have {given} shell{'s' * (given != 1)} and the network to grow has {own}; "
            "it needs more of them than the weights have: load weights of the same network with load_state_dict"
        )
    load_state(inner, inner_state, what="the previous stage's weights")
    prefix = INNER_PREFIX * (own - given)
    inherited = tuple(prefix + key for key in inner.state_dict())
    return Growth(inherited, tuple(key for key in network.state_dict() if not key.startswith(prefix)))
