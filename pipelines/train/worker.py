"""What each Ray Train worker runs: the stages that are left."""

from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode, ValidationTaskConfig

from mdm_core.errors import MdmError
from pipelines import storage
from pipelines.tracking import SystemMetrics
from pipelines.train.checkpoint import latest_checkpoint
from pipelines.train.finite import AgreedError
from pipelines.train.place import Place
from pipelines.train.stage import Hooks, RunContext, StageRun


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
    hooks = _RayHooks(board, place, node=ranks.get_node_rank(), previews=bool(context.config.preview.captions))
    try:
        train_stages(context, place=place, hooks=hooks)
    except MdmError as error:
        ray.get(board.put.remote({"error": str(error)}))
        # Ray would try again what can only end the same way, on a full disk for one. But where others wait for this
        # worker, nothing else ends them.
        if place.workers > 1 and not isinstance(error, AgreedError):
            raise


def train_stages(context: RunContext, *, place: Place, hooks: Hooks) -> None:
    """Trains what the newest checkpoint leaves to do; every worker runs it, with its own `place`."""
    start = latest_checkpoint(context.config.checkpoint.uri)
    first = 0 if start is None else start.manifest.stage + start.manifest.stage_done
    inner = start.tensors("ema") if start is not None and start.manifest.stage_done else None
    for index in range(first, len(context.config.stages)):
        stage = StageRun(context, index, place=place, hooks=hooks)
        if start is not None and start.manifest.stage == index:
            stage.resume(start)
        elif inner is not None:
            stage.grow_from(inner)
        inner = stage.run()


class _RayHooks(Hooks):
    """Sends events to the board, and lets Ray Train make previews and tell of preemptions."""

    def __init__(self, board: Any, place: Place, *, node: int, previews: bool) -> None:
        self._board, self._place, self._previews = board, place, previews
        self._system = SystemMetrics(f"node-{node}") if ray.train.get_context().get_local_rank() == 0 else None

    def post(self, event: dict[str, Any]) -> None:
        self._board.put.remote(event)

    def reported(self, stage: int, images: int) -> None:
        if self._system is not None:
            self.post({"stage": stage, "images": images, "system": self._system.take()})

    def saved(self, uri: str, stage: int, images: int) -> None:
        if not self._previews:
            return
        # Every worker must come here; rank 0 alone has something to hand in.
        is_first = self._place.rank == 0
        filesystem, path = storage.arrow_filesystem(uri)
        ray.train.report(
            {},
            checkpoint=Checkpoint(path, filesystem) if is_first else None,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            validation=ValidationTaskConfig({"uri": uri, "stage": stage, "images": images}) if is_first else False,
        )

    def preemption(self) -> str:
        info = ray.train.get_preemption_info()
        return "" if info is None else f"nodes {', '.join(info.preempted_node_ids)}"
