"""One writer in a run's folder: a lock that outlives its run only for moments, and a fence against late writers.

`RUN/lock/00000003.json` says who took the folder as the third. Such a file is made only if there is none of its number
(a conditional put on S3), so of several who try one succeeds; the highest number holds the folder.
`RUN/lock/TOKEN.beat` is renewed by the run of that token every few seconds while it lives.

What is guaranteed:

- A run that lives is not disturbed: a second one is refused, and told whose folder it is.
- A run that died is followed at once where its end can be seen (its process is gone from this machine), elsewhere
  after `stale_s` without a beat. Clocks of two machines are compared for hours, not for seconds.
- Each attempt of a run's rank 0 takes the next number without waiting for the attempt before. Whoever has a lower one
  is refused by its next `Fence.check`, right before each file of a checkpoint and before its manifest. What is left is
  the time from a check to the end of the put after it: a writer that sleeps just there may replace one file late, which
  the checksum in the manifest tells, and the checkpoint before is used.
- On object storage without conditional puts, two that start in the same instant may both begin; the check before the
  first file ends one of them.
"""

import contextlib
import json
import logging
import os
import platform
import secrets
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mdm_core.errors import ConfigError, WorkError
from pipelines import storage
from pipelines.remote import as_os_error

log = logging.getLogger(__name__)

_FOLDER = "lock"
_LONG_AGO = 60
"""So many times `stale_s` without a beat need no watching."""
_TORN_S = 1.0
"""A lock file without its content is one being written, if only for so long."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A run that holds a folder: one call of `mdm train`, with its workers and all their attempts."""

    token: str
    """Tells it from every other."""
    host: str
    """Name of the machine that the command runs on."""
    machine: str
    """Where its process id means something; empty where that is not known."""
    pid: int
    """Process of the command."""
    process_began: str
    """When that process began, as the kernel counts; tells it from a later one with its id."""
    began_s: float
    """When the run began, in seconds since 1970."""

    @classmethod
    def this_process(cls) -> "Owner":
        """A new owner, for the command that runs in this process."""
        return cls(
            token=secrets.token_hex(8),
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            process_began=_process_began(os.getpid()),
            began_s=time.time(),
        )

    def __str__(self) -> str:
        began = datetime.fromtimestamp(self.began_s, UTC).isoformat(sep=" ", timespec="seconds")
        return f"process {self.pid} of {self.host}, which began at {began}"

    def is_here(self) -> bool:
        """Whether its process can be looked at from here."""
        return bool(self.machine) and self.machine == _machine()

    def is_gone(self) -> bool:
        """Whether its process is known to have ended."""
        return self.is_here() and _process_began(self.pid) != self.process_began


_NOBODY = Owner(token="", host="", machine="", pid=0, process_began="", began_s=0.0)


@dataclass(frozen=True)
class Fence:
    """A number of the folder at `uri`, given to one writer."""

    uri: str
    owner: Owner
    number: int
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells it from another of the same number."""

    def check(self) -> None:
        """Returns if this writer holds the folder.

        Raises:
            WorkError: It does not, any more.
        """
        held = _held(self.uri)
        if held is None or held.mark != self.mark:
            by = "a later attempt of its run" if held and held.owner.token == self.owner.token else held and held.owner
            raise WorkError(f"{self.uri} was taken over by {by or 'nobody'}; this process writes nothing more there")


class RunLock:
    """Holds a run's folder while the block lasts; its workers write there by `take_fence`."""

    def __init__(self, uri: str, *, beat_s: float = 10.0, stale_s: float = 60.0, owner: Owner | None = None) -> None:
        """Takes nothing yet.

        Args:
            uri: Folder of the run.
            beat_s: Seconds between two signs of life.
            stale_s: Seconds without one after which a run on another machine counts as dead.
            owner: Who holds it; this process if None.
        """
        self.uri, self._beat_s, self._stale_s = uri, beat_s, stale_s
        self.owner = owner or Owner.this_process()
        """Goes to the workers, who call `take_fence` with it."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)

    def __enter__(self) -> "RunLock":
        """Takes the folder.

        Raises:
            ConfigError: A run that lives holds it.
            WorkError: It can't be written to.
        """
        while True:
            held = _held(self.uri)
            if held is not None:
                self._outwait(held.owner)
            if _take(self.uri, self.owner, after=held) is not None:
                break
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(WorkError):
            if not self.is_lost():
                self._beat(released=True)

    def is_lost(self) -> bool:
        """Whether another run has taken the folder, this one having been silent for too long."""
        held = _held(self.uri)
        return held is None or held.owner.token != self.owner.token

    def _outwait(self, holder: Owner) -> None:
        """Returns once a holder is known to be gone; raises ConfigError if it lives."""
        first = _read_beat(self.uri, holder)
        if first["released"] or holder.is_gone() or time.time() - first["at_s"] > _LONG_AGO * self._stale_s:
            return
        lives = ConfigError(
            f"{self.uri} is being written to by {holder}; two runs can't share a folder: wait for that one to end, "
            "stop it, or give this run another checkpoint.uri"
        )
        if holder.is_here():
            raise lives
        log.warning(
            "%s was last held by %s; watching for a sign of life, %g s at most", self.uri, holder, self._stale_s
        )
        deadline_s = time.monotonic() + self._stale_s
        while time.monotonic() < deadline_s:
            time.sleep(min(1.0, self._beat_s / 2))
            beat = _read_beat(self.uri, holder)
            if beat["released"]:
                return
            if beat != first:
                raise lives

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                if self.is_lost():
                    log.error("%s was taken over by another run; nothing more is written there", self.uri)
                    return
                self._beat()
            except Exception as error:
                # Whatever it is: the next one may come through.
                log.warning("no sign of life could be left at %s: %s", self.uri, error)

    def _beat(self, *, released: bool = False) -> None:
        beat = {"at_s": time.time(), "released": released}
        storage.write_bytes_atomic(_beat_uri(self.uri, self.owner.token), json.dumps(beat).encode())


def take_fence(uri: str, owner: Owner) -> Fence:
    """Makes the caller the only writer in a folder that its run holds; the one before is fenced out.

    Raises:
        WorkError: Another run holds it.
    """
    while True:
        held = _held(uri)
        if held is None or held.owner.token != owner.token:
            raise WorkError(
                f"{uri} is no more this run's to write to; it is held by {held.owner if held else 'nobody'}"
            )
        if (fence := _take(uri, owner, after=held)) is not None:
            return fence


def _take(uri: str, owner: Owner, *, after: Fence | None) -> Fence | None:
    """The fence of the number after `after`, unless somebody else has it."""
    fence = Fence(uri, owner, after.number + 1 if after else 1)
    content = json.dumps({"owner": asdict(owner), "mark": fence.mark}).encode()
    if not storage.create(_number_uri(uri, fence.number), content):
        return None
    # A number is free again once higher ones are there.
    held = _held(uri)
    if held is None or held.mark != fence.mark:
        return None
    if after is not None:
        storage.delete(_number_uri(uri, after.number))
        if after.owner.token != owner.token:
            storage.delete(_beat_uri(uri, after.owner.token))
    return fence


def _held(uri: str) -> Fence | None:
    """Who has the highest number; None if nobody has any."""
    torn_since_s: float | None = None
    while True:
        try:
            with as_os_error():
                files = storage.list_files(storage.join(uri, _FOLDER))
                numbers = [int(Path(file).stem) for file in files if file.endswith(".json")]
                if not numbers:
                    return None
                number = max(numbers)
                content = storage.read_bytes(_number_uri(uri, number))
        except FileNotFoundError:
            continue  # there is a higher one by now
        except OSError as error:
            raise WorkError(
                f"{storage.join(uri, _FOLDER)} can't be read: {error}; who may write there is not known"
            ) from error
        try:
            said = json.loads(content)
            return Fence(uri, Owner(**said["owner"]), number, said["mark"])
        except (ValueError, TypeError, KeyError) as error:
            torn_since_s = torn_since_s or time.monotonic()
            if time.monotonic() - torn_since_s > _TORN_S:
                log.warning("%s says nothing (%s): its writer died over it", _number_uri(uri, number), error)
                return Fence(uri, _NOBODY, number)
            time.sleep(_TORN_S / 10)


def _read_beat(uri: str, owner: Owner) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read_bytes(_beat_uri(uri, owner.token))))
    except FileNotFoundError:
        return {"at_s": owner.began_s, "released": False}


def _number_uri(uri: str, number: int) -> str:
    return storage.join(uri, _FOLDER, f"{number:08d}.json")


def _beat_uri(uri: str, token: str) -> str:
    return storage.join(uri, _FOLDER, f"{token}.beat")


def _machine() -> str:
    """This boot of this machine, and this namespace of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}" if _process_began(os.getpid()) else ""
    except OSError:
        return ""


def _process_began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]
