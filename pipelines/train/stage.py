"""One stage of training on one worker, step by step. It knows nothing of Ray: rank and workers are numbers."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mdm_core.nested_unet import NestedUNet, build_network
from mdm_core.progressive import grow
from mdm_core.unet import UNet
from pipelines.data.table.sample_table import SampleTable
from pipelines.embed.live import open_embeddings
from pipelines.train.checkpoint import Checkpoint, Manifest, State, checkpoint_uri
from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.config import TrainConfig
from pipelines.train.ema_snapshots import EMA_LENGTHS
from pipelines.train.finite import FiniteCheck
from pipelines.train.hooks import Hooks
from pipelines.train.ingest.batch import Batch
from pipelines.train.ingest.mix import rows_per_step
from pipelines.train.ingest.reader import BatchReader
from pipelines.train.ingest.selection import Selection, select_rows
from pipelines.train.initial import InitialFile, begin_from, read_initial_weights
from pipelines.train.loss_window import LossWindow, WindowMeans
from pipelines.train.place import Place
from pipelines.train.preemption import PreemptionNotice
from pipelines.train.run_lock import Owner
from pipelines.train.speed import Speed
from pipelines.train.step import TrainState, freeze_inner, losses, new_state, optimizer_step


@dataclass(frozen=True)
class RunContext:
    """What is settled before any worker starts."""

    config: TrainConfig
    table_version: int
    """The number that `latest` stood for when the run began."""
    run_id: str
    """MLflow run of the training."""
    initial: Mapping[int, InitialFile] = field(default_factory=dict)
    """What stages begin from whose configuration says so, as `find_initial_weights` gives it."""
    owner: Owner | None = None
    """Who holds the folder of the run; None where nobody else can write there."""
    selection: Selection | None = None
    """The rows that are trained on; found by each worker if empty."""
    trace: str | None = None
    """Local folder in which each worker writes down what it does (see `trace`); none does if empty."""


class StageRun:
    """A stage of the run, from its start or from a checkpoint of it."""

    def __init__(
        self, context: RunContext, index: int, *, place: Place, hooks: Hooks, writer: CheckpointWriter | None
    ) -> None:
        """Opens what the stage reads.

        Args:
            context: The run.
            index: The stage, from 0.
            place: This worker.
            hooks: What is told and asked on the way.
            writer: Writes the checkpoints; on rank 0 only.
        """
        self.context, self.index, self.place, self.hooks, self.writer = context, index, place, hooks, writer
        self.config, self.stage = context.config, context.config.stages[index]
        self.table = SampleTable.open(self.config.data.table, context.table_version)
        text = self.config.text
        self.store = open_embeddings(
            self.table,
            text.encoder,
            max_tokens=text.max_tokens,
            precomputed=text.precomputed,
            device=str(place.device),
        )
        self.selection = context.selection or select_rows(self.table, self.config.data.where)
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
        """Trains to the end of the stage, and returns its averaged weights.

        Raises:
            AgreedError: The gradients of a step are not finite, and the run is to stop there.
        """
        window = LossWindow(self.place, num_timesteps=self.config.model.num_timesteps)
        finite = FiniteCheck(self.place, self.config.on_nan, num_skipped=int(self.metrics.get("steps_skipped", 0)))
        preemption, waited_s = PreemptionNotice(self.hooks), 0.0
        with self._reader() as reader:
            for batches in self._steps(reader):
                lr = self.stage.learning_rate(self.images_seen)
                # Each by itself: joined they would not be pinned any more, and the host would wait for the device.
                timestep = torch.cat([b.timestep.to(self.place.device, non_blocking=True) for b in batches])
                rows = self._accumulate(batches)
                norm = optimizer_step(self.state, lr=lr, max_grad_norm=self.stage.max_grad_norm)
                window.add(rows, timestep, norm)
                ids = [i for batch in batches for i in batch.ids]
                finite.add(self.state.step - 1, norm=norm, rows=rows, ids=ids)
                self.hooks.stepped(self.state.step, ids, reader.wait_s)
                done = self.state.step == self.stage.num_steps
                is_reported = done or self.state.step % self.config.log_every_steps == 0
                if done:
                    finite.check()
                if is_reported:
                    means = window.take(waited_s=reader.wait_s - waited_s)
                    self._report(means, lr, finite.num_skipped)
                    preemption.measured(means.agreed_step_s)
                    waited_s = reader.wait_s
                self._save(finite, done, is_preempted=preemption.is_new(is_reported=is_reported))
                if done:
                    break
        return self.state.ema.state_dict()

    def _steps(self, reader: BatchReader) -> Iterator[tuple[Batch, ...]]:
        """This worker's share of each step that is left, and the network made ready for it."""
        steps = reader.steps(
            self.state.step,
            global_batch_size=self.stage.global_batch_size,
            rank=self.place.rank,
            workers=self.place.workers,
            micro_batch_size=self.config.scaling.micro_batch_size,
        )
        freeze_inner(self.state.network, self._inner_is_frozen(self.images_seen))
        self._network = self._distributed(self.state.network)
        for batches in steps:
            if freeze_inner(self.state.network, self._inner_is_frozen(self.images_seen)):
                # The exchange among workers knows what trains. Two would hold the same weights: the old one goes first.
                self._network = self.state.network
                gc.collect()
                self._network = self._distributed(self.state.network)
            yield batches

    def _accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Adds up the gradients of this worker's share of a step; returns the (R, B) losses of its rows."""
        rows: list[Tensor] = []
        # Of workers the gradients are averaged, of rows the mean over the whole batch is wanted.
        share = self.place.workers / self.stage.global_batch_size
        for number, batch in enumerate(batches, start=1):
            with self._unsynchronized(number < len(batches)):
                with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self._uses_bfloat16):
                    rows.append(losses(self._network, batch.to(self.place.device), **self._objective))
                (rows[-1].sum() * share).backward()
        return torch.cat(rows, dim=1).detach()

    def _unsynchronized(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        if wanted and isinstance(self._network, DistributedDataParallel):
            return self._network.no_sync()
        return contextlib.nullcontext()

    @functools.cached_property
    def _objective(self) -> dict[str, Any]:
        resolutions, mix, batch = self.networks.resolutions, self.stage.resolution_mix, self.stage.global_batch_size
        return {
            "alpha_bars": self.schedule.alpha_bars(resolutions).to(self.place.device),
            "resolutions": resolutions,
            "resolution_weights": self.stage.resolution_weights or (1.0,) * len(resolutions),
            "weighting": self.stage.loss_weighting,
            "min_snr_gamma": self.stage.min_snr_gamma,
            "divisors": self.schedule.signal_divisors(resolutions),
            "prediction_type": self.config.model.prediction_type,
            "row_shares": None if mix is None else [n / batch for n in rows_per_step(mix, batch)],
        }

    @property
    def _uses_bfloat16(self) -> bool:
        return self.config.scaling.dtype(on_gpu=self.place.device.type == "cuda") == "bfloat16"

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
            ema_length=self.stage.ema,
            average_lengths=EMA_LENGTHS if keeps_snapshots else (),
        )

    def _checkpointed(self, network: UNet) -> list[str]:
        """The levels to run twice; those of networks that have not been grown yet are left out."""
        named = self.config.scaling.checkpoint_levels
        return [name for name in network.levels() if name in named or "all" in named]

    def _distributed(self, network: UNet) -> nn.Module:
        compiled: nn.Module = network
        if self.config.scaling.compile:
            # What was compiled for the sizes of the stage before would make every size here a variable.
            torch.compiler.reset()
            compiled = torch.compile(network)  # type: ignore[assignment]
        if self.place.workers == 1:
            return compiled
        devices = [self.place.device] if self.place.device.type == "cuda" else None
        # Gradients lie in what is sent, not beside it: 4 bytes a parameter less.
        return DistributedDataParallel(compiled, device_ids=devices, gradient_as_bucket_view=True)

    @functools.cached_property
    def _speed(self) -> Speed:
        return Speed(
            self.networks,
            self.place,
            bfloat16=self._uses_bfloat16,
            text_tokens=self.config.text.max_tokens,
            mix=self.stage.resolution_mix,
        )

    def _reader(self) -> BatchReader:
        data = self.config.data
        return BatchReader(
            self.table,
            self.store,
            self.selection,
            resolutions=self.networks.resolutions,
            seed=self.config.seed,
            stage=self.index,
            num_timesteps=self.config.model.num_timesteps,
            max_tokens=self.config.text.max_tokens,
            fill_text=not self.networks.networks[-1].mask_text,
            resolution_mix=self.stage.resolution_mix,
            drop_prob=self.config.text.drop_prob,
            flip=data.flip,
            crop=data.crop,
            shuffle_row_groups=data.shuffle_row_groups,
            prefetch_steps=data.prefetch_steps,
            num_threads=self.config.scaling.cpus_per_worker,
            pin_memory=self.place.device.type == "cuda",
        )

    def _just_passed(self, every_images: int) -> bool:
        return self.images_seen // every_images > (self.images_seen - self.stage.global_batch_size) // every_images

    def _report(self, means: WindowMeans, lr: float, num_skipped: int) -> None:
        loss = sum(means.by_resolution)
        self.metrics.setdefault("loss_first", loss)
        self.metrics["loss_last"] = loss
        self.metrics["steps_skipped"] = num_skipped
        self.metrics["seconds"] = self.metrics.get("seconds", 0.0) + means.seconds
        self.metrics["images_per_s"] = self.images_seen / self.metrics["seconds"]
        self.hooks.reported(self.index, self.images_seen)
        if self.place.rank != 0:
            return
        shown = {
            **means.losses(self.networks.resolutions),
            "lr": lr,
            "grad_norm": means.grad_norm,
            "steps_skipped": num_skipped,
            "data_wait_fraction": means.waited_s / means.seconds,
            "workers": self.place.workers,
            "checkpoint_blocked_s": self.writer.blocked_s if self.writer is not None else 0.0,
            **self._speed.metrics(means.steps * self.stage.global_batch_size / means.seconds),
        }
        self.hooks.post({"stage": self.index, "images": self.images_seen, "metrics": shown})

    def _save(self, finite: FiniteCheck, done: bool, *, is_preempted: bool) -> None:
        """Writes what is due after this step: a snapshot of the averages, a checkpoint."""
        snapshots_every = self.config.checkpoint.ema_snapshots_every_images
        snapshot_is_due = snapshots_every is not None and (done or self._just_passed(snapshots_every))
        checkpoint_is_due = done or is_preempted or self._just_passed(self.config.checkpoint.every_images)
        if snapshot_is_due or checkpoint_is_due:
            # After gradients that are to stop the run, a checkpoint would pass over them in silence.
            finite.check()
        # Ahead of the checkpoint: a run that goes on from there does not come by here again.
        if snapshot_is_due and self.writer is not None and self.state.averages is not None:
            self.writer.save_snapshot(self._manifest(done), self.state.averages.state_dict())
        if not checkpoint_is_due:
            return
        if self.writer is not None:
            self.writer.save(self._manifest(done), self.state.tensors())
            if is_preempted:
                self.writer.wait()
        uri = checkpoint_uri(self.config.checkpoint.uri, stage=self.index, images_seen=self.images_seen)
        wait = self.writer.wait if self.writer is not None else lambda: None
        self.hooks.saved(uri, self.index, self.images_seen, wait)

    def _manifest(self, done: bool) -> Manifest:
        before = sum(stage.num_images for stage in self.config.stages[: self.index])
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
            selection=self.selection.digest,
            text_encoder=self.config.text.encoder,
            max_tokens=self.config.text.max_tokens,
            run_id=self.context.run_id,
            code_version=version("mdm"),
            metrics=self.metrics,
            initial_weights=self.initial_weights,
        )
