"""Samplers where the right answer is known in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.samplers import Solver, sample

RESOLUTIONS = (8, 4)
MEAN, DEVIATION = 0.1, 0.25


class GaussianOracle(nn.Module):
    """The best v for pictures whose values are independent N(MEAN, DEVIATION²); counts its calls."""

    def __init__(self, alpha_bars: Tensor) -> None:
        super().__init__()
        self.alpha_bars, self.calls = alpha_bars, 0
        self.timesteps: list[int] = []

    def forward(self, x_t: list[Tensor], timestep: Tensor, *_: object) -> list[Tensor]:
        self.calls += 1
        self.timesteps.append(int(timestep[0]))
        outputs = []
        for x, row in zip(x_t, self.alpha_bars, strict=True):
            signal = row[timestep + 1].double()[:, None, None, None]
            variance = signal * DEVIATION**2 + 1 - signal
            x0 = MEAN + DEVIATION**2 * signal.sqrt() / variance * (x - signal.sqrt() * MEAN)
            outputs.append((signal.sqrt() * x - x0) / (1 - signal).sqrt())
        return outputs


def exact(noise: Tensor, signal: float) -> Tensor:
    """Where the probability-flow ODE ends for that distribution."""
    return MEAN + DEVIATION * (noise - math.sqrt(signal) * MEAN) / math.sqrt(signal * DEVIATION**2 + 1 - signal)


def errors(solver: Solver, steps: int) -> list[float]:
    alpha_bars = NoiseSchedule().alpha_bars(RESOLUTIONS).double()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(4, 3, side, side, generator=generator, dtype=torch.float64) for side in RESOLUTIONS]
    network = GaussianOracle(alpha_bars)
    pictures = sample(network, noise, alpha_bars=alpha_bars, num_inference_steps=steps, solver=solver)  # type: ignore[arg-type]
    assert network.calls == steps
    assert network.timesteps[0] == 999
    return [
        float((picture - exact(start, float(row[-1]))).abs().mean())
        for picture, start, row in zip(pictures, noise, alpha_bars, strict=True)
    ]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_samplers_converge_to_the_exact_end_of_the_ode(solver: Solver) -> None:
    for few, many in zip(errors(solver, 20), errors(solver, 160), strict=True):
        assert many < few / 4
        assert many < 0.03 * DEVIATION


def test_halving_the_steps_costs_the_second_order_sampler_four_times_the_error() -> None:
    for coarse, fine in zip(errors("dpmpp_2m", 20), errors("dpmpp_2m", 40), strict=True):
        assert 3.5 < coarse / fine < 9
    for second, first in zip(errors("dpmpp_2m", 20), errors("ddim", 32), strict=True):
        assert second < first


class CaptionEcho(nn.Module):
    """Predicts a flat picture: the first number of the caption, or 0.2 without one."""

    def forward(self, x_t: list[Tensor], timestep: Tensor, text_emb: Tensor, text_mask: Tensor) -> list[Tensor]:
        x0 = torch.where(text_mask.any(dim=1), text_emb[:, 0, 0], torch.tensor(0.2))[:, None, None, None]
        alpha_bars = NoiseSchedule().alpha_bars(RESOLUTIONS)
        signals = [row[timestep + 1][:, None, None, None] for row in alpha_bars]
        return [(s.sqrt() * x - x0) / (1 - s).sqrt() for x, s in zip(x_t, signals, strict=True)]


def test_guidance_goes_beyond_the_caption_and_stops_at_white() -> None:
    text_emb = torch.tensor([0.3, 0.6]).reshape(2, 1, 1)
    noise = [torch.randn(2, 3, side, side) for side in RESOLUTIONS]
    for scale, wanted in ((1.0, (0.3, 0.6)), (3.0, (0.2 + 3 * 0.1, 1.0)), (0.0, (0.2, 0.2))):
        pictures = sample(
            CaptionEcho(),  # type: ignore[arg-type]
            noise,
            alpha_bars=NoiseSchedule().alpha_bars(RESOLUTIONS),
            num_inference_steps=7,
            text_emb=text_emb,
            text_mask=torch.ones(2, 1, dtype=torch.bool),
            guidance_scale=scale,
        )
        for level in pictures:
            for picture, value in zip(level, wanted, strict=True):
                torch.testing.assert_close(picture, torch.full_like(picture, value), atol=2e-3, rtol=0)


def test_progress_counts_every_call() -> None:
    alpha_bars = NoiseSchedule().alpha_bars(RESOLUTIONS).double()
    noise = [torch.zeros(1, 3, side, side, dtype=torch.float64) for side in RESOLUTIONS]
    seen: list[tuple[int, int]] = []
    network = GaussianOracle(alpha_bars)
    sample(network, noise, alpha_bars=alpha_bars, num_inference_steps=3, on_step=lambda *step: seen.append(step))  # type: ignore[arg-type]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="num_inference_steps=1001 must be between 1 and 1000"):
        sample(network, noise, alpha_bars=alpha_bars, num_inference_steps=1001)  # type: ignore[arg-type]
