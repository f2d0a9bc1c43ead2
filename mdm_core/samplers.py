"""Pictures from noise, at all resolutions jointly.

Legend: B pictures, R resolutions (finest first), N noise levels, L text tokens, D width of the text.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mdm_core.parameterization import add_noise, eps_from_x0, x0_from_v
from mdm_core.unet import UNet

Solver = Literal["ddim", "dpmpp_2m"]


@torch.no_grad()
def sample(
    network: UNet,
    noise: list[Tensor],
    *,
    alpha_bars: Tensor,
    num_inference_steps: int,
    text_emb: Tensor | None = None,
    text_mask: Tensor | None = None,
    guidance_scale: float = 1.0,
    solver: Solver = "dpmpp_2m",
    on_step: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Denoises every resolution together, from timestep N − 1 down.

    Args:
        network: Predicts v; called once a step, on 2B rows when guided.
        noise: One (B, 3, r, r) a resolution, standard normal.
        alpha_bars: (R, N + 1), as `NoiseSchedule.alpha_bars` gives them.
        num_inference_steps: Network calls, from 1 to N, spaced evenly from the noisiest timestep ("trailing",
            arXiv 2305.08891, section 3.3).
        text_emb: (B, L, D) token embeddings; None samples without text.
        text_mask: (B, L) bool, True = real token.
        guidance_scale: w of classifier-free guidance (arXiv 2207.12598): x0_none + w · (x0_text − x0_none); 1 is off.
        solver: `ddim` (arXiv 2010.02502, equation 12, eta 0) or `dpmpp_2m` (arXiv 2211.01095, algorithm 2).
        on_step: Called with (steps done, steps in all).

    Returns:
        One (B, 3, r, r) in [-1, 1] a resolution, finest first.
    """
    levels = alpha_bars.shape[1] - 1
    if not 1 <= num_inference_steps <= levels:
        raise ValueError(f"num_inference_steps={num_inference_steps} must be between 1 and {levels}")
    entries = [round(levels * (1 - i / num_inference_steps)) for i in range(num_inference_steps + 1)]
    signals = alpha_bars[:, entries, None, None, None, None].to(noise[0])  # (R, steps + 1, 1, 1, 1, 1)
    x_t, last_x0 = list(noise), None
    for i in range(num_inference_steps):
        x0 = _predict_x0(network, x_t, signals[:, i], entries[i] - 1, text_emb, text_mask, guidance_scale)
        for r, (now, then) in enumerate(zip(signals[:, i], signals[:, i + 1], strict=True)):
            estimate = x0[r]
            if solver == "dpmpp_2m" and last_x0 is not None and entries[i + 1] > 0:
                estimate = _extrapolate(x0[r], last_x0[r], *signals[r, i - 1 : i + 2])
            x_t[r] = add_noise(estimate, eps_from_x0(x_t[r], estimate, now), then)
        last_x0 = x0
        if on_step is not None:
            on_step(i + 1, num_inference_steps)
    return x_t


def _predict_x0(
    network: UNet,
    x_t: list[Tensor],
    signals: Tensor,
    timestep: int,
    text_emb: Tensor | None,
    text_mask: Tensor | None,
    guidance_scale: float,
) -> list[Tensor]:
    """One (B, 3, r, r) in [-1, 1] a resolution: the guided estimate of the clean pictures."""
    rows = x_t[0].shape[0]
    guided = guidance_scale != 1.0 and text_emb is not None
    if guided:
        assert text_emb is not None
        mask = text_emb.new_ones(text_emb.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
        text_mask = torch.cat([mask, torch.zeros_like(mask)])  # a row without real tokens is unconditional
        text_emb = torch.cat([text_emb, text_emb])
        inputs = [torch.cat([x, x]) for x in x_t]
    else:
        inputs = x_t
    timesteps = torch.full((inputs[0].shape[0],), timestep, device=x_t[0].device)
    estimates = []
    for x, v, signal in zip(inputs, network(inputs, timesteps, text_emb, text_mask), signals, strict=True):
        x0 = x0_from_v(x, v, signal)
        if guided:
            x0 = torch.lerp(x0[rows:], x0[:rows], guidance_scale)
        estimates.append(x0.clamp(-1, 1))
    return estimates


def _extrapolate(x0: Tensor, last_x0: Tensor, before: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """The estimate at the middle of the next step, along the line through this one and the last.

    Args:
        x0: (B, 3, r, r), this step's estimate.
        last_x0: The previous step's.
        before: alpha_bar at the previous step.
        now: alpha_bar at this one.
        then: alpha_bar at the next, below 1.
    """
    log_snr = [torch.log(signal / (1 - signal)) for signal in (before, now, then)]
    ratio = (log_snr[2] - log_snr[1]) / (log_snr[1] - log_snr[0])
    return torch.lerp(last_x0, x0, 1 + ratio / 2)
