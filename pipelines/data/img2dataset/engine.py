"""Fetching and resizing by img2dataset's own code, for those who need its exact pixels."""

import asyncio
import contextlib
import hashlib
import importlib.util
import io
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mdm_core.errors import ConfigError, MdmError
from pipelines.data.config import ImageConfig, RefreshConfig
from pipelines.data.engine import Link, Result
from pipelines.data.failure import Failure
from pipelines.data.fetch.connections import tls_context
from pipelines.data.fetch.links import host_of, parse_link
from pipelines.data.img2dataset.messages import download_failure, resize_failure
from pipelines.data.img2dataset.opener import LimitedFetch, install
from pipelines.data.pictures.decode import Picture, decode

_RESIZE_MODES = {
    "shorter_side": "keep_ratio",
    "center_crop": "center_crop",
    "longer_side": "keep_ratio_largest",
    "none": "no",
}
_FORMATS = {"jpeg": "jpg", "webp": "webp", "png": "png"}
# Of 0 to 9, as zlib counts; it changes the size of a file, and no pixel.
_PNG_COMPRESSION = 6
_OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "none"}
# Small, and large enough for a perceptual hash.
_PROBE_PX = 64


def check_img2dataset(config: RefreshConfig) -> None:
    """Returns if `fetch.engine: img2dataset` can do what is configured; nothing heavy is imported.

    Raises:
        ConfigError: It can't.
    """
    if config.image.format == "source":
        raise ConfigError(
            "image.format=source is not known to fetch.engine=img2dataset; wanted jpeg, webp or png, or engine native"
        )
    if importlib.util.find_spec("img2dataset") is None:
        raise ConfigError(
            "fetch.engine=img2dataset needs img2dataset, which is not installed; pip install 'mdm[img2dataset]'"
        )


class Img2datasetEngine:
    """Runs img2dataset's downloader and resizer in threads; outcomes and reasons are those of the native engine.

    The limits of `fetch` are kept by the opener that its downloader fetches through. What only the resolver of the
    system can end, a name that nobody answers for, is given up at the deadline, though its thread may live on. A file
    is judged by this project's decoder first: img2dataset's would keep half a picture, and decode a bomb.

    Args:
        config: The refresh.
        num_threads: Pictures resized at once.
    """

    def __init__(self, config: RefreshConfig, *, num_threads: int = 1) -> None:
        check_img2dataset(config)
        self._config = config
        self._download, make_resizer = _import_img2dataset()
        image = config.image
        self._resize = make_resizer(
            image_size=image.size_px,
            resize_mode=_RESIZE_MODES[image.resize],
            resize_only_if_bigger=not image.upscale,
            encode_quality=_PNG_COMPRESSION if image.format == "png" else image.quality,
            encode_format=_FORMATS[image.format],
        )
        self._probe = ImageConfig(size_px=_PROBE_PX, max_pixels=image.max_pixels)
        self._context = tls_context(config.fetch.verify_tls)
        # Twice: threads that wait for the resolver must not take the turns of others.
        self._fetchers = ThreadPoolExecutor(2 * config.fetch.concurrency, thread_name_prefix="fetch")
        self._resizers = ThreadPoolExecutor(num_threads, thread_name_prefix="resize")
        self._slots = asyncio.Semaphore(config.fetch.concurrency)
        self._host_slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(config.fetch.per_host)
        )
        install()

    async def results(self, links: Sequence[Link]) -> list[Result]:
        """Returns what became of each link, in their order."""
        return await asyncio.gather(*(self._result(link.url) for link in links))

    async def close(self) -> None:
        """Ends the threads, without waiting for those that still fetch."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._resizers.shutdown(wait=False, cancel_futures=True)

    async def _result(self, text: str) -> Result:
        try:
            link = parse_link(text)
        except ValueError:
            return Result(failure=Failure("bad_url"))
        loop = asyncio.get_running_loop()
        async with self._host_slots[host_of(link)], self._slots:
            fetching = loop.run_in_executor(self._fetchers, self._fetch, str(link))
            try:
                body = await asyncio.wait_for(fetching, self._config.fetch.deadline_s)
            except TimeoutError:
                return Result(failure=Failure("deadline", retryable=True))
        if isinstance(body, Failure):
            return Result(failure=body)
        return await loop.run_in_executor(self._resizers, self._resized, body)

    def _fetch(self, url: str) -> bytes | Failure:
        fetch = self._config.fetch
        with LimitedFetch(fetch, self._context) as limits:
            _, stream, message = self._download(
                (0, url),
                timeout=fetch.deadline_s,
                retries=fetch.retries,
                user_agent_token=fetch.user_agent.partition("/")[0].strip().lower(),
                disallowed_header_directives=_OPT_OUTS if fetch.honour_opt_out else None,
            )
        if isinstance(limits.error, MdmError):
            raise limits.error
        return download_failure(message) if stream is None else bytes(stream.getvalue())

    def _resized(self, body: bytes) -> Result:
        sha256 = hashlib.sha256(body).digest()
        judged = decode(body, self._probe, self._config.filters)
        if isinstance(judged, Failure):
            return Result(failure=judged, sha256=sha256)
        data, width, height, original_width, original_height, message = self._resize(io.BytesIO(body))
        if message is not None:
            return Result(failure=resize_failure(message), sha256=sha256)
        picture = Picture(data, self._config.image.format, width, height, original_width, original_height, judged.phash)
        return Result(picture=picture, sha256=sha256)


def _import_img2dataset() -> tuple[Any, Any]:
    """Returns its function that downloads, and its class that resizes."""
    # albumentations, which it uses, asks its author's server for newer versions when it is imported.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from img2dataset import downloader, resizer
    except ImportError as error:
        raise ConfigError(
            f"fetch.engine=img2dataset can't be used: {error}; pip install 'mdm[img2dataset]' under Python 3.11 or 3.12"
        ) from error
    # It points stdout and stderr of the whole process at /dev/null while it resizes, and from two threads for good.
    resizer.SuppressStdoutStderr = contextlib.nullcontext
    return downloader.download_image_with_retry, resizer.Resizer
