"""Distances between feature sets, against torchmetrics, scipy's matrix root and hand values."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from pipelines.evaluate.metrics import frechet_distance, frechet_estimate, kernel_distance, squared_mmd

Features = NDArray[np.float64]


def draw(count: int, width: int, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) * scale + shift


class Passthrough(torch.nn.Module):
    """Stands where torchmetrics has its Inception: what it is given are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def torchmetrics_fid(x: Features, y: Features) -> float:
    metric = FrechetInceptionDistance(feature=Passthrough(x.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=False)
    metric.update(torch.from_numpy(y), real=True)
    return float(metric.compute())


@pytest.mark.parametrize(("count", "reference"), [(300, 500), (12, 500), (300, 12), (12, 20)])
def test_frechet_equals_torchmetrics_with_more_and_fewer_rows_than_columns(count: int, reference: int) -> None:
    x, y = draw(count, 24, seed=1), draw(reference, 24, seed=2, shift=0.5, scale=1.3)
    assert frechet_distance(x, y) == pytest.approx(torchmetrics_fid(x, y), rel=1e-6)


def test_frechet_of_two_normals_in_one_dimension_is_the_closed_form() -> None:
    x, y = draw(200, 1, seed=1), draw(300, 1, seed=2, shift=3.0)
    wanted = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-10)


def test_frechet_of_a_set_and_itself_moved_is_the_square_of_the_move() -> None:
    x = draw(50, 8, seed=1)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x + 2.0, x) == pytest.approx(8 * 2.0**2, rel=1e-10)
    assert frechet_distance(x.astype(np.float32), x) == pytest.approx(0, abs=1e-4)


def test_the_jackknife_s_interval_holds_the_spread_of_fresh_draws() -> None:
    width = 6
    mixing = np.random.default_rng(0).standard_normal((width, width))
    reference = np.random.default_rng(1).standard_normal((4000, width)) @ mixing
    draws = [np.random.default_rng(10 + i).standard_normal((250, width)) @ mixing + 1.0 for i in range(60)]
    values = np.array([frechet_distance(x, reference) for x in draws])
    errors = [(e.high - e.value) / 1.96 for e in (frechet_estimate(x, reference, seed=0) for x in draws[:20])]
    assert frechet_estimate(draws[0], reference, seed=0).value == values[0]
    assert np.mean(errors) == pytest.approx(values.std(ddof=1), rel=0.35)


def test_an_interval_is_the_same_for_the_same_seed() -> None:
    x, y = draw(64, 5, seed=1), draw(200, 5, seed=2)
    assert frechet_estimate(x, y, seed=3) == frechet_estimate(x, y, seed=3)
    assert frechet_estimate(x, y, seed=3) != frechet_estimate(x, y, seed=4)
    assert kernel_distance(x, y, seed=3) == kernel_distance(x, y, seed=3)
    assert kernel_distance(x, y, seed=3) != kernel_distance(x, y, seed=4)


def test_squared_mmd_equals_torchmetrics() -> None:
    x, y = draw(80, 10, seed=1), draw(80, 10, seed=2, shift=0.3)
    assert squared_mmd(x, y) == pytest.approx(float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-9)


def test_squared_mmd_of_a_few_numbers_is_the_hand_value() -> None:
    # One column: k(a, b) = (a b + 1)³. x = (0, 1): k = 1; y = (1, 2): k = 27; across: k(0, ·) = 1, k(1, ·) = 8, 27.
    x, y = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    assert squared_mmd(x, y) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kernel_distance_of_whole_sets_is_the_squared_mmd_and_its_interval_a_point() -> None:
    x, y = draw(40, 6, seed=1), draw(40, 6, seed=2, shift=1.0)
    estimate = kernel_distance(x, y, seed=0, num_subsets=5, subset_size=1000)
    assert estimate.value == pytest.approx(squared_mmd(x, y), rel=1e-12)
    assert estimate.low == pytest.approx(estimate.high, rel=1e-12)


def test_kernel_distance_is_near_nothing_between_draws_of_the_same() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, 16)), rng.standard_normal((400, 16))
    same, moved = kernel_distance(x, y, seed=0), kernel_distance(x + 0.5, y, seed=0)
    assert same.low < 0 < same.high
    assert same.low < same.value < same.high
    assert moved.low > same.high


def test_sets_that_can_t_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got features of width 3 and 4"):
        frechet_distance(draw(9, 3, seed=0), draw(9, 4, seed=0))
    with pytest.raises(ValueError, match=r"got features of shape \(1, 3\), wanted \(N, D\) with N of 2 or more"):
        frechet_distance(draw(1, 3, seed=0), draw(9, 3, seed=0))
