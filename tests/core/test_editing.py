"""Editing where the right answer is known: what must stay stays, and the rest is what the data allow."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mdm_core.denoiser import Diffusion
from mdm_core.editing import image_to_image, inpaint, upscale
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import add_noise
from mdm_core.samplers import Sampling, Solver, sample
from mdm_core.thresholding import Threshold

RESOLUTIONS = (16, 8, 4)
SHIFTED, BY_SIGNAL = NoiseSchedule(), NoiseSchedule(shift="signal", shift_power=2)


class Denoising:
    """A network that outputs x0, computed at each resolution from x_t and alpha_bar; keeps what it was given."""

    def __init__(self, x0: Callable[[Tensor, Tensor, float], Tensor], schedule: NoiseSchedule = SHIFTED) -> None:
        self.x0, self.schedule = x0, schedule
        self.seen: list[tuple[int, list[Tensor]]] = []

    def __call__(self, x_t: list[Tensor], timestep: Tensor) -> list[Tensor]:
        sides = tuple(x.shape[-1] for x in x_t)
        self.seen.append((int(timestep[0]) + 1, x_t))
        signals = self.schedule.alpha_bars(sides)[:, timestep + 1, None, None, None]
        return [
            self.x0(x, signal.to(x), divisor)
            for x, signal, divisor in zip(x_t, signals, self.schedule.signal_divisors(sides), strict=True)
        ]


def normal(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, side, side, generator=generator, dtype=dtype) for side in RESOLUTIONS]


def painting(rows: int) -> Tensor:
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1


def unruly(x_t: Tensor, signal: Tensor, divisor: float) -> Tensor:
    """No denoiser at all: what must stay has to stay whatever the network says."""
    return 2 * torch.sin(3 * x_t) + x_t.flip(-1)


@pytest.mark.parametrize("schedule", [SHIFTED, BY_SIGNAL], ids=["snr", "signal"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("side", [8, 4])
def test_upscaled_pictures_average_to_the_given_one(solver: Solver, schedule: NoiseSchedule, side: int) -> None:
    low = F.avg_pool2d(painting(2), 16 // side)
    low[0, 0, 0, 0] = 1.0  # leaves its block no choice
    pictures = upscale(
        Diffusion(Denoising(unruly, schedule), schedule, "x0"),
        low,
        normal(2, 0),
        sampling=Sampling(num_inference_steps=6, solver=solver),
        generator=torch.Generator().manual_seed(1),
    )
    assert [picture.shape[-1] for picture in pictures] == list(RESOLUTIONS)
    for picture in pictures:
        assert float(picture.abs().max()) <= 1 + 1e-6
        if picture.shape[-1] >= side:
            torch.testing.assert_close(F.avg_pool2d(picture, picture.shape[-1] // side), low, atol=3e-7, rtol=0)
    assert torch.equal(pictures[RESOLUTIONS.index(side)], low)


def test_upscaling_adds_the_missing_average_to_what_the_network_knows() -> None:
    known = painting(1) / 2
    low = F.avg_pool2d(known, 2) + 0.25
    fine, *_ = upscale(
        Diffusion(Denoising(lambda x, a, d: F.avg_pool2d(known, 16 // x.shape[-1])), SHIFTED, "x0"),
        low,
        normal(1, 0),
        sampling=Sampling(num_inference_steps=4),
    )
    torch.testing.assert_close(fine, known + 0.25)


@pytest.mark.parametrize("schedule", [SHIFTED, BY_SIGNAL], ids=["snr", "signal"])
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_what_is_kept_has_its_noised_value_at_every_call(solver: Solver, schedule: NoiseSchedule) -> None:
    image, noise, network = painting(2), normal(2, 0), Denoising(unruly, schedule)
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[:, :, 3:9, 2:12] = True
    sampling = Sampling(num_inference_steps=5, solver=solver)
    pictures = inpaint(Diffusion(network, schedule, "x0"), image, mask, noise, sampling=sampling)
    assert torch.equal(torch.where(mask, 0, pictures[0]), torch.where(mask, 0, image))
    for r, side in enumerate(RESOLUTIONS):
        kept = ~F.max_pool2d(mask.float(), 16 // side).bool().expand(-1, 3, -1, -1)
        average = F.avg_pool2d(image, 16 // side)
        assert 0 < int(kept.sum()) < kept.numel()
        torch.testing.assert_close(pictures[r][kept], average[kept])
        for level, x_t in network.seen:
            signal = schedule.alpha_bar(side / 4)[level]
            wanted = add_noise(average / schedule.signal_divisor(side / 4), noise[r], signal)
            torch.testing.assert_close(x_t[r][kept], wanted[kept], atol=2e-5, rtol=0)


def test_going_back_fits_the_region_to_the_rest() -> None:
    """Pictures of one flat value ~ N(0, 1): given half of one, the other half has the same value."""

    def flat(x: Tensor, a: Tensor, divisor: float) -> Tensor:
        values = x[0, 0].numel()
        mean = a.sqrt() * x.sum(dim=(2, 3), keepdim=True) / (a * values + 1 - a)
        return mean.expand_as(x)

    image = torch.full((8, 3, 16, 16), 0.7)
    mask = torch.zeros(8, 1, 16, 16, dtype=torch.bool)
    mask[:, :, :, 8:] = True
    misses = []
    for repeats in (1, 4):
        pictures = inpaint(
            Diffusion(Denoising(flat), SHIFTED, "x0"),
            image,
            mask,
            normal(8, 0),
            sampling=Sampling(num_inference_steps=20, solver="ddpm", threshold=Threshold(kind="none")),
            generator=torch.Generator().manual_seed(2),
            repeats=repeats,
        )
        misses.append(float((pictures[0][:, :, :, 8:] - 0.7).abs().mean()))
    assert misses[1] < 0.02
    assert misses[1] < misses[0] / 2


@pytest.mark.parametrize("schedule", [SHIFTED, BY_SIGNAL], ids=["snr", "signal"])
def test_image_to_image_follows_the_ode_from_the_noised_picture(schedule: NoiseSchedule) -> None:
    deviation = 0.3

    def gaussian(x: Tensor, a: Tensor, divisor: float) -> Tensor:
        variance = (deviation / divisor) ** 2
        return variance * a.sqrt() / (a * variance + 1 - a) * x

    image, noise = painting(1).double() / 2, normal(1, 0, torch.float64)
    network = Denoising(gaussian, schedule)
    pictures = image_to_image(
        Diffusion(network, schedule, "x0"), image, noise, strength=0.4, sampling=Sampling(num_inference_steps=200)
    )
    assert network.seen[0][0] == 400
    for r, side in enumerate(RESOLUTIONS):
        a, divisor = float(schedule.alpha_bar(side / 4)[400]), schedule.signal_divisor(side / 4)
        x_t = math.sqrt(a) * F.avg_pool2d(image, 16 // side) / divisor + math.sqrt(1 - a) * noise[r]
        wanted = deviation * x_t / math.sqrt(a * (deviation / divisor) ** 2 + 1 - a)
        torch.testing.assert_close(pictures[r], wanted.clamp(-1, 1), atol=5e-3, rtol=0)


def test_full_strength_keeps_nothing() -> None:
    noise, sampling = normal(1, 0), Sampling(num_inference_steps=8)
    network = Denoising(lambda x, a, d: 0.3 * torch.tanh(x))
    changed = image_to_image(Diffusion(network, SHIFTED, "x0"), painting(1), noise, strength=1, sampling=sampling)
    for got, wanted in zip(changed, sample(Diffusion(network, SHIFTED, "x0"), noise, sampling=sampling), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    noise, sampling = normal(1, 0), Sampling(num_inference_steps=8)
    diffusion, image, mask = Diffusion(Denoising(unruly), SHIFTED), painting(1), torch.ones(1, 1, 16, 16) > 0
    with pytest.raises(ValueError, match=r"low is \(1, 3, 16, 16\); wanted .* r one of \[8, 4\]"):
        upscale(diffusion, image, noise, sampling=sampling)
    with pytest.raises(ValueError, match=r"mask is \(1, 1, 16, 16\) torch.float32; wanted \(1, 1, 16, 16\) bool"):
        inpaint(diffusion, image, mask.float(), noise, sampling=sampling)
    with pytest.raises(ValueError, match=r"image is \(2, 3, 16, 16\); wanted \(1, 3, 16, 16\)"):
        inpaint(diffusion, painting(2), mask, noise, sampling=sampling)
    with pytest.raises(ValueError, match=r"image is \(1, 3, 8, 8\); wanted \(1, 3, 16, 16\)"):
        image_to_image(diffusion, image[..., :8, :8], noise, strength=0.5, sampling=sampling)
    with pytest.raises(ValueError, match="repeats=2 draws noise of its own in between"):
        inpaint(diffusion, image, mask, noise, sampling=sampling, step_noise=[noise] * 7, repeats=2)
    with pytest.raises(ValueError, match="strength=0 must be above 0"):
        image_to_image(diffusion, image, noise, strength=0, sampling=sampling)
    with pytest.raises(ValueError, match="num_inference_steps=8 must be between 1 and 5"):
        image_to_image(diffusion, image, noise, strength=0.005, sampling=sampling)
