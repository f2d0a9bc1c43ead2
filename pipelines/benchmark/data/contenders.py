"""The two that are measured, each a command of its own: `mdm refresh`, and img2dataset's `download`."""

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mdm_core.errors import ConfigError, WorkError
from pipelines.benchmark.data.watch import Watched, run_watched

Label = Literal["native", "img2dataset"]
SHARD_ROWS = 1000
_SHOWN_OF_LOG = 2000

# Without a file of its own the processes that it starts have none to import again.
_DOWNLOAD = "import json, sys; from img2dataset import download; download(**json.loads(sys.argv[1]))"


@dataclass(frozen=True)
class Cores:
    """Cores of the machine."""

    contender: tuple[int, ...]
    others: tuple[int, ...]
    """Those of the server and of the measuring; the same ones where the machine has no more."""


@dataclass(frozen=True)
class Links:
    """A list of links, as both read it."""

    tsv: Path
    parquet: Path
    count: int


@dataclass(frozen=True)
class Run:
    """One run of a contender."""

    watched: Watched
    ended_s: float
    """When the last file of its output was closed, in seconds since 1970."""
    report: dict[str, Any]
    """Counts: of `mdm refresh` those that it prints, of img2dataset `ok` and `failed`."""


def check_img2dataset() -> None:
    """Raises ConfigError where img2dataset is not installed."""
    if importlib.util.find_spec("img2dataset") is None:
        raise ConfigError(
            "against=img2dataset needs img2dataset, which is not installed; pip install 'mdm[img2dataset]', "
            "or give --against none"
        )


def write_links(folder: Path, name: str, urls: Sequence[str]) -> Links:
    """The list of `urls`, with captions that no filter minds, written as TSV and as Parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    links = Links(folder / f"{name}.tsv", folder / f"{name}.parquet", len(urls))
    captions = [f"a picture drawn from number {number}" for number in range(len(urls))]
    with links.tsv.open("w", encoding="utf-8") as file:
        file.writelines(f"{url}\t{caption}\n" for url, caption in zip(urls, captions, strict=True))
    pq.write_table(pa.table({"url": list(urls), "caption": captions}), links.parquet)
    return links


def refresh_config(links: Path, table: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a refresh from loopback, as the file says it."""
    return {
        "command": "refresh",
        "source": {"uri": str(links), "format": "tsv", "name": "benchmark"},
        "table": {"uri": str(table)},
        "tracking": None,
        **sections,
        "fetch": {"allow_networks": ["127.0.0.0/8"], **sections.get("fetch", {})},
    }


def run_native(
    config: Mapping[str, Any], folder: Path, cores: Cores, *, pinned: bool = True, cap_s: float | None = None
) -> Run:
    """Runs `mdm refresh` with a configuration; `folder` takes the file and what it says.

    Raises:
        WorkError: It failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "refresh.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(config), encoding="utf-8")
    everywhere = tuple(sorted({*cores.contender, *cores.others}))
    watched, printed = run_watched(
        [sys.executable, "-m", "jobs.refresh", "--config", str(file), "--json"],
        cores=cores.contender if pinned else everywhere,
        watch_cores=cores.others,
        log=folder / "refresh.log",
        cap_s=cap_s,
    )
    _check("mdm refresh", watched, folder / "refresh.log")
    report = {} if watched.timed_out else json.loads(printed.splitlines()[-1])
    return Run(watched, _last_written_s(Path(config["table"]["uri"])), report)


def run_img2dataset(
    links: Links,
    folder: Path,
    cores: Cores,
    *,
    image_px: int,
    threads: int,
    timeout_s: float,
    cap_s: float | None = None,
) -> Run:
    """Runs img2dataset on a list, one process a core; its output lies in `folder`/out.

    Its settings are those that make the same pictures as `mdm refresh`: the shorter side resized, never enlarged,
    JPEG of quality 95. It need not look for EXIF, which nobody else does.

    Raises:
        WorkError: It failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "url_list": str(links.parquet),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(folder / "out"),
        "output_format": "webdataset",
        "processes_count": len(cores.contender),
        "thread_count": threads,
        "number_sample_per_shard": SHARD_ROWS,
        "image_size": image_px,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_quality": 95,
        "extract_exif": False,
        "compute_hash": "sha256",
        "timeout": timeout_s,
        "enable_wandb": False,
    }
    watched, _ = run_watched(
        [sys.executable, "-c", _DOWNLOAD, json.dumps(options)],
        cores=cores.contender,
        watch_cores=cores.others,
        log=folder / "img2dataset.log",
        cap_s=cap_s,
        # It would ask the network for its newest version when it is imported.
        env={"NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    _check("img2dataset", watched, folder / "img2dataset.log")
    report = {"ok": 0, "failed": 0}
    for stats in sorted((folder / "out").glob("*_stats.json")):
        said = json.loads(stats.read_text(encoding="utf-8"))
        report["ok"] += said["successes"]
        report["failed"] += said["count"] - said["successes"]
    return Run(watched, _last_written_s(folder / "out"), report)


def _check(name: str, watched: Watched, log: Path) -> None:
    if watched.returncode != 0 and not watched.timed_out:
        said = log.read_text(encoding="utf-8", errors="replace")[-_SHOWN_OF_LOG:].strip()
        raise WorkError(f"{name} ended with exit code {watched.returncode}; the end of what it said:\n{said}")


def _last_written_s(folder: Path) -> float:
    """When the newest of the files under a folder was last written to, in seconds since 1970."""
    return max(_written_s(folder), default=0.0)


def _written_s(folder: Path) -> Iterator[float]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.stat().st_mtime
