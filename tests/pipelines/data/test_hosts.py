import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pipelines.data.config import FetchConfig
from pipelines.data.fetch import Failure, Fetcher
from pipelines.data.hosts import COOL_DOWN_S, FAILURES_TO_SHUT, LONGEST_PAUSE_S, Hosts, Turn
from tests.pipelines.data.raw_server import End, RawServer, Step, answer, ok

UNAVAILABLE = Failure("host_unavailable", retryable=True)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def with_hosts(check: Callable[[Hosts, Clock], Awaitable[None]], per_host: int = 4) -> None:
    clock = Clock()
    asyncio.run(check(Hosts(per_host, clock), clock))  # type: ignore[arg-type]


async def ask(hosts: Hosts, outcome: str, name: str = "host") -> bool:
    """Returns whether the host was asked, in one turn that ends with `outcome`."""
    async with hosts.turn(name) as turn:
        if not turn.start():
            return False
        tell(turn, outcome)
        return True


def tell(turn: Turn, outcome: str) -> None:
    if outcome != "silence":
        getattr(turn, outcome)()


def test_host_is_shut_after_so_many_failures_in_a_row() -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        asked = []
        for _ in range(FAILURES_TO_SHUT + 5):
            clock.now_s += 1
            asked.append(await ask(hosts, "failed"))
        assert asked == [True] * FAILURES_TO_SHUT + [False] * 5
        assert await ask(hosts, "succeeded", "other")

    with_hosts(check)


def test_one_success_begins_the_row_anew() -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        for _ in range(5):
            for outcome in ["failed"] * (FAILURES_TO_SHUT - 1) + ["silence", "succeeded"]:
                clock.now_s += 1
                assert await ask(hosts, outcome)

    with_hosts(check)


def test_one_probe_after_the_cool_down_opens_the_host_or_shuts_it_again() -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        for _ in range(FAILURES_TO_SHUT):
            clock.now_s += 1
            await ask(hosts, "failed")
        clock.now_s += COOL_DOWN_S - 0.1
        assert not await ask(hosts, "succeeded")
        clock.now_s += 0.2
        async with hosts.turn("host") as probe:
            assert probe.start()
            assert [await ask(hosts, "succeeded") for _ in range(3)] == [False] * 3
            clock.now_s += 20
            probe.failed()
        assert not await ask(hosts, "succeeded")
        clock.now_s += COOL_DOWN_S
        # A probe that says nothing, as one that was cancelled, leaves the next to try.
        assert await ask(hosts, "silence")
        assert await ask(hosts, "succeeded")
        assert [await ask(hosts, "silence") for _ in range(3)] == [True] * 3

    with_hosts(check)


def test_failures_that_began_before_a_success_are_no_row() -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        turns = [hosts.turn("host") for _ in range(3 * FAILURES_TO_SHUT)]
        for turn in turns:
            await turn.__aenter__()
            assert turn.start()
        clock.now_s += 1
        assert await ask(hosts, "succeeded")
        clock.now_s += 19
        for turn in turns:
            turn.failed()
            await turn.__aexit__(None, None, None)
        assert await ask(hosts, "silence")

    with_hosts(check, per_host=100)


def test_those_that_wait_are_refused_when_the_host_is_shut() -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        clock.now_s += 1
        turns = [hosts.turn("host") for _ in range(FAILURES_TO_SHUT)]
        for turn in turns:
            await turn.__aenter__()
            assert turn.start()
        waiting = [asyncio.create_task(ask(hosts, "succeeded")) for _ in range(50)]
        await asyncio.sleep(0)
        for turn in turns:
            turn.failed()
        assert await asyncio.gather(*waiting) == [False] * 50

    with_hosts(check, per_host=FAILURES_TO_SHUT)


@pytest.mark.parametrize(("wait_s", "pause_s"), [(300.0, 300.0), (1e12, LONGEST_PAUSE_S), (math.inf, LONGEST_PAUSE_S)])
def test_host_that_asks_to_wait_is_left_alone_for_so_long(wait_s: float, pause_s: float) -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        async with hosts.turn("host") as other, hosts.turn("host") as turn:
            assert other.start()
            assert turn.start()
            turn.asked_to_wait(wait_s)
            turn.failed()
            clock.now_s += 1
            # It answered another link; but it asked.
            other.succeeded()
        clock.now_s += pause_s - 2
        assert not await ask(hosts, "succeeded")
        clock.now_s += 2
        assert await ask(hosts, "succeeded")
        assert await ask(hosts, "succeeded")

    with_hosts(check)


def test_turns_are_given_in_order_and_never_more_at_once_than_allowed() -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        order: list[int] = []
        at_once: list[int] = []
        running = 0

        async def one(number: int, first: bool = False) -> None:
            nonlocal running
            async with hosts.turn("host", first=first) as turn:
                assert turn.start()
                order.append(number)
                running += 1
                at_once.append(running)
                for _ in range(3):
                    await asyncio.sleep(0)
                running -= 1

        tasks = [asyncio.create_task(one(number)) for number in range(20)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one(99, first=True)))
        await asyncio.gather(*tasks)
        assert order == [*range(4), 99, *range(4, 20)]
        assert max(at_once) == 4
        assert len(hosts) == 0

    with_hosts(check)


def test_turns_are_neither_lost_nor_doubled_by_cancelling() -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        rng = random.Random(5)
        running: Counter[str] = Counter()

        async def one(name: str, outcome: str) -> None:
            async with hosts.turn(name) as turn:
                if turn.start():
                    running[name] += 1
                    try:
                        assert running[name] <= 2
                        for _ in range(rng.randrange(6)):
                            await asyncio.sleep(0)
                        tell(turn, outcome)
                    finally:
                        running[name] -= 1

        outcomes = ["failed", "failed", "failed", "failed", "succeeded", "silence"]
        for _ in range(60):
            tasks = [asyncio.create_task(one(rng.choice("ab"), rng.choice(outcomes))) for _ in range(30)]
            for _ in range(rng.randrange(40)):
                clock.now_s += rng.choice([0.0, 1.0, COOL_DOWN_S])
                await asyncio.sleep(0)
                rng.choice(tasks).cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert not [error for error in done if isinstance(error, Exception)]
            clock.now_s += 2 * COOL_DOWN_S
            for name in "ab":
                assert await ask(hosts, "succeeded", name)
                assert name not in hosts.known

    with_hosts(check, per_host=2)


def test_one_that_was_refused_does_not_forget_a_host_that_others_are_at() -> None:
    async def check(hosts: Hosts, clock: Clock) -> None:
        bad, good = [hosts.turn("host") for _ in range(2)]
        for turn in (bad, good):
            await turn.__aenter__()
            assert turn.start()
        refused = asyncio.create_task(ask(hosts, "succeeded"))
        await asyncio.sleep(0)
        for _ in range(FAILURES_TO_SHUT):
            bad.failed()
        good.succeeded()
        for turn in (bad, good):
            await turn.__aexit__(None, None, None)
        assert len(hosts) == 0
        new = [hosts.turn("host") for _ in range(2)]
        for turn in new:
            await turn.__aenter__()
        assert not await refused
        third = asyncio.create_task(ask(hosts, "succeeded"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not third.done()
        await new[0].__aexit__(None, None, None)
        assert await third

    with_hosts(check, per_host=2)


def fetch_each(urls: list[str], **options: Any) -> list[bytes | Failure]:
    """Returns what comes of links that are asked for at once."""
    config = FetchConfig(**{"allow_networks": ("127.0.0.0/8",), "deadline_s": 10.0, "retries": 0} | options)

    async def run() -> list[bytes | Failure]:
        async with Fetcher(config) as fetcher:

            async def one(url: str) -> bytes | Failure:
                async with fetcher.fetched(url) as body:
                    return body

            return await asyncio.gather(*map(one, urls))

    return asyncio.run(run())


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
