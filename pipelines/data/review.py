"""What a refresh tells MLflow: its configuration, its counts, and pictures of what was kept and what was not."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from PIL import Image, ImageOps

from pipelines.data.config import RefreshConfig
from pipelines.data.stats import stats_figure, table_stats
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.sample_table import read_rows
from pipelines.data.table.shards import WrittenShard
from pipelines.tracking import Run, open_run

_TILE_PX = 96
_TILES_A_ROW = 8
_MAX_TILES = 64
_FILES_LOOKED_AT = 4


class Review:
    """Collects what is worth looking at, and logs it; without a run it does nothing."""

    def __init__(self, config: RefreshConfig, run: Run | None) -> None:
        self._config = config
        self._run = run
        self._filtered: list[bytes] = []
        self._kept: list[str] = []

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: RefreshConfig) -> Iterator[Self]:
        """Gives a review that logs where the configuration says; its run ends with the block."""
        if config.tracking is None:
            yield cls(config, None)
            return
        with open_run(config.tracking, name=f"refresh {config.source.name}", tags={"mdm.command": "refresh"}) as run:
            run.log_params(config.model_dump(mode="json", exclude={"tracking"}))
            yield cls(config, run)

    def note(self, shards: Sequence[WrittenShard]) -> None:
        """Remembers some pictures of what was written."""
        for shard in shards:
            self._filtered += shard.thumbnails[: _MAX_TILES - len(self._filtered)]
            if shard.outcome == "ok":
                self._kept.append(shard.path)

    def tell(self, report: Mapping[str, Any], ledger: Ledger) -> None:
        """Logs what became of the links, what the table holds if that has changed, and two grids."""
        if self._run is None:
            return
        numbers = {name: value for name, value in report.items() if isinstance(value, int | float)}
        worked_on = sum(numbers[name] for name in ("ok", "filtered", "failed"))
        numbers["links_per_s"] = worked_on / max(report["seconds"], 1e-9)
        step = report["table_version"]
        self._run.log_metrics(numbers, step)
        self._run.log_metrics({f"reason.{name}": count for name, count in report["reasons"].items()}, step)
        self._run.log_dict(dict(report), "report.json")
        if worked_on or report["scored"] or report["pruned"]:
            # It reads a little of every file, as a refresh does when it begins; with nothing new that would be half.
            stats = table_stats(ledger.uri)
            self._run.log_dict(stats, "stats.json")
            self._run.log_figure(stats_figure(stats), "stats.png")
        for name, pictures in (("kept", self._kept_pictures(ledger)), ("filtered", self._filtered)):
            if pictures:
                self._run.log_image(grid(pictures), name, step)

    def _kept_pictures(self, ledger: Ledger) -> list[bytes]:
        # Files may have been rewritten since; those that were not are enough.
        there = [path for path in self._kept if path in ledger.paths]
        some = there[:: max(1, len(there) // _FILES_LOOKED_AT)][:_FILES_LOOKED_AT]
        pictures: list[bytes] = []
        for path in some:
            rows = read_rows(ledger.uri, path, ["image", "frames"], ledger.schema).slice(0, _MAX_TILES // len(some))
            for image, frames in zip(rows["image"].to_pylist(), rows["frames"].to_pylist(), strict=True):
                pictures.append(image or frames[len(frames) // 2])
        return pictures


def grid(pictures: Sequence[bytes]) -> Image.Image:
    """Returns encoded pictures side by side, each fitted into a square tile."""
    rows = -(-len(pictures) // _TILES_A_ROW)
    sheet = Image.new("RGB", (_TILES_A_ROW * _TILE_PX, rows * _TILE_PX), "white")
    for at, data in enumerate(pictures):
        tile = ImageOps.contain(Image.open(io.BytesIO(data)).convert("RGB"), (_TILE_PX, _TILE_PX))
        left, top = at % _TILES_A_ROW * _TILE_PX, at // _TILES_A_ROW * _TILE_PX
        sheet.paste(tile, (left + (_TILE_PX - tile.width) // 2, top + (_TILE_PX - tile.height) // 2))
    return sheet


def make_thumbnail(body: bytes) -> bytes | None:
    """Returns a small JPEG of a picture that a stranger sent, or nothing if it can't be shown."""
    with contextlib.suppress(Exception):
        # Formats that Pillow reads without running anything else.
        picture = Image.open(io.BytesIO(body), formats=["JPEG", "PNG", "WEBP", "GIF", "BMP"])
        picture.draft("RGB", (_TILE_PX, _TILE_PX))
        small = ImageOps.contain(picture.convert("RGB"), (_TILE_PX, _TILE_PX))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG")
        return buffer.getvalue()
    return None
