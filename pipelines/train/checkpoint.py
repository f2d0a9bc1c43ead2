"""Checkpoints: folders of safetensors that are whole or not there at all. `checkpoint_writer` makes them.

`RUN/stage-0/images-000000032000/` holds `weights.safetensors`, `ema.safetensors`, `optimizer.safetensors`, where
snapshots of averages are kept (`ema_snapshots`) also `averages.safetensors`, and `manifest.json`. The manifest is
written last and carries the checksum of every other file: a folder without one is an upload that was cut, and is never
read. `weights` and `ema` are model files as well (`mdm_core.model_file`): alone, away from their folder, they still say
what they are.
"""

import errno
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import CheckpointError, ConfigError, WorkError
from mdm_core.model_file import header_metadata
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType
from pipelines import storage
from pipelines.train.tensor_files import read_tensors

log = logging.getLogger(__name__)

State = dict[str, Tensor]

MANIFEST = "manifest.json"
_NAME = re.compile(r"stage-(\d+)/images-(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is, beside its tensors."""

    stage: int
    """Index of the stage, from 0."""
    images_seen: int
    """Images of this stage, repeats included."""
    total_images_seen: int
    """Images of all stages up to here."""
    stage_done: bool
    """Whether the stage ends here."""
    network: dict[str, Any]
    """The networks of this stage: `MatryoshkaConfig.to_dict`."""
    schedule: dict[str, Any]
    """Arguments of the `NoiseSchedule`."""
    config: dict[str, Any]
    """The resolved configuration of the run."""
    table_uri: str
    """The table that was trained on."""
    table_version: int
    """Its version."""
    text_encoder: str
    """Encoder of the captions."""
    max_tokens: int
    """Tokens of a caption that were kept."""
    run_id: str
    """MLflow run of the training."""
    code_version: str
    """Version of this package."""
    metrics: dict[str, float]
    """loss_first, loss_last, images_per_s, and seconds of this stage."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each other file of the checkpoint."""
    selection: str = ""
    """Digest of the rows that are trained on; checkpoints from before it was kept have none."""
    prediction_type: PredictionType = "v"
    """What the network answers; checkpoints from before there was a choice have v."""
    initial_weights: dict[str, str] | None = None
    """`uri` and `sha256` of the file that the stage began from, if the configuration named one."""

    def matryoshka(self) -> MatryoshkaConfig:
        """The networks of this stage."""
        return MatryoshkaConfig.from_dict(self.network)

    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of the run."""
        return NoiseSchedule(**self.schedule)

    def model_header(self, **further: Any) -> dict[str, str]:
        """The metadata with which a file of weights is a model file; `further` adds to it, or says otherwise."""
        kept = ("text_encoder", "max_tokens", "stage", "images_seen", "total_images_seen")
        said = {name: getattr(self, name) for name in kept} | {"name": self.config.get("name", "")} | further
        return header_metadata(self.matryoshka(), self.noise_schedule(), self.prediction_type, said)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint at a URI."""

    uri: str
    manifest: Manifest
    passed_over: tuple[str, ...] = ()
    """What is wrong with each newer checkpoint of the run."""
    _verified: dict[str, State] = field(default_factory=dict, repr=False, compare=False)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, as `tensors` takes it."""
        return f"{name}.safetensors" in self.manifest.files

    def tensors(self, name: str) -> State:
        """The tensors of `weights`, `ema`, `optimizer` or `averages`, on the CPU.

        They are mapped from the file, or from a copy of it that is gone with them: copy those that are to outlive it.

        Raises:
            CheckpointError: The file is missing, or not the one that was written.
            WorkError: It can't be read now.
        """
        # Each caller has tensors of its own: they may be written to.
        return self._verified.pop(name, None) or self._read(name)

    def verify(self, names: Sequence[str]) -> None:
        """Compares files with their checksums; the first call of `tensors` for each of them does not read it again.

        Raises:
            CheckpointError: One is missing, or not the one that was written.
        """
        for name in names:
            self._verified[name] = self._read(name)

    def release(self) -> None:
        """Lets go of what `verify` has read, for whoever wants the manifest only."""
        self._verified.clear()

    def _read(self, name: str) -> State:
        file = f"{name}.safetensors"
        try:
            tensors, checksum = read_tensors(storage.join(self.uri, file))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.uri} has lost its {file}; use an older checkpoint") from error
        except OSError as error:
            # A server that does not answer is no reason to use an older checkpoint; a disk with a bad sector is.
            kind = CheckpointError if error.errno == errno.EIO else WorkError
            raise kind(f"{self.uri}/{file} can't be read: {error}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{self.uri}/{file} is damaged: {error}") from error
        if checksum != self.manifest.files.get(file):
            raise CheckpointError(f"{self.uri}/{file} is damaged: its checksum is not the manifest's")
        return tensors


def open_checkpoint(uri: str) -> Checkpoint:
    """The checkpoint at `uri`, or the newest of the run at `uri` whose averaged weights are what they should be.

    Raises:
        ConfigError: There is none.
    """
    if storage.exists(storage.join(uri, MANIFEST)):
        return Checkpoint(uri, read_manifest(uri))
    newest = latest_checkpoint(uri, used=["ema"])
    if newest is None:
        raise ConfigError(
            f"{uri} holds no checkpoint; give the folder of a run, or of one checkpoint (stage-…/images-…)"
        )
    return newest


def latest_checkpoint(run_uri: str, *, used: Sequence[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint of a run whose files are what its manifest says; damaged ones are named and passed over.

    Args:
        run_uri: Folder of the run.
        used: Files that are looked at, by name; none looks at the manifest alone. None is what a training needs that
            goes on from there: all of a stage that is under way, the averaged weights of one that is done.

    Returns:
        None if the run has no checkpoint yet.

    Raises:
        CheckpointError: It has some, and none can be used.
    """
    found = list_checkpoints(run_uri)
    damaged: list[str] = []
    for uri in reversed(found):
        try:
            checkpoint = Checkpoint(uri, read_manifest(uri), tuple(damaged))
            needed = ["ema"] if checkpoint.manifest.stage_done else _names(checkpoint.manifest)
            checkpoint.verify(needed if used is None else used)
        except CheckpointError as error:
            log.warning("%s; going back to the checkpoint before", error)
            damaged.append(str(error))
            continue
        return checkpoint
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints of {run_uri} can be used: they are damaged, or of another version "
            "of mdm; use that version, or give the run another checkpoint.uri"
        )
    return None


def list_checkpoints(run_uri: str) -> list[str]:
    """URIs of the checkpoints of a run that have a manifest, oldest first."""
    found = []
    for path in storage.list_files(run_uri):
        if path.endswith(f"/{MANIFEST}") and (numbers := stage_and_images(path.removesuffix(f"/{MANIFEST}"))):
            found.append(numbers)
    return [checkpoint_uri(run_uri, stage=stage, images_seen=images) for stage, images in sorted(found)]


def stage_ends(run_uri: str) -> list[Manifest]:
    """Manifests of the last checkpoint of each finished stage, in order."""
    manifests = []
    for uri in list_checkpoints(run_uri):
        try:
            manifests.append(read_manifest(uri))
        except CheckpointError as error:
            log.warning("%s; its stage is left out of the report", error)
    return [manifest for manifest in manifests if manifest.stage_done]


def read_manifest(uri: str) -> Manifest:
    """The manifest of the folder at `uri`.

    Raises:
        CheckpointError: It is missing, damaged, or of another version.
    """
    try:
        return Manifest(**json.loads(storage.read_bytes(storage.join(uri, MANIFEST))))
    except FileNotFoundError as error:
        raise CheckpointError(f"{uri} has lost its {MANIFEST}; use an older checkpoint") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{uri}/{MANIFEST} is damaged, or of another version of mdm: {error}") from error


def checkpoint_uri(run_uri: str, *, stage: int, images_seen: int) -> str:
    """Where a run keeps the checkpoint of a stage after so many of its images."""
    return storage.join(run_uri, f"stage-{stage}", f"images-{images_seen:012d}")


def stage_and_images(uri: str) -> tuple[int, int] | None:
    """The two numbers in the URI of a checkpoint; None if it is no such URI."""
    match = _NAME.search(uri)
    return (int(match[1]), int(match[2])) if match else None


def _names(manifest: Manifest) -> list[str]:
    return [file.removesuffix(".safetensors") for file in manifest.files]
