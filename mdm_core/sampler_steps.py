"""One step from a noise level to a less noisy one, and the estimates of the clean picture that steps aim at.

Legend: B pictures, r side of a resolution in pixels. alpha_bar broadcasts against pictures.
"""

import torch
from torch import Tensor

from mdm_core.parameterization import add_noise, eps_from_x0


def ddim_step(
    x_t: Tensor, x0: Tensor, now: Tensor, then: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """`x_t` at a less noisy level, were the clean pictures `x0` (arXiv 2010.02502, equation 12).

    Args:
        x_t: (B, 3, r, r) at alpha_bar `now`.
        x0: (B, 3, r, r).
        now: alpha_bar, broadcasting against pictures; below 1.
        then: alpha_bar after the step, above `now`.
        eta: Standard deviation of the noise, as a part of the ancestral sampler's.
        noise: (B, 3, r, r) standard normal; needed where eta is above 0.
    """
    eps = eps_from_x0(x_t, x0, now)
    if eta == 0 or noise is None:
        return add_noise(x0, eps, then)
    variance = eta**2 * posterior_variance(now, then)
    # With eta 1 rounding can leave less than 0 of what was 0.
    return then.sqrt() * x0 + (1 - then - variance).clamp(min=0).sqrt() * eps + variance.sqrt() * noise


def ddpm_step(x_t: Tensor, x0: Tensor, now: Tensor, then: Tensor, noise: Tensor) -> Tensor:
    """A draw of `x_t` at a less noisy level, given `x0` (arXiv 2006.11239, equation 7); arguments as for `ddim_step`.

    It is `ddim_step` with eta 1 but for rounding, which in float32 is up to 4e-5 either way: 1 − now ÷ then cancels
    between little noisy levels here, 1 − then − variance between very noisy ones there.
    """
    mean = ((1 - now / then) * then.sqrt() * x0 + (now / then).sqrt() * (1 - then) * x_t) / (1 - now)
    return mean + posterior_variance(now, then).sqrt() * noise


def posterior_variance(now: Tensor, then: Tensor) -> Tensor:
    """The variance of `x_t` at alpha_bar `then`, given it at `now` and x0 (arXiv 2006.11239, equation 7)."""
    return (1 - now / then) * (1 - then) / (1 - now)


def extrapolated(x0: Tensor, last_x0: Tensor, before: Tensor, now: Tensor, then: Tensor) -> Tensor:
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


def heun_corrected(x0: Tensor, x0_ahead: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """The estimate with which a plain step lands where Heun's averaged slope does.

    With x = x_t ÷ √alpha_bar and sigma = √((1 − alpha_bar) ÷ alpha_bar) the slope is (x − x0) ÷ sigma; averaging it
    over both ends of the step comes to moving towards x0 + (x0_ahead − x0) · sigma_now ÷ (2 · sigma_then).
    """
    weight = ((1 - now) / now * then / (1 - then)).sqrt() / 2
    return torch.lerp(x0, x0_ahead, weight)
