"""Checkpoints: folders of safetensors that are whole or not there at all.

`RUN/stage-0/images-000000032000/` holds `weights.safetensors`, `ema.safetensors`, `optimizer.safetensors` and
`manifest.json`. The manifest is written last and carries the checksum of every other file: a folder without one is
an upload that was cut, and is never read. `weights` and `ema` are model files as well (`mdm_core.model_file`): alone,
away from their folder, they still say what they are.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.model_file import header_metadata
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType
from pipelines import storage

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_MODEL_FILES = ("weights", "ema")
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
    prediction_type: PredictionType = "v"
    """What the network answers; checkpoints from before there was a choice have v."""

    def matryoshka(self) -> MatryoshkaConfig:
        """The networks of this stage."""
        return MatryoshkaConfig.from_dict(self.network)

    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of the run."""
        return NoiseSchedule(**self.schedule)

    def model_header(self) -> dict[str, str]:
        """The metadata with which a file of weights is a model file."""
        kept = ("text_encoder", "max_tokens", "stage", "images_seen", "total_images_seen")
        said = {name: getattr(self, name) for name in kept} | {"name": self.config.get("name", "")}
        return header_metadata(self.matryoshka(), self.noise_schedule(), self.prediction_type, said)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint at a URI."""

    uri: str
    manifest: Manifest

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `weights`, `ema` or `optimizer`, on the CPU.

        Raises:
            CheckpointError: The file is missing, or not the one that was written.
        """
        file = f"{name}.safetensors"
        try:
            data = storage.read_bytes(storage.join(self.uri, file))
        except (FileNotFoundError, ConfigError) as error:
            raise CheckpointError(f"{self.uri} has lost its {file}; use an older checkpoint") from error
        if hashlib.sha256(data).hexdigest() != self.manifest.files.get(file):
            raise CheckpointError(f"{self.uri}/{file} is damaged: its checksum is not the manifest's")
        try:
            return load(data)
        except SafetensorError as error:
            raise CheckpointError(f"{self.uri}/{file} can't be read: {error}") from error


def checkpoint_uri(run_uri: str, stage: int, images_seen: int) -> str:
    """The folder of a run's checkpoint after so many images of a stage."""
    return storage.join(run_uri, f"stage-{stage}", f"images-{images_seen:012d}")


def save_checkpoint(run_uri: str, manifest: Manifest, tensors: Mapping[str, dict[str, Tensor]]) -> Checkpoint:
    """Writes a checkpoint of a run, and returns it once it is whole."""
    uri = checkpoint_uri(run_uri, manifest.stage, manifest.images_seen)
    files = {}
    for name, values in tensors.items():
        header = manifest.model_header() if name in _MODEL_FILES else None
        data = save({key: value.detach().contiguous().cpu() for key, value in values.items()}, header)
        files[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
        storage.write_bytes_atomic(storage.join(uri, f"{name}.safetensors"), data)
    whole = Manifest(**asdict(manifest) | {"files": files})
    storage.write_bytes_atomic(storage.join(uri, MANIFEST), json.dumps(asdict(whole), indent=1).encode())
    return Checkpoint(uri, whole)


def open_checkpoint(uri: str) -> Checkpoint:
    """The checkpoint at `uri`, or the newest of the run at `uri`.

    Raises:
        ConfigError: There is none.
    """
    if storage.exists(storage.join(uri, MANIFEST)):
        return Checkpoint(uri, _read_manifest(uri))
    newest = latest_checkpoint(uri)
    if newest is None:
        raise ConfigError(
            f"{uri} holds no checkpoint; give the folder of a run, or of one checkpoint (stage-…/images-…)"
        )
    return newest


def latest_checkpoint(run_uri: str) -> Checkpoint | None:
    """The newest checkpoint of a run whose files are what its manifest says; damaged ones are named and passed over.

    Returns:
        None if the run has no checkpoint yet.

    Raises:
        CheckpointError: It has some, and none can be used.
    """
    found = list_checkpoints(run_uri)
    for uri in reversed(found):
        try:
            checkpoint = Checkpoint(uri, _read_manifest(uri))
            for name in checkpoint.manifest.files:
                checkpoint.tensors(name.removesuffix(".safetensors"))
        except CheckpointError as error:
            log.warning("%s; going back to the checkpoint before", error)
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
        if path.endswith(f"/{MANIFEST}") and (match := _NAME.search(path.removesuffix(f"/{MANIFEST}"))):
            found.append((int(match[1]), int(match[2])))
    return [checkpoint_uri(run_uri, stage, images_seen) for stage, images_seen in sorted(found)]


def stage_ends(run_uri: str) -> list[Manifest]:
    """Manifests of the last checkpoint of each finished stage, in order."""
    manifests = []
    for uri in list_checkpoints(run_uri):
        try:
            manifests.append(_read_manifest(uri))
        except CheckpointError as error:
            log.warning("%s; its stage is left out of the report", error)
    return [manifest for manifest in manifests if manifest.stage_done]


def prune_checkpoints(run_uri: str, *, stage: int, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of a stage, and all but the last of each stage before it."""
    by_stage: dict[int, list[str]] = {}
    for uri in list_checkpoints(run_uri):
        match = _NAME.search(uri)
        assert match is not None
        by_stage.setdefault(int(match[1]), []).append(uri)
    for index, uris in by_stage.items():
        for uri in uris[: -(keep if index == stage else 1)]:
            # The manifest goes first: a deletion that is cut leaves a folder that is no checkpoint.
            storage.delete(storage.join(uri, MANIFEST))
            storage.delete(uri)


def _read_manifest(uri: str) -> Manifest:
    try:
        return Manifest(**json.loads(storage.read_bytes(storage.join(uri, MANIFEST))))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{uri}/{MANIFEST} is damaged, or of another version of mdm: {error}") from error
