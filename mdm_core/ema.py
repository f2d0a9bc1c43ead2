"""Averages of the weights over training."""

import numpy as np
import torch
from torch import Tensor, nn


def power_exponent(relative_length: float) -> float:
    """The exponent gamma whose power-function profile has a standard deviation of `relative_length` of the training.

    Args:
        relative_length: In (0, 0.28); 0.05 to 0.15 are usual.

    Returns:
        gamma > 0 with relative_length² = (gamma + 1) / ((gamma + 2)² (gamma + 3)); arXiv 2312.02696, equation 123.
    """
    if not 0 < relative_length < 0.28:
        raise ValueError(f"relative_length={relative_length} must be between 0 and 0.28")
    inverse = relative_length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEma:
    """A power-function average: after step t the weights of step s count as s^gamma (arXiv 2312.02696, section 3.1).

    It needs no warm-up: the first step's weights replace the initial ones whole.
    """

    def __init__(self, network: nn.Module, *, relative_length: float) -> None:
        self.gamma = power_exponent(relative_length)
        self.averages = {name: value.detach().clone() for name, value in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Takes in the weights after optimizer step `step`, which counts from 1."""
        share = 1 - (1 - 1 / step) ** (self.gamma + 1)
        names = list(self.averages)
        parameters = dict(network.named_parameters())
        torch._foreach_lerp_([self.averages[n] for n in names], [parameters[n].detach() for n in names], share)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the network's own keys."""
        return self.averages

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave; every key must be there, and no other."""
        if state.keys() != self.averages.keys():
            odd = sorted(state.keys() ^ self.averages.keys())
            raise ValueError(f"the averages don't fit the network: {len(odd)} keys differ, the first is {odd[0]!r}")
        for name, value in state.items():
            self.averages[name].copy_(value)
