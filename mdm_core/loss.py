"""The training objective: one loss over all resolutions.

Legend: B rows of the batch, R resolutions (finest first), r side of a resolution in pixels, N noise levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mdm_core.parameterization import PredictionType, add_noise, check_prediction_type, prediction_target

LossWeighting = Literal["eps", "v", "x0", "min_snr"]


@dataclass(frozen=True)
class TrainingPairs:
    """What a network is given and what it should answer, one entry a resolution."""

    x_t: list[Tensor]
    """(B, 3, r, r) noised pictures."""
    targets: list[Tensor]
    """(B, 3, r, r)."""
    alpha_bar: list[Tensor]
    """(B, 1, 1, 1) signal power."""


def training_pairs(
    x0: Sequence[Tensor],
    eps: Sequence[Tensor],
    timestep: Tensor,
    *,
    alpha_bars: Tensor,
    divisors: Sequence[float] | None = None,
    prediction_type: PredictionType = "v",
) -> TrainingPairs:
    """Noised pictures and targets at every resolution.

    Args:
        x0: One (B, 3, r, r) in [-1, 1] a resolution, finest first; a finer one may have only the first rows.
        eps: Standard normal noise, likewise.
        timestep: (B,) int in [0, N).
        alpha_bars: (R, N + 1), as `NoiseSchedule.alpha_bars` gives them.
        divisors: What each resolution's pictures are divided by (`NoiseSchedule.signal_divisors`); None is 1.
        prediction_type: What the network outputs.

    Raises:
        ValueError: If there is no such prediction type.
    """
    check_prediction_type(prediction_type)
    signals = [row[timestep[: len(x)] + 1][:, None, None, None] for row, x in zip(alpha_bars, x0, strict=True)]
    scaled = list(x0) if divisors is None else [x / d for x, d in zip(x0, divisors, strict=True)]
    triples = list(zip(scaled, eps, signals, strict=True))
    return TrainingPairs(
        [add_noise(*triple) for triple in triples],
        [prediction_target(*triple, prediction_type) for triple in triples],
        signals,
    )


def matryoshka_loss(
    targets: Sequence[Tensor],
    outputs: Sequence[Tensor],
    alpha_bar: Sequence[Tensor],
    *,
    resolution_weights: Sequence[float],
    prediction_type: PredictionType = "v",
    weighting: LossWeighting = "eps",
    min_snr_gamma: float = 5.0,
    row_shares: Sequence[float] | None = None,
) -> Tensor:
    """The weighted squared error of each resolution and each row (arXiv 2310.15111, equation 5).

    A finer resolution may have fewer rows than the coarsest: the first ones of the batch. Each of its rows then
    counts for more, so that the mean over B is the mean over the rows that the resolution has.

    Args:
        targets: What the network should answer (see `prediction_target`), one (B, 3, r, r) a resolution, finest first.
        outputs: What it answered, likewise.
        alpha_bar: One (B, 1, 1, 1) a resolution: signal power at each row's timestep.
        resolution_weights: One a resolution, finest first.
        prediction_type: What the network outputs.
        weighting: The quantity whose plain squared error is meant: `eps`, the published one, `v` or `x0`; or
            `min_snr`, the error of x0 times min(SNR, gamma) (arXiv 2303.09556, section 3.4).
        min_snr_gamma: That gamma.
        row_shares: For a batch that several workers or accumulation steps share unevenly: the part of all its rows
            that each resolution has, in (0, 1]. None takes the parts of the rows given here.

    Returns:
        (R, B) float32: means over pixels and channels, 0 for rows that a resolution lacks. The loss is their sum over
        R, averaged over B.

    Raises:
        ValueError: If the lists differ in length, a resolution has more rows than the coarsest, or a name is unknown.
    """
    check_prediction_type(prediction_type)
    if weighting not in get_args(LossWeighting):
        raise ValueError(f"weighting={weighting!r} is unknown; use one of {list(get_args(LossWeighting))}")
    lengths = {len(each) for each in (targets, outputs, alpha_bar, resolution_weights, row_shares or targets)}
    if len(lengths) != 1:
        raise ValueError(f"targets, outputs, alpha_bar and weights must have one entry a resolution, got {lengths}")
    batch = outputs[-1].shape[0]
    rows = torch.zeros(len(outputs), batch, device=outputs[-1].device)
    for r, (target, output, signal) in enumerate(zip(targets, outputs, alpha_bar, strict=True)):
        present = output.shape[0]
        if not 0 < present <= batch:
            raise ValueError(f"resolution {r} has {present} rows; wanted 1 to {batch}, the rows of the coarsest")
        error = (target[:present].float() - output.float()).square().mean(dim=(1, 2, 3))
        factor = error_factor(signal[:present].flatten(), prediction_type, weighting, min_snr_gamma)
        share = present / batch if row_shares is None else row_shares[r]
        rows[r, :present] = error * resolution_weights[r] * factor / share
    return rows


def error_factor(
    alpha_bar: Tensor, prediction_type: PredictionType, weighting: LossWeighting, min_snr_gamma: float = 5.0
) -> Tensor:
    """What turns the squared error of a network's output into the one that `weighting` means.

    The errors differ by factors of the noise level only: with a = alpha_bar, ‖Δeps‖² = a · ‖Δv‖² and
    ‖Δx0‖² = (1 − a) · ‖Δv‖². Multiplying is stable in low precision, where converting the pictures first would divide
    by small numbers.

    Args:
        alpha_bar: (B,) in (0, 1).
        prediction_type: What the network outputs.
        weighting: See `matryoshka_loss`.
        min_snr_gamma: See `matryoshka_loss`.

    Returns:
        (B,).
    """
    if weighting == prediction_type:
        return torch.ones_like(alpha_bar)
    noise = 1 - alpha_bar
    parts_of_v = {"v": torch.ones_like(alpha_bar), "eps": alpha_bar, "x0": noise}
    if weighting == "min_snr":
        snr = alpha_bar / noise
        return snr.clamp(max=min_snr_gamma) * noise / parts_of_v[prediction_type]
    return parts_of_v[weighting] / parts_of_v[prediction_type]


def vdm_weights(alpha_bar: Tensor) -> Tensor:
    """How much each noise level counts in the variational bound (arXiv 2107.00630, equation 14).

    Args:
        alpha_bar: (N + 1,) float32 from `NoiseSchedule.alpha_bar`, N at least 2. Computed in its precision: the
            published weights carry the rounding of float32, up to 8e-4 of their size.

    Returns:
        (N + 1,): SNR before ÷ SNR at the level, minus 1. Entries 0 and 1, where it is infinite, repeat entry 2.
    """
    before, now = alpha_bar[1:-1], alpha_bar[2:]
    ratio = before * (1 - now) / (1 - before) / now - 1
    return torch.cat([ratio[:1], ratio[:1], ratio])


def weighted_mean(rows: Tensor, row_weights: Tensor) -> Tensor:
    """The loss of (R, B) `rows` when each of the B rows counts by its weight: (B,), not all 0."""
    return (rows.sum(dim=0) * row_weights).sum() / row_weights.sum()
