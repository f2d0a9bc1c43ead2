"""What is timed: one training step, or one batch of pictures from noise; as it is shipped, and written plainly."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mdm_core.conditioning import Condition
from mdm_core.config import MatryoshkaConfig
from mdm_core.denoiser import Diffusion
from mdm_core.ema import PowerEma
from mdm_core.guidance import Guidance
from mdm_core.nested_unet import build_network
from mdm_core.presets import PRESETS
from mdm_core.samplers import Sampling, sample
from pipelines.benchmark.config import NetworkBenchmarkConfig, SampleBenchmarkConfig, TrainBenchmarkConfig
from pipelines.benchmark.plain import build_plain_network
from pipelines.train.ingest.batch import Batch
from pipelines.train.step import losses, new_state, optimizer_step

Label = Literal["ours", "plain"]

LR, MAX_GRAD_NORM, EMA_LENGTH, EMA_DECAY = 5e-5, 2.0, 0.1, 0.9999
"""The published recipe's; none of them changes the speed."""


class Contender(Protocol):
    """Something that is timed."""

    @property
    def network(self) -> nn.Module:
        """What it calls."""

    def step(self) -> None:
        """Does the work once."""


@dataclass
class NetworkCalls:
    """How often a network was called, and on how many rows, since the last `reset`."""

    calls: int = 0
    rows: int = 0
    _handle: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, network: nn.Module) -> "NetworkCalls":
        """Counts from now on, by a hook on the network."""
        counted = cls()
        counted._handle = network.register_forward_pre_hook(counted._count, with_kwargs=True)
        return counted

    def reset(self) -> None:
        """Counts from 0 again."""
        self.calls = self.rows = 0

    def _count(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x_t = args[0] if args else kwargs["x_t"]
        self.calls += 1
        self.rows += x_t[-1].shape[0]


def build_contender(label: Label, config: NetworkBenchmarkConfig, device: torch.device) -> Contender:
    """The work that `config` describes, ready to be timed on `device`."""
    torch.manual_seed(0)
    if isinstance(config, TrainBenchmarkConfig):
        return Training(config, device) if label == "ours" else PlainTraining(config, device)
    assert isinstance(config, SampleBenchmarkConfig)
    return Generation(config, device, plain=label == "plain")


class Training:
    """The optimizer step that `mdm train` does, on a batch that stays in memory."""

    def __init__(self, config: TrainBenchmarkConfig, device: torch.device) -> None:
        networks = config.matryoshka()
        network = build_network(networks).to(device)
        network.checkpoint_levels(config.checkpointed(tuple(network.levels())))
        self._state = new_state(network, weight_decay=0.0, ema_length=EMA_LENGTH)
        self.network = self._state.network
        if not config.channels_last:
            _leave_channels_last(self.network)
            self._state.ema = PowerEma(self.network, relative_length=EMA_LENGTH)
        if config.compile:
            _compile(self.network)
        self._loss = _objective(config, networks, device)
        self._batch = synthetic_batch(config, networks).to(device)

    def step(self) -> None:
        """Forward, loss, backward, clipping, fused AdamW and the average of the weights."""
        self.train_on(self._batch)

    def train_on(self, batch: Batch) -> None:
        """The same step on another batch, which is on the device."""
        self._loss(self.network, batch).backward()
        optimizer_step(self._state, lr=LR, max_grad_norm=MAX_GRAD_NORM)


class PlainTraining:
    """The same step written the straightward way, as public training code has it."""

    def __init__(self, config: TrainBenchmarkConfig, device: torch.device) -> None:
        networks = config.matryoshka()
        self.network = build_plain_network(networks).to(device)
        # PyTorch's own choice: a loop over the parameters on the CPU, a few kernels for all of them on a GPU.
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
        self._ema = {name: value.clone() for name, value in self.network.state_dict().items()}
        self._loss = _objective(config, networks, device)
        self._batch = synthetic_batch(config, networks).to(device)

    def step(self) -> None:
        """Forward, loss, backward, clipping, AdamW and the average of the weights, one parameter at a time."""
        loss = self._loss(self.network, self._batch)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                self._ema[name].mul_(EMA_DECAY).add_(value, alpha=1 - EMA_DECAY)
        loss.item()  # for the log, which makes public training code wait for the device in each step


class Generation:
    """A batch of pictures from noise by the sampler of `mdm sample`, with our network or the plain one."""

    def __init__(self, config: SampleBenchmarkConfig, device: torch.device, *, plain: bool) -> None:
        networks = config.matryoshka()
        self.network: nn.Module = build_plain_network(networks) if plain else build_network(networks)
        self.network = self.network.to(device).eval()
        if config.channels_last and not plain:
            self.network = self.network.to(memory_format=torch.channels_last)
        if config.compile and not plain:
            _compile(self.network)
        layout = torch.channels_last if config.channels_last and not plain else torch.contiguous_format
        generator = torch.Generator().manual_seed(0)
        self._noise = [
            torch.randn(config.batch, 3, side, side, generator=generator).to(device).contiguous(memory_format=layout)
            for side in networks.resolutions
        ]
        text_emb, text_mask = _captions(config, networks, generator)
        self._condition = Condition(text_emb=text_emb.to(device), text_mask=text_mask.to(device))
        self._sampling = Sampling(
            num_inference_steps=config.num_inference_steps,
            solver=config.solver,
            guidance=Guidance(scale=config.guidance_scale),
        )
        self._diffusion = Diffusion(self.network, PRESETS[config.preset].schedule)
        self._autocast = _autocast(config, device)
        self._generator = torch.Generator(device).manual_seed(0)

    def step(self) -> None:
        """From noise to pictures."""
        with self._autocast():
            sample(
                self._diffusion,
                self._noise,
                sampling=self._sampling,
                condition=self._condition,
                generator=self._generator,
            )


def _objective(
    config: TrainBenchmarkConfig, networks: MatryoshkaConfig, device: torch.device
) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss of a network on a batch."""
    alpha_bars = PRESETS[config.preset].schedule.alpha_bars(networks.resolutions).to(device)
    autocast = _autocast(config, device)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        with autocast():
            rows = losses(
                network,
                batch,
                alpha_bars=alpha_bars,
                resolutions=networks.resolutions,
                resolution_weights=(1.0,) * len(networks.resolutions),
                weighting="eps",
            )
        return rows.sum(dim=0).mean()

    return loss


def synthetic_batch(config: TrainBenchmarkConfig, networks: MatryoshkaConfig) -> Batch:
    """Random pictures, captions, timesteps and noise; the same each time."""
    generator = torch.Generator().manual_seed(0)
    side, rows = networks.resolutions[0], config.batch
    text_emb, text_mask = _captions(config, networks, generator)
    return Batch(
        x0=torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8),
        text_emb=text_emb,
        text_mask=text_mask,
        timestep=torch.randint(0, 1000, (rows,), generator=generator),
        noise=[torch.randn(rows, 3, r, r, generator=generator) for r in networks.resolutions],
        ids=[bytes([row % 256]) * 16 for row in range(rows)],
        rows_per_resolution=(rows,) * len(networks.resolutions),
    )


def _captions(
    config: TrainBenchmarkConfig | SampleBenchmarkConfig, networks: MatryoshkaConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(B, L, D) random embeddings, and a mask with every token real."""
    shape = (config.batch, config.text_tokens, networks.text_dim or 0)
    return torch.randn(shape, generator=generator), torch.ones(shape[:2], dtype=torch.bool)


def _autocast(config: NetworkBenchmarkConfig, device: torch.device) -> Callable[[], torch.autocast]:
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def _compile(network: nn.Module) -> None:
    """Compiles what the network does when called, and leaves its hooks outside."""
    network.forward = torch.compile(network.forward)


def _leave_channels_last(network: nn.Module) -> None:
    """Puts the weights, and the pictures that come in, into NCHW order."""
    network.to(memory_format=torch.contiguous_format)

    def relaid(module: nn.Module, args: Any) -> Any:
        return ([x.contiguous() for x in args[0]], *args[1:])

    network.register_forward_pre_hook(relaid)
