"""Hosts that fail, stall, ask to wait and send links on, and what that costs the links of others."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipelines.data.config import FetchConfig
from pipelines.data.failure import Failure
from pipelines.data.fetch.fetcher import Fetcher
from pipelines.data.fetch.hosts import FAILURES_TO_SHUT
from tests.pipelines.data.fetching import fetch_all
from tests.pipelines.data.raw_server import End, RawServer, Step, answer, ok

UNAVAILABLE = Failure("host_unavailable", retryable=True)


def fetch_each(urls: Sequence[str], **options: Any) -> list[bytes | Failure]:
    defaults: dict[str, Any] = {"allow_networks": ("127.0.0.0/8",), "deadline_s": 10.0}
    return fetch_all(urls, **defaults | options)


def test_dead_host_costs_eight_requests_and_the_rest_fail_at_once() -> None:
    def script(path: str) -> list[Step]:
        return [answer("503 No", "Content-Length: 0")] if path.startswith("/dead") else [ok(path.encode())]

    with RawServer(script) as server:
        dead = [server.url(f"/dead/{number}", "127.0.0.2") for number in range(100)]
        alive = [server.url(f"/{number}") for number in range(100)]
        mixed = [url for pair in zip(dead, alive, strict=True) for url in pair]
        results = fetch_each(mixed, per_host=4)
        asked = Counter(line.split("/")[1] for line in server.request_lines)["dead"]
    assert results[1::2] == [f"/{number}".encode() for number in range(100)]
    assert Counter(results[0::2]) == {Failure("http_503", True): asked, UNAVAILABLE: 100 - asked}
    # The last of them were under way when the eighth failed.
    assert FAILURES_TO_SHUT <= asked < FAILURES_TO_SHUT + 4


def test_stalls_among_good_links_do_not_shut_their_host() -> None:
    stalls = set(random.Random(3).sample(range(300), 60))
    with RawServer(lambda path: [3600.0] if path.startswith("/stall") else [ok(path.encode())]) as server:
        urls = [server.url(f"/stall/{number}" if number in stalls else f"/{number}") for number in range(300)]
        results = fetch_each(urls, deadline_s=0.5, per_host=16)
    wanted = [Failure("deadline", True) if n in stalls else f"/{n}".encode() for n in range(300)]
    assert results == wanted


def test_long_retry_after_leaves_the_host_for_later() -> None:
    with RawServer(lambda path: [answer("429 Slow", "Retry-After: 3000", "Content-Length: 0")]) as server:
        results = fetch_each([server.url(f"/{number}") for number in range(50)], per_host=1, retries=2)
        assert results == [Failure("http_429", True, retry_after_s=3000.0)] + [UNAVAILABLE] * 49
        assert len(server.requests) == 1


def test_redirect_to_a_host_that_is_shut_is_not_followed() -> None:
    def script(path: str) -> list[Step]:
        if path.startswith("/to"):
            return [answer("302 There", f"Location: {server.url('/dead', '127.0.0.2')}", "Content-Length: 0")]
        return [answer("500 No", "Content-Length: 0")] if path == "/dead" else [ok(b"alive")]

    with RawServer(script) as server:
        results = fetch_each([server.url(f"/to/{number}") for number in range(30)] + [server.url("/")], per_host=1)
        num_dead = sum(" /dead " in line for line in server.request_lines)
    # The host that sends there answers, and is not blamed.
    assert results == [Failure("http_500", True)] * FAILURES_TO_SHUT + [UNAVAILABLE] * 22 + [b"alive"]
    assert num_dead == FAILURES_TO_SHUT


def test_redirected_links_keep_to_the_limit_of_the_host_they_are_sent_to() -> None:
    running = 0
    most = 0

    def script(path: str) -> list[Step]:
        if path.startswith("/to"):
            return [answer("302 There", f"Location: {server.url('/slow', '127.0.0.3')}", "Content-Length: 0")]
        return [0.03, ok(b"slow")]

    class Counting(RawServer):
        async def _play(self, writer: asyncio.StreamWriter, steps: Any) -> bool:
            nonlocal running, most
            running += len(steps) > 1
            most = max(most, running)
            try:
                return await super()._play(writer, steps)
            finally:
                running -= len(steps) > 1

    with Counting(script) as server:
        urls = [server.url(f"/to/{number}", f"127.0.0.{1 + number % 2}") for number in range(24)]
        assert fetch_each(urls, per_host=3) == [b"slow"] * 24
    assert most == 3


def test_links_sent_on_to_a_slow_host_hold_no_place_while_they_wait() -> None:
    def script(path: str) -> list[Step]:
        if path == "/to":
            return [answer("302 There", f"Location: {server.url('/stall', '127.0.0.2')}", "Content-Length: 0")]
        return [3600.0] if path == "/stall" else [ok(b"quick")]

    async def run() -> list[bytes | Failure]:
        config = FetchConfig(allow_networks=("127.0.0.0/8",), concurrency=2, per_host=1, deadline_s=60.0)
        async with Fetcher(config) as fetcher:

            async def one(url: str) -> bytes | Failure:
                async with fetcher.fetched(url) as body:
                    return body

            slow = [asyncio.create_task(one(server.url("/to"))) for _ in range(5)]
            while server.request_lines.count("GET /to HTTP/1.1") < 5:
                await asyncio.sleep(0.01)
            quick = asyncio.gather(*(one(server.url("/quick", "127.0.0.3")) for _ in range(10)))
            results = await asyncio.wait_for(quick, 20)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
            return results

    with RawServer(script) as server:
        assert asyncio.run(asyncio.wait_for(run(), 30)) == [b"quick"] * 10


def test_links_that_wait_for_their_host_hold_no_place_among_those_fetched() -> None:
    with RawServer(lambda path: [3600.0] if path == "/stall" else [ok(b"quick")]) as server:
        urls = [server.url("/stall", "127.0.0.2")] * 20 + [server.url("/quick")] * 50
        results = fetch_each(urls, concurrency=2, per_host=1, deadline_s=0.3)
    assert results[20:] == [b"quick"] * 50
    assert Counter(results[:20]) == {Failure("deadline", True): FAILURES_TO_SHUT, UNAVAILABLE: 12}


def test_connections_that_break_count_as_failures_too() -> None:
    with RawServer(lambda path: [End.ABORT]) as server:
        results = fetch_each([server.url(f"/{number}") for number in range(20)], per_host=1)
    assert results == [Failure("connection", True)] * FAILURES_TO_SHUT + [UNAVAILABLE] * 12
