"""Schedules, conversions, pyramid and averages against closed forms and plain loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from mdm_core.ema import PowerEma, power_exponent
from mdm_core.errors import ConfigError
from mdm_core.noise_schedule import NoiseSchedule, ScheduleKind
from mdm_core.parameterization import PredictionType, add_noise, prediction_target, to_eps, to_v, to_x0
from mdm_core.pyramid import build_pyramid


def test_alpha_bar_is_the_squared_cosine() -> None:
    alpha_bar = NoiseSchedule(num_timesteps=1000).alpha_bar()
    assert alpha_bar.shape == (1001,)
    assert alpha_bar[0] == 1
    for entry in (1, 250, 500, 900):
        closed = (
            math.cos((entry / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        )
        assert alpha_bar[entry].item() == pytest.approx(closed, rel=1e-5)


def test_shift_divides_the_signal_to_noise_ratio() -> None:
    schedule = NoiseSchedule(shift_power=2)
    inner, outer = schedule.alpha_bar(1)[1:].double(), schedule.alpha_bar(4)[1:].double()
    np.testing.assert_allclose(outer / (1 - outer) * 16, inner / (1 - inner), rtol=2e-3)
    assert torch.equal(schedule.alpha_bars((64, 16)), torch.stack([schedule.alpha_bar(4), schedule.alpha_bar(1)]))


def test_linear_schedule_is_the_product_of_its_alphas() -> None:
    alpha_bar, product = NoiseSchedule(kind="linear", beta_start=0.01, beta_end=0.03, num_timesteps=5).alpha_bar(), 1.0
    for entry, beta in enumerate((0.01, 0.015, 0.02, 0.025, 0.03), start=1):
        product *= 1 - beta
        assert alpha_bar[entry].item() == pytest.approx(product, rel=1e-6)


def test_cosine_schedule_has_log_snr_from_5_to_minus_5() -> None:
    alpha_bar = NoiseSchedule(kind="cosine").alpha_bar().double()
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    assert log_snr[[1, 1000]].tolist() == pytest.approx([5, -5], abs=1e-4)
    # Half-way between the two angles lies equal signal and noise, between entries 500 and 501.
    assert float(log_snr[500] + log_snr[501]) == pytest.approx(0, abs=1e-4)


def test_sigmoid_schedule_runs_from_clean_to_noise_symmetrically() -> None:
    alpha_bar = NoiseSchedule(kind="sigmoid", sigmoid_start=-3, sigmoid_end=3, sigmoid_tau=0.7).alpha_bar().double()
    assert alpha_bar[0] == 1
    assert float(alpha_bar[-1]) == pytest.approx(1e-9, rel=1e-6)
    torch.testing.assert_close(alpha_bar + alpha_bar.flip(0), torch.ones_like(alpha_bar))
    closed = (1 / (1 + math.exp(-3 / 0.7)) - 1 / (1 + math.exp(1.5 / 0.7))) / math.tanh(3 / 1.4)
    assert float(alpha_bar[250]) == pytest.approx(closed, rel=1e-5)


@pytest.mark.parametrize("kind", ["squared_cosine", "cosine", "linear", "sigmoid"])
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_continuous_time_passes_through_the_entries(kind: ScheduleKind, ratio: float) -> None:
    schedule = NoiseSchedule(kind=kind, num_timesteps=100, shift_power=2)
    t = torch.arange(101, dtype=torch.float64) / 100
    torch.testing.assert_close(schedule.alpha_bar_at(t, ratio).float(), schedule.alpha_bar(ratio), atol=1e-6, rtol=1e-4)
    fine = torch.linspace(1e-4, 1, 5_000, dtype=torch.float64)
    log_snr = schedule.log_snr(fine, ratio)
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(schedule.t_at(log_snr, ratio), fine, atol=1e-9, rtol=0)
    assert schedule.t_at(torch.tensor([math.inf, -math.inf])).tolist() == [0, 1]


def test_dividing_the_signal_is_dividing_the_ratio() -> None:
    """Signal power ÷ noise power of what the network sees is the same, either way."""
    by_snr = NoiseSchedule(shift_power=2).alpha_bar(4)[1:].double()
    by_signal = NoiseSchedule(shift="signal", shift_power=2)
    inner, divisor = by_signal.alpha_bar(4)[1:].double(), by_signal.signal_divisor(4)
    assert torch.equal(by_signal.alpha_bar(4), by_signal.alpha_bar(1))
    assert by_signal.signal_divisors((64, 16)) == (4, 1)
    np.testing.assert_allclose(inner / divisor**2 / (1 - inner), by_snr / (1 - by_snr), rtol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_timesteps": 0}, "num_timesteps=0 must be at least 1"),
        ({"kind": "cosin"}, "kind='cosin' is no noise schedule; use one of"),
        ({"shift": "noise"}, "shift='noise' is no way to shift"),
        ({"beta_start": 0.5}, "beta_start=0.5 and beta_end=0.02 must rise"),
        ({"sigmoid_tau": 0}, "sigmoid_tau=0 above 0"),
        ({"input_divisor": 0}, "input_divisor=0 must be above 0"),
    ],
)
def test_schedule_refuses_what_makes_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NoiseSchedule(**arguments)


@pytest.mark.parametrize("prediction_type", ["v", "eps", "x0"])
def test_every_prediction_gives_back_all_three(prediction_type: PredictionType) -> None:
    x0, eps = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 2 - 1, torch.randn(4, 3, 8, 8, dtype=torch.float64)
    alpha_bar = torch.tensor([0.001, 0.3, 0.8, 0.999], dtype=torch.float64).reshape(4, 1, 1, 1)
    x_t, output = add_noise(x0, eps, alpha_bar), prediction_target(x0, eps, alpha_bar, prediction_type)
    torch.testing.assert_close(to_x0(output, x_t, alpha_bar, prediction_type), x0)
    torch.testing.assert_close(to_eps(output, x_t, alpha_bar, prediction_type), eps)
    # v is how x_t changes with the angle whose cosine is √alpha_bar.
    angle = alpha_bar.sqrt().arccos()
    slope = (add_noise(x0, eps, (angle + 1e-6).cos() ** 2) - add_noise(x0, eps, (angle - 1e-6).cos() ** 2)) / 2e-6
    torch.testing.assert_close(to_v(output, x_t, alpha_bar, prediction_type), slope, atol=1e-7, rtol=1e-6)


def test_pyramid_averages_blocks() -> None:
    x0 = torch.randn(2, 3, 8, 8)
    fine, coarse = build_pyramid(x0, (8, 2))
    assert fine is x0
    for row in range(2):
        for column in range(2):
            block = x0[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
            np.testing.assert_allclose(coarse[:, :, row, column], block.mean(axis=(2, 3)), rtol=1e-5, atol=1e-6)


def test_clips_lose_frames_where_tiles_fall_and_pixels_where_they_stay() -> None:
    frames = torch.randn(2, 16, 3, 4, 4)
    clip = torch.cat([torch.cat(list(frames[:, 4 * row : 4 * row + 4].unbind(1)), dim=3) for row in range(4)], dim=2)
    fine, fewer, smaller, both = build_pyramid(clip, (16, 8, 4, 1), tiles=(4, 2, 2, 1))
    assert fine is clip
    for index, kept in enumerate((0, 4, 8, 12)):
        row, column = divmod(index, 2)
        tile = fewer[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(tile, frames[:, kept])
        pooled = frames[:, kept].reshape(2, 3, 2, 2, 2, 2).mean(dim=(3, 5))
        torch.testing.assert_close(smaller[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], pooled)
    torch.testing.assert_close(both, frames[:, 0].mean(dim=(2, 3), keepdim=True))
    with pytest.raises(ValueError, match=r"tiles=\(4, 1\): 1 × 1 frames of 4 px can't be pooled to 8 px"):
        build_pyramid(clip, (16, 8), tiles=(4, 1))
    with pytest.raises(ValueError, match="4 × 4 frames can't become 3 × 3"):
        build_pyramid(clip, (16, 12), tiles=(4, 3))


def test_power_ema_weighs_step_t_as_t_to_the_gamma() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    ema = PowerEma(network, relative_length=0.1)
    values = np.random.default_rng(0).normal(size=60)
    for step, value in enumerate(values, start=1):
        torch.nn.init.constant_(network.weight, value)
        ema.update(network, step)
    # Telescoping 1 - (1 - 1/t)^(gamma+1) gives each step the share t^(gamma+1) - (t-1)^(gamma+1).
    steps = np.arange(61, dtype=np.float64) ** (power_exponent(0.1) + 1)
    shares = np.diff(steps) / steps[-1]
    assert shares.sum() == pytest.approx(1)
    assert ema.state_dict()["weight"].item() == pytest.approx(float(shares @ values), rel=1e-4)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_power_exponent_has_the_length_asked_for(length: float) -> None:
    t = np.linspace(0, 1, 400_001)[1:]
    weight = t ** power_exponent(length)
    weight /= weight.sum()
    mean = (weight * t).sum()
    assert math.sqrt((weight * (t - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)
