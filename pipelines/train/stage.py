"""One stage of training on one worker, step by step. It knows nothing of Ray: rank and workers are numbers."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mdm_core.nested_unet import NestedUNet, build_network
from mdm_core.progressive import grow
from mdm_core.unet import UNet
from pipelines.data.table import SampleTable
from pipelines.embed.store import EmbeddingStore
from pipelines.sample.generator import Generator
from pipelines.train.batches import BatchReader
from pipelines.train.checkpoint import Checkpoint, Manifest, State
from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.config import TrainConfig
from pipelines.train.ema_snapshots import EMA_LENGTHS
from pipelines.train.initial import InitialFile, begin_from, read_initial_weights
from pipelines.train.run_lock import Owner
from pipelines.train.step import TrainState, freeze_inner, learning_rate, losses, new_state, optimizer_step

Post = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RunContext:
    """What is settled before any worker starts."""

    config: TrainConfig
    table_version: int
    """The number that `latest` stood for when the run began."""
    run_id: str
    """MLflow run of the training."""
    preview_text: tuple[Tensor, Tensor] | None = None
    """Encoded captions, (B, L, D) and (B, L), of the pictures made at each checkpoint."""
    initial: Mapping[int, InitialFile] = field(default_factory=dict)
    """What stages begin from whose configuration says so, as `find_initial_weights` gives it."""
    owner: Owner | None = None
    """Who holds the folder of the run; None where nobody else can write there."""


@dataclass(frozen=True)
class Place:
    """Which of the workers this is, and where it computes."""

    rank: int = 0
    workers: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class StageRun:
    """A stage of the run, from its start or from a checkpoint of it."""

    def __init__(
        self, context: RunContext, index: int, *, place: Place, post: Post, writer: CheckpointWriter | None
    ) -> None:
        """Opens what the stage reads.

        Args:
            context: The run.
            index: The stage, from 0.
            place: This worker.
            post: Takes events for the driver: metrics and pictures. Called on rank 0 only.
            writer: Writes the checkpoints; on rank 0 only.
        """
        self.context, self.index, self.place, self.post, self.writer = context, index, place, post, writer
        self.config, self.stage = context.config, context.config.stages[index]
        self.table = SampleTable.open(self.config.data.table, context.table_version)
        self.store = EmbeddingStore.open(self.table, self.config.text.encoder, max_tokens=self.config.text.max_tokens)
        self.networks = self.config.model.matryoshka(self.store.width).up_to(self.stage.resolution)
        self.schedule = self.config.model.noise_schedule()
        self.metrics: dict[str, float] = {}
        self.initial_weights: dict[str, str] | None = None
        self.state = self._new_state(lambda network: None)

    def grow_from(self, inner: State) -> None:
        """Starts the stage from the averaged weights of the one before."""

        def begin(network: UNet) -> None:
            assert isinstance(network, NestedUNet)
            grow(network, inner)

        self.state = self._new_state(begin)

    def start_from(self, file: InitialFile) -> None:
        """Starts the stage from the weights that its configuration names."""
        weights, checksum = read_initial_weights(file)
        self.initial_weights = {"uri": file.uri, "sha256": checksum}
        self.state = self._new_state(lambda network: begin_from(network, self.networks, weights))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint of this stage."""
        self.initial_weights = checkpoint.manifest.initial_weights
        # As in the step before it: what was frozen then has no moments.
        freeze_inner(self.state.network, self._inner_is_frozen(checkpoint.manifest.images_seen - 1))
        self.state.load(checkpoint.tensors, step=checkpoint.manifest.images_seen // self.stage.global_batch_size)
        self.metrics = dict(checkpoint.manifest.metrics)

    def run(self) -> State:
        """Trains to the end of the stage, and returns its averaged weights."""
        stage, state = self.stage, self.state
        alpha_bars = self.schedule.alpha_bars(self.networks.resolutions).to(self.place.device)
        weights = stage.resolution_weights or (1.0,) * len(self.networks.resolutions)
        freeze_inner(state.network, self._inner_is_frozen(self.images_seen))
        network = self._distributed(state.network)
        window = LossWindow(self.place)
        if state.step == 0 and self.place.rank == 0:
            self._post_pictures()
        for batch in self._batches():
            if freeze_inner(state.network, self._inner_is_frozen(self.images_seen)):
                # The exchange among workers knows what trains. Two would hold the same weights: the old one goes first.
                del network
                gc.collect()
                network = self._distributed(state.network)
            lr = self._learning_rate()
            with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.place.device.type == "cuda"):
                rows = losses(
                    network,
                    batch.to(self.place.device),
                    alpha_bars=alpha_bars,
                    resolutions=self.networks.resolutions,
                    resolution_weights=weights,
                    weighting=stage.loss_weighting,
                    min_snr_gamma=stage.min_snr_gamma,
                    divisors=self.schedule.signal_divisors(self.networks.resolutions),
                    prediction_type=self.config.model.prediction_type,
                )
            rows.sum(dim=0).mean().backward()
            window.add(rows.detach(), optimizer_step(state, lr=lr, max_grad_norm=stage.max_grad_norm))
            done = state.step == stage.num_steps
            if done or state.step % self.config.log_every_steps == 0:
                self._report(window, lr)
            if self.writer is not None:
                self._save(self.writer, done)
            if done:
                break
        return state.ema.state_dict()

    @property
    def images_seen(self) -> int:
        """Images of this stage that have been trained on, by all workers together."""
        return self.state.step * self.stage.global_batch_size

    def _inner_is_frozen(self, images_seen: int) -> bool:
        """Whether the networks inside keep their weights in the step that takes image `images_seen`."""
        batch = self.stage.global_batch_size
        return images_seen // batch * batch < self.stage.freeze_inner_images

    def _new_state(self, begin: Callable[[UNet], None]) -> TrainState:
        torch.manual_seed(self.config.seed + self.index)
        network = build_network(self.networks)
        begin(network)
        network.checkpoint_levels(self._checkpointed(network))
        network = network.to(self.place.device)
        keeps_snapshots = self.writer is not None and self.config.checkpoint.ema_snapshots_every_images is not None
        return new_state(
            network,
            weight_decay=self.stage.weight_decay,
            ema_length=self.stage.ema_length,
            average_lengths=EMA_LENGTHS if keeps_snapshots else (),
        )

    def _checkpointed(self, network: UNet) -> list[str]:
        """The levels to run twice; those of networks that have not been grown yet are left out."""
        named = self.config.scaling.checkpoint_levels
        return [name for name in network.levels() if name in named or "all" in named]

    def _distributed(self, network: UNet) -> nn.Module:
        if self.place.workers == 1:
            return network
        return DistributedDataParallel(network, device_ids=[self.place.device] if self.place.device.index else None)

    def _batches(self) -> Any:
        reader = BatchReader(
            self.table,
            self.store,
            resolutions=self.networks.resolutions,
            seed=self.config.seed,
            stage=self.index,
            num_timesteps=self.config.model.num_timesteps,
            max_tokens=self.config.text.max_tokens,
            drop_prob=self.config.text.drop_prob,
            flip=self.config.data.flip,
            shuffle_shards=self.config.data.shuffle_shards,
        )
        return reader.steps(
            self.state.step,
            global_batch_size=self.stage.global_batch_size,
            rank=self.place.rank,
            workers=self.place.workers,
        )

    def _learning_rate(self) -> float:
        stage = self.stage
        return learning_rate(
            self.images_seen,
            peak=stage.lr,
            warmup_images=stage.warmup_images,
            total_images=stage.num_steps * stage.global_batch_size,
            decay=stage.decay,
        )

    def _just_passed(self, every_images: int) -> bool:
        return self.images_seen // every_images > (self.images_seen - self.stage.global_batch_size) // every_images

    def _report(self, window: "LossWindow", lr: float) -> None:
        by_resolution, grad_norm, steps, seconds = window.take()
        loss = sum(by_resolution)
        self.metrics.setdefault("loss_first", loss)
        self.metrics["loss_last"] = loss
        self.metrics["seconds"] = self.metrics.get("seconds", 0.0) + seconds
        self.metrics["images_per_s"] = self.images_seen / self.metrics["seconds"]
        if self.place.rank == 0:
            shown = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
            shown["images_per_s"] = steps * self.stage.global_batch_size / seconds
            sides = self.networks.resolutions
            shown |= {f"loss_{side}": value for side, value in zip(sides, by_resolution, strict=True)}
            self.post({"stage": self.index, "images": self.images_seen, "metrics": shown})

    def _save(self, writer: CheckpointWriter, done: bool) -> None:
        snapshots_every = self.config.checkpoint.ema_snapshots_every_images
        # Ahead of the checkpoint: a run that goes on from there does not come by here again.
        if self.state.averages is not None and snapshots_every and (done or self._just_passed(snapshots_every)):
            writer.save_snapshot(self._manifest(done), self.state.averages.state_dict())
        if done or self._just_passed(self.config.checkpoint.every_images):
            writer.save(self._manifest(done), self.state.tensors())
            self._post_pictures()

    def _post_pictures(self) -> None:
        if self.context.preview_text is not None:
            pictures = self._preview(*self.context.preview_text)
            self.post({"stage": self.index, "images": self.images_seen, "pictures": pictures})

    def _manifest(self, done: bool) -> Manifest:
        before = sum(s.num_steps * s.global_batch_size for s in self.config.stages[: self.index])
        return Manifest(
            stage=self.index,
            images_seen=self.images_seen,
            total_images_seen=before + self.images_seen,
            stage_done=done,
            network=self.networks.to_dict(),
            schedule=self.config.model.schedule_arguments(),
            prediction_type=self.config.model.prediction_type,
            config=self.config.model_dump(mode="json"),
            table_uri=self.table.uri,
            table_version=self.table.version,
            text_encoder=self.config.text.encoder,
            max_tokens=self.config.text.max_tokens,
            run_id=self.context.run_id,
            code_version=version("mdm"),
            metrics=self.metrics,
            initial_weights=self.initial_weights,
        )

    def _preview(self, text_emb: Tensor, text_mask: Tensor) -> dict[int, Any]:
        """Pictures of the preview captions from the averaged weights, (B, r, r, 3) by resolution."""
        network = build_network(self.networks)
        network.load_state_dict(self.state.ema.state_dict())
        network = network.to(self.place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = Generator(network, self.schedule, prediction_type=self.config.model.prediction_type)
        levels = generator.generate_from_text(
            text_emb,
            text_mask,
            noise_ids=range(len(text_emb)),
            seed=self.config.seed,
            guidance_scale=self.config.preview.guidance_scale,
            num_inference_steps=self.config.preview.num_inference_steps,
        )
        return dict(zip(self.networks.resolutions, levels, strict=True))


class LossWindow:
    """Losses and gradient norms since the last report, kept on the device until they are taken."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._clear()

    def add(self, rows: Tensor, grad_norm: Tensor) -> None:
        """Takes in the (R, B) losses of one step and its gradient norm."""
        self._sums.append(torch.cat([rows.mean(dim=1), grad_norm[None]]))

    def take(self) -> tuple[list[float], float, int, float]:
        """Mean loss of each resolution over all workers, mean gradient norm, steps, seconds; then begins anew."""
        means = torch.stack(self._sums).mean(dim=0)
        if self._place.workers > 1:
            torch.distributed.all_reduce(means)
            means /= self._place.workers
        *by_resolution, grad_norm = means.tolist()
        steps, seconds = len(self._sums), time.monotonic() - self._began_s
        self._clear()
        return by_resolution, grad_norm, steps, seconds

    def _clear(self) -> None:
        self._sums: list[Tensor] = []
        self._began_s = time.monotonic()
