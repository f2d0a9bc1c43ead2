"""Pictures from noise, at all resolutions jointly.

Legend: B pictures, R resolutions (finest first), N noise levels, n steps, r side of a resolution in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor

from mdm_core.conditioning import Condition
from mdm_core.denoiser import Denoiser, Diffusion
from mdm_core.guidance import Guidance
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import add_noise
from mdm_core.sampler_steps import ddim_step, ddpm_step, extrapolated, heun_corrected
from mdm_core.thresholding import Threshold

Solver = Literal["ddpm", "ddim", "heun", "dpmpp_2m"]
Spacing = Literal["trailing", "reference"]

LARGEST_SIGMA = 80.0
"""Where `heun` begins at the innermost resolution (arXiv 2206.00364, table 1). Between the noisiest levels sigma falls
by orders of magnitude in a step, and its correction grows with that ratio."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are made from noise.

    Raises:
        ValueError: If fields are out of range or contradict each other.
    """

    num_inference_steps: int
    """n, from 1 to N. A step is one call of the network; two, but for the last, with `heun`."""
    solver: Solver = "dpmpp_2m"
    """`ddpm`, the ancestral sampler (arXiv 2006.11239, algorithm 2); `ddim` (arXiv 2010.02502, equation 12); `heun`
    without churn (arXiv 2206.00364, algorithm 1); `dpmpp_2m` (arXiv 2211.01095, algorithm 2)."""
    eta: float = 0.0
    """Noise of each step of `ddim`, in [0, 1]: 0 is deterministic, 1 is `ddpm`."""
    spacing: Spacing = "trailing"
    """Which noise levels are visited: `trailing` begins at N, the noisiest (arXiv 2305.08891, section 3.3);
    `reference`, the published code's, begins lower (at 801 of 1,000 with 4 steps)."""
    guidance: Guidance = field(default_factory=Guidance)
    """Classifier-free guidance."""
    threshold: Threshold = field(default_factory=Threshold)
    """What keeps the estimates in [-1, 1]."""

    def __post_init__(self) -> None:
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver={self.solver!r} is unknown; use one of {list(get_args(Solver))}")
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"spacing={self.spacing!r} is unknown; use one of {list(get_args(Spacing))}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be between 0 (no noise) and 1 (all of it)")
        if self.eta > 0 and self.solver != "ddim":
            raise ValueError(f"eta={self.eta} is of solver='ddim' only, got {self.solver!r}; leave eta at 0")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Where a run of the sampler is."""

    done: int
    """Steps done."""
    total: int
    """Steps in all."""
    x0: list[Tensor]
    """The step's estimates of the clean pictures, one (B, 3, r, r) a resolution in [-1, 1]."""
    x_t: list[Tensor]
    """What the next step begins with, likewise, in the network's units."""


class Stepping(TypedDict, total=False):
    """What the editing functions hand on to `SamplerRun.denoise`."""

    generator: torch.Generator | None
    step_noise: Sequence[list[Tensor]] | None
    on_step: Callable[[StepReport], None] | None
    repeats: int


def sample(
    diffusion: Diffusion,
    noise: list[Tensor],
    *,
    sampling: Sampling,
    condition: Condition | None = None,
    generator: torch.Generator | None = None,
    step_noise: Sequence[list[Tensor]] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[Tensor]:
    """Denoises every resolution together, from the noisiest level down.

    Args:
        diffusion: The network, and what it was trained with.
        noise: One (B, 3, r, r) a resolution, standard normal, in the type that the network reads; the steps between
            its calls are computed in float32 at least.
        sampling: Solver, steps, guidance and threshold.
        condition: What the pictures show, B rows; None for nothing.
        generator: Draws the noise of the steps, where the solver adds any; its device must be the noise's.
        step_noise: That noise itself: for each step but the last one (B, 3, r, r) a resolution.
        on_step: Called after each step.

    Returns:
        One (B, 3, r, r) in [-1, 1] a resolution, finest first, in float32 at least.

    Raises:
        ValueError: If the number of steps, the noise, the condition or the guidance don't fit.
    """
    run = SamplerRun(diffusion, noise, sampling=sampling, condition=condition)
    x0 = run.denoise(noise, generator=generator, step_noise=step_noise, on_step=on_step)
    return [picture.clamp(-1, 1) for picture in x0]


class SamplerRun:
    """One way down the noise levels, which `sample` and the editing functions share."""

    def __init__(
        self,
        diffusion: Diffusion,
        like: list[Tensor],
        *,
        sampling: Sampling,
        condition: Condition | None = None,
        start: int | None = None,
        project: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        """Makes a run.

        Args:
            diffusion: See `sample`.
            like: One (B, 3, r, r) a resolution, finest first, whose shape, type and device the pictures have.
            sampling: See `sample`.
            condition: See `sample`.
            start: The noise level to begin at, at most N; None for N.
            project: Applied to each estimate of the clean pictures, in [-1, 1], at all resolutions together.
        """
        _check_rows(like, condition, sampling.guidance.negative)
        schedule, resolutions = diffusion.schedule, tuple(x.shape[-1] for x in like)
        sampling.guidance.scales(len(resolutions))
        self.sampling, self._project = sampling, project
        self.divisors = schedule.signal_divisors(resolutions)
        # 1 - alpha_bar is 0 in half precision where little noise is left.
        self._dtype = torch.promote_types(like[0].dtype, torch.float32)
        alpha_bars = schedule.alpha_bars(resolutions).to(like[0].device, self._dtype)
        self._denoiser = Denoiser(
            diffusion=diffusion,
            alpha_bars=alpha_bars,
            divisors=self.divisors,
            dtype=like[0].dtype,
            condition=Condition() if condition is None else condition,
            guidance=sampling.guidance,
            threshold=sampling.threshold,
        )
        start = schedule.num_timesteps if start is None else start
        if sampling.solver == "heun":
            start = min(start, _level_of_sigma(schedule, LARGEST_SIGMA))
        self.levels = noise_levels(start, sampling.num_inference_steps, sampling.spacing)
        self.signals = alpha_bars[:, self.levels]  # (R, n + 1)

    def denoise(
        self,
        x_t: list[Tensor],
        *,
        generator: torch.Generator | None = None,
        step_noise: Sequence[list[Tensor]] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        repeats: int = 1,
    ) -> list[Tensor]:
        """The clean pictures, one (B, 3, r, r) a resolution, finest first.

        Args:
            x_t: Pictures at the first of `levels`, divided by `divisors` and noised.
            generator: See `sample`.
            step_noise: See `sample`.
            on_step: See `sample`.
            repeats: How often each step but the last is made, going back in between (arXiv 2201.09865, algorithm 1).

        Raises:
            ValueError: If there is too little step noise, or some while steps are repeated, which take more.
        """
        total = self.sampling.num_inference_steps
        if repeats < 1:
            raise ValueError(f"repeats={repeats} must be at least 1, which makes each step once")
        if step_noise is not None and len(step_noise) < total - 1:
            raise ValueError(f"step_noise has {len(step_noise)} entries; {total} steps need {total - 1}")
        if step_noise is not None and repeats > 1:
            raise ValueError(f"repeats={repeats} draws noise of its own in between; give a generator, not step_noise")
        x_t, before = [x.to(self._dtype) for x in x_t], None
        with torch.no_grad():
            for i in range(total):
                again = repeats if i + 1 < total else 1
                for repeat in range(again):
                    x0, estimate = self._estimates(x_t, i, before)
                    x_t = self._move(x_t, estimate, i, generator, step_noise)
                    if repeat + 1 < again:
                        x_t = self._go_back(x_t, i, generator)
                before = x0
                if on_step is not None:
                    on_step(StepReport(done=i + 1, total=total, x0=self._scaled(x0), x_t=x_t))
        return self._scaled(x_t)

    def _estimates(self, x_t: list[Tensor], i: int, before: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """The network's estimate of the clean pictures at step i, and the one that the step aims at."""
        x0 = self._estimate(x_t, self.levels[i])
        if self.levels[i + 1] == 0:
            return x0, x0
        if self.sampling.solver == "dpmpp_2m" and before is not None:
            pairs = zip(x0, before, self.signals[:, i - 1 : i + 2], strict=True)
            return x0, [extrapolated(now, last, *signals) for now, last, signals in pairs]
        if self.sampling.solver == "heun":
            ahead = self._estimate(self._move(x_t, x0, i, None, None), self.levels[i + 1])
            triples = zip(x0, ahead, self.signals[:, i : i + 2], strict=True)
            return x0, [heun_corrected(now, then, *signals) for now, then, signals in triples]
        return x0, x0

    def _estimate(self, x_t: list[Tensor], level: int) -> list[Tensor]:
        x0 = self._denoiser.estimate(x_t, level)
        if self._project is None:
            return x0
        return [x / divisor for x, divisor in zip(self._project(self._scaled(x0)), self.divisors, strict=True)]

    def _move(
        self,
        x_t: list[Tensor],
        x0: list[Tensor],
        i: int,
        generator: torch.Generator | None,
        step_noise: Sequence[list[Tensor]] | None,
    ) -> list[Tensor]:
        """`x_t` at the level after step i, were the clean pictures `x0`."""
        if self.levels[i + 1] == 0:
            return list(x0)
        ancestral, eta = self.sampling.solver == "ddpm", self.sampling.eta
        moved = []
        for r, (x, clean) in enumerate(zip(x_t, x0, strict=True)):
            now, then = self.signals[r, i], self.signals[r, i + 1]
            if not ancestral and eta == 0:
                moved.append(ddim_step(x, clean, now, then))
                continue
            draw = _normal(x, generator) if step_noise is None else step_noise[i][r].to(x)
            step = ddpm_step(x, clean, now, then, draw) if ancestral else ddim_step(x, clean, now, then, eta, draw)
            moved.append(step)
        return moved

    def _go_back(self, x_t: list[Tensor], i: int, generator: torch.Generator | None) -> list[Tensor]:
        """`x_t` at the level before step i again, with fresh noise (arXiv 2201.09865, equation 9)."""
        ratios = self.signals[:, i] / self.signals[:, i + 1]
        return [add_noise(x, _normal(x, generator), ratio) for x, ratio in zip(x_t, ratios, strict=True)]

    def _scaled(self, x: list[Tensor]) -> list[Tensor]:
        """From the network's units to those of pictures."""
        return [part * divisor for part, divisor in zip(x, self.divisors, strict=True)]


def noise_levels(start: int, num_inference_steps: int, spacing: Spacing = "trailing") -> list[int]:
    """The n + 1 noise levels of a run, from at most `start` down to 0.

    Raises:
        ValueError: If there are not as many levels as steps.
    """
    n = num_inference_steps
    if not 1 <= n <= start:
        raise ValueError(f"num_inference_steps={n} must be between 1 and {start}, the noise levels there are")
    if spacing == "reference":
        return [round((n - i) * ((start + 1) / (n + 1))) for i in range(n + 1)]
    return [round(start * (1 - i / n)) for i in range(n + 1)]


def _check_rows(pictures: list[Tensor], *conditions: Condition | None) -> None:
    rows = {x.shape[0] for x in pictures}
    rows |= {condition.rows for condition in conditions if condition is not None and condition.rows is not None}
    if len(rows) != 1:
        raise ValueError(
            f"noise and conditions have {sorted(rows)} rows; give one of each a picture, at every resolution"
        )


def _level_of_sigma(schedule: NoiseSchedule, sigma: float) -> int:
    """The noisiest level at which √((1 − alpha_bar) ÷ alpha_bar) of the innermost resolution is at most `sigma`."""
    log_snr = -2 * torch.tensor(sigma, dtype=torch.float64).log()
    return max(1, int(schedule.t_at(log_snr) * schedule.num_timesteps + 1e-6))


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
