"""Averages against sums written out step by step, and reconstructed ones against the averages they stand for."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mdm_core.ema import (
    ClassicEma,
    PowerEma,
    PowerEmaTracker,
    Snapshot,
    power_exponent,
    reconstruct,
    reconstruction_weights,
)
from mdm_core.errors import CheckpointError, ConfigError

NUM_STEPS = 2048
Array = NDArray[np.float64]


class Numbers(torch.nn.Module):
    """A network of a few numbers."""

    def __init__(self, values: Array) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def set(self, values: Array, count: int) -> None:
        self.weight.data.copy_(torch.tensor(values))
        self.count = torch.tensor(count)


def profile(relative_length: float, step: int, num_steps: int = NUM_STEPS) -> Array:
    """Share of each step's weights in the average after `step`: t^(gamma+1) telescopes."""
    t = np.minimum(np.arange(num_steps + 1.0) / step, 1)
    shares: Array = np.diff(t ** (power_exponent(relative_length) + 1))
    return shares


def trajectories() -> Array:
    """(steps, 40): random walks, white noise, and numbers that never move."""
    rng = np.random.default_rng(0)
    walks = rng.normal(size=(NUM_STEPS, 16)).cumsum(axis=0) / math.sqrt(NUM_STEPS)
    noise = rng.normal(size=(NUM_STEPS, 16))
    return np.concatenate([walks, noise, np.tile(rng.normal(size=8), (NUM_STEPS, 1))], axis=1)


def tracked(path: Array, *, every: int, lengths: tuple[float, ...] = (0.05, 0.10)) -> list[Snapshot]:
    network = Numbers(path[0])
    tracker = PowerEmaTracker(network, relative_lengths=lengths)
    snapshots = []
    for step, values in enumerate(path, start=1):
        network.set(values, step)
        tracker.update(network, step)
        if step % every == 0:
            snapshots += tracker.snapshots(step)
    return snapshots


@pytest.fixture(scope="module")
def walk() -> tuple[Array, list[Snapshot]]:
    path = trajectories()
    return path, tracked(path, every=NUM_STEPS // 32)


def test_snapshots_are_the_sums_over_all_steps(walk: tuple[Array, list[Snapshot]]) -> None:
    path, snapshots = walk
    assert len(snapshots) == 64
    for snapshot in snapshots:
        state = snapshot.read()
        exact = profile(snapshot.relative_length, snapshot.step) @ path
        np.testing.assert_allclose(state["weight"].numpy(), exact, atol=1e-12)
        assert state["count"] == snapshot.step


@pytest.mark.parametrize(
    ("length", "error"), [(0.02, 4.0e-2), (0.03, 1.1e-2), (0.07, 9.8e-4), (0.15, 2.3e-3), (0.2, 6.5e-3), (0.25, 3.4e-2)]
)
def test_reconstruction_is_as_close_as_it_says(length: float, error: float, walk: tuple[Array, list[Snapshot]]) -> None:
    path, snapshots = walk
    weights, claimed = reconstruction_weights(
        [s.step for s in snapshots], [s.relative_length for s in snapshots], relative_length=length, step=NUM_STEPS
    )
    given = weights @ np.stack([profile(s.relative_length, s.step) for s in snapshots])
    wanted = profile(length, NUM_STEPS)
    assert np.linalg.norm(given - wanted) / np.linalg.norm(wanted) == pytest.approx(claimed, rel=0.03)
    assert claimed == pytest.approx(error, rel=0.05)
    assert weights.sum() == pytest.approx(1, abs=1e-11)

    state = reconstruct(snapshots, length, NUM_STEPS)
    off = state["weight"].numpy() - wanted @ path
    # White noise: the standard deviation of Σ Δp(s) n(s) is ‖Δp‖. A walk of unit deviation, being smooth, fares better.
    assert np.sqrt((off[16:32] ** 2).mean()) < 2 * claimed * np.linalg.norm(wanted)
    assert np.abs(off[:16]).max() < 0.25 * claimed
    np.testing.assert_allclose(off[32:], 0, atol=1e-12)


def test_reconstruction_at_an_earlier_step(walk: tuple[Array, list[Snapshot]]) -> None:
    path, snapshots = walk
    off = reconstruct(snapshots, 0.12, NUM_STEPS // 2)["weight"].numpy() - profile(0.12, NUM_STEPS // 2) @ path
    assert np.abs(off[:16]).max() < 1e-3
    # No snapshot ends where this profile does, so it can't be met as well; and that is said.
    step = 3 * NUM_STEPS // 4 + 20
    with pytest.raises(ConfigError, match=r"error of 0\.21, more than max_error=0\.1; ask for a step that has a snap"):
        reconstruct(snapshots, 0.12, step)
    off = reconstruct(snapshots, 0.12, step, max_error=0.25)["weight"].numpy() - profile(0.12, step) @ path
    assert np.abs(off[:16]).max() < 2e-2
    np.testing.assert_allclose(off[32:], 0, atol=1e-12)


def test_more_snapshots_come_closer() -> None:
    errors = []
    for count in (8, 16, 32, 64, 128):
        steps = np.repeat(np.arange(1, count + 1), 2).tolist()
        errors.append(reconstruction_weights(steps, [0.05, 0.10] * count, relative_length=0.15, step=count)[1])
    # Twice as many snapshots: a quarter of the error.
    assert np.array(errors[:-1]) / np.array(errors[1:]) == pytest.approx(4, rel=0.1)
    assert errors[0] == pytest.approx(3.3e-2, rel=0.05)
    assert errors[-1] == pytest.approx(1.4e-4, rel=0.05)


@pytest.mark.parametrize("length", [0.05, 0.10])
@pytest.mark.parametrize("step", [64, 1024, NUM_STEPS])
def test_reconstruction_of_what_is_stored_is_what_is_stored(
    length: float, step: int, walk: tuple[Array, list[Snapshot]]
) -> None:
    _, snapshots = walk
    (stored,) = [s for s in snapshots if (s.step, s.relative_length) == (step, length)]
    state = reconstruct(snapshots, length, step)
    assert torch.equal(state["weight"], stored.read()["weight"])
    # The least squares find it as well, without being told.
    weights, error = reconstruction_weights(
        [s.step for s in snapshots if s.step <= step],
        [s.relative_length for s in snapshots if s.step <= step],
        relative_length=length,
        step=step,
    )
    index = [(s.step, s.relative_length) for s in snapshots].index((step, length))
    np.testing.assert_allclose(weights, np.eye(len(weights))[index], atol=1e-10)
    assert error < 1e-6


@pytest.mark.parametrize("power", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [0.05, 0.08, 0.2])
def test_powers_of_time_have_the_closed_average(power: int, length: float) -> None:
    t = np.arange(1, NUM_STEPS + 1) / NUM_STEPS
    path = np.stack([t**power], axis=1)
    gamma = power_exponent(length)
    closed = (gamma + 1) / (gamma + power + 1)  # ∫ (gamma + 1) t^gamma t^power over [0, 1]
    network = Numbers(path[0])
    ema = PowerEma(network, relative_length=length)
    for step, values in enumerate(path, start=1):
        network.set(values, step)
        ema.update(network, step)
    assert ema.state_dict()["weight"].item() == pytest.approx(closed, abs=power / NUM_STEPS + 1e-12)
    made = reconstruct(tracked(path, every=NUM_STEPS // 32), length, NUM_STEPS)["weight"].item()
    assert made == pytest.approx(ema.state_dict()["weight"].item(), abs=2e-4)


def test_one_stored_length_is_enough_near_it() -> None:
    path = trajectories()
    snapshots = tracked(path, every=NUM_STEPS // 64, lengths=(0.10,))
    made = reconstruct(snapshots, 0.09, NUM_STEPS)["weight"].numpy()
    assert np.abs(made - profile(0.09, NUM_STEPS) @ path)[:16].max() < 2e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda snapshots: ([], 0.1, 10), "there are no snapshots to make an average from"),
        (
            lambda snapshots: (snapshots, 0.1, NUM_STEPS + 1),
            "step=2049 must be between 1 and the last snapshot's, 2048",
        ),
        (lambda snapshots: (snapshots, 0.1, 0), "step=0 must be between 1"),
        (lambda snapshots: (snapshots, 0.3, NUM_STEPS), r"relative_length=0\.3 must be between 0 and 0\.28"),
        (lambda snapshots: (snapshots, 0.0, NUM_STEPS), r"relative_length=0\.0 must be between"),
        (
            lambda snapshots: (snapshots, 0.005, NUM_STEPS),
            r"64 snapshots of the lengths \[0\.05, 0\.1\] up to step 2048 .* error of 0\.\d+, more than max_error=0\.1",
        ),
    ],
)
def test_impossible_reconstructions_are_refused(
    change: Callable[[list[Snapshot]], tuple[list[Snapshot], float, int]],
    message: str,
    walk: tuple[Array, list[Snapshot]],
) -> None:
    with pytest.raises(ConfigError, match=message):
        reconstruct(*change(walk[1]))


def test_snapshots_are_read_one_by_one_and_only_where_they_count() -> None:
    live: list[int] = []
    most = 0

    def read(index: int) -> dict[str, torch.Tensor]:
        nonlocal most
        live.append(index)
        most = max(most, len(live))
        value = torch.full((4,), float(index))
        return _Counted(live, index, value)

    snapshots = [Snapshot(step, length, partial(read, step)) for step in range(1, 11) for length in (0.05, 0.10)]
    made = reconstruct([*snapshots, Snapshot(40, 0.1, lambda: pytest.fail("not needed"))], 0.08, 10)
    # A step's average is at its own height, so the result lies between.
    assert 5 < made["w"][0].item() < 11
    assert most <= 2


class _Counted(dict[str, torch.Tensor]):
    """Says when it is gone."""

    def __init__(self, live: list[int], index: int, value: torch.Tensor) -> None:
        super().__init__(w=value)
        self._live, self._index = live, index

    def __del__(self) -> None:
        self._live.remove(self._index)


def test_snapshots_of_different_networks_are_refused() -> None:
    snapshots = [Snapshot(step, 0.1, lambda: {"w": torch.zeros(2)}) for step in (1, 2)]
    odd = Snapshot(3, 0.1, lambda: {"w": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="the snapshot of step 3 is of another network than the others"):
        reconstruct([*snapshots, odd], 0.11, 3, max_error=1)


@pytest.mark.parametrize("warmup_steps", [0, 9])
def test_classic_ema_is_the_sum_over_all_steps(warmup_steps: int) -> None:
    rng = np.random.default_rng(0)
    initial, path = rng.normal(size=3), rng.normal(size=(200, 3))
    network = Numbers(initial)
    ema = ClassicEma(network, decay=0.95, warmup_steps=warmup_steps)
    for step, values in enumerate(path, start=1):
        network.set(values, step)
        ema.update(network, step)
    kept = [min(0.95, s / (s + warmup_steps)) for s in range(1, 201)]
    shares = [(1 - keep) * math.prod(kept[s + 1 :]) for s, keep in enumerate(kept)]
    expected = math.prod(kept) * initial + np.array(shares) @ path
    np.testing.assert_allclose(ema.state_dict()["weight"].numpy(), expected, atol=1e-13)
    if warmup_steps:
        # The first steps are a power-function average: those of s^8, and next to nothing of the initial weights.
        assert math.prod(kept[:100]) < 1e-11
    assert ema.state_dict()["count"] == 200


@pytest.mark.parametrize(("decay", "warmup_steps"), [(1.0, 0), (0.0, 0), (0.9, -1)])
def test_classic_ema_refuses_what_is_no_average(decay: float, warmup_steps: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        ClassicEma(Numbers(np.zeros(1)), decay=decay, warmup_steps=warmup_steps)


@pytest.mark.parametrize(
    "make",
    [
        lambda network: PowerEma(network, relative_length=0.1),
        lambda network: ClassicEma(network, decay=0.9, warmup_steps=5),
        lambda network: PowerEmaTracker(network),
    ],
)
def test_interrupted_average_goes_on_exactly(make: Callable[[torch.nn.Module], PowerEma]) -> None:
    path = trajectories()[:60]
    network = Numbers(path[0])
    whole, first = make(network), make(network)
    for step, values in enumerate(path, start=1):
        network.set(values, step)
        whole.update(network, step)
        if step <= 30:
            first.update(network, step)
    stored = {key: value.clone() for key, value in first.state_dict().items()}
    second = make(Numbers(np.zeros(40)))
    second.load_state_dict(stored)
    for step, values in enumerate(path[30:], start=31):
        network.set(values, step)
        second.update(network, step)
    assert second.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in second.state_dict().items())
    stored.popitem()
    with pytest.raises(ValueError, match="1 keys differ"):
        second.load_state_dict(stored)


def test_low_precision_weights_are_averaged_in_float32() -> None:
    network = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    ema = PowerEma(network, relative_length=0.1)
    for step in range(1, 301):
        torch.nn.init.constant_(network.weight, 1 + (step % 2) / 128)
        ema.update(network, step)
    average = ema.state_dict()["weight"]
    assert average.dtype is torch.float32
    shares = profile(0.1, 300, 300)
    assert average.item() == pytest.approx(1 + shares[::2].sum() / 128, abs=1e-6)


def test_tracker_wants_different_lengths() -> None:
    for lengths in ((), (0.1, 0.1)):
        with pytest.raises(ConfigError, match="one or more different lengths"):
            PowerEmaTracker(Numbers(np.zeros(1)), relative_lengths=lengths)
