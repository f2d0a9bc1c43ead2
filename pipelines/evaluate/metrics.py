"""Distances between two sets of feature vectors. N rows of D features each; computed in float64."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating]

_JACKKNIFE_GROUPS = 16
_Z_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float


def frechet_distance(features: Features, reference: Features) -> float:
    """Returns the squared Fréchet distance between the normal distributions fitted to two sets.

        |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^½          (Heusel et al. 2017, "FID", equation 6)

    With the centred features X, S = XᵀX / (n - 1), and tr (S1 S2)^½ is the sum of the singular values of X1 X2ᵀ over
    √((n1 - 1)(n2 - 1)). So no matrix root is taken, which is exact where n < D makes S singular.

    Raises:
        ValueError: A set has fewer than two rows, or the sets differ in D.
    """
    return _frechet(_Moments.of(features), _Moments.of(reference))


def frechet_estimate(features: Features, reference: Features, *, seed: int) -> Estimate:
    """Returns the Fréchet distance with an interval for the draw of `features` (not for that of `reference`).

    The standard error is the grouped jackknife's: the distance is taken again without each of 16 random groups. A
    bootstrap would be wrong here: repeated rows shrink S1.
    """
    fitted = _Moments.of(reference)
    value = _frechet(_Moments.of(features), fitted)
    order = np.random.default_rng(seed).permutation(len(features))
    groups = np.array_split(order, min(_JACKKNIFE_GROUPS, len(features) // 2))
    if len(groups) < 2:
        return Estimate(value, -np.inf, np.inf)
    without = np.array([_frechet(_Moments.of(np.delete(features, group, axis=0)), fitted) for group in groups])
    error = np.sqrt((len(groups) - 1) / len(groups) * np.sum((without - without.mean()) ** 2))
    return Estimate(value, value - _Z_95 * float(error), value + _Z_95 * float(error))


def kernel_distance(
    features: Features, reference: Features, *, seed: int, num_subsets: int = 100, subset_size: int = 100
) -> Estimate:
    """Returns the kernel distance, KID: the mean over random subsets of the unbiased squared MMD.

    The kernel is (x·y / D + 1)³ (Bińkowski et al. 2018, "Demystifying MMD GANs", section 4). The interval holds 95 % of
    the subsets' values.
    """
    size = min(subset_size, len(features), len(reference))
    rng = np.random.default_rng(seed)
    values = [
        squared_mmd(
            features[rng.choice(len(features), size, replace=False)],
            reference[rng.choice(len(reference), size, replace=False)],
        )
        for _ in range(num_subsets)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(np.mean(values)), float(low), float(high))


def squared_mmd(x: Features, y: Features) -> float:
    """Returns the unbiased squared maximum mean discrepancy under KID's kernel; it can be below 0."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def kernel(a: Features, b: Features) -> NDArray[np.float64]:
        similarity: NDArray[np.float64] = (a @ b.T / a.shape[1] + 1) ** 3
        return similarity

    def mean_off_diagonal(values: NDArray[np.float64]) -> float:
        count = len(values)
        return float((values.sum() - np.trace(values)) / (count * (count - 1)))

    return mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * float(kernel(x, y).mean())


@dataclass(frozen=True)
class _Moments:
    """Mean of a set, and a root R of its covariance: S = RᵀR, R having D columns."""

    mean: NDArray[np.float64]
    root: NDArray[np.float64]

    @classmethod
    def of(cls, features: Features) -> "_Moments":
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"got features of shape {features.shape}, wanted (N, D) with N of 2 or more")
        centred = np.asarray(features, np.float64)
        mean = centred.mean(axis=0)
        centred = (centred - mean) / np.sqrt(len(centred) - 1)
        if len(centred) > 2 * centred.shape[1]:
            # The triangle of a QR has the singular values of what it came from, and D rows whatever N is.
            centred = np.asarray(np.linalg.qr(centred, mode="r"))
        return cls(mean, centred)


def _frechet(one: _Moments, other: _Moments) -> float:
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"got features of width {len(one.mean)} and {len(other.mean)}, wanted the same")
    between = np.sum((one.mean - other.mean) ** 2)
    overlap = np.linalg.svd(one.root @ other.root.T, compute_uv=False).sum()
    return float(between + np.sum(one.root**2) + np.sum(other.root**2) - 2 * overlap)
