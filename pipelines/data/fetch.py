"""Fetching what strangers' links point to: one deadline, one size, one polite pace, whatever a server does."""

import asyncio
import contextlib
import email.utils
import random
import socket
import ssl
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from pipelines.data.addresses import AddressGuard, GuardedResolver, Lookup, PrivateAddressError
from pipelines.data.config import FetchConfig

_MAY_PASS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524}
_REDIRECTS = {301, 302, 303, 307, 308}
_OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_BACKOFF_S = 0.5
_UNPACK_BYTES = 1 << 16


@dataclass(frozen=True)
class Failure:
    """Why a link has no picture."""

    reason: str
    retryable: bool = False
    outcome: Literal["failed", "filtered"] = "failed"
    retry_after_s: float = 0.0


class Fetcher:
    """Fetches links over one pool of connections, inside one event loop; it may be made outside of it.

    Args:
        config: The limits.
        lookup: Returns the addresses of a name; the system's resolver by default.
        seed: Of the jitter in the waits between tries.
    """

    def __init__(self, config: FetchConfig, *, lookup: Lookup | None = None, seed: int = 0) -> None:
        self._config = config
        self._random = random.Random(seed)
        self._guard = AddressGuard(config.allow_networks)
        self._lookup = lookup
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(config.concurrency)
        self._host_slots: defaultdict[str, asyncio.Semaphore] = defaultdict(self._new_host)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; closing again, or without having fetched, does nothing."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        """Returns the one session, which belongs to the loop that first asks for it."""
        if self._session is not None:
            return self._session
        context = ssl.create_default_context()
        if not self._config.verify_tls:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        # Both limits are kept here and not by the connector, where waiting for a turn would use up the deadline.
        connector = aiohttp.TCPConnector(
            limit=0,
            ssl=context,
            resolver=GuardedResolver(self._guard, self._lookup),
            socket_factory=self._guard.open_socket,
            ttl_dns_cache=60,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_timeout_s),
            headers={
                "User-Agent": self._config.user_agent,
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )
        return self._session

    @contextlib.asynccontextmanager
    async def fetched(self, url: str) -> AsyncIterator[bytes | Failure]:
        """Gives the body that `url` leads to, or why there is none; the deadline runs from its turn on.

        Its turn ends with the block: bodies in use count as being fetched, so that no more of them are in memory than
        links are fetched at once.
        """
        try:
            target = _parse(url)
        except ValueError:
            yield Failure("bad_url")
            return
        # First the host: a link that waits for its host must not keep others from theirs.
        async with contextlib.AsyncExitStack() as turn:
            async with self._host_slots[target.raw_host or ""]:
                await turn.enter_async_context(self._slots)
                result = await self._fetch(target)
            yield result

    async def _fetch(self, url: URL) -> bytes | Failure:
        try:
            async with asyncio.timeout(self._config.deadline_s):
                return await self._fetch_with_retries(url)
        except TimeoutError:
            return Failure("deadline", retryable=True)

    def _new_host(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(self._config.per_host)

    async def _fetch_with_retries(self, url: URL) -> bytes | Failure:
        deadline = time.monotonic() + self._config.deadline_s
        for tries in range(self._config.retries + 1):
            result = await self._follow(url)
            if isinstance(result, bytes) or not result.retryable or tries == self._config.retries:
                break
            wait_s = max(result.retry_after_s, 0.0) + self._random.uniform(0.5, 1.5) * _BACKOFF_S * 2**tries
            if time.monotonic() + wait_s >= deadline:
                break
            await asyncio.sleep(wait_s)
        return result

    async def _follow(self, url: URL) -> bytes | Failure:
        """Follows redirects by hand: each leads to a link that is as untrusted as the first."""
        try:
            for _ in range(self._config.max_redirects + 1):
                async with self._open_session().get(url, allow_redirects=False) as response:
                    location = response.headers.get("Location")
                    if response.status not in _REDIRECTS or location is None:
                        return await self._read(response)
                    url = _parse(urljoin(str(url), location))
            return Failure("too_many_redirects")
        except PrivateAddressError:
            return Failure("private_address")
        except aiohttp.ClientConnectorError as error:
            return _connect_failure(error)
        except aiohttp.ServerTimeoutError:
            return Failure("connect_timeout", retryable=True)
        except aiohttp.ClientPayloadError:
            return Failure("incomplete_body", retryable=True)
        except aiohttp.ClientConnectionError:
            return Failure("connection", retryable=True)
        except aiohttp.InvalidURL:
            return Failure("bad_url")
        except ValueError:
            return Failure("bad_redirect")
        except aiohttp.ClientError:
            return Failure("bad_response")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes | Failure:
        if response.status != 200:
            may_pass = response.status in _MAY_PASS
            return Failure(f"http_{response.status}", may_pass, retry_after_s=_retry_after_s(response.headers))
        if self._config.honour_opt_out and _opted_out(response.headers.getall("X-Robots-Tag", [])):
            return Failure("opted_out", outcome="filtered")
        if (response.content_length or 0) > self._config.max_bytes:
            return Failure("too_large")
        body = bytearray()
        async for block in response.content.iter_any():
            body += block
            if len(body) > self._config.max_bytes:
                return Failure("too_large")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            return bytes(body)
        return _unpack(bytes(body), encoding, self._config.max_bytes)


def _parse(url: str) -> URL:
    """Returns a URL whose percent-encoding is as it was given; only what cannot be sent as it is gets encoded.

    Raises:
        ValueError: It is not a link to a host over http or https.
    """
    sendable = url.isascii() and url.isprintable() and " " not in url
    parsed = URL(url, encoded=sendable)
    if parsed.scheme not in ("http", "https") or not parsed.raw_host:
        raise ValueError(f"{url!r} is not an http(s) link")
    with contextlib.suppress(OSError):
        # Numbers for an address, in any base and grouping, mean what they mean to a browser.
        parsed = parsed.with_host(socket.inet_ntoa(socket.inet_aton(parsed.raw_host)))
    return parsed


def _connect_failure(error: aiohttp.ClientConnectorError) -> Failure:
    if isinstance(error.os_error, PrivateAddressError):
        return Failure("private_address")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Failure("dns", retryable=True)
    if isinstance(error, aiohttp.ClientSSLError):
        return Failure("tls")
    return Failure("connection", retryable=True)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def _opted_out(values: list[str]) -> bool:
    """Returns whether `X-Robots-Tag` headers, those for every agent, keep the picture out."""
    for value in values:
        agent, separator, rest = value.partition(":")
        if separator and "," not in agent and agent.strip().lower() not in ("unavailable_after", "max-image-preview"):
            # Rules for one named crawler, which this is not.
            if agent.strip() != "*":
                continue
            value = rest
        if any(directive.strip().lower() in _OPT_OUTS for directive in value.split(",")):
            return True
    return False


def _unpack(body: bytes, encoding: str, max_bytes: int) -> bytes | Failure:
    """Returns an encoded body unpacked, never more than a block beyond what is accepted of it."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return Failure("content_encoding")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    unpacked = bytearray()
    try:
        while body and not unpacker.eof:
            unpacked += unpacker.decompress(body, _UNPACK_BYTES)
            body = unpacker.unconsumed_tail
            if len(unpacked) > max_bytes:
                return Failure("too_large")
        unpacked += unpacker.flush(_UNPACK_BYTES)
    except zlib.error:
        return Failure("content_encoding")
    return bytes(unpacked) if unpacker.eof else Failure("incomplete_body", retryable=True)
