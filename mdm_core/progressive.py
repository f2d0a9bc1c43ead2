"""Growing a network: the weights of one stage inside the next, larger one."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mdm_core.errors import CheckpointError
from mdm_core.nested_unet import NestedUNet


@dataclass(frozen=True)
class Growth:
    """Which of the larger network's keys came from the smaller one, and which start fresh."""

    inherited: tuple[str, ...]
    fresh: tuple[str, ...]


def grow(network: NestedUNet, inner_state: Mapping[str, Tensor]) -> Growth:
    """Puts the weights of the previous stage into the inner network of the next.

    The adapters are zero at the start, so the grown network's predictions at the inner resolutions are those of the
    network that the weights came from.

    Args:
        network: The larger network, freshly built.
        inner_state: Weights of the network it is nested around.

    Returns:
        The keys that were inherited and those that start fresh.

    Raises:
        CheckpointError: If a key is missing, left over or of another shape; nothing is loaded then.
    """
    wanted = network.inner_unet.state_dict()
    missing, surplus = sorted(wanted.keys() - inner_state.keys()), sorted(inner_state.keys() - wanted.keys())
    reshaped = [
        f"{key} is {tuple(inner_state[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in wanted.keys() & inner_state.keys()
        if wanted[key].shape != inner_state[key].shape
    ]
    if missing or surplus or reshaped:
        raise CheckpointError(
            f"the previous stage's weights don't fit the {network.inner_unet.config.resolution} px network: "
            f"missing {missing[:3]}, left over {surplus[:3]}, shapes {sorted(reshaped)[:3]}; "
            "the inner networks of both stages must have the same configuration"
        )
    network.inner_unet.load_state_dict(dict(inner_state))
    inherited = tuple(f"inner_unet.{key}" for key in wanted)
    return Growth(inherited, tuple(key for key in network.state_dict() if key not in set(inherited)))
