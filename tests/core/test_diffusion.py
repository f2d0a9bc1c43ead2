"""Schedules, conversions, pyramid, objective and averages against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from mdm_core.ema import PowerEma, power_exponent
from mdm_core.errors import ConfigError
from mdm_core.loss import matryoshka_loss
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import add_noise, eps_from_x0, v_target, x0_from_v
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


def test_schedule_refuses_no_timesteps() -> None:
    with pytest.raises(ConfigError, match="num_timesteps=0 must be at least 1"):
        NoiseSchedule(num_timesteps=0)


def test_x0_and_eps_come_back_from_what_they_made() -> None:
    x0, eps = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 2 - 1, torch.randn(4, 3, 8, 8, dtype=torch.float64)
    alpha_bar = torch.tensor([0.001, 0.3, 0.8, 0.999], dtype=torch.float64).reshape(4, 1, 1, 1)
    x_t = add_noise(x0, eps, alpha_bar)
    torch.testing.assert_close(x0_from_v(x_t, v_target(x0, eps, alpha_bar), alpha_bar), x0)
    torch.testing.assert_close(eps_from_x0(x_t, x0, alpha_bar), eps)


def test_pyramid_averages_blocks() -> None:
    x0 = torch.randn(2, 3, 8, 8)
    fine, coarse = build_pyramid(x0, (8, 2))
    assert fine is x0
    for row in range(2):
        for column in range(2):
            block = x0[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
            np.testing.assert_allclose(coarse[:, :, row, column], block.mean(axis=(2, 3)), rtol=1e-5, atol=1e-6)


def test_loss_is_the_error_of_the_noise() -> None:
    """With the published weighting the loss equals the squared error of eps, computed from each v."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(3, 3, side, side, generator=generator) for side in (8, 4) for _ in range(3)]
    alpha_bar = torch.tensor([0.2, 0.5, 0.9]).reshape(3, 1, 1, 1)
    expected = torch.zeros(2, 3)
    targets, predictions = [], []
    for level, weight in enumerate((1.0, 0.5)):
        x0, eps, v_hat = draw[3 * level : 3 * level + 3]
        x_t = add_noise(x0, eps, alpha_bar)
        targets.append(v_target(x0, eps, alpha_bar))
        predictions.append(v_hat)
        eps_hat = (1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v_hat
        for row in range(3):
            expected[level, row] = weight * float(((eps - eps_hat)[row] ** 2).mean())
    got = matryoshka_loss(targets, predictions, [alpha_bar] * 2, resolution_weights=(1.0, 0.5), weighting="eps")
    torch.testing.assert_close(got, expected)


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
