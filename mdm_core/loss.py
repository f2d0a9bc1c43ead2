"""The training objective: one loss over all resolutions."""

from typing import Literal

import torch
from torch import Tensor

LossWeighting = Literal["eps", "v"]


def matryoshka_loss(
    v: list[Tensor],
    v_hat: list[Tensor],
    alpha_bar: list[Tensor],
    *,
    resolution_weights: tuple[float, ...],
    weighting: LossWeighting = "eps",
) -> Tensor:
    """The weighted squared error of each resolution and each row (arXiv 2310.15111, equation 5).

    Args:
        v: Targets, one (B, 3, r, r) a resolution, finest first.
        v_hat: Predictions, likewise.
        alpha_bar: One (B, 1, 1, 1) a resolution: signal power at each row's timestep.
        resolution_weights: One a resolution, finest first.
        weighting: `eps` multiplies the error of v by alpha_bar, which makes it the error of the noise, the published
            target, without its division by a small number; `v` leaves it as it is.

    Returns:
        (R, B) float32: means over pixels and channels. The loss is their sum over R, averaged over B.
    """
    rows = []
    for target, prediction, signal, weight in zip(v, v_hat, alpha_bar, resolution_weights, strict=True):
        error = (target.float() - prediction.float()).square().mean(dim=(1, 2, 3)) * weight
        rows.append(error * signal.flatten() if weighting == "eps" else error)
    return torch.stack(rows)
