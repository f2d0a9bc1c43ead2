"""The checks of the accounting proof: what a refresh made of a TroubleList, against what the server knows it served."""

import contextlib
import hashlib
import io
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.stats import table_stats
from pipelines.data.table.sample_table import SampleTable
from tests.pipelines.data.refresh_process import RefreshProcess
from tests.pipelines.data.trouble_list import (
    ALLOWED_NETWORKS,
    KINDS,
    MAX_BYTES,
    MAX_REDIRECTS,
    MIN_SIDE_PX,
    RETRIES,
    SOURCE_NAME,
    TroubleList,
)
from tests.pipelines.data.trouble_server import Served, TroubleServer

_SIZE_PX = 48
_TIMEOUT_S = 1800.0
_COUNTS = ("links", "ok", "filtered", "failed", "duplicate", "malformed", "unchanged")
_COLUMNS = (
    "id", "url", "caption", "source", "outcome", "reason", "retryable", "attempts", "sha256", "image", "format",
    "width", "height", "original_width", "original_height",
)  # fmt: skip


@dataclass
class Checks:
    """Comparisons made so far."""

    num_passed: int = 0
    failed: list[str] = field(default_factory=list)

    def equal(self, name: str, got: object, wanted: object) -> None:
        """Compares, and prints a line about it."""
        if got == wanted:
            self.num_passed += 1
            print(f"ok    {name}{_brief(wanted)}", flush=True)
        else:
            self.failed.append(name)
            print(f"FAIL  {name}: got {got!r}, wanted {wanted!r}", flush=True)

    def each(self, name: str, got: Mapping[Any, object], wanted: Mapping[Any, object]) -> None:
        """Compares two mappings, and prints how many values they hold, or the first that differ."""
        wrong = [key for key in wanted if key not in got or got[key] != wanted[key]]
        wrong += [key for key in got if key not in wanted]
        if not wrong:
            self.equal(f"{name} ({len(wanted):,})", True, True)
            return
        shown = [f"{key}: got {got.get(key)!r}, wanted {wanted.get(key)!r}" for key in wrong[:5]]
        self.failed.append(name)
        print(f"FAIL  {name}: {len(wrong):,} of {len(wanted):,} differ\n      " + "\n      ".join(shown), flush=True)


class Proof:
    """Refreshes of one list, and the checks of what came of them.

    Args:
        server: Serves the links.
        folder: For files of this machine; its name must be short, as Ray makes sockets in it.
        base: URI of the folder for the list and the tables.
        shard_rows: Links a shard.
        deadline_s: Seconds for a link, of which good ones need little even on a busy machine.
        num_workers: Processes on Ray that fetch; with 1 the refresh fetches itself.
    """

    def __init__(
        self, server: TroubleServer, folder: Path, base: str, *, shard_rows: int, deadline_s: float = 10.0,
        num_workers: int = 2,
    ) -> None:  # fmt: skip
        self.server = server
        self.links: TroubleList = server.links
        self.checks = Checks()
        self._folder = folder
        self._base = base
        self._shard_rows = shard_rows
        self._deadline_s = deadline_s
        self._num_workers = num_workers
        self._list = storage.join(base, "list.tsv")
        self._work_s = self._last_work_s = 0.0
        self.peak_driver_bytes = self.peak_worker_bytes = 0
        storage.write_bytes_atomic(self._list, b"".join(line + b"\n" for line in self.links.lines()))

    def table(self, name: str) -> str:
        """Returns the URI of a table."""
        return storage.join(self._base, name)

    def refresh(self, name: str) -> tuple[int, dict[str, Any], str]:
        """Runs a refresh to its end, and returns its exit code, its result and its log."""
        with self._started(name) as process:
            code, result = process.wait(_TIMEOUT_S)
            self._note(process)
            self._last_work_s = process.work_s
            return code, result, process.log()

    def check_first(self, name: str) -> dict[str, Any]:
        """Refreshes a table that is not there yet without disturbance, and checks all that came of it."""
        self.server.forget()
        code, result, log = self.refresh(name)
        self._work_s = self._last_work_s
        self.checks.equal("exit code of the refresh", code, 0)
        if code:
            print(log[-4000:])
            return result
        self.checks.each("counts", {key: result.get(key) for key in _COUNTS}, self.links.counts())
        self.checks.each("reasons", result.get("reasons", {}), self.links.reasons())
        served = self.server.report()
        self.check_rows(name, served)
        self._check_asked(served)
        stats = table_stats(self.table(name))
        counts = self.links.counts()
        wanted = {"rows": self.links.num_links, **{key: counts[key] for key in ("ok", "filtered", "failed")}}
        self.checks.each("what mdm stats counts", {key: stats.get(key) for key in wanted}, wanted)
        return result

    def check_rows(self, name: str, served: Served) -> None:
        """Checks each row of a table against what its link is, and what was served for it."""
        links, checks = self.links, self.checks
        rows = read_rows(self.table(name))
        by_url = {row["url"]: row for row in rows}
        numbers = {links.url(number): number for number in range(links.num_links)}
        checks.equal("rows", len(rows), links.num_links)
        checks.each("each link has one row", Counter(row["url"] for row in rows), dict.fromkeys(numbers, 1))
        found = {number: by_url[url] for url, number in numbers.items() if url in by_url}
        wanted = {number: self._wanted(number) for number in range(links.num_links)}
        for column in ("id", "caption", "source", "outcome", "reason", "retryable", "attempts"):
            checks.each(
                column,
                {number: row[column] for number, row in found.items()},
                {number: row[column] for number, row in wanted.items()},
            )
        checks.each(
            "sha256 of the bytes served",
            {number: row["sha256"] for number, row in found.items()},
            {n: served.sha256.get(n) if KINDS[links.kind(n)].is_hashed else None for n in range(links.num_links)},
        )
        is_ok = [number for number in range(links.num_links) if KINDS[links.kind(number)].outcome == "ok"]
        checks.each(
            "original sizes",
            {n: (row["original_width"], row["original_height"]) for n, row in found.items() if row["outcome"] == "ok"},
            {number: links.size(number) for number in is_ok},
        )
        checks.each(
            "stored pictures", {n: _stored(row) for n, row in found.items() if row["image"] is not None},
            {number: ("JPEG", *_resized(*links.size(number))) for number in is_ok},
        )  # fmt: skip

    def check_nothing_new(self, name: str) -> None:
        """Refreshes a table that is whole, and checks that nothing is asked for."""
        self.server.forget()
        version = SampleTable.open(self.table(name)).version
        code, result, log = self.refresh(name)
        self.checks.equal("exit code of a refresh with nothing new", code, 0)
        counts = self.links.counts()
        wanted = counts | {"ok": 0, "filtered": 0, "failed": 0, "unchanged": self.links.num_links}
        self.checks.each("its counts", {key: result.get(key) for key in _COUNTS}, wanted)
        self.checks.equal("links that it asks for", sum(self.server.report().asked.values()), 0)
        self.checks.equal("version that it leaves", result.get("table_version"), version)
        if code:
            print(log[-4000:])

    def check_two_at_once(self, name: str) -> None:
        """Lets two refreshes make one table at the same time: both succeed, and each link has one row."""
        with self._started(name, 0) as one, self._started(name, 1) as two:
            ended = [process.wait(_TIMEOUT_S) for process in (one, two)]
            logs = [process.log()[-4000:] for process in (one, two)]
        self.checks.equal("exit codes of two at once", [code for code, _ in ended], [0, 0])
        if any(code for code, _ in ended):
            print(*logs, sep="\n")
        counts = self.links.counts()
        for name_, wanted in counts.items():
            found = [result.get(name_, 0) for _, result in ended]
            if name_ in ("ok", "filtered", "failed"):
                # What one has done is unchanged to the other.
                self.checks.equal(f"{name_} of both together", sum(found), wanted)
            elif name_ == "unchanged":
                self.checks.equal("unchanged of both together", sum(found), self.links.num_links)
            else:
                self.checks.equal(f"{name_} of each", found, [wanted, wanted])
        self.check_rows(name, self.server.report())

    def check_kills(
        self, victims: list[str], *, seed: int, undisturbed: str | None = None, work_s: float | None = None
    ) -> list[str]:
        """Refreshes with kills at random moments, then to the end, and compares with a table made without any.

        `undisturbed` is the URI of that table. Returns the tables made: another one is begun where the last is whole
        before all of `victims` were killed.
        """
        draw = random.Random(seed)
        self._work_s = self._work_s if work_s is None else work_s
        waiting = list(victims)
        tables: list[str] = []
        while waiting:
            tables.append(f"disturbed-{len(tables)}")
            self.server.forget()
            while waiting and num_rows(self.table(tables[-1])) < self.links.num_links:
                self._disturb(tables[-1], waiting, draw)
            code, result, log = self.refresh(tables[-1])
            self.checks.equal("exit code of the refresh after the kills", code, 0)
            if code:
                print(log[-4000:])
            accounted = sum(result.get(key, 0) for key in _COUNTS if key != "links")
            self.checks.equal("counts add up to the list", accounted, self.links.counts()["links"])
            self.check_rows(tables[-1], self.server.report())
            if undisturbed is not None:
                made, wanted = summary(self.table(tables[-1])), summary(undisturbed)
                self.checks.each("rows that are those of the undisturbed table", made, wanted)
        return tables

    def _disturb(self, name: str, waiting: list[str], draw: random.Random) -> None:
        """Runs one refresh, to its end or to that of its driver, and takes out of `waiting` what was killed."""
        with self._started(name) as process:
            while waiting and self._kill_one(process, name, waiting[0], draw):
                if waiting.pop(0) == "driver":
                    break
            else:
                # A refresh whose workers were killed goes on by itself.
                code, result = process.wait(_TIMEOUT_S)
                self.checks.equal("exit code of a refresh whose workers were killed", code, 0)
                self.checks.equal("links that it tells of", result.get("links"), self.links.counts()["links"])
                if code or not result:
                    print(process.log()[-4000:])
            self._note(process)

    def _kill_one(self, process: RefreshProcess, name: str, victim: str, draw: random.Random) -> bool:
        """Waits for a random moment of the work, kills, and returns whether there was still something to kill."""
        while process.is_running and not process.workers():
            time.sleep(0.05)
        left = 1 - num_rows(self.table(name)) / self.links.num_links
        until_s = time.monotonic() + draw.uniform(0, 0.8 * self._work_s * left)
        while process.is_running and time.monotonic() < until_s:
            time.sleep(0.02)
        rows = num_rows(self.table(name))
        if not process.is_running or rows == self.links.num_links:
            return False
        if (pid := process.kill(victim, draw)) is None:
            return False
        print(f"      killed {victim} {pid} with {rows:,} of {self.links.num_links:,} rows committed", flush=True)
        return True

    def _check_asked(self, served: Served) -> None:
        links = self.links
        kinds = {number: links.kind(number) for number in range(links.num_links)}
        resets = {n for n, kind in kinds.items() if kind == "reset"}
        self.checks.each(
            "times that each link was asked for",
            {n: count for n, count in served.asked.items() if n not in resets},
            {n: KINDS[kind].asked for n, kind in kinds.items() if KINDS[kind].asked and n not in resets},
        )
        # A kept connection that is reset is no failure to aiohttp yet: it asks once more over a new one.
        tries = range(KINDS["reset"].asked, 2 * KINDS["reset"].asked + 1)
        self.checks.each(
            "links that are reset are asked for again", {n: served.asked.get(n) in tries for n in resets},
            dict.fromkeys(resets, True),
        )  # fmt: skip
        moved = {number: 1 for number, kind in kinds.items() if kind == "moved"}
        self.checks.each("times that places were asked for to which links redirect", served.moved, moved)

    def _wanted(self, number: int) -> dict[str, Any]:
        kind = KINDS[self.links.kind(number)]
        url = self.links.url(number)
        return {
            "id": hashlib.blake2b(url.encode(), digest_size=16).digest(),
            "caption": self.links.caption(number),
            "source": SOURCE_NAME,
            "attempts": 1,
            **{name: getattr(kind, name) for name in ("outcome", "reason", "retryable")},
        }

    @contextlib.contextmanager
    def _started(self, name: str, number: int = 0) -> Iterator[RefreshProcess]:
        config = self._folder / f"{name}-{number}.yaml"
        config.write_text(json.dumps(self._config(name)))
        environment = os.environ | {"RAY_TMPDIR": str(self._folder), "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        with RefreshProcess(config, environment) as process:
            yield process

    def _config(self, name: str) -> dict[str, Any]:
        return {
            "source": {"uri": self._list, "name": SOURCE_NAME},
            "table": {"uri": self.table(name)},
            "fetch": {
                "allow_networks": ALLOWED_NETWORKS, "deadline_s": self._deadline_s, "max_bytes": MAX_BYTES,
                "retries": RETRIES, "max_redirects": MAX_REDIRECTS, "per_host": 32,
            },
            "image": {"size_px": _SIZE_PX, "format": "jpeg"},
            "filters": {"min_side_px": MIN_SIDE_PX},
            "run": {"shard_rows": self._shard_rows, "commit_every_s": 1, "workers": self._num_workers},
            "tracking": None,
        }  # fmt: skip

    def _note(self, process: RefreshProcess) -> None:
        self.peak_driver_bytes = max(self.peak_driver_bytes, process.peak_driver_bytes)
        self.peak_worker_bytes = max(self.peak_worker_bytes, process.peak_worker_bytes)


def read_rows(uri: str) -> list[dict[str, Any]]:
    """Returns the rows of a table."""
    table = SampleTable.open(uri)
    return [row for shard in table.shards(None) for row in table.read(shard, _COLUMNS).to_pylist()]


def num_rows(uri: str) -> int:
    """Returns how many rows a table has; none if it is not there."""
    try:
        return sum(shard.num_rows for shard in SampleTable.open(uri).shards(None))
    except ConfigError:
        return 0


def summary(uri: str) -> dict[bytes, tuple[object, ...]]:
    """Returns for each id what must be the same in a table that was made again, the stored pictures too."""
    columns = [name for name in _COLUMNS if name not in ("id", "attempts")]
    return {row["id"]: tuple(row[name] for name in columns) for row in read_rows(uri)}


def _resized(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, _SIZE_PX / min(width, height))
    return round(width * scale), round(height * scale)


def _stored(row: dict[str, Any]) -> tuple[object, ...]:
    """Returns the format and the size of a stored picture as its file tells them, if its row agrees."""
    with Image.open(io.BytesIO(row["image"])) as picture:
        told = (row["format"].upper(), row["width"], row["height"])
        found = (picture.format, *picture.size)
    return found if found == told else (found, told)


def _brief(value: object) -> str:
    return f": {value!r}" if isinstance(value, int) and not isinstance(value, bool) else ""
