"""Snapshots of averaged weights, from which an average of any length is made after the training (arXiv 2312.02696).

`RUN/stage-0/ema/images-000000032000/` holds a model file for each of `EMA_LENGTHS`, as `ema-0.05.safetensors`, and a
manifest like a checkpoint's. They are never pruned.

They are float16, as in the paper, which halves their room and rounds each weight by 2^-12 of it at most. In a
combination of snapshots that grows by the root of the sum of its squared coefficients: not at all for lengths from 0.05
on, six times for 0.03, eighteen times for 0.02 (of 100 snapshots); `mdm ema` says it. A tensor with a number beyond
float16's range stays float32.
"""

import logging
import re
from collections.abc import Iterable

import torch

from mdm_core.errors import CheckpointError
from pipelines import storage
from pipelines.train.checkpoint import MANIFEST, Checkpoint, State, read_manifest

log = logging.getLogger(__name__)

EMA_LENGTHS = (0.05, 0.10)
"""Lengths of the averages that are kept, as shares of the stage so far."""
_FOLDER = re.compile(r"/images-(\d+)/" + re.escape(MANIFEST) + "$")


def snapshot_uri(run_uri: str, *, stage: int, images_seen: int) -> str:
    """Where a run keeps the snapshot of a stage after so many of its images."""
    return storage.join(run_uri, f"stage-{stage}", "ema", f"images-{images_seen:012d}")


def snapshot_name(length: float) -> str:
    """Name of the file of one length, without its ending."""
    return f"ema-{length}"


def list_snapshots(run_uri: str, *, stage: int) -> list[Checkpoint]:
    """The whole snapshots of a stage, oldest first; those whose manifest can't be read are named and left out."""
    found = []
    for file in storage.list_files(storage.join(run_uri, f"stage-{stage}", "ema")):
        if match := _FOLDER.search(file):
            uri = snapshot_uri(run_uri, stage=stage, images_seen=int(match[1]))
            try:
                found.append(Checkpoint(uri, read_manifest(uri)))
            except CheckpointError as error:
                log.warning("%s; going on without this snapshot", error)
    return sorted(found, key=lambda snapshot: snapshot.manifest.images_seen)


def stages_with_snapshots(run_uri: str) -> set[int]:
    """The stages of a run that have snapshots."""
    files = storage.list_files(run_uri)
    return {int(match[1]) for file in files if (match := re.search(r"/stage-(\d+)/ema/images-\d+/", file))}


def lengths_of(snapshot: Checkpoint) -> list[float]:
    """The lengths that a snapshot has."""
    return [float(file.removeprefix("ema-").removesuffix(".safetensors")) for file in snapshot.manifest.files]


def to_stored(averages: State) -> dict[str, State]:
    """Averages as `PowerEmaTracker.state_dict` gives them, file by file in the precision they are stored in.

    The dictionary that is given is emptied, so that hardly more than one copy is in memory.
    """
    files: dict[str, State] = {}
    for key in list(averages):
        length, _, name = key.partition("/")
        value = averages.pop(key)
        if value.is_floating_point():
            half = value.half()
            value = half if _all_finite([half]) or not _all_finite([value]) else value
        files.setdefault(snapshot_name(float(length)), {})[name] = value
    return files


def _all_finite(values: Iterable[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values)
