"""Fetching what strangers' links point to: one deadline, one size, one polite pace, whatever a server does."""

import asyncio
import contextlib
import random
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from mdm_core.errors import ConfigError
from pipelines.data.config import FetchConfig
from pipelines.data.failure import STATUSES_THAT_PASS, Failure
from pipelines.data.fetch.addresses import AddressGuard, Lookup, PrivateAddressError
from pipelines.data.fetch.budget import BYTES_IN_FLIGHT, ByteBudget
from pipelines.data.fetch.connections import open_session
from pipelines.data.fetch.content_encoding import UnknownEncodingError, Unpacker
from pipelines.data.fetch.headers import opted_out, retry_after_s
from pipelines.data.fetch.hosts import Hosts, Turn
from pipelines.data.fetch.links import follow_link, host_of, parse_link

_ASK_TO_WAIT = {429, 503}
_REDIRECTS = {301, 302, 303, 307, 308}
_BACKOFF_S = 0.5
# The rest of an answer that holds no picture is read if it is short and quick: another connection costs more.
_REST_BYTES = 1 << 16
_REST_S = 1.0


class Fetcher:
    """Fetches links over one pool of connections, inside one event loop; it may be made outside of it.

    Args:
        config: The limits.
        lookup: Returns the addresses of a name; the system's resolver by default.
        seed: Of the jitter in the waits between tries; different in each process by default.
        bytes_in_flight: Bytes of bodies in memory at once; in truth up to `config.max_bytes` more.
    """

    def __init__(
        self,
        config: FetchConfig,
        *,
        lookup: Lookup | None = None,
        seed: int | None = None,
        bytes_in_flight: int = BYTES_IN_FLIGHT,
    ) -> None:
        agent = config.user_agent
        if not (agent.isascii() and agent.isprintable()):
            raise ConfigError(f"fetch.user_agent={agent!r} cannot be sent; wanted printable ASCII")
        self.config = config
        self.agent_name = agent.partition("/")[0].strip()
        self.random = random.Random(seed)
        self.hosts = Hosts(config.per_host)
        self.slots = asyncio.Semaphore(config.concurrency)
        self.budget = ByteBudget(max(bytes_in_flight, config.max_bytes))
        self._guard = AddressGuard(config.allow_networks)
        self._lookup = lookup
        self._session: aiohttp.ClientSession | None = None

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

    def fetched(self, url: str) -> contextlib.AbstractAsyncContextManager[bytes | Failure]:
        """Gives the body that `url` leads to, or why there is none; the deadline runs from its turn on.

        Its turn ends with the block: bodies in use count as being fetched, so that no more of them are in memory than
        links are fetched at once.
        """
        return _Download(self, url)

    def session(self) -> aiohttp.ClientSession:
        """Returns the one session, which belongs to the loop that first asks for it."""
        if self._session is None:
            self._session = open_session(self.config, self._guard, self._lookup)
        return self._session


class _Download:
    """One link's way to its body: its turns, its deadline, its redirects and its tries."""

    def __init__(self, fetcher: Fetcher, url: str) -> None:
        self._fetcher = fetcher
        self._url = url
        self._lease = fetcher.budget.lease()
        self._left_s = fetcher.config.deadline_s
        self._redirects_left = fetcher.config.max_redirects
        self._num_tries = 0
        self._has_slot = False

    async def __aenter__(self) -> bytes | Failure:
        try:
            url = parse_link(self._url)
        except ValueError:
            return Failure("bad_url")
        try:
            return await self._result(url)
        except BaseException:
            self._end()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._lease.give_back()
        self._give_back_slot()

    async def _result(self, url: URL) -> bytes | Failure:
        """Returns the body, or why there is none."""
        result: bytes | Failure | URL = url
        while isinstance(result, URL):
            url = result
            # First the host, and nothing else meanwhile: a link that waits for its host must not keep others from
            # theirs. One that was sent on has waited once, and may hold a signature that ends soon.
            self._give_back_slot()
            is_sent_on = self._redirects_left < self._fetcher.config.max_redirects
            async with self._fetcher.hosts.turn(host_of(url), first=is_sent_on) as turn:
                if turn.has_slot:
                    await self._fetcher.slots.acquire()
                    self._has_slot = True
                if not turn.start():
                    return Failure("host_unavailable", retryable=True)
                result = await self._ask_in_time(url, turn)
                if isinstance(result, Failure) and result.retryable:
                    turn.failed()
                else:
                    turn.succeeded()
        return result

    def _give_back_slot(self) -> None:
        if self._has_slot:
            self._has_slot = False
            self._fetcher.slots.release()

    async def _ask_in_time(self, url: URL, turn: Turn) -> bytes | Failure | URL:
        """Returns what a host answers within what is left of the deadline: all the time but that spent in queues."""
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(self._left_s) as self._timeout:
                result = await self._ask(url, turn)
                self._left_s = (self._timeout.when() or 0.0) - clock()
                return result
        except TimeoutError:
            return Failure("deadline", retryable=True)

    async def _ask(self, url: URL, turn: Turn) -> bytes | Failure | URL:
        """Returns the body, the link to another host, or a failure that further tries did not change."""
        config = self._fetcher.config
        while True:
            self._lease.give_back()
            result = await self._try(url)
            if isinstance(result, URL):
                if not self._redirects_left:
                    return Failure("too_many_redirects")
                self._redirects_left -= 1
                if host_of(result) != host_of(url):
                    return result
                url = result
            elif isinstance(result, Failure) and result.retryable:
                if result.retry_after_s > config.deadline_s:
                    turn.asked_to_wait(result.retry_after_s)
                wait_s = result.retry_after_s + backoff_s(self._num_tries, self._fetcher.random)
                ends_s = self._timeout.when() or 0.0
                if self._num_tries == config.retries or asyncio.get_running_loop().time() + wait_s >= ends_s:
                    return result
                self._num_tries += 1
                await asyncio.sleep(wait_s)
            else:
                return result

    async def _try(self, url: URL) -> bytes | Failure | URL:
        """Returns what one request gives. Redirects are followed by hand: they are as untrusted as the first link."""
        try:
            async with self._fetcher.session().get(url, allow_redirects=False) as response:
                if response.status == 200:
                    return await self._read(response)
                await _read_rest(response)
                location = response.headers.get("Location")
                if response.status in _REDIRECTS and location is not None:
                    return _sent_on(url, location)
                wait_s = retry_after_s(response.headers) if response.status in _ASK_TO_WAIT else 0.0
                return Failure(f"http_{response.status}", response.status in STATUSES_THAT_PASS, retry_after_s=wait_s)
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
        except aiohttp.ClientError:
            return Failure("bad_response")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes | Failure:
        """Returns the body of an answer, unpacked; reading waits while too many bytes are in memory."""
        config = self._fetcher.config
        tags = response.headers.getall("X-Robots-Tag", ())
        if tags and config.honour_opt_out and opted_out(tags, self._fetcher.agent_name):
            return Failure("opted_out", outcome="filtered")
        if (response.content_length or 0) > config.max_bytes:
            return Failure("too_large")
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        pieces: list[bytes] = []
        try:
            unpacker = Unpacker(encoding) if encoding not in ("", "identity") else None
            async for block in response.content.iter_any():
                for piece in unpacker.pieces(block) if unpacker else (block,):
                    if self._lease.held_bytes + len(piece) > config.max_bytes:
                        return Failure("too_large")
                    if not self._lease.take(len(piece)):
                        await self._wait_for_memory(len(piece))
                    pieces.append(piece)
        except UnknownEncodingError:
            return Failure("content_encoding")
        if unpacker and not unpacker.is_complete:
            return Failure("incomplete_body", retryable=True)
        return b"".join(pieces)

    async def _wait_for_memory(self, num_bytes: int) -> None:
        """Returns when the body may grow; the deadline waits too, since this is not the server's doing."""
        clock = asyncio.get_running_loop().time
        left_s = (self._timeout.when() or 0.0) - clock()
        self._timeout.reschedule(None)
        await self._lease.wait(num_bytes)
        self._timeout.reschedule(clock() + left_s)


def backoff_s(num_tries: int, rng: random.Random) -> float:
    """Returns seconds to wait after so many tries, twice as many each time, and never the same for two links."""
    return rng.uniform(0.5, 1.5) * _BACKOFF_S * 2.0 ** min(num_tries, 30)


def _sent_on(url: URL, location: str) -> URL | Failure:
    try:
        return follow_link(url, location)
    except ValueError:
        return Failure("bad_redirect")


async def _read_rest(response: aiohttp.ClientResponse) -> None:
    """Reads what is left of an answer, if it is little and comes soon; then its connection can be used again."""
    if response.content.is_eof() or (response.content_length or 0) > _REST_BYTES:
        return
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(_REST_S):
            num_bytes = 0
            async for block in response.content.iter_any():
                num_bytes += len(block)
                if num_bytes > _REST_BYTES:
                    break


def _connect_failure(error: aiohttp.ClientConnectorError) -> Failure:
    if isinstance(error.os_error, PrivateAddressError):
        return Failure("private_address")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Failure("dns", retryable=True)
    if isinstance(error, aiohttp.ClientSSLError):
        return Failure("tls")
    return Failure("connection", retryable=True)
