"""img2dataset as its users run it, in this process, and what it wrote, read without any code of this project."""

import contextlib
import importlib
import io
import signal
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.img2dataset.engine import _import_img2dataset


def run_img2dataset(folder: Path, urls: list[str], **options: Any) -> None:
    """Calls its `download`, whose processes are run here one after the other: each would import for seconds."""
    _import_img2dataset()
    # Its package has a function of this name.
    main = importlib.import_module("img2dataset.main")

    def in_this_process(_: int, downloader: Any, reader: Any, *__: Any) -> None:
        for shard in reader:
            assert downloader(shard)[0]

    folder.mkdir()
    pq.write_table(pa.table({"url": urls, "caption": [f"caption {n}" for n in range(len(urls))]}), folder / "list")
    before = signal.getsignal(signal.SIGINT)
    try:
        with (
            mock.patch.object(main, "multiprocessing_distributor", in_this_process),
            mock.patch.object(main, "LoggerProcess", mock.MagicMock()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            main.download(
                url_list=str(folder / "list"),
                output_folder=str(folder / "out"),
                input_format="parquet",
                url_col="url",
                caption_col="caption",
                processes_count=1,
                thread_count=8,
                timeout=2,
                **options,
            )
    finally:
        signal.signal(signal.SIGINT, before)


def read_written(folder: Path) -> dict[str, tuple[dict[str, Any], bytes | None]]:
    """Returns the metadata and the picture of each link."""
    found: dict[str, tuple[dict[str, Any], bytes | None]] = {}
    for path in sorted((folder / "out").glob("*.parquet")):
        files: dict[str, bytes] = {}
        if path.with_suffix(".tar").exists():
            with tarfile.open(path.with_suffix(".tar")) as tar:
                for member in tar.getmembers():
                    body = tar.extractfile(member)
                    assert body is not None
                    files[member.name] = body.read()
        elif path.with_suffix("").exists():
            files = {file.name: file.read_bytes() for file in path.with_suffix("").iterdir()}
        for row in pq.read_table(path).to_pylist():
            pictures = [row[name] for name in ("jpg", "png", "webp") if row.get(name)]
            pictures += [files[name] for end in ("jpg", "png", "webp") if (name := f"{row['key']}.{end}") in files]
            assert len(pictures) == (row["status"] == "success")
            found[row["url"]] = row, pictures[0] if pictures else None
    return found
