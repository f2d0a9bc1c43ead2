"""What each Ray Train worker runs: the stages that are left."""

import contextlib
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed

from mdm_core.errors import MdmError
from pipelines.train.checkpoint import Checkpoint, latest_checkpoint, read_manifest
from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.run_lock import take_fence
from pipelines.train.stage import Place, Post, RunContext, StageRun


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
    try:
        train_stages(context, place=place, post=lambda event: board.put.remote(event))
    except MdmError as error:
        ray.get(board.put.remote({"error": str(error)}))
        # Ray would try again what can only end the same way, on a full disk for one. But where others wait for this
        # worker, nothing else ends them.
        if place.workers > 1:
            raise


def train_stages(context: RunContext, *, place: Place, post: Post) -> None:
    """Trains what the newest checkpoint leaves to do; every worker runs it, with its own `place`."""
    with _writer(context) if place.rank == 0 else contextlib.nullcontext() as writer:
        start = _agreed_start(context.config.checkpoint.uri, place)
        first = 0 if start is None else start.manifest.stage + start.manifest.stage_done
        inner = start.tensors("ema") if start is not None and start.manifest.stage_done else None
        for index in range(first, len(context.config.stages)):
            stage = StageRun(context, index, place=place, post=post, writer=writer)
            if start is not None and start.manifest.stage == index:
                stage.resume(start)
            elif context.config.stages[index].init_from is not None:
                stage.start_from(context.initial[index])
            elif inner is not None:
                stage.grow_from(inner)
            inner = stage.run()


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
