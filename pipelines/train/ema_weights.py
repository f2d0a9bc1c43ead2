"""`mdm ema`: averaged weights of any length, from the snapshots that a training has kept."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mdm_core.ema import Snapshot, reconstruct, reconstruction_weights
from mdm_core.errors import CheckpointError, ConfigError, MdmError
from pipelines.train.checkpoint import Checkpoint, Manifest, State
from pipelines.train.ema_snapshots import lengths_of, list_snapshots, snapshot_name, stages_with_snapshots
from pipelines.train.tensor_files import write_tensors

log = logging.getLogger(__name__)

_ROUNDING = 2.0**-12
_TRIED_LENGTHS = [number / 200 for number in range(1, 56)]


@dataclass(frozen=True, kw_only=True)
class EmaReport:
    """Weights that were made."""

    out: str
    """The model file."""
    length: float
    """Length of the average, as a share of the images up to `images`."""
    stage: int
    """Stage of the run."""
    images: int
    """Images of the stage that the average ends at."""
    snapshots: int
    """Files of averages that it was made from."""
    left_out: tuple[str, ...]
    """Damaged ones, and what is wrong with each."""
    error: float
    """Distance of its profile from the one that was asked for, as a share of that one's norm; 0 for a stored one."""
    rounding: float
    """What the snapshots' float16 makes of a weight, as a share of it: rounding errors of 2^-12, added like noise."""

    def as_dict(self) -> dict[str, Any]:
        """The object of `--json`."""
        return {**vars(self), "left_out": list(self.left_out)}


def rebuild_ema(
    run_uri: str, *, length: float, out: str, stage: int | None = None, images: int | None = None, max_error: float
) -> EmaReport:
    """Writes a model file with the average of a length; a damaged snapshot is named, and done without if that will do.

    Args:
        run_uri: Folder of the run.
        length: Standard deviation of the average's profile, as a share of the images so far; in (0, 0.28).
        out: File to write, ending in .safetensors.
        stage: Stage; the last with snapshots if None.
        images: Images of the stage that the average ends at; those of its last snapshot if None.
        max_error: Largest distance of the profile from the one that is wanted, as a share of its norm.

    Raises:
        ConfigError: There are no snapshots, or none that give this average.
        CheckpointError: Without those that are damaged, the others do not give it.
    """
    stage, found = _snapshots_of(run_uri, stage)
    last = found[-1].manifest.images_seen
    images = last if images is None else images
    if not 0 < images <= last:
        raise ConfigError(
            f"images={images} must be between 1 and {last}, where the last snapshot of stage {stage} of {run_uri} is"
        )
    # Where none is at `images`, only the next one has seen what comes just before.
    end = next(s.manifest.images_seen for s in found if s.manifest.images_seen >= images)
    stored = [_Stored(s, each) for s in found if s.manifest.images_seen <= end for each in lengths_of(s)]
    left_out: list[str] = []
    while True:
        error, gain = _fit(stored, length, images, max_error, left_out, where=f"stage {stage} of {run_uri}")
        try:
            weights = reconstruct([each.snapshot() for each in stored], length, images, max_error=float("inf"))
            break
        except _DamagedError as damaged:
            log.warning("%s; going on without it", damaged)
            left_out.append(str(damaged))
            stored.remove(damaged.stored)
    _write(out, weights, stored[-1].folder.manifest, length=length, images=images, error=error)
    return EmaReport(
        out=out,
        length=length,
        stage=stage,
        images=images,
        snapshots=len(stored),
        left_out=tuple(left_out),
        error=error,
        rounding=gain * _ROUNDING,
    )


@dataclass(frozen=True)
class _Stored:
    """One file of a snapshot."""

    folder: Checkpoint
    length: float

    @property
    def images(self) -> int:
        return self.folder.manifest.images_seen

    def snapshot(self) -> Snapshot:
        # The steps of a stage are of as many images each, so that images count the time as well.
        return Snapshot(self.images, self.length, self._read)

    def _read(self) -> State:
        try:
            return self.folder.tensors(snapshot_name(self.length))
        except CheckpointError as error:
            raise _DamagedError(self, str(error)) from error


class _DamagedError(Exception):
    """A file of a snapshot could not be read."""

    def __init__(self, stored: _Stored, message: str) -> None:
        super().__init__(message)
        self.stored = stored


def _snapshots_of(run_uri: str, stage: int | None) -> tuple[int, list[Checkpoint]]:
    if stage is None:
        stages = stages_with_snapshots(run_uri)
        stage = max(stages, default=0)
    found = list_snapshots(run_uri, stage=stage)
    if not found:
        raise ConfigError(
            f"stage {stage} of {run_uri} has no snapshots of averages; give the folder of a run that was trained with "
            "checkpoint.ema_snapshots_every_images"
        )
    return stage, found


def _fit(
    stored: Sequence[_Stored], length: float, images: int, max_error: float, left_out: Sequence[str], *, where: str
) -> tuple[float, float]:
    """The error of the combination that comes closest, and its gain of noise; raises where the error is too large."""
    kind: type[MdmError] = CheckpointError if left_out else ConfigError
    without = f" once {len(left_out)} damaged ones are left out" if left_out else ""
    if not stored or stored[-1].images < images:
        raise kind(f"{where} has no snapshot of {images} images or more{without}; ask for fewer images")
    if any((each.images, each.length) == (images, length) for each in stored):
        return 0.0, 1.0
    steps, lengths = [each.images for each in stored], [each.length for each in stored]
    weights, error = reconstruction_weights(steps, lengths, relative_length=length, step=images)
    if error <= max_error:
        return error, float((weights**2).sum() ** 0.5)
    errors = {
        tried: reconstruction_weights(steps, lengths, relative_length=tried, step=images)[1] for tried in _TRIED_LENGTHS
    }
    possible = [tried for tried, error_there in errors.items() if error_there <= max_error]
    fix = f"lengths from {possible[0]} to {possible[-1]} can be made" if possible else "no length can be made"
    raise kind(
        f"the {len(stored)} snapshots of {where}{without} give an average of length {length} at {images} images with "
        f"an error of {error:.2g}, more than max_error={max_error}; {fix} there, and more where snapshots are closer "
        "to each other or end at the very images"
    )


def _write(out: str, weights: State, manifest: Manifest, *, length: float, images: int, error: float) -> None:
    header = manifest.model_header(
        images_seen=images,
        total_images_seen=manifest.total_images_seen - manifest.images_seen + images,
        ema_length=length,
        ema_error=error,
    )
    write_tensors(out, weights, header)
