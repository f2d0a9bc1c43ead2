"""Conditions, guidance and thresholds against what they do to networks whose answer is known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdm_core.conditioning import Condition, drop_at_random
from mdm_core.denoiser import Diffusion
from mdm_core.guidance import Guidance
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.samplers import Sampling, sample
from mdm_core.thresholding import Threshold

RESOLUTIONS = (8, 4)
SCHEDULE = NoiseSchedule()


class CaptionEcho(nn.Module):
    """Predicts a flat picture: the first number of the caption, or 0.2 without one; notes the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def forward(self, x_t: list[Tensor], timestep: Tensor, text_emb: Tensor, text_mask: Tensor) -> list[Tensor]:
        self.calls.append((int(timestep[0]), len(timestep)))
        x0 = torch.where(text_mask.any(dim=1), text_emb[:, 0, 0], torch.tensor(0.2))[:, None, None, None]
        signals = [row[timestep + 1][:, None, None, None] for row in SCHEDULE.alpha_bars(RESOLUTIONS)]
        return [(s.sqrt() * x - x0) / (1 - s).sqrt() for x, s in zip(x_t, signals, strict=True)]


def captioned(*values: float) -> Condition:
    text_emb = torch.tensor(values).reshape(-1, 1, 1)
    return Condition(text_emb=text_emb, text_mask=torch.ones(len(values), 1, dtype=torch.bool))


def flat_pictures(guidance: Guidance, *captions: float, network: CaptionEcho | None = None) -> list[Tensor]:
    noise = [torch.randn(len(captions), 3, side, side) for side in RESOLUTIONS]
    sampling = Sampling(num_inference_steps=7, guidance=guidance)
    return sample(
        Diffusion(network or CaptionEcho(), SCHEDULE), noise, sampling=sampling, condition=captioned(*captions)
    )


def assert_flat(level: Tensor, values: tuple[float, ...]) -> None:
    for picture, value in zip(level, values, strict=True):
        torch.testing.assert_close(picture, torch.full_like(picture, value), atol=2e-3, rtol=0)


def test_guidance_goes_beyond_the_caption_and_stops_at_white() -> None:
    for scale, wanted in ((1.0, (0.3, 0.6)), (3.0, (0.2 + 3 * 0.1, 1.0)), (0.0, (0.2, 0.2))):
        for level in flat_pictures(Guidance(scale=scale), 0.3, 0.6):
            assert_flat(level, wanted)


def test_each_resolution_has_its_scale() -> None:
    fine, coarse = flat_pictures(Guidance(scale=(3.0, 1.0)), 0.3)
    assert_flat(fine, (0.5,))
    assert_flat(coarse, (0.3,))


def test_guidance_goes_away_from_the_negative_condition() -> None:
    for level in flat_pictures(Guidance(scale=2.0, negative=captioned(-0.1)), 0.3):
        assert_flat(level, (0.3 + 0.4,))


def test_no_second_half_is_computed_outside_the_interval() -> None:
    network = CaptionEcho()
    (fine, _) = flat_pictures(Guidance(scale=3.0, interval=(0.2, 0.6)), 0.3, 0.4, network=network)
    assert network.calls == [(timestep, 4 if 200 <= timestep + 1 <= 600 else 2) for timestep, _ in network.calls]
    assert {rows for _, rows in network.calls} == {2, 4}
    assert_flat(fine, (0.3, 0.4))  # the last steps aim at the caption itself


def test_rescale_gives_back_the_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = (negative + 4 * (positive - negative)).numpy()
    for amount in (0.0, 0.7, 1.0):
        got = Guidance(scale=4.0, rescale=amount).combine(positive, negative, 4.0).numpy()
        for row in range(2):
            ratio = np.std(positive[row].numpy(), ddof=1) / np.std(plain[row], ddof=1)
            np.testing.assert_allclose(got[row], plain[row] * (amount * ratio + 1 - amount), rtol=1e-10)


def test_dynamic_threshold_divides_by_the_quantile() -> None:
    x0 = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 2.0]).reshape(
        2, 1, 1, 1
    )
    for ratio, most in ((0.995, 100.0), (0.95, 1.5)):
        got = Threshold(kind="dynamic", ratio=ratio, max_value=most).apply(x0)
        for row in range(2):
            values = x0[row].double().numpy()
            limit = min(max(np.quantile(np.abs(values), ratio), 1.0), most)
            np.testing.assert_allclose(got[row].numpy(), np.clip(values, -limit, limit) / limit, atol=1e-6)
    assert torch.equal(Threshold().apply(x0), x0.clamp(-1, 1))
    assert Threshold(kind="none").apply(x0) is x0


def test_dropped_rows_have_no_text_and_no_label() -> None:
    condition = Condition(
        text_emb=torch.randn(4, 3, 2),
        text_mask=torch.tensor([[1, 1, 0]] * 4).bool(),
        labels=torch.arange(4),
        micros={"scale": torch.arange(4.0)},
    )
    draws = torch.tensor([0.05, 0.5, 0.0999, 0.1])
    some = drop_at_random(condition, cond_drop_prob=0.1, draws=draws)
    assert some.text_mask is not None
    assert some.text_mask.sum(dim=1).tolist() == [0, 2, 0, 2]
    assert some.labels is not None
    assert some.labels.tolist() == [-1, 1, -1, 3]
    both = condition.joined(condition.dropped()).arguments()
    assert both["text_mask"].sum(dim=1).tolist() == [2] * 4 + [0] * 4
    assert both["labels"].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert both["micros"]["scale"].tolist() == [0, 1, 2, 3] * 2
    assert Condition(labels=torch.arange(2)).arguments().keys() == {"labels"}


def test_rows_are_dropped_as_often_as_asked() -> None:
    condition = Condition(labels=torch.zeros(20_000, dtype=torch.long))
    dropped = drop_at_random(condition, cond_drop_prob=0.1, generator=torch.Generator().manual_seed(0)).labels
    assert dropped is not None
    assert float((dropped == -1).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_a_shorter_negative_text_is_padded_with_tokens_that_are_not_real() -> None:
    joined = Condition(text_emb=torch.ones(1, 4, 2)).joined(Condition(text_emb=torch.ones(1, 2, 2)))
    assert joined.text_mask is not None
    assert joined.text_mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"have \[2, 3\] rows"):
        Condition(text_emb=torch.zeros(2, 1, 1), labels=torch.zeros(3))
    with pytest.raises(ValueError, match="only one of the two conditions has labels"):
        Condition(labels=torch.zeros(1)).joined(Condition())
    with pytest.raises(ValueError, match=r"cond_drop_prob=1.5 must be between 0 and 1"):
        drop_at_random(Condition(), cond_drop_prob=1.5)
    with pytest.raises(ValueError, match=r"interval=\(0.6, 0.2\) must rise"):
        Guidance(interval=(0.6, 0.2))
