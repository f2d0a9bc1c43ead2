"""A step against its formulas written out: rate, loss for whatever is predicted and weighted, update; its state."""

import dataclasses
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from mdm_core.nested_unet import build_network
from pipelines.train.config import StageConfig
from pipelines.train.ingest.batch import Batch
from pipelines.train.model_config import ModelConfig
from pipelines.train.step import TrainState, losses, new_state, optimizer_step

SIDES = (16, 8)
ROWS = 6


def model(**changes: Any) -> ModelConfig:
    network = {"num_resnets": [1, 1], "num_groups": 4, "num_heads": 2, "time_dim": 16}
    values = {
        "networks": [
            {"resolution": 16, "channels": [4, 8], "num_attention_layers": [0, 0], "mid_blocks": False, **network},
            {"resolution": 8, "channels": [8, 8], "num_attention_layers": [0, 1], **network},
        ],
        "num_timesteps": 100,
    }
    return ModelConfig.model_validate(values | changes)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        x0=torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=generator),
        text_emb=torch.zeros(ROWS, 2, 5),
        text_mask=torch.ones(ROWS, 2, dtype=torch.bool),
        timestep=torch.tensor([0, 3, 20, 50, 80, 98]),
        noise=[torch.randn(ROWS, 3, side, side, generator=generator) for side in SIDES],
        ids=[b""] * ROWS,
        rows_per_resolution=(ROWS, ROWS),
    )


class Recorder(torch.nn.Module):
    """Answers with fixed pictures and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.x_t: list[Tensor] = []
        generator = torch.Generator().manual_seed(1)
        self.answers = [torch.randn(ROWS, 3, side, side, generator=generator) for side in SIDES]

    def forward(self, x_t: list[Tensor], *rest: Tensor) -> list[Tensor]:
        self.x_t = x_t
        return self.answers


@pytest.mark.parametrize(
    ("prediction_type", "weighting", "schedule"),
    [
        *product(["v", "eps", "x0"], ["v", "eps", "x0", "min_snr"], [{}]),
        ("v", "eps", {"shift": "signal", "shift_power": 2.0}),
        ("eps", "eps", {"schedule": "sigmoid", "shift_power": 0.5}),
        ("x0", "min_snr", {"schedule": "cosine"}),
        ("v", "v", {"schedule": "linear", "shift": "signal"}),
    ],
)
def test_the_loss_is_the_weighted_error_of_what_is_asked_for(
    prediction_type: Any, weighting: Any, schedule: dict[str, Any]
) -> None:
    config = model(prediction_type=prediction_type, **schedule)
    noise_schedule, network, given = config.noise_schedule(), Recorder(), batch()
    rows = losses(
        network,
        given,
        alpha_bars=noise_schedule.alpha_bars(SIDES),
        resolutions=SIDES,
        resolution_weights=(2.0, 0.5),
        weighting=weighting,
        min_snr_gamma=3.0,
        divisors=noise_schedule.signal_divisors(SIDES),
        prediction_type=config.prediction_type,
    )
    finest = given.x0.double().numpy() / 127.5 - 1
    for r, (side, weight) in enumerate(zip(SIDES, (2.0, 0.5), strict=True)):
        signal = noise_schedule.alpha_bar(side / 8).double().numpy()[given.timestep.numpy() + 1][:, None, None, None]
        x0 = finest if side == 16 else finest.reshape(ROWS, 3, 8, 2, 8, 2).mean(axis=(3, 5))
        if schedule.get("shift") == "signal":
            x0 = x0 / (side / 8) ** (schedule.get("shift_power", 1.0) / 2)
        eps, answer = given.noise[r].double().numpy(), network.answers[r].double().numpy()
        x_t = np.sqrt(signal) * x0 + np.sqrt(1 - signal) * eps
        np.testing.assert_allclose(network.x_t[r].numpy(), x_t, atol=1e-5)
        # All three of what the network answers.
        if prediction_type == "v":
            clean = np.sqrt(signal) * x_t - np.sqrt(1 - signal) * answer
        else:
            clean = answer if prediction_type == "x0" else (x_t - np.sqrt(1 - signal) * answer) / np.sqrt(signal)
        noise = (x_t - np.sqrt(signal) * clean) / np.sqrt(1 - signal)
        snr = signal / (1 - signal)
        error = {
            "x0": (clean - x0) ** 2,
            "eps": (noise - eps) ** 2,
            "v": (np.sqrt(signal) * (noise - eps) - np.sqrt(1 - signal) * (clean - x0)) ** 2,
            "min_snr": np.minimum(snr, 3.0) * (clean - x0) ** 2,
        }[weighting]
        np.testing.assert_allclose(rows[r].numpy(), weight * error.mean(axis=(1, 2, 3)), rtol=2e-4)


def test_a_frozen_layer_comes_back_with_the_others() -> None:
    def state() -> TrainState:
        torch.manual_seed(0)
        network = build_network(model().matryoshka(text_dim=5))
        network.conv_in.requires_grad_(False)
        return new_state(network, weight_decay=0.0, ema_length=0.1)

    def step(trained: TrainState) -> None:
        rows = losses(
            trained.network,
            batch(),
            alpha_bars=model().noise_schedule().alpha_bars(SIDES),
            resolutions=SIDES,
            resolution_weights=(1.0, 1.0),
            weighting="eps",
        )
        rows.sum(dim=0).mean().backward()
        optimizer_step(trained, lr=1e-2, max_grad_norm=1.0)

    undisturbed, cut, resumed = state(), state(), state()
    for trained in (undisturbed, undisturbed, cut):
        step(trained)
    kept = {name: {key: value.clone() for key, value in tensors.items()} for name, tensors in cut.tensors().items()}
    resumed.load(kept.__getitem__, step=1)
    step(resumed)
    for key, value in undisturbed.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[key], value)


@pytest.mark.parametrize("fine", [0, 1, 4])
def test_rows_that_a_resolution_has_not_count_for_nothing(fine: int) -> None:
    """Against each resolution computed alone, from its own rows."""
    given = dataclasses.replace(batch(), rows_per_resolution=(fine, ROWS))
    torch.manual_seed(0)
    network = build_network(model().matryoshka(5))
    arguments: dict[str, Any] = {
        "alpha_bars": model().noise_schedule().alpha_bars(SIDES),
        "resolutions": SIDES,
        "resolution_weights": (1.0, 1.0),
        "weighting": "eps",
    }
    whole = losses(network, batch(), **arguments)
    mixed = losses(network, given, **arguments, row_shares=(0.25, 1.0))
    assert mixed[0, fine:].tolist() == [0.0] * (ROWS - fine)
    # The outer network has no part in what the inner one answers.
    torch.testing.assert_close(mixed[1], whole[1])
    torch.testing.assert_close(mixed[0, :fine] * 0.25, whole[0, :fine])
    mixed.sum().backward()
    outer = [p for name, p in network.named_parameters() if not name.startswith("inner_unet")]
    assert all(p.grad is not None for p in network.parameters())
    assert any(bool(p.grad.any()) for p in outer if p.grad is not None) == (fine > 0)


@pytest.mark.parametrize(
    ("images_seen", "warmup_images", "decay", "expected"),
    [
        (0, 100, "constant", 2e-5),
        (49, 100, "constant", 1e-3),
        (99, 100, "constant", 2e-3),
        (100, 100, "constant", 2e-3),
        (999, 100, "constant", 2e-3),
        (0, 100, "linear", 2e-5),
        (49, 100, "linear", 0.951e-3),
        (100, 100, "linear", 1.8e-3),
        (750, 100, "linear", 0.5e-3),
        (992, 100, "linear", 1.6e-5),
        (0, 0, "constant", 2e-3),
        (0, 0, "linear", 2e-3),
        (500, 0, "linear", 1e-3),
    ],
)
def test_the_learning_rate_rises_then_falls_to_nothing(
    images_seen: int, warmup_images: int, decay: Literal["constant", "linear"], expected: float
) -> None:
    """Of a stage whose steps take 1000 images, at most 2e-3."""
    stage = StageConfig(
        resolution=8, images=993, global_batch_size=8, lr=2e-3, warmup_images=warmup_images, decay=decay
    )
    assert stage.learning_rate(images_seen) == pytest.approx(expected, rel=1e-12)


def test_gradients_are_clipped_and_weights_decay_as_adamw_says() -> None:
    """Over three steps, the middle one clipped: after one alone, AdamW's update would not show the gradients' scale."""
    torch.manual_seed(0)
    state = new_state(build_network(model().matryoshka(text_dim=5)), weight_decay=0.3, ema_length=0.1)
    parameters = dict(state.network.named_parameters())
    begun = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    copies = {name: torch.nn.Parameter(value.clone()) for name, value in begun.items()}
    second = torch.optim.AdamW(copies.values(), betas=(0.9, 0.99), weight_decay=0.3, fused=False, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for size, lr in ((0.5, 1e-2), (40.0, 3e-2), (1.5, 2e-2)):
        drawn = {name: torch.randn(value.shape, generator=generator) for name, value in begun.items()}
        drawn["conv_in.weight"].zero_()
        squares = sum(float((value.double() ** 2).sum()) for value in drawn.values())
        scale = size / squares**0.5
        for name, parameter in parameters.items():
            # In memory as the parameter is, as autograd gives it; the fused kernel counts on that.
            parameter.grad = torch.empty_like(parameter).copy_(drawn[name] * scale)
            copies[name].grad = drawn[name] * scale * min(1.0, 2.0 / size)
        second.param_groups[0]["lr"] = lr
        second.step()
        norm = optimizer_step(state, lr=lr, max_grad_norm=2.0)
        assert float(norm) == pytest.approx(size, rel=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, copies[name], atol=1e-6, rtol=1e-5)
    # Without a gradient there is the decay alone.
    left = (1 - 1e-2 * 0.3) * (1 - 3e-2 * 0.3) * (1 - 2e-2 * 0.3)
    torch.testing.assert_close(parameters["conv_in.weight"].detach(), begun["conv_in.weight"] * left)
    assert state.step == 3
