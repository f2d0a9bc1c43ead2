"""What the published code's `sampler_config` and `diffusion_config` mean here, and the noise of its recorded runs."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mdm_core.apple_config import diffusion_from_apple
from mdm_core.denoiser import Network
from mdm_core.parameterization import add_noise, eps_from_x0, to_x0, v_from_x0
from mdm_core.sampler_steps import posterior_variance
from mdm_core.unet import UNet

TILES_OF_A_CLIP = 4
"""Frames along a side of the published code's clips."""

DIFFUSION_DEFAULTS: dict[str, Any] = {
    "model_output_scale": 0,
    "use_vdm_loss_weights": True,
    "use_double_loss": False,
    "multi_res_weights": None,
    "no_use_residual": False,
    "mixed_ratio": None,
    # Read nowhere:
    "use_random_interp": False,
    "random_downsample": False,
    "average_downsample": False,
    "mid_downsample": False,
}


def with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    unknown = sorted(values.keys() - defaults.keys())
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known are {sorted(defaults)}")
    return {**defaults, **values}


class Setup:
    """The schedule, prediction types and network that a case's `sampler_config` describes."""

    def __init__(self, case: Mapping[str, Any], network: UNet) -> None:
        self.network, self.resolutions = network, network.resolutions
        nested, divisor = len(self.resolutions) > 1, case["sampler_config"].get("rescale_signal")
        threshold = {"threshold_function": case["threshold"]} if "threshold" in case else {}
        diffusion = diffusion_from_apple(case["sampler_config"] | threshold, nested=nested)
        self.schedule, self.prediction = diffusion.schedule, diffusion.prediction_type
        self.loss_target, self.threshold = diffusion.loss_target, diffusion.threshold
        if not nested and divisor not in (None, 1) and self.loss_target == "v" and case["kind"] == "loss":
            raise ValueError("rescale_signal with a v loss: the published code's target is of another picture")
        self.divisors = self.schedule.signal_divisors(self.resolutions)

    @property
    def tiles(self) -> tuple[int, ...] | None:
        """Frames along a side of a clip at each resolution; None where no shell has layers over time."""
        tiles, network, temporal = [TILES_OF_A_CLIP], self.network, False
        for finer, coarser in pairwise(self.resolutions):
            halves = network.config.video == "temporal"
            tiles.append(tiles[-1] * coarser // finer if halves else tiles[-1])
            temporal, network = temporal or halves, network.inner_unet  # type: ignore[assignment]
        return tuple(tiles) if temporal else None

    def call(self, output_scale: float) -> Network:
        """The network, its outputs held within ± `output_scale` unless that is 0."""
        if not output_scale:
            return self.network
        return lambda *args, **parts: [
            torch.tanh(output / output_scale) * output_scale for output in self.network(*args, **parts)
        ]

    def as_loss_target(self, output: Tensor, x_t: Tensor, signal: Tensor) -> Tensor:
        """What the published code calls the prediction: for nested networks in terms of the loss, by way of x0."""
        if self.loss_target == self.prediction or len(self.resolutions) == 1:
            return output
        back = eps_from_x0 if self.loss_target == "eps" else v_from_x0
        return back(x_t, to_x0(output, x_t, signal, self.prediction), signal)

    def noise(
        self, data: Mapping[str, Tensor], levels: list[int], *, stochastic: bool, eta: float
    ) -> tuple[list[Tensor], list[list[Tensor]] | None]:
        """The noise that a run begins with, and that of its steps.

        The recorder called the initial noise `noise0`, and then the draws of the steps as well.
        """
        count, nested = len(self.resolutions), len(self.resolutions) > 1
        drawing = [now != 1 if nested else then != 0 for now, then in pairwise(levels)] if stochastic else []
        draws = [data[f"noise{k}"] for k in range(sum(key.startswith("noise") for key in data))]
        first = len(draws) - sum(drawing) * count
        if first not in (0, 1):
            raise ValueError(f"{len(draws)} noises stored; {sum(drawing) * count} draws wanted, and perhaps the first")
        queue = iter(draws[first:])
        step_noise = [[next(queue) if draw else data["step0.xs_0"] for _ in range(count)] for draw in drawing] or None
        if "init0" in data:
            return [data[f"init{r}"] for r in range(count)], step_noise
        if nested:
            raise ValueError("a nested run without init0, init1, … can't be replayed")
        return [draws[0] if first == 1 else self._first_noise(data, levels, draws[0], eta)], step_noise

    def _first_noise(self, data: Mapping[str, Tensor], levels: list[int], draw: Tensor, eta: float) -> Tensor:
        """What the first step began with, where only what it led to is stored: the step solved for x_t."""
        now, then = self.schedule.alpha_bar()[levels[:2]].double()
        variance = eta**2 * posterior_variance(now, then)
        x0, x_s = data["step0.x0_0"].double(), data["step0.xs_0"].double()
        eps = (x_s - then.sqrt() * x0 - variance.sqrt() * draw.double()) / (1 - then - variance).sqrt()
        return add_noise(x0, eps, now).float()
