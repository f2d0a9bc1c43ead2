"""A refresh that finds nothing new: a large table, and the list of the very links that it holds."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from mdm_core.errors import WorkError
from pipelines.benchmark.data.contenders import SHARD_ROWS, Cores, refresh_config, run_native
from pipelines.benchmark.data.photos import tiny
from pipelines.data.config import FiltersConfig
from pipelines.data.table import keys
from pipelines.data.table.commit import commit
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.sample_table import SCHEMA, SampleTable
from pipelines.data.table.shards import WrittenShard, write_shard

# Nothing listens there, and nothing must be asked there.
_NOWHERE = "http://127.0.0.1:9"


def measure_noop(folder: Path, *, rows: int, cores: Cores) -> dict[str, Any]:
    """Seconds and most memory of the whole `mdm refresh`, on all cores, of a table that holds all links of its list.

    Raises:
        WorkError: The refresh did something.
    """
    links, table = make_table(folder / f"noop-{rows}", rows)
    run = run_native(refresh_config(links, table), folder / f"noop-{rows}" / "run", cores, pinned=False)
    if run.report["unchanged"] != rows or run.report["links"] != rows:
        raise WorkError(f"of {rows:,} links that the table holds, the refresh says: {run.report}")
    return {
        "rows": rows,
        "seconds": run.watched.seconds,
        "peak_bytes": run.watched.peak_bytes,
        "cpu_s": run.watched.cpu_s,
        "files": len(SampleTable.open(str(table)).shards()),
        "table_version": run.report["table_version"],
    }


def make_table(folder: Path, rows: int) -> tuple[Path, Path]:
    """A list of `rows` links and a table that holds them, in files of 1,000 rows; made once in a folder."""
    links, table = folder / "links.tsv", folder / "table"
    if links.exists():
        return links, table
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    starts = range(0, rows, SHARD_ROWS)

    def write(start: int) -> WrittenShard:
        numbers = range(start, min(start + SHARD_ROWS, rows))
        images = [tiny(number) for number in numbers]
        sample = sample_rows(_urls(numbers), images, _captions(numbers), datetime.now(UTC))
        return write_shard(str(table), f"00000000-{start // SHARD_ROWS:06d}", "ok", sample)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shards = list(pool.map(write, starts))
    commit(Ledger(str(table), now_s=time.time()), shards, FiltersConfig(exact_duplicates=False))
    partial = links.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for start in starts:
            numbers = range(start, min(start + SHARD_ROWS, rows))
            pairs = zip(_urls(numbers), _captions(numbers), strict=True)
            file.writelines(f"{url}\t{caption}\n" for url, caption in pairs)
    # Last, so that a list that is there says that the table is whole.
    partial.rename(links)
    return links, table


def sample_rows(urls: Sequence[str], images: Sequence[bytes], captions: Sequence[str], now: datetime) -> pa.Table:
    """Rows of a sample table, all of them `ok`; the columns that say no more of a picture are null."""
    known: dict[str, Iterable[Any]] = {
        "id": [keys.link_key(url) for url in urls],
        "url": urls,
        "caption": captions,
        "source": ["benchmark"] * len(urls),
        "outcome": ["ok"] * len(urls),
        "retryable": [False] * len(urls),
        "attempts": [1] * len(urls),
        "fetched_at": [now] * len(urls),
        "image": images,
        "format": ["jpeg"] * len(urls),
        "sha256": [hashlib.sha256(image).digest() for image in images],
    }
    columns = [pa.array(known.get(field.name, [None] * len(urls)), field.type) for field in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _urls(numbers: range) -> list[str]:
    return [f"{_NOWHERE}/{number}" for number in numbers]


def _captions(numbers: range) -> list[str]:
    return [f"a picture drawn from number {number}" for number in numbers]
