"""Processor time of a picture, step by step: the contenders' own functions, called over the same pictures.

In processes of their own, since both bring libraries that the other has not. A step's time is that of the library calls
that do it, whichever function they are in; what is left of the function is `other`.
"""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdm_core.errors import WorkError
from pipelines.data.config import RefreshConfig

if TYPE_CHECKING:
    from pipelines.data.fetch.fetcher import Fetcher

STEPS = ("fetch", "decode", "resize", "encode", "other", "write")


@dataclass(frozen=True)
class StepsOf:
    """What both are given."""

    urls: tuple[str, ...]
    image_px: int
    cores: tuple[int, ...]
    folder: Path
    config: RefreshConfig
    threads: int


class _Clock:
    """Adds up processor time by step; a call inside another counts for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self._inside = False

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Counts the block, in whatever threads of the process it runs."""
        before, began_s = sum(self.seconds.values()), time.process_time()
        try:
            yield
        finally:
            took_s = time.process_time() - began_s
            # Of `other`, what the steps inside have counted is no part.
            self.seconds[name] += took_s - (sum(self.seconds.values()) - before)

    @contextlib.contextmanager
    def calls(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Counts all calls of a function or method inside the block."""
        original = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            self._inside = True
            began_s = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] += time.process_time() - began_s
                self._inside = False

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            setattr(owner, attribute, original)


class NativeSteps:
    """What `mdm refresh` does with each picture."""

    def __init__(self, given: StepsOf) -> None:
        os.sched_setaffinity(0, given.cores)
        self._given = given

    def __call__(self, request: str) -> dict[str, float]:
        """Seconds a picture by step."""
        import simplejpeg
        import uvloop
        from PIL import Image, ImageFile
        from threadpoolctl import threadpool_limits

        from pipelines.benchmark.data.noop import sample_rows
        from pipelines.data.failure import Failure
        from pipelines.data.fetch.fetcher import Fetcher
        from pipelines.data.pictures import decode as decoding
        from pipelines.data.table.shards import write_shard

        given, config, clock = self._given, self._given.config, _Clock()
        uvloop.run(_fetch(Fetcher(config.fetch), given.urls[:1]))
        with clock.step("fetch"):
            bodies = uvloop.run(_fetch(Fetcher(config.fetch), given.urls))
        decoding.decode(bodies[0], config.image, config.filters)
        timed: tuple[tuple[Any, str, str], ...] = (
            (simplejpeg, "decode_jpeg", "decode"),
            (ImageFile.ImageFile, "load", "decode"),
            (decoding, "resize", "resize"),
            (simplejpeg, "encode_jpeg", "encode"),
            (Image.Image, "save", "encode"),
        )
        pictures = []
        # As in a refresh's worker.
        with threadpool_limits(1, user_api="blas"), _timing(clock, timed), clock.step("other"):
            for body in bodies:
                hashlib.sha256(body)
                pictures.append(decoding.decode(body, config.image, config.filters))
        images = [picture.data for picture in pictures if not isinstance(picture, Failure)]

        def write(count: int) -> None:
            rows = sample_rows(given.urls[:count], images[:count], ["a caption"] * count, datetime.now(UTC))
            write_shard(str(given.folder), "steps", "ok", rows)

        # The first time brings in libraries, which is part of the start-up.
        write(1)
        with clock.step("write"):
            write(len(images))
        return {name: seconds / len(bodies) for name, seconds in clock.seconds.items()}


class Img2datasetSteps:
    """What img2dataset does with each picture."""

    def __init__(self, given: StepsOf) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        os.sched_setaffinity(0, given.cores)
        self._given = given

    def __call__(self, request: str) -> dict[str, float]:
        """Seconds a picture by step."""
        import cv2
        import pyarrow as pa
        from img2dataset import resizer, writer
        from img2dataset.downloader import download_image_with_retry

        given, clock = self._given, _Clock()

        def fetch(row: tuple[int, str]) -> Any:
            return download_image_with_retry(row, 20, 0, None, ["noai"])

        fetch((0, given.urls[0]))
        with clock.step("fetch"), ThreadPoolExecutor(given.threads) as pool:
            streams = [stream for _, stream, _ in pool.map(fetch, enumerate(given.urls))]
        resize = resizer.Resizer(given.image_px, "keep_ratio", True, encode_quality=95)
        resize(streams[0])
        timed = ((cv2, "imdecode", "decode"), (cv2, "resize", "resize"), (cv2, "imencode", "encode"))
        pictures = []
        with _timing(clock, timed), clock.step("other"):
            for stream in streams:
                pictures.append(resize(stream))
                stream.seek(0)
                hashlib.sha256(stream.read()).hexdigest()
        names = ("url", "key", "status", "sha256")
        schema = pa.schema([(name, pa.string()) for name in names])

        def write(count: int) -> None:
            samples = writer.WebDatasetSampleWriter(0, str(given.folder), True, 5, schema, "jpg")
            for number, (url, picture) in enumerate(zip(given.urls[:count], pictures[:count], strict=True)):
                key = f"{number:09d}"
                meta = {"url": url, "key": key, "status": "success", "sha256": "0" * 64}
                samples.write(picture[0], key, "a caption", meta)
            samples.close()

        write(1)
        with clock.step("write"):
            write(len(pictures))
        return {name: seconds / len(streams) for name, seconds in clock.seconds.items()}


@contextlib.contextmanager
def _timing(clock: _Clock, timed: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in timed:
            stack.enter_context(clock.calls(owner, attribute, name))
        yield


async def _fetch(fetcher: "Fetcher", urls: Sequence[str]) -> list[bytes]:
    async def body(url: str) -> bytes:
        async with fetcher.fetched(url) as found:
            if not isinstance(found, bytes):
                raise WorkError(f"the server of pictures gave no picture for {url}: {found}")
            return found

    try:
        return await asyncio.gather(*map(body, urls))
    finally:
        await fetcher.close()
