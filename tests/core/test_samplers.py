"""Samplers where the right answer is known in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mdm_core.conditioning import Condition
from mdm_core.denoiser import Diffusion
from mdm_core.guidance import Guidance
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType
from mdm_core.samplers import Sampling, Solver, StepReport, noise_levels, sample
from mdm_core.thresholding import Threshold

RESOLUTIONS = (8, 4)
MEAN, DEVIATION = 0.1, 0.25


class GaussianOracle(nn.Module):
    """The best answer for pictures whose values are independent N(MEAN, DEVIATION²); counts its calls."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: PredictionType = "v") -> None:
        super().__init__()
        self.alpha_bars, self.divisors = schedule.alpha_bars(RESOLUTIONS), schedule.signal_divisors(RESOLUTIONS)
        self.prediction_type = prediction_type
        self.timesteps: list[int] = []

    def forward(self, x_t: list[Tensor], timestep: Tensor) -> list[Tensor]:
        self.timesteps.append(int(timestep[0]))
        outputs = []
        for x, row, divisor in zip(x_t, self.alpha_bars, self.divisors, strict=True):
            a = row[timestep + 1].double()[:, None, None, None]
            mean, deviation = MEAN / divisor, DEVIATION / divisor
            x0 = mean + deviation**2 * a.sqrt() / (a * deviation**2 + 1 - a) * (x - a.sqrt() * mean)
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
            outputs.append({"v": a.sqrt() * eps - (1 - a).sqrt() * x0, "eps": eps, "x0": x0}[self.prediction_type])
        return outputs


def exact(noise: Tensor, signal: float, divisor: float) -> Tensor:
    """Where the probability-flow ODE ends for that distribution."""
    mean, deviation = MEAN / divisor, DEVIATION / divisor
    slope = deviation / math.sqrt(signal * deviation**2 + 1 - signal)
    return divisor * (mean + slope * (noise - math.sqrt(signal) * mean))


def start(rows: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 3, side, side, generator=generator, dtype=torch.float64) for side in RESOLUTIONS]


def errors(solver: Solver, steps: int, schedule: NoiseSchedule, prediction_type: PredictionType = "v") -> list[float]:
    noise, network = start(), GaussianOracle(schedule, prediction_type)
    pictures = sample(
        Diffusion(network, schedule, prediction_type),
        noise,
        sampling=Sampling(num_inference_steps=steps, solver=solver),
    )
    assert len(network.timesteps) == (2 * steps - 1 if solver == "heun" else steps)
    first = network.timesteps[0] + 1
    return [
        float((picture - exact(draw, float(row[first]), divisor)).abs().mean())
        for picture, draw, row, divisor in zip(pictures, noise, network.alpha_bars, network.divisors, strict=True)
    ]


SHIFTED = NoiseSchedule()
BY_SIGNAL = NoiseSchedule(shift="signal", shift_power=2)


@pytest.mark.parametrize("schedule", [SHIFTED, BY_SIGNAL], ids=["snr", "signal"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
def test_samplers_converge_to_the_exact_end_of_the_ode(solver: Solver, schedule: NoiseSchedule) -> None:
    for few, many in zip(errors(solver, 20, schedule), errors(solver, 160, schedule), strict=True):
        assert many < few / 4
        assert many < 0.03 * DEVIATION


def test_halving_the_steps_costs_the_second_order_sampler_four_times_the_error() -> None:
    for coarse, fine in zip(errors("dpmpp_2m", 20, SHIFTED), errors("dpmpp_2m", 40, SHIFTED), strict=True):
        assert 3.5 < coarse / fine < 9
    for second, first in zip(errors("dpmpp_2m", 20, SHIFTED), errors("ddim", 32, SHIFTED), strict=True):
        assert second < first


def test_every_prediction_type_samples_the_same() -> None:
    wanted = errors("dpmpp_2m", 12, SHIFTED)
    for prediction_type in ("eps", "x0"):
        assert errors("dpmpp_2m", 12, SHIFTED, prediction_type) == pytest.approx(wanted, rel=1e-3)


def test_heun_is_the_published_loop() -> None:
    """Against arXiv 2206.00364, algorithm 1, written out in sigma for one resolution."""
    network, noise = GaussianOracle(SHIFTED), start()
    sampling = Sampling(num_inference_steps=6, solver="heun")
    pictures = sample(Diffusion(network, SHIFTED), noise, sampling=sampling)
    levels = [timestep + 1 for timestep in network.timesteps[:1] + network.timesteps[1::2]] + [0]
    innermost = ((1 - network.alpha_bars[-1].double()) / network.alpha_bars[-1].double()).sqrt()
    # From the noisiest level within the limit at the innermost resolution, so that none begins with signal missing.
    assert innermost[levels[0]] <= 80 < innermost[levels[0] + 1]
    for side, (draw, row) in enumerate(zip(noise, network.alpha_bars.double(), strict=True)):
        sigma = [math.sqrt((1 - row[level]) / row[level]) for level in levels]

        def denoised(x: Tensor, s: float) -> Tensor:
            return (MEAN + DEVIATION**2 / (DEVIATION**2 + s**2) * (x - MEAN)).clamp(-1, 1)

        x = draw / row[levels[0]].sqrt()
        for now, then in pairwise(sigma):
            slope = (x - denoised(x, now)) / now
            ahead = x + (then - now) * slope
            if then > 0:
                slope = (slope + (ahead - denoised(ahead, then)) / then) / 2
            x = x + (then - now) * slope
        torch.testing.assert_close(pictures[side], x.clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_noise_of_the_steps_leaves_the_variance_that_the_posterior_does(solver: Solver, eta: float) -> None:
    pictures = sample(
        Diffusion(GaussianOracle(SHIFTED), SHIFTED),
        start(rows=300),
        sampling=Sampling(num_inference_steps=20, solver=solver, eta=eta, threshold=Threshold(kind="none")),
        generator=torch.Generator().manual_seed(1),
    )
    for level, row in zip(pictures, SHIFTED.alpha_bars(RESOLUTIONS).double().tolist(), strict=True):
        variance = 1.0
        for now, then in pairwise(row[entry] for entry in range(1000, -1, -50)):
            # arXiv 2006.11239, equation 7, with x0 the linear function of x_t that GaussianOracle has.
            beta, slope = 1 - now / then, DEVIATION**2 * math.sqrt(now) / (now * DEVIATION**2 + 1 - now)
            factor = slope * math.sqrt(then) * beta / (1 - now) + math.sqrt(now / then) * (1 - then) / (1 - now)
            variance = factor**2 * variance + beta * (1 - then) / (1 - now)
        assert float(level.mean()) == pytest.approx(MEAN, abs=0.01)
        assert float(level.std()) == pytest.approx(math.sqrt(variance), rel=0.015)


def test_given_step_noise_replays_what_a_generator_draws() -> None:
    generator = torch.Generator().manual_seed(3)
    sampling = Sampling(num_inference_steps=3, solver="ddpm")
    drawn = sample(Diffusion(GaussianOracle(SHIFTED), SHIFTED), start(), sampling=sampling, generator=generator)
    generator = torch.Generator().manual_seed(3)
    step_noise = [[torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in start()] for _ in range(2)]
    given = sample(Diffusion(GaussianOracle(SHIFTED), SHIFTED), start(), sampling=sampling, step_noise=step_noise)
    assert all(torch.equal(a, b) for a, b in zip(drawn, given, strict=True))


def test_spacings_reach_every_level_once() -> None:
    assert noise_levels(1000, 4) == [1000, 750, 500, 250, 0]
    assert noise_levels(1000, 4, "reference") == [801, 601, 400, 200, 0]
    for spacing in ("trailing", "reference"):
        assert noise_levels(10, 10, spacing) == list(range(10, -1, -1))
        assert all(len(set(noise_levels(97, n, spacing))) == n + 1 for n in range(1, 98))


def test_progress_reports_every_step() -> None:
    seen: list[StepReport] = []
    sampling = Sampling(num_inference_steps=3)
    pictures = sample(Diffusion(GaussianOracle(SHIFTED), SHIFTED), start(), sampling=sampling, on_step=seen.append)
    assert [(report.done, report.total) for report in seen] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(seen[-1].x0[0], pictures[0])


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_a_network_in_half_precision_is_sampled_in_single(solver: Solver) -> None:
    """In bfloat16 alone 1 - alpha_bar is 0 near the end, and the steps divide by it."""
    network = GaussianOracle(SHIFTED)
    seen: set[torch.dtype] = set()

    def half(x_t: list[Tensor], timestep: Tensor) -> list[Tensor]:
        seen.update(x.dtype for x in x_t)
        return [output.bfloat16() for output in network([x.double() for x in x_t], timestep)]

    sampling = Sampling(num_inference_steps=50, solver=solver)
    noise = [x.bfloat16() for x in start()]
    found = []
    for model, begin in ((half, noise), (network, [x.float() for x in noise])):
        generator = torch.Generator().manual_seed(1)
        draws = [[torch.randn(x.shape, generator=generator) for x in noise] for _ in range(49)]
        found.append(sample(Diffusion(model, SHIFTED), begin, sampling=sampling, step_noise=draws))
    assert seen == {torch.bfloat16}
    for rough, fine in zip(*found, strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, fine.float(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 must be between 1 and 1000"),
        ({"num_inference_steps": 2, "solver": "euler"}, "solver='euler' is unknown; use one of"),
        ({"num_inference_steps": 2, "spacing": "leading"}, "spacing='leading' is unknown"),
        ({"num_inference_steps": 2, "eta": 0.5}, "eta=0.5 is of solver='ddim' only, got 'dpmpp_2m'"),
        ({"num_inference_steps": 2, "solver": "ddim", "eta": 1.5}, "eta=1.5 must be between 0"),
        ({"num_inference_steps": 2, "guidance": Guidance(scale=2)}, "needs a text or a label to drop"),
        ({"num_inference_steps": 2, "guidance": Guidance(scale=(2.0,))}, "has 1 entries for 2 resolutions"),
    ],
)
def test_bad_arguments_say_what_is_wanted(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        sample(Diffusion(GaussianOracle(SHIFTED), SHIFTED), start(), sampling=Sampling(**arguments))  # type: ignore[arg-type]
    two = Condition(labels=torch.zeros(2))
    with pytest.raises(ValueError, match=r"noise and conditions have \[2, 4\] rows"):
        sample(
            Diffusion(GaussianOracle(SHIFTED), SHIFTED),
            start(),
            sampling=Sampling(num_inference_steps=2),
            condition=two,
        )
    with pytest.raises(ValueError, match="prediction_type='epsilon' is unknown"):
        errors("ddim", 2, SHIFTED, "epsilon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_noise has 1 entries; 3 steps need 2"):
        sample(
            Diffusion(GaussianOracle(SHIFTED), SHIFTED),
            start(),
            sampling=Sampling(num_inference_steps=3, solver="ddpm"),
            condition=Condition(),
            step_noise=[start()],
        )
