"""`mdm benchmark data`: how fast and in how much memory links become a table, part by part."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm_core.errors import ConfigError
from pipelines.benchmark.config import DataBenchmarkConfig
from pipelines.benchmark.data.bad_links import measure_bad_links
from pipelines.benchmark.data.contenders import Cores, Label, check_img2dataset
from pipelines.benchmark.data.memory import measure_memory, plot_memory
from pipelines.benchmark.data.noop import measure_noop
from pipelines.benchmark.data.photos import write_photos
from pipelines.benchmark.data.pictures import Pictures, measure_pictures
from pipelines.benchmark.data.server import PhotoServer
from pipelines.progress import Progress


def benchmark_data(config: DataBenchmarkConfig) -> dict[str, Any]:
    """What `config` asks for was measured, one record a part, as plain values.

    Raises:
        ConfigError: img2dataset is not installed, or the machine is too small or not Linux.
        WorkError: A contender failed, or did not do what it was given.
    """
    cores = _cores(config.cores)
    pictures = [part for part in config.parts if part in ("px256", "px64")]
    if config.against == "img2dataset" and (pictures or "bad_links" in config.parts):
        check_img2dataset()
    result: dict[str, Any] = {}
    with _folder(config.folder) as folder, Progress("benchmark", total=_num_runs(config), unit="runs") as progress:
        photos = folder / "photos"
        num_photos = config.images if pictures else 0
        write_photos(photos, num_photos)
        with PhotoServer(photos, count=num_photos, cores=cores.others) as server:
            for part in config.parts:
                if part in pictures:
                    given = _pictures(config, part, folder, server, cores)
                    result[part] = measure_pictures(given, progress.advance)
                    continue
                if part == "bad_links":
                    result[part] = measure_bad_links(
                        folder / "bad_links",
                        server,
                        count=config.bad_links,
                        connections=config.connections,
                        deadline_s=config.deadline_s,
                        cores=cores,
                        img2dataset_cap_s=config.cap_s if config.against == "img2dataset" else None,
                    )
                elif part == "noop_refresh":
                    result[part] = measure_noop(folder, rows=config.rows, cores=cores)
                else:
                    result[part] = measure_memory(folder / "memory", server, config.memory_links, cores)
                    if config.plot is not None:
                        plot_memory(result[part], Path(config.plot))
                progress.advance(1)
    return result


def _pictures(config: DataBenchmarkConfig, part: str, folder: Path, server: PhotoServer, cores: Cores) -> Pictures:
    labels: tuple[Label, ...] = ("native", "img2dataset") if config.against == "img2dataset" else ("native",)
    return Pictures(
        folder=folder,
        photos=folder / "photos",
        server=server,
        image_px=int(part.removeprefix("px")),
        images=config.images,
        rounds=config.rounds,
        warmup_images=min(config.warmup_images, config.images),
        sample=config.sample,
        labels=labels,
        connections=config.connections,
        threads=config.img2dataset_threads,
        cores=cores,
    )


def _num_runs(config: DataBenchmarkConfig) -> int:
    contenders = 2 if config.against == "img2dataset" else 1
    each = contenders * (config.rounds + bool(config.warmup_images))
    return sum(each if part.startswith("px") else 1 for part in config.parts)


def _cores(count: int) -> Cores:
    if not sys.platform.startswith("linux"):
        raise ConfigError("mdm benchmark data reads /proc, which only Linux has; run it there, or in a container")
    there = sorted(os.sched_getaffinity(0))
    if count > len(there):
        raise ConfigError(f"cores={count} is more than the {len(there)} that this process may use; give fewer")
    # On a machine without a core to spare the server shares theirs.
    return Cores(tuple(there[:count]), tuple(there[count:] or there))


@contextlib.contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    """The folder to work in; one that was given is left as it is then."""
    if given is not None:
        folder = Path(given).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    made = Path(tempfile.mkdtemp(prefix="mdm-benchmark-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
