"""Photos fetched, made smaller and stored: `mdm refresh` against img2dataset, in turn, on the same cores."""

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdm_core.errors import WorkError
from pipelines.benchmark.data.contenders import (
    SHARD_ROWS,
    Cores,
    Label,
    Links,
    Run,
    refresh_config,
    run_img2dataset,
    run_native,
    write_links,
)
from pipelines.benchmark.data.quality import mean_psnr_db, stored_in_table, stored_in_tars
from pipelines.benchmark.data.server import PhotoServer
from pipelines.benchmark.data.steps import Img2datasetSteps, NativeSteps, StepsOf
from pipelines.benchmark.turns import Worker
from pipelines.data.config import RefreshConfig

_FETCH_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Pictures:
    """What is measured."""

    folder: Path
    photos: Path
    """Where the server's photos lie."""
    server: PhotoServer
    image_px: int
    images: int
    rounds: int
    warmup_images: int
    sample: int
    """Pictures whose quality and steps are looked at."""
    labels: tuple[Label, ...]
    connections: int
    threads: int
    """Those of img2dataset."""
    cores: Cores


def measure_pictures(given: Pictures, advance: Callable[..., None]) -> dict[str, Any]:
    """The record of both, and how many times as many images a second ours does.

    Args:
        given: What is measured.
        advance: Told of each run when it is done.

    Raises:
        WorkError: A contender failed, or left out a picture.
    """
    folder = given.folder / f"px{given.image_px}"
    links = _links(given, folder, "photos", given.images)
    if given.warmup_images:
        few = _links(given, folder, "few-photos", given.warmup_images)
        for label in given.labels:
            _run(given, label, few, folder / label)
            advance(1)
    rounds: dict[Label, list[dict[str, Any]]] = {label: [] for label in given.labels}
    for number in range(given.rounds):
        # Who is first changes, since a machine may slow down meanwhile.
        for label in given.labels if number % 2 == 0 else given.labels[::-1]:
            rounds[label].append(_run(given, label, links, folder / label))
            advance(1, **{f"{label}_images_per_s": round(rounds[label][-1]["images_per_s"], 1)})
    records: dict[Label, dict[str, Any]] = {
        label: contender_record(rounds[label], images=given.images) for label in given.labels
    }
    for label, record in records.items():
        record |= _quality(given, label, folder / label)
        record["cpu_s_by_step"] = _steps(given, label, folder)
    result = _compared(records) | {"image_px": given.image_px, "images": given.images}
    for label, record in records.items():
        result[label] = record
    return result


def contender_record(rounds: Sequence[dict[str, Any]], *, images: int) -> dict[str, Any]:
    """Medians of what the rounds took, and the rounds."""
    median = {name: float(np.median([one[name] for one in rounds])) for name in rounds[0]}
    return {
        "images_per_s": images / median["seconds_without_startup"],
        "images_per_s_with_startup": images / median["seconds"],
        "before_first_request_s": median["before_first_request_s"],
        "after_last_file_s": median["after_last_file_s"],
        "cpu_s_per_image": median["cpu_s"] / images,
        "peak_bytes": int(median["peak_bytes"]),
        "rounds": list(rounds),
    }


def _compared(records: dict[Label, dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if len(records) == 2:
        native, other = records["native"], records["img2dataset"]
        for name, rate in (("ratio", "images_per_s"), ("ratio_with_startup", "images_per_s_with_startup")):
            result[name] = native[rate] / other[rate]
    for label, record in records.items():
        result[f"psnr_{label}"] = record["psnr_db"]
    return result


def _links(given: Pictures, folder: Path, name: str, count: int) -> Links:
    return write_links(folder, name, [given.server.url("photo", number) for number in range(count)])


def _run(given: Pictures, label: Label, links: Links, folder: Path) -> dict[str, Any]:
    """One run of a contender, into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    given.server.forget()
    if label == "native":
        run = run_native(_config(given, links.tsv, folder), folder, given.cores)
    else:
        run = run_img2dataset(
            links,
            folder,
            given.cores,
            image_px=given.image_px,
            threads=given.threads,
            timeout_s=_FETCH_TIMEOUT_S,
        )
    if run.report["ok"] != links.count:
        raise WorkError(f"{label} was given {links.count:,} good photos, and says: {run.report}")
    return round_record(run, given.server.seen(), images=links.count)


def round_record(run: Run, seen: dict[str, Any], *, images: int) -> dict[str, Any]:
    """What one run took; start-up is all before the first request, and all after the last file was written."""
    watched = run.watched
    without_s = run.ended_s - seen["first_s"]
    return {
        "seconds": watched.seconds,
        "seconds_without_startup": without_s,
        "before_first_request_s": seen["first_s"] - watched.began_s,
        "after_last_file_s": watched.began_s + watched.seconds - run.ended_s,
        "images_per_s": images / without_s,
        "cpu_s": watched.cpu_s,
        "peak_bytes": watched.peak_bytes,
        "peak_rss_bytes": watched.peak_rss_bytes,
        "requests": seen["requests"],
    }


def _config(given: Pictures, links: Path, folder: Path) -> dict[str, Any]:
    return refresh_config(
        links,
        folder / "table",
        fetch={"concurrency": given.connections, "deadline_s": _FETCH_TIMEOUT_S},
        image={"size_px": given.image_px},
        run={"workers": len(given.cores.contender), "shard_rows": SHARD_ROWS},
    )


def _quality(given: Pictures, label: Label, folder: Path) -> dict[str, Any]:
    stored = stored_in_table(str(folder / "table")) if label == "native" else stored_in_tars(folder / "out")

    def body_of(number: int) -> bytes:
        return (given.photos / f"0-{number:06d}.jpg").read_bytes()

    found = mean_psnr_db(stored, body_of, every=max(1, given.images // given.sample))
    return {"psnr_db": found["psnr_db"], "psnr_pictures": found["pictures"]}


def _steps(given: Pictures, label: Label, folder: Path) -> dict[str, float]:
    count = min(given.sample, given.images)
    config = RefreshConfig.model_validate(
        {key: value for key, value in _config(given, folder / "photos.tsv", folder).items() if key != "command"}
    )
    (folder / f"steps-{label}").mkdir(exist_ok=True)
    steps = StepsOf(
        urls=tuple(given.server.url("photo", number) for number in range(count)),
        image_px=given.image_px,
        cores=given.cores.contender,
        folder=folder / f"steps-{label}",
        config=config,
        threads=given.threads,
    )
    making = functools.partial(NativeSteps if label == "native" else Img2datasetSteps, steps)
    with Worker(f"the steps of {label}", making) as worker:
        worker.ready()
        return dict(worker.ask("steps", doing="step by step"))
