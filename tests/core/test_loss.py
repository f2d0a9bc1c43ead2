"""The objective against plain loops over rows, and against errors computed from converted pictures."""

import pytest
import torch
from torch import Tensor

from mdm_core.loss import LossWeighting, matryoshka_loss, training_pairs, vdm_weights, weighted_mean
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType, to_eps, to_v, to_x0

SIDES = (8, 4)
WEIGHTS = (1.0, 0.5)


def draws(rows: int) -> list[list[Tensor]]:
    """x0, eps and outputs, each one a resolution."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(rows, 3, side, side, generator=generator, dtype=torch.float64) for side in SIDES] for _ in range(3)
    ]


@pytest.mark.parametrize("prediction_type", ["v", "eps", "x0"])
@pytest.mark.parametrize("weighting", ["v", "eps", "x0", "min_snr"])
def test_loss_is_the_error_of_the_quantity_it_names(prediction_type: PredictionType, weighting: LossWeighting) -> None:
    x0, eps, outputs = draws(3)
    schedule, timestep = NoiseSchedule(num_timesteps=10), torch.tensor([1, 4, 8])
    alpha_bars, divisors = schedule.alpha_bars(SIDES).double(), (2.0, 1.0)
    pairs = training_pairs(x0, eps, timestep, alpha_bars=alpha_bars, divisors=divisors, prediction_type=prediction_type)
    got = matryoshka_loss(
        pairs.targets,
        outputs,
        pairs.alpha_bar,
        resolution_weights=WEIGHTS,
        prediction_type=prediction_type,
        weighting=weighting,
        min_snr_gamma=3.0,
    )
    convert = {"v": to_v, "eps": to_eps}.get(weighting, to_x0)
    for r, divisor in enumerate(divisors):
        for row in range(3):
            a = alpha_bars[r, timestep[row] + 1]
            clean = x0[r][row] / divisor
            x_t = a.sqrt() * clean + (1 - a).sqrt() * eps[r][row]
            truth = {"v": a.sqrt() * eps[r][row] - (1 - a).sqrt() * clean, "eps": eps[r][row]}.get(weighting, clean)
            error = (convert(outputs[r][row], x_t, a, prediction_type) - truth).square().mean()
            factor = min(float(a / (1 - a)), 3.0) if weighting == "min_snr" else 1.0
            assert got[r, row].item() == pytest.approx(WEIGHTS[r] * factor * float(error), rel=1e-4)


def plain(rows: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Targets, outputs and alpha_bar."""
    targets, _, outputs = draws(rows)
    return targets, outputs, [torch.full((rows, 1, 1, 1), 0.5, dtype=torch.float64) for _ in SIDES]


@pytest.mark.parametrize(("rows", "finer"), [(3, 2), (7, 3), (5, 1), (4, 4)])
def test_each_resolution_counts_as_the_mean_over_its_rows(rows: int, finer: int) -> None:
    targets, outputs, alpha_bar = plain(rows)
    outputs[0] = outputs[0][:finer]
    got = matryoshka_loss(targets, outputs, alpha_bar, resolution_weights=WEIGHTS, weighting="v")
    for r, present in enumerate((finer, rows)):
        errors = [float((targets[r][row] - outputs[r][row]).square().mean()) for row in range(present)]
        assert float(got[r].mean()) == pytest.approx(WEIGHTS[r] * sum(errors) / present, rel=1e-6)
        assert not got[r, present:].any()


def test_uneven_shares_of_a_batch_add_up_to_the_whole() -> None:
    """7 rows, 3 of them with the finer resolution, as parts of 4 and 3 rows with 1 and 2 of these."""
    targets, outputs, alpha_bar = plain(7)

    def part(order: list[int], finer: int) -> Tensor:
        picked = [[level[order] for level in levels] for levels in (targets, outputs, alpha_bar)]
        picked[1][0] = picked[1][0][:finer]
        return matryoshka_loss(*picked, resolution_weights=WEIGHTS, row_shares=(3 / 7, 1.0))

    parts = torch.cat([part([0, 3, 4, 5], 1), part([1, 2, 6], 2)], dim=1)
    outputs[0] = outputs[0][:3]
    whole = matryoshka_loss(targets, outputs, alpha_bar, resolution_weights=WEIGHTS)
    torch.testing.assert_close(parts.mean(dim=1), whole.mean(dim=1))


def test_variational_weights_are_ratios_of_snr() -> None:
    alpha_bar = NoiseSchedule(num_timesteps=10).alpha_bar().double()
    snr = alpha_bar / (1 - alpha_bar)
    weights = vdm_weights(alpha_bar)
    for level in range(2, 11):
        assert float(weights[level]) == pytest.approx(float(snr[level - 1] / snr[level] - 1), rel=1e-6)
    assert weights[:2].tolist() == [float(weights[2])] * 2
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert float(weighted_mean(rows, torch.tensor([1.0, 3.0]))) == pytest.approx((1 * 4 + 3 * 6) / 4)


def test_lists_and_rows_that_do_not_fit_are_refused() -> None:
    targets, outputs, alpha_bar = plain(2)
    with pytest.raises(ValueError, match="must have one entry a resolution"):
        matryoshka_loss(targets, outputs, alpha_bar, resolution_weights=(1.0,))
    with pytest.raises(ValueError, match="weighting='snr' is unknown"):
        matryoshka_loss(targets, outputs, alpha_bar, resolution_weights=WEIGHTS, weighting="snr")  # type: ignore[arg-type]
    outputs[1] = outputs[1][:1]
    with pytest.raises(ValueError, match="resolution 0 has 2 rows; wanted 1 to 1"):
        matryoshka_loss(targets, outputs, alpha_bar, resolution_weights=WEIGHTS)
