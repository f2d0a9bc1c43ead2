"""One optimizer step, and the stage's state between steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mdm_core.ema import PowerEma, PowerEmaTracker
from mdm_core.loss import LossWeighting, matryoshka_loss, training_pairs
from mdm_core.nested_unet import NestedUNet
from mdm_core.parameterization import PredictionType
from mdm_core.pyramid import build_pyramid
from mdm_core.unet import UNet
from pipelines.train.ingest.batch import Batch


@dataclass
class TrainState:
    """What a checkpoint of a stage holds."""

    network: UNet
    ema: PowerEma
    optimizer: torch.optim.AdamW
    step: int = 0
    averages: PowerEmaTracker | None = None
    """What snapshots are made of, where they are."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The files of a checkpoint, by name."""
        files = {
            "weights": dict(self.network.state_dict()),
            "ema": self.ema.state_dict(),
            "optimizer": _optimizer_tensors(self.network, self.optimizer),
        }
        return files if self.averages is None else files | {"averages": self.averages.state_dict()}

    def load(self, read: Callable[[str], dict[str, Tensor]], *, step: int) -> None:
        """Takes back what `tensors` gave after a step; `read` gives a file of it by name."""
        self.network.load_state_dict(read("weights"))
        self.ema.load_state_dict(read("ema"))
        _load_optimizer_tensors(self.network, self.optimizer, read("optimizer"))
        if self.averages is not None:
            self.averages.load_state_dict(read("averages"))
        self.step = step


def new_state(
    network: UNet, *, weight_decay: float, ema_length: float, average_lengths: Sequence[float] = ()
) -> TrainState:
    """The state before the first step; the networks' convolutions run in channels-last order.

    Args:
        network: Freshly built, or with the weights to begin from.
        weight_decay: AdamW's.
        ema_length: Length of the average.
        average_lengths: Lengths of those that snapshots are made of; none for no snapshots.
    """
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    averages = PowerEmaTracker(network, relative_lengths=average_lengths) if average_lengths else None
    return TrainState(network, PowerEma(network, relative_length=ema_length), optimizer, averages=averages)


def freeze_inner(network: UNet, frozen: bool) -> bool:
    """Lets the networks inside a nested one keep their weights, or train; returns whether that changes anything.

    Frozen weights have no gradient, which the optimizer passes over, and no part in the exchange among workers, which
    is set up once: a `DistributedDataParallel` from before a change has to go before a new one takes its place.
    """
    inner = network.inner_unet if isinstance(network, NestedUNet) else None
    if inner is None or all(parameter.requires_grad != frozen for parameter in inner.parameters()):
        return False
    inner.requires_grad_(not frozen)
    return True


def losses(
    network: nn.Module,
    batch: Batch,
    *,
    alpha_bars: Tensor,
    resolutions: tuple[int, ...],
    resolution_weights: tuple[float, ...],
    weighting: LossWeighting,
    min_snr_gamma: float = 5.0,
    divisors: Sequence[float] | None = None,
    prediction_type: PredictionType = "v",
    row_shares: Sequence[float] | None = None,
) -> Tensor:
    """(R, B): the weighted loss of each resolution and row of a batch, 0 for rows that a resolution is not trained on.

    Args:
        network: Predicts what `prediction_type` says; plain, or wrapped for several workers.
        batch: The worker's share of the step.
        alpha_bars: (R, N + 1), as `NoiseSchedule.alpha_bars` gives them.
        resolutions: Sides in pixels, finest first.
        resolution_weights: One a resolution.
        weighting: See `matryoshka_loss`.
        min_snr_gamma: See `matryoshka_loss`.
        divisors: What each resolution's pictures are divided by (`NoiseSchedule.signal_divisors`); None is 1.
        prediction_type: What the network answers.
        row_shares: Part of the rows of all workers that each resolution is trained on; those of this batch if None.
    """
    # Workers wait for each gradient. Where a resolution has no row here, a copy of the first row stands ahead of all,
    # for nothing; a row itself can't, as the networks inside see what those outside make of it.
    is_filled = 0 in batch.rows_per_resolution
    if is_filled:
        batch = batch.with_copy_of_first_row()
    counts = batch.rows_per_resolution
    x0 = [x[:count] for x, count in zip(build_pyramid(batch.x0.float() / 127.5 - 1, resolutions), counts, strict=True)]
    noise = [level[:count] for level, count in zip(batch.noise, counts, strict=True)]
    pairs = training_pairs(
        x0, noise, batch.timestep, alpha_bars=alpha_bars, divisors=divisors, prediction_type=prediction_type
    )
    x_t = [x.contiguous(memory_format=torch.channels_last) for x in pairs.x_t]
    outputs = network(x_t, batch.timestep, batch.text_emb, batch.text_mask)
    rows = matryoshka_loss(
        pairs.targets,
        outputs,
        pairs.alpha_bar,
        resolution_weights=resolution_weights,
        prediction_type=prediction_type,
        weighting=weighting,
        min_snr_gamma=min_snr_gamma,
        row_shares=row_shares,
    )
    return rows[:, 1:] + rows[:, :1] * 0 if is_filled else rows


def optimizer_step(state: TrainState, *, lr: float, max_grad_norm: float) -> Tensor:
    """Applies the gradients that are there, unless they are not finite: then the weights stay as they are.

    Nothing of this waits for the device.

    Returns:
        The norm of the gradients before clipping, () on the device. It is the same for all workers, as the gradients
        are averaged over them before.
    """
    norm = nn.utils.clip_grad_norm_([p for p in state.network.parameters() if p.grad is not None], max_grad_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    # What PyTorch's gradient scaler tells its optimizers; the fused kernel looks at it on the device.
    state.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.ema.update(state.network, state.step)
    if state.averages is not None:
        state.averages.update(state.network, state.step)
    return norm


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    return tensors


def _load_optimizer_tensors(network: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue  # the optimizer leaves it alone, and has nothing to say of it
        optimizer.state[parameter] = {"step": tensors[f"step.{name}"].to(parameter.device)} | {
            # The fused kernel walks all four tensors in memory order, so the moments must lie as the parameter does.
            key: torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"])
            for key in ("exp_avg", "exp_avg_sq")
        }
