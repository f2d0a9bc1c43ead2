"""The noise of a picture: from (seed, number) only, drawn when a step asks for it."""

from itertools import combinations

import numpy as np
import pytest
import torch

from pipelines.sample.noise import PictureNoise


def noise(numbers: list[int], seed: int = 7) -> PictureNoise:
    return PictureNoise(seed=seed, noise_ids=numbers, resolutions=(16, 8), device=torch.device("cpu"))


def test_a_picture_has_the_same_noise_in_any_batch() -> None:
    numbers = [4, 2**33 + 1, 9]
    together, steps = noise(numbers).initial(), noise(numbers).of_steps(5)
    for row, number in enumerate(numbers):
        draw = np.random.default_rng([7, number])
        alone = noise([number]).of_steps(5)
        for level, side in enumerate((16, 8)):
            assert torch.equal(
                together[level][row], torch.from_numpy(draw.standard_normal((3, side, side), np.float32))
            )
            assert all(torch.equal(steps[step][level][row], alone[step][level][0]) for step in (3, 0, 4))


def test_no_two_draws_are_the_same() -> None:
    """Nor is that of picture 0's first step the initial noise of picture 0, as numbers in one seed would have it."""
    draws = [noise([number], seed).initial() for number in (0, 1, 2**32) for seed in (0, 1)]
    draws += [noise([number], seed).of_steps(3)[step] for number in (0, 1, 2**32) for seed in (0, 1) for step in (0, 1)]
    for first, second in combinations([torch.cat([level.flatten() for level in draw]) for draw in draws], 2):
        # 960 values: five standard deviations of the correlation of independent noise.
        assert abs(float(torch.dot(first, second))) / 960 < 5 / 960**0.5


def test_only_what_is_asked_for_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    of_step = PictureNoise.of_step

    def counted(self: PictureNoise, step: int) -> list[torch.Tensor]:
        drawn.append(step)
        return of_step(self, step)

    monkeypatch.setattr(PictureNoise, "of_step", counted)
    steps = noise([1]).of_steps(100)
    assert len(steps) == 100
    assert drawn == []
    # The sampler asks once a resolution.
    first, again = steps[7], steps[7]
    assert drawn == [7]
    assert first is again
    with pytest.raises(IndexError):
        steps[100]
