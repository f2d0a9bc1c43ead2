"""Pictures made from pictures: finer, filled in, or changed.

Each function goes down the noise levels as `sample` does. What must stay is put into every estimate of the clean
pictures, so that at every level `x_t` has it at the right noise, and the end has it exactly.

Legend: B pictures, R resolutions (finest first), r side of a resolution in pixels.
"""

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from mdm_core.conditioning import Condition
from mdm_core.denoiser import Diffusion
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import add_noise
from mdm_core.pyramid import build_pyramid
from mdm_core.samplers import SamplerRun, Sampling, Stepping


def upscale(
    diffusion: Diffusion,
    low: Tensor,
    noise: list[Tensor],
    *,
    sampling: Sampling,
    condition: Condition | None = None,
    **stepping: Unpack[Stepping],
) -> list[Tensor]:
    """Finer versions of a picture: average-pooled, each gives it back.

    Args:
        diffusion: See `sample`.
        low: (B, 3, r, r) in [-1, 1], r any of the network's resolutions but the finest.
        noise: See `sample`; at every resolution.
        sampling: See `sample`.
        condition: See `sample`.
        **stepping: `generator`, `step_noise` and `on_step` of `sample`; `repeats` of `inpaint`.

    Returns:
        One (B, 3, r, r) in [-1, 1] a resolution, finest first. From r on they are `low` and its averages.

    Raises:
        ValueError: If `low` has the side of no coarser resolution.
    """
    resolutions = _resolutions(noise)
    if low.shape != (noise[0].shape[0], 3, low.shape[-1], low.shape[-1]) or low.shape[-1] not in resolutions[1:]:
        raise ValueError(
            f"low is {tuple(low.shape)}; wanted ({noise[0].shape[0]}, 3, r, r) with r one of {list(resolutions[1:])}"
        )
    known = build_pyramid(low, tuple(side for side in resolutions if side <= low.shape[-1]))
    finer = len(resolutions) - len(known)

    def project(x0: list[Tensor]) -> list[Tensor]:
        return [_with_averages(x, low) for x in x0[:finer]] + known

    run = SamplerRun(diffusion, noise, sampling=sampling, condition=condition, project=project)
    everywhere = [torch.ones_like(x[:, :1], dtype=torch.bool) for x in known]
    x_t = noise[:finer] + _held(run, noise, known, everywhere, finer)
    x0 = run.denoise(x_t, **stepping)
    return [_within_range(x, low) for x in x0[:finer]] + known


def inpaint(
    diffusion: Diffusion,
    image: Tensor,
    mask: Tensor,
    noise: list[Tensor],
    *,
    sampling: Sampling,
    condition: Condition | None = None,
    **stepping: Unpack[Stepping],
) -> list[Tensor]:
    """A picture with a region made anew; the rest comes back exactly.

    Args:
        diffusion: See `sample`.
        image: (B, 3, r, r) in [-1, 1] at the finest resolution; its values in the region don't matter.
        mask: (B, 1, r, r) bool, True = make anew. At a coarser resolution a pixel is kept where all under it is.
        noise: See `sample`.
        sampling: See `sample`.
        condition: See `sample`.
        **stepping: `generator`, `step_noise` and `on_step` of `sample`, and `repeats`: how often each step is made,
            going back in between, which fits the region to the rest (arXiv 2201.09865, algorithm 1; 10 there).

    Returns:
        One (B, 3, r, r) in [-1, 1] a resolution, finest first; what is kept of a coarser one is the average.

    Raises:
        ValueError: If the shapes don't fit.
    """
    resolutions = _resolutions(noise)
    if mask.shape != (noise[0].shape[0], 1, *noise[0].shape[2:]) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is {tuple(mask.shape)} {mask.dtype}; wanted {(noise[0].shape[0], 1, *noise[0].shape[2:])} bool"
        )
    _check_image(image, noise)
    known = build_pyramid(torch.where(mask, 0.0, image), resolutions)
    kept = [~F.max_pool2d(mask.float(), resolutions[0] // side).bool() for side in resolutions]

    def project(x0: list[Tensor]) -> list[Tensor]:
        return [torch.where(keep, k, x) for keep, k, x in zip(kept, known, x0, strict=True)]

    run = SamplerRun(diffusion, noise, sampling=sampling, condition=condition, project=project)
    x0 = run.denoise(_held(run, noise, known, kept), **stepping)
    return project([x.clamp(-1, 1) for x in x0])


def image_to_image(
    diffusion: Diffusion,
    image: Tensor,
    noise: list[Tensor],
    *,
    strength: float,
    sampling: Sampling,
    condition: Condition | None = None,
    **stepping: Unpack[Stepping],
) -> list[Tensor]:
    """A picture changed: noised part of the way, and denoised again (arXiv 2108.01073, section 3).

    Args:
        diffusion: See `sample`.
        image: (B, 3, r, r) in [-1, 1] at the finest resolution.
        noise: See `sample`.
        strength: t in (0, 1] at which it begins: near 0 the picture comes back, 1 keeps of it what the schedule leaves
            at its noisiest level, next to nothing with most. All of `num_inference_steps` are made from there.
        sampling: See `sample`.
        condition: See `sample`.
        **stepping: `generator`, `step_noise` and `on_step` of `sample`; `repeats` of `inpaint`.

    Returns:
        One (B, 3, r, r) in [-1, 1] a resolution, finest first.

    Raises:
        ValueError: If the strength is out of range, or leaves fewer noise levels than steps.
    """
    run = SamplerRun(
        diffusion, noise, sampling=sampling, condition=condition, start=first_level(strength, diffusion.schedule)
    )
    _check_image(image, noise)
    pictures = build_pyramid(image, _resolutions(noise))
    x_t = _held(run, noise, pictures, [torch.ones_like(x[:, :1], dtype=torch.bool) for x in pictures])
    x0 = run.denoise(x_t, **stepping)
    return [x.clamp(-1, 1) for x in x0]


def first_level(strength: float, schedule: NoiseSchedule) -> int:
    """The noise level at which `image_to_image` begins.

    Raises:
        ValueError: If the strength is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be above 0 (the picture itself) and at most 1 (all noise)")
    return max(1, round(strength * schedule.num_timesteps))


def _resolutions(noise: list[Tensor]) -> tuple[int, ...]:
    return tuple(x.shape[-1] for x in noise)


def _check_image(image: Tensor, noise: list[Tensor]) -> None:
    if image.shape != noise[0].shape:
        raise ValueError(f"image is {tuple(image.shape)}; wanted {tuple(noise[0].shape)}, as the finest noise is")


def _held(
    run: SamplerRun, noise: list[Tensor], known: list[Tensor], kept: list[Tensor], first: int = 0
) -> list[Tensor]:
    """What a run begins with, from resolution `first` on: known pixels at its first noise level, noise elsewhere."""
    begun = []
    for r, (picture, keep) in enumerate(zip(known, kept, strict=True), start=first):
        noised = add_noise(picture / run.divisors[r], noise[r], run.signals[r, 0])
        begun.append(torch.where(keep, noised, noise[r]))
    return begun


def _with_averages(x0: Tensor, low: Tensor) -> Tensor:
    """The picture nearest to `x0` whose blocks have `low` as their averages (a shift of each block)."""
    factor = x0.shape[-1] // low.shape[-1]
    return x0 + F.interpolate(low - F.avg_pool2d(x0, factor), scale_factor=factor, mode="nearest")


def _within_range(x0: Tensor, low: Tensor) -> Tensor:
    """`x0` with blocks whose averages are `low`, drawn towards these until all values are in [-1, 1]."""
    factor = x0.shape[-1] // low.shape[-1]
    room_above = (1 - low) / (F.max_pool2d(x0, factor) - low).clamp(min=1e-12)
    room_below = (low + 1) / (low + F.max_pool2d(-x0, factor)).clamp(min=1e-12)
    part = torch.minimum(room_above, room_below).clamp(0, 1)
    average, part = (F.interpolate(x, scale_factor=factor, mode="nearest") for x in (low, part))
    return average + part * (x0 - average)
