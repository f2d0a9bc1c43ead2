"""What each Ray Train worker runs: the stages that are left."""

import contextlib
import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import CheckpointUploadMode, ValidationTaskConfig

from mdm_core.errors import ConfigError, MdmError, WorkError
from pipelines.tracking import SystemMetrics
from pipelines.train.checkpoint import Checkpoint, latest_checkpoint, read_manifest
from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.finite import AgreedError
from pipelines.train.hooks import Hooks
from pipelines.train.initial import InitialFile
from pipelines.train.place import Place
from pipelines.train.preview import Preview
from pipelines.train.run_lock import take_fence
from pipelines.train.stage import RunContext, StageRun
from pipelines.train.trace import Trace

if TYPE_CHECKING:
    from pipelines.sample.generator import Pictures


def train_worker(arguments: dict[str, Any]) -> None:
    """Trains every stage that is left, from the newest checkpoint on.

    Args:
        arguments: `context`, a `RunContext`, and `board`, the actor that takes what the driver shows and logs.
    """
    context: RunContext = arguments["context"]
    scaling = context.config.scaling
    torch.set_num_threads(scaling.cpus_per_worker)
    ranks = ray.train.get_context()
    device = ray.train.torch.get_device() if scaling.gpus_per_worker else torch.device("cpu")
    place = Place(ranks.get_world_rank(), ranks.get_world_size(), device)
    board = arguments["board"]
    hooks = _RayHooks(
        board,
        place,
        node=ranks.get_node_rank(),
        previews=bool(context.config.preview.captions),
        trace=Trace(context.trace, rank=place.rank) if context.trace is not None else Hooks(),
    )
    try:
        hooks.reached("began")
        train_stages(context, place=place, hooks=hooks)
    except MdmError as error:
        ray.get(board.put.remote({"error": str(error)}))
        # Ray would try again what can only end the same way, on a full disk for one. But where others wait for this
        # worker, nothing else ends them; and an elastic run that is down to one worker is not at its end.
        if scaling.max_workers > 1 and not isinstance(error, AgreedError):
            raise


def train_stages(context: RunContext, *, place: Place, hooks: Hooks) -> None:
    """Trains what the newest checkpoint leaves to do; every worker runs it, with its own `place`."""
    with _writer(context) if place.rank == 0 else contextlib.nullcontext() as writer:
        start = _agreed_start(context.config.checkpoint.uri, place)
        hooks.reached("opened", checkpoint=None if start is None else start.uri)
        if start is not None:
            _check_same_rows(context, start)
        first = 0 if start is None else start.manifest.stage + start.manifest.stage_done
        inner = start.tensors("ema") if start is not None and start.manifest.stage_done else None
        for index in range(first, len(context.config.stages)):
            stage = StageRun(context, index, place=place, hooks=hooks, writer=writer)
            if start is not None and start.manifest.stage == index:
                stage.resume(start)
            elif context.config.stages[index].init_from is not None:
                stage.start_from(_initial_of(context, index))
            elif inner is not None:
                stage.grow_from(inner)
            hooks.reached("loaded")
            # On the CPU, and nothing else of the stage, so that the next one has the device to itself.
            inner = {name: value.cpu() for name, value in stage.run().items()}
            del stage
            gc.collect()


def _initial_of(context: RunContext, index: int) -> InitialFile:
    if index not in context.initial:
        raise WorkError(
            f"stage {index} has to begin anew, though the run was started to go on after it: its checkpoint is "
            "damaged; run it again"
        )
    return context.initial[index]


def _agreed_start(run_uri: str, place: Place) -> Checkpoint | None:
    """The newest checkpoint as rank 0 sees it, once nobody else can add any; the others take its word for it."""
    start = latest_checkpoint(run_uri) if place.rank == 0 else None
    if place.workers == 1:
        return start
    said = [None if start is None else start.uri]
    torch.distributed.broadcast_object_list(said, src=0, device=place.device)
    if place.rank == 0 or said[0] is None:
        return start
    return Checkpoint(said[0], read_manifest(said[0]))


def _writer(context: RunContext) -> CheckpointWriter:
    checkpoint = context.config.checkpoint
    fence = take_fence(checkpoint.uri, context.owner) if context.owner is not None else None
    return CheckpointWriter(checkpoint.uri, keep=checkpoint.keep, fence=fence)


class _RayHooks(Hooks):
    """Sends events to the board, lets Ray Train make previews and tell of preemptions, and keeps a trace if wanted."""

    def __init__(self, board: Any, place: Place, *, node: int, previews: bool, trace: Hooks) -> None:
        self._board, self._place, self._previews, self._trace = board, place, previews, trace
        self._system = SystemMetrics(f"node-{node}") if ray.train.get_context().get_local_rank() == 0 else None

    def post(self, event: dict[str, Any]) -> None:
        self._board.put.remote(event)

    def reported(self, stage: int, images: int) -> None:
        if self._system is None:
            return
        with contextlib.suppress(OSError, psutil.Error):
            self.post({"stage": stage, "images": images, "system": self._system.take()})

    def reached(self, point: str, **further: Any) -> None:
        self._trace.reached(point, **further)

    def stepped(self, step: int, ids: Sequence[bytes], waited_s: float) -> None:
        self._trace.stepped(step, ids, waited_s)

    def saved(self, uri: str, stage: int, images: int, wait: Callable[[], None]) -> None:
        if not self._previews:
            return

        notes = ray.train.get_context().get_storage()

        def whole(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            # What goes wrong here is raised where the next checkpoint is saved, and the preview finds none.
            with contextlib.suppress(MdmError):
                wait()
            # Ray takes nothing for a checkpoint but a folder among its own notes; this one says where the real one is.
            folder = f"{notes.experiment_fs_path}/{name}"
            notes.storage_filesystem.create_dir(folder)
            with notes.storage_filesystem.open_output_stream(f"{folder}/checkpoint.txt") as file:
                file.write(uri.encode())
            return ray.train.Checkpoint(folder, notes.storage_filesystem)

        # Every worker must come here; rank 0 alone has something to hand in.
        is_first = self._place.rank == 0
        ray.train.report(
            {},
            checkpoint=ray.train.Checkpoint(notes.experiment_fs_path, notes.storage_filesystem) if is_first else None,
            # On a thread of Ray's, which tells the preview once the checkpoint is written.
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=whole,
            delete_local_checkpoint_after_upload=False,
            validation=ValidationTaskConfig({"uri": uri, "stage": stage, "images": images}) if is_first else False,
        )

    def preemption(self) -> str:
        info = ray.train.get_preemption_info()
        return "" if info is None else f"nodes {', '.join(info.preempted_node_ids)}"


def make_pictures(preview: Preview, uri: str) -> "dict[int, Pictures]":
    """Has a task of its own make a preview's pictures.

    Raises:
        MdmError: There are none: of the checkpoint, or because the task came to nothing.
    """
    config = preview.config
    task = ray.remote(_pictures).options(num_cpus=config.cpus, num_gpus=config.gpus, max_retries=0).remote(preview, uri)
    try:
        pictures: dict[int, Pictures] = ray.get(task, timeout=config.timeout_s)
        return pictures
    except MdmError:
        raise
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(task, force=True)
        raise WorkError(f"it was not made within preview.timeout_s={config.timeout_s:g}") from error
    except ray.exceptions.RayError as error:
        raise WorkError(f"its task failed: {str(error).splitlines()[0]}") from error


def _pictures(preview: Preview, uri: str) -> "dict[int, Pictures]":
    torch.set_num_threads(max(preview.config.cpus, 1))
    return preview.pictures(uri)


def _check_same_rows(context: RunContext, start: Checkpoint) -> None:
    """Raises ConfigError if a checkpoint was trained on other rows than the run is about to be, as by another run."""
    manifest = start.manifest
    digest = context.selection.digest if context.selection is not None else manifest.selection
    if manifest.table_version != context.table_version or manifest.selection not in ("", digest):
        raise ConfigError(
            f"{start.uri} was trained on other rows (version {manifest.table_version} of the table), and came after "
            "this run had looked; run it again, and it goes on from there"
        )
