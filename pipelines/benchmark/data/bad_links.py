"""A list with bad links among its good ones: how long do they hold up the rest?"""

import random
import shutil
from pathlib import Path
from typing import Any

from mdm_core.errors import WorkError
from pipelines.benchmark.data.contenders import (
    Cores,
    Links,
    Run,
    refresh_config,
    run_img2dataset,
    run_native,
    write_links,
)
from pipelines.benchmark.data.server import PhotoServer

BAD_SHARE = 0.2
_TROUBLES = ("stall", "drip", "reset")


def kinds_of_links(count: int, seed: int = 0) -> list[str]:
    """What each link leads to: one in five to trouble, the kinds equally often, the others to pictures."""
    num_bad = round(BAD_SHARE * count)
    kinds = [_TROUBLES[number % len(_TROUBLES)] for number in range(num_bad)] + ["tiny"] * (count - num_bad)
    random.Random(seed).shuffle(kinds)
    return kinds


def measure_bad_links(
    folder: Path,
    server: PhotoServer,
    *,
    count: int,
    connections: int,
    deadline_s: float,
    cores: Cores,
    img2dataset_cap_s: float | None,
) -> dict[str, Any]:
    """How long fetching took, from the first request to the last answer or parting, in deadlines of one link.

    Args:
        folder: Takes the list and the outputs.
        server: Where the links lead.
        count: Links.
        connections: Links fetched at once.
        deadline_s: Seconds for one link in all; for img2dataset the only limit it has, that of one read.
        cores: Those that are used.
        img2dataset_cap_s: Seconds after which img2dataset is ended; None: it is not measured.

    Raises:
        WorkError: A good link did not give a picture, or a bad one did.
    """
    kinds = kinds_of_links(count)
    links = write_links(folder, "bad-links", [server.url(kind, number) for number, kind in enumerate(kinds)])
    config = refresh_config(
        links.tsv,
        folder / "table",
        fetch={"concurrency": connections, "deadline_s": deadline_s, "connect_timeout_s": min(5.0, deadline_s)},
        filters={"min_side_px": 0},
        run={"workers": len(cores.contender)},
    )
    server.forget()
    shutil.rmtree(folder / "table", ignore_errors=True)
    run = run_native(config, folder / "native", cores)
    good = kinds.count("tiny")
    if (run.report["ok"], run.report["failed"]) != (good, count - good):
        raise WorkError(f"of {good:,} good and {count - good:,} bad links the refresh says: {run.report}")
    record = _record(run, server, deadline_s) | {
        "links": count,
        "bad": count - good,
        "connections": connections,
        "deadline_s": deadline_s,
        "reasons": run.report["reasons"],
    }
    if img2dataset_cap_s is not None:
        record["img2dataset"] = _img2dataset(folder, server, links, connections, deadline_s, cores, img2dataset_cap_s)
    return record


def _img2dataset(
    folder: Path,
    server: PhotoServer,
    links: Links,
    connections: int,
    deadline_s: float,
    cores: Cores,
    cap_s: float,
) -> dict[str, Any]:
    server.forget()
    shutil.rmtree(folder / "img2dataset", ignore_errors=True)
    run = run_img2dataset(
        links,
        folder / "img2dataset",
        cores,
        image_px=256,
        threads=connections,
        timeout_s=deadline_s,
        cap_s=cap_s,
    )
    return _record(run, server, deadline_s) | {"finished": not run.watched.timed_out, "cap_s": cap_s}


def _record(run: Run, server: PhotoServer, deadline_s: float) -> dict[str, Any]:
    seen = server.seen()
    fetching_s = seen["last_s"] - seen["first_s"] if seen["requests"] else 0.0
    return {
        "seconds_over_deadline": fetching_s / deadline_s,
        "fetch_s": fetching_s,
        "seconds": run.watched.seconds,
        "requests": seen["requests"],
        "ok": run.report.get("ok", 0),
    }
