"""Averages of the weights over training, and averages of any length made afterwards from stored ones.

A power-function average of exponent gamma after step T counts the weights of step s as p(s) ∝ s^gamma, s ≤ T. Its
length is the standard deviation of p as a share of T. Steps count from 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mdm_core.errors import CheckpointError, ConfigError

_LONGEST = 0.28
_NEGLIGIBLE = 1e-12

Numbers = NDArray[np.float64]


def power_exponent(relative_length: float) -> float:
    """The exponent gamma whose power-function profile has a standard deviation of `relative_length` of the training.

    Args:
        relative_length: In (0, 0.28); 0.05 to 0.15 are usual.

    Returns:
        gamma > 0 with relative_length² = (gamma + 1) / ((gamma + 2)² (gamma + 3)); arXiv 2312.02696, equation 123.
    """
    if not 0 < relative_length < _LONGEST:
        raise ValueError(f"relative_length={relative_length} must be between 0 and {_LONGEST}")
    inverse = relative_length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class _Average:
    """A running average of a network's state dict, in float32 at least; what is no fraction is copied."""

    def __init__(self, network: nn.Module) -> None:
        self.averages: dict[str, Tensor] = {
            name: value.detach().to(_wide(value.dtype), copy=True) for name, value in network.state_dict().items()
        }

    @torch.no_grad()
    def _move_towards(self, network: nn.Module, share: float) -> None:
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        # Several times as fast as state_dict(), which matters at a thousand tensors every step.
        state: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
        state |= network.named_buffers(remove_duplicate=False)
        for name, average in self.averages.items():
            if average.is_floating_point():
                ours.append(average)
                theirs.append(state[name].to(average.dtype))
            else:
                average.copy_(state[name])
        torch._foreach_lerp_(ours, theirs, share)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the network's own keys; the next update changes them in place."""
        return self.averages

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave; every key must be there, and no other."""
        if state.keys() != self.averages.keys():
            odd = sorted(state.keys() ^ self.averages.keys())
            raise ValueError(f"the averages don't fit the network: {len(odd)} keys differ, the first is {odd[0]!r}")
        for name, value in state.items():
            self.averages[name].copy_(value)


class PowerEma(_Average):
    """A power-function average: after step t the weights of step s count as s^gamma (arXiv 2312.02696, section 3.1).

    It needs no warm-up: the first step's weights replace the initial ones whole. Its state is the averages alone, the
    step being the caller's to keep.
    """

    def __init__(self, network: nn.Module, *, relative_length: float) -> None:
        super().__init__(network)
        self.gamma = power_exponent(relative_length)

    def update(self, network: nn.Module, step: int) -> None:
        """Takes in the weights after optimizer step `step`, which counts from 1."""
        self._move_towards(network, 1 - (1 - 1 / step) ** (self.gamma + 1))


class ClassicEma(_Average):
    """An exponential average: each step keeps `decay` of the average, and takes the rest from the weights.

    Args:
        network: What is averaged; its initial weights begin the average.
        decay: In (0, 1); the published models have 0.9999.
        warmup_steps: Step t keeps at most t / (t + warmup_steps), so that the initial weights are forgotten: while that
            holds, step s counts as s^(warmup_steps - 1). 0, as published, keeps `decay` from the first step on.
    """

    def __init__(self, network: nn.Module, *, decay: float = 0.9999, warmup_steps: int = 0) -> None:
        if not 0 < decay < 1 or warmup_steps < 0:
            raise ConfigError(
                f"decay={decay} must be between 0 and 1, and warmup_steps={warmup_steps} must be 0 or more"
            )
        super().__init__(network)
        self.decay, self.warmup_steps = decay, warmup_steps

    def update(self, network: nn.Module, step: int) -> None:
        """Takes in the weights after optimizer step `step`, which counts from 1."""
        self._move_towards(network, 1 - min(self.decay, step / (step + self.warmup_steps)))


@dataclass(frozen=True)
class Snapshot:
    """A power-function average as it was after one step."""

    step: int
    """Optimizer step, from 1."""
    relative_length: float
    """Length of the average."""
    read: Callable[[], Mapping[str, Tensor]]
    """Gives the averaged weights; called when they are needed, one snapshot after the other."""


class PowerEmaTracker:
    """Power-function averages of several lengths, whose snapshots `reconstruct` makes any other length from."""

    def __init__(self, network: nn.Module, *, relative_lengths: Sequence[float] = (0.05, 0.10)) -> None:
        if not relative_lengths or len(set(relative_lengths)) != len(relative_lengths):
            raise ConfigError(f"relative_lengths={list(relative_lengths)} must be one or more different lengths")
        self.averages = {length: PowerEma(network, relative_length=length) for length in relative_lengths}

    def update(self, network: nn.Module, step: int) -> None:
        """Takes in the weights after optimizer step `step`, which counts from 1."""
        for average in self.averages.values():
            average.update(network, step)

    def snapshots(self, step: int) -> list[Snapshot]:
        """The averages as they are after `step`, copied to the CPU; one for each length."""
        return [
            Snapshot(step, length, _kept({name: _cpu_copy(value) for name, value in average.averages.items()}))
            for length, average in self.averages.items()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """All averages, each key after its length and a slash; the next update changes them in place."""
        return {
            f"{length}/{name}": value
            for length, average in self.averages.items()
            for name, value in average.averages.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave; every key must be there, and no other."""
        if state.keys() != self.state_dict().keys():
            odd = sorted(state.keys() ^ self.state_dict().keys())
            raise ValueError(f"the averages don't fit the tracker: {len(odd)} keys differ, the first is {odd[0]!r}")
        for length, average in self.averages.items():
            average.load_state_dict({name: state[f"{length}/{name}"] for name in average.averages})


def reconstruct(
    snapshots: Sequence[Snapshot], relative_length: float, step: int, *, max_error: float = 0.1
) -> dict[str, Tensor]:
    """The power-function average of any length after any step, from stored ones of other lengths and steps.

    A combination of the snapshots, see `reconstruction_weights`. One snapshot at a time is in memory, beside sums of 8
    bytes a weight.

    Args:
        snapshots: Of one training, in any order. Those after `step` are not used, except for the first.
        relative_length: In (0, 0.28).
        step: At most the last snapshot's.
        max_error: Largest error of the profile that is accepted, as a share of its norm.

    Returns:
        The weights on the CPU, in float32 at least; the very snapshot where one has this length and step.

    Raises:
        ConfigError: If the snapshots can't give this average.
        CheckpointError: If they are not of the same network.
    """
    if not 0 < relative_length < _LONGEST:
        raise ConfigError(f"relative_length={relative_length} must be between 0 and {_LONGEST}")
    used = _usable(snapshots, step)
    for snapshot in used:
        if (snapshot.step, snapshot.relative_length) == (step, relative_length):
            return {name: _cpu_copy(value) for name, value in snapshot.read().items()}
    weights, error = reconstruction_weights(
        [s.step for s in used], [s.relative_length for s in used], relative_length=relative_length, step=step
    )
    if error > max_error:
        raise ConfigError(
            f"{len(used)} snapshots of the lengths {sorted({s.relative_length for s in used})} up to step "
            f"{used[-1].step} give the average of length {relative_length} at step {step} with an error of "
            f"{error:.2g}, more than max_error={max_error}; ask for a step that has a snapshot, for a length nearer "
            "to theirs, or store more of them"
        )
    chosen = [(s, float(w)) for s, w in zip(used, weights, strict=True) if abs(w) > _NEGLIGIBLE]
    return _combined(chosen)


def reconstruction_weights(
    steps: Sequence[int], relative_lengths: Sequence[float], *, relative_length: float, step: int
) -> tuple[Numbers, float]:
    """The weight of each snapshot in the combination that comes closest to an average of another length or step.

    Least squares between profiles, solved in float64 (arXiv 2312.02696, section 3.2 and appendix C). Unlike there, the
    weights must sum to 1, so that parameters that never moved come out as they are.

    Args:
        steps: Step of each of the n snapshots.
        relative_lengths: Length of each.
        relative_length: Length that is wanted.
        step: After which it is wanted.

    Returns:
        (n,) weights, and the distance between the profile they give and the one that is wanted, as a share of the
        latter's norm: weights that are independent from step to step come out with this relative error.
    """
    t = np.asarray(steps, dtype=np.float64) / step
    gamma = np.array([power_exponent(length) for length in relative_lengths])
    one, wanted_gamma = np.ones(1), np.array([power_exponent(relative_length)])
    products = _inner_product(t[:, None], gamma[:, None], t, gamma)
    wanted = _inner_product(t, gamma, one, wanted_gamma)
    # Profiles of unit norm; long and short ones differ by orders of magnitude otherwise.
    norms = np.sqrt(np.diag(products))
    products, wanted, sums = products / norms / norms[:, None], wanted / norms, 1 / norms
    # A Lagrange multiplier holds the sum at 1; scaled so that its row is like the others.
    scale = 1 / np.linalg.norm(sums)
    system = np.block([[products, scale * sums[:, None]], [scale * sums[None, :], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(wanted, scale), rcond=1e-15)[0][:-1]
    norm = _inner_product(one, wanted_gamma, one, wanted_gamma).item()
    squared = norm - 2 * solution @ wanted + solution @ products @ solution
    return solution / norms, float(np.sqrt(max(squared, 0.0) / norm))


def _inner_product(t_a: Numbers, gamma_a: Numbers, t_b: Numbers, gamma_b: Numbers) -> Numbers:
    """∫ p_a p_b, with p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on [0, t]; arXiv 2312.02696, appendix C."""
    shorter_in_longer = np.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    product: Numbers = (gamma_a + 1) * (gamma_b + 1) * shorter_in_longer
    return product / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def _usable(snapshots: Sequence[Snapshot], step: int) -> list[Snapshot]:
    steps = sorted({snapshot.step for snapshot in snapshots})
    if not steps:
        raise ConfigError("there are no snapshots to make an average from; store some while training")
    if not 1 <= step <= steps[-1]:
        raise ConfigError(f"step={step} must be between 1 and the last snapshot's, {steps[-1]}")
    # Where no snapshot is of `step` itself, only the next one has seen the weights just before it.
    end = next(s for s in steps if s >= step)
    return sorted((s for s in snapshots if s.step <= end), key=lambda s: (s.step, s.relative_length))


@torch.no_grad()
def _combined(chosen: Sequence[tuple[Snapshot, float]]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for snapshot, weight in chosen:
        state = snapshot.read()
        if not sums:
            dtypes = {name: value.dtype for name, value in state.items()}
            sums = {name: torch.zeros_like(v, device="cpu", dtype=_sum_dtype(v.dtype)) for name, v in state.items()}
        if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in sums.items()}:
            raise CheckpointError(f"the snapshot of step {snapshot.step} is of another network than the others")
        for name, value in state.items():
            if value.is_floating_point():
                sums[name].add_(value.cpu(), alpha=weight)
            else:
                sums[name].copy_(value)
    return {name: total.to(_wide(dtypes[name])) for name, total in sums.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _cpu_copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", _wide(value.dtype), copy=True)


def _kept(state: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
    def read() -> Mapping[str, Any]:
        return state

    return read
