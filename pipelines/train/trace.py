"""What each worker of a run did and when, for whoever measures it: lines of JSON, one file a process."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipelines.train
from pipelines.train.hooks import Hooks


class Trace(Hooks):
    """Writes a line for each thing that one worker tells.

    A line is with the kernel when the call returns, so that SIGKILL loses none. Nothing waits for the device: there, a
    step that is told of may still be computed.
    """

    def __init__(self, folder: str, *, rank: int) -> None:
        """Makes the file of this process, `FOLDER/rank-RANK-pid-PID.jsonl`.

        Args:
            folder: A local folder that is there.
            rank: Of this worker.
        """
        path = Path(folder) / f"rank-{rank}-pid-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._write({"point": "imported"}, at_s=pipelines.train.IMPORTED_S)

    def reached(self, point: str, **further: Any) -> None:
        """Writes it down."""
        self._write({"point": point, **further})

    def stepped(self, step: int, ids: Sequence[bytes], waited_s: float) -> None:
        """Writes it down, with the ids in hexadecimal."""
        self._write({"step": step, "ids": [one.hex() for one in ids], "waited_s": waited_s})

    def _write(self, line: dict[str, Any], *, at_s: float | None = None) -> None:
        line = {"time_s": time.time() if at_s is None else at_s, **line}
        os.write(self._file, json.dumps(line).encode() + b"\n")
