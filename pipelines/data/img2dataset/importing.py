"""Pictures that img2dataset has fetched already, taken as they are: nothing is fetched."""

import asyncio
import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines.data.config import FiltersConfig, ImageConfig, RefreshConfig
from pipelines.data.engine import Link, Result
from pipelines.data.failure import Failure
from pipelines.data.filters import size_reason
from pipelines.data.img2dataset.messages import download_failure, resize_failure
from pipelines.data.img2dataset.shards import Shard
from pipelines.data.pictures.containers import format_of
from pipelines.data.pictures.decode import Picture, decode

_NO_FILTERS = FiltersConfig(min_side_px=0, max_aspect=1e9)
# Small, and large enough for a perceptual hash.
_PROBE_PX = 64
# Chunks come in the order of the list, so that two workers' shards at most are in use at once.
_OPEN_SHARDS = 2


class Img2datasetImport:
    """Reads what became of links from the shards that `Link.origin` names, and their pictures.

    `image` has no say: the bytes are stored as they lie there, if they are a picture. The sizes that are filtered by
    are those before img2dataset resized.

    Args:
        config: The refresh.
    """

    def __init__(self, config: RefreshConfig) -> None:
        self._filters = config.filters
        self._probe = ImageConfig(size_px=_PROBE_PX, max_pixels=config.image.max_pixels)
        # One, so that a shard is read from its beginning to its end.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="import")
        self._shards: OrderedDict[str, Shard] = OrderedDict()

    async def results(self, links: Sequence[Link]) -> list[Result]:
        """Returns what became of each link, in their order."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._read, links)

    async def close(self) -> None:
        """Closes the shards."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def _read(self, links: Sequence[Link]) -> list[Result]:
        by_shard: defaultdict[str, dict[int, int]] = defaultdict(dict)
        for at, link in enumerate(links):
            uri, _, row = link.origin.rpartition("#")
            by_shard[uri][at] = int(row)
        results: dict[int, Result] = {}
        for uri, numbers in by_shard.items():
            shard = self._shard(uri)
            failures = {number: _failure(shard.row(number)) for number in numbers.values()}
            pictures = shard.pictures(number for number, failure in failures.items() if failure is None)
            for at, number in numbers.items():
                failure = failures[number]
                data = pictures.get(number)
                results[at] = Result(failure=failure) if failure else self._result(shard.row(number), data)
        return [results[at] for at in range(len(links))]

    def _shard(self, uri: str) -> Shard:
        if uri not in self._shards:
            self._shards[uri] = Shard(uri)
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)[1].close()
        self._shards.move_to_end(uri)
        return self._shards[uri]

    def _result(self, row: dict[str, Any], data: bytes | None) -> Result:
        if data is None:
            return Result(failure=Failure("missing_in_shard"))
        sha256 = _sha256(row, data)
        judged = decode(data, self._probe, _NO_FILTERS)
        if isinstance(judged, Failure):
            return Result(failure=judged, sha256=sha256)
        # Without resizing img2dataset stores no sizes.
        width, height = row.get("original_width"), row.get("original_height")
        width, height = width or judged.original_width, height or judged.original_height
        if reason := size_reason(width, height, self._filters):
            return Result(failure=Failure(reason, outcome="filtered"), sha256=sha256)
        picture = Picture(
            data=data,
            format=str(format_of(data)).lower(),
            width=judged.original_width,
            height=judged.original_height,
            original_width=width,
            original_height=height,
            phash=judged.phash,
        )
        return Result(picture=picture, sha256=sha256)


def _failure(row: dict[str, Any]) -> Failure | None:
    """Returns why a row has no picture, by its metadata."""
    status, message = row.get("status"), str(row.get("error_message"))
    if status == "failed_to_download":
        return download_failure(message)
    if status == "failed_to_resize":
        return resize_failure(message)
    if status != "success":
        return Failure("unknown_status")
    return None


def _sha256(row: dict[str, Any], data: bytes) -> bytes:
    """Returns the hash of the bytes that were fetched, where it was computed, else of those that are stored."""
    try:
        found = bytes.fromhex(row.get("sha256") or "")
    except ValueError:
        found = b""
    return found if len(found) == hashlib.sha256().digest_size else hashlib.sha256(data).digest()
