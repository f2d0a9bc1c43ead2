"""Writing checkpoints: whole or not at all, by one thread beside the training, and only then older ones go."""

import copy
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace

import torch
from torch import Tensor

from pipelines import storage
from pipelines.train.checkpoint import (
    MANIFEST,
    Checkpoint,
    Manifest,
    State,
    checkpoint_uri,
    list_checkpoints,
    stage_and_images,
)
from pipelines.train.ema_snapshots import snapshot_uri, to_stored
from pipelines.train.run_lock import Fence
from pipelines.train.tensor_files import write_tensors

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run while the run goes on, until the block ends.

    One checkpoint and one snapshot of averages are under way at most, so that the memory for them is bounded: what they
    hold is copied to the CPU once, and freed file by file. All are written by one thread, in the order of the calls.
    What went wrong there is raised by the next call, and nothing is written after it.
    """

    def __init__(self, run_uri: str, *, keep: int, fence: Fence | None = None) -> None:
        """Writes nothing yet.

        Args:
            run_uri: Folder of the run.
            keep: Checkpoints of the current stage that are kept.
            fence: This writer's right to write there; None where nobody else can.
        """
        self._run_uri, self._keep, self._fence = run_uri, keep, fence
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: dict[str, Future[None]] = {}
        self._has_failed = False
        self.blocked_s = 0.0
        """Seconds that the training stood still here: for the copies, and for the save before."""

    def __enter__(self) -> "CheckpointWriter":
        # What a killed writer left of files that were not whole; nobody else may be writing here.
        storage.delete_unfinished(self._run_uri, older_than_s=0, now_s=time.time())
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            if failure is not error:
                log.warning("a checkpoint could not be written: %s", failure)
        finally:
            self._thread.shutdown()

    def save(self, manifest: Manifest, tensors: Mapping[str, State]) -> None:
        """Writes a checkpoint of what the tensors are now; once it is safe, older ones go (see `prune_checkpoints`).

        Raises:
            WorkError: An earlier one could not be written.
        """

        def write(manifest: Manifest, copies: dict[str, State]) -> None:
            uri = checkpoint_uri(self._run_uri, stage=manifest.stage, images_seen=manifest.images_seen)
            _write(uri, manifest, copies, self._fence)
            # Its own, and not those of an attempt that has followed it meanwhile.
            if self._fence is not None:
                self._fence.check()
            prune_checkpoints(self._run_uri, stage=manifest.stage, images_seen=manifest.images_seen, keep=self._keep)

        self._submit("checkpoint", manifest, tensors, write)

    def save_snapshot(self, manifest: Manifest, averages: State) -> None:
        """Writes a snapshot of averages, `PowerEmaTracker.state_dict`, to be kept for good (see `ema_snapshots`).

        Raises:
            WorkError: An earlier one could not be written.
        """

        def write(manifest: Manifest, copies: dict[str, State]) -> None:
            uri = snapshot_uri(self._run_uri, stage=manifest.stage, images_seen=manifest.images_seen)
            _write(uri, manifest, to_stored(copies.pop("averages")), self._fence)

        self._submit("snapshot", manifest, {"averages": averages}, write)

    def wait(self) -> None:
        """Returns once everything is written.

        Raises:
            WorkError: Something could not be.
        """
        for kind in list(self._pending):
            self._pending[kind].result()

    def _submit(
        self,
        kind: str,
        manifest: Manifest,
        tensors: Mapping[str, State],
        write: Callable[[Manifest, dict[str, State]], None],
    ) -> None:
        began_s = time.monotonic()
        for known, pending in self._pending.items():
            if known == kind or pending.done():
                pending.result()
        copies, copied = _copies(tensors)
        # Its metrics go on changing.
        self._pending[kind] = self._thread.submit(self._run, write, copy.deepcopy(manifest), copies, copied)
        self.blocked_s += time.monotonic() - began_s

    def _run(
        self,
        write: Callable[[Manifest, dict[str, State]], None],
        manifest: Manifest,
        copies: dict[str, State],
        copied: Callable[[], object],
    ) -> None:
        if self._has_failed:
            return
        try:
            copied()
            write(manifest, copies)
        except BaseException:
            self._has_failed = True
            raise


def save_checkpoint(
    run_uri: str, manifest: Manifest, tensors: Mapping[str, State], *, fence: Fence | None = None
) -> Checkpoint:
    """Writes a checkpoint of a run, and returns it once it is whole.

    Raises:
        WorkError: It could not be written, or this is not the writer of the folder any more.
    """
    uri = checkpoint_uri(run_uri, stage=manifest.stage, images_seen=manifest.images_seen)
    return _write(uri, manifest, dict(tensors), fence)


def prune_checkpoints(run_uri: str, *, stage: int, images_seen: int, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of a stage, all but the last of each stage before it, and halves.

    The newest is that of so many images of the stage. Later ones are of before the run went back, as from damage.

    Halves are what an upload that was cut has left: folders without a manifest.
    """
    by_stage: dict[int, list[str]] = {}
    for uri in list_checkpoints(run_uri):
        numbers = stage_and_images(uri)
        assert numbers is not None
        if numbers > (stage, images_seen):
            _delete(uri)
            continue
        by_stage.setdefault(numbers[0], []).append(uri)
    for index, uris in by_stage.items():
        for uri in uris[: -(keep if index == stage else 1)]:
            _delete(uri)
    whole = {uri for uris in by_stage.values() for uri in uris}
    folders = {file.rpartition("/")[0] for file in storage.list_files(run_uri)}
    for folder in folders - whole:
        if stage_and_images(folder):
            storage.delete(folder)


def _write(uri: str, manifest: Manifest, tensors: dict[str, State], fence: Fence | None) -> Checkpoint:
    """Writes a folder, and takes each file's tensors out of `tensors` once they are written."""
    check = fence.check if fence is not None else lambda: None
    check()
    # A half, or one that was damaged.
    _delete(uri)
    files = {}
    while tensors:
        name = next(iter(tensors))
        file = f"{name}.safetensors"
        header = manifest.model_header() if name == "weights" or name.startswith("ema") else None
        files[file] = write_tensors(storage.join(uri, file), tensors[name], header, before_commit=check)
        del tensors[name]
    whole = replace(manifest, files=files)
    check()
    storage.write_bytes_atomic(storage.join(uri, MANIFEST), json.dumps(asdict(whole), indent=1).encode())
    return Checkpoint(uri, whole)


def _delete(uri: str) -> None:
    # The manifest goes first: a deletion that is cut leaves a folder that is no checkpoint.
    storage.delete(storage.join(uri, MANIFEST))
    storage.delete(uri)


def _copies(tensors: Mapping[str, State]) -> tuple[dict[str, State], Callable[[], object]]:
    """Copies on the CPU, and what waits until they are there: those of a GPU are made while it computes on."""
    copies = {name: {key: _copy(value.detach()) for key, value in state.items()} for name, state in tensors.items()}
    on_gpu = {value.device for state in tensors.values() for value in state.values() if value.is_cuda}
    # Queued behind the copies, and ahead of what changes the tensors next.
    events = [torch.cuda.current_stream(device).record_event() for device in on_gpu]
    return copies, lambda: [event.synchronize() for event in events]


def _copy(value: Tensor) -> Tensor:
    copied = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return copied.copy_(value, non_blocking=True)
