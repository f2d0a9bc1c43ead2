import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from pipelines.data.fetch.hosts import COOL_DOWN_S, FAILURES_TO_SHUT, LONGEST_PAUSE_S, Hosts, Turn


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


def test_dead_hosts_without_number_are_not_all_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.fetch.hosts.MOST_REMEMBERED", 100, raising=False)

    async def check(hosts: Hosts, clock: Clock) -> None:
        for number in range(1000):
            await ask(hosts, "failed", f"dead-{number}")
            # One that is asked again and again is shut in its turn, and stays so.
            if number % 50 == 0:
                assert await ask(hosts, "failed", "often") == (number // 50 < FAILURES_TO_SHUT)
        assert len(hosts) == 100
        assert set(hosts.known) == {"often", *(f"dead-{number}" for number in range(901, 1000))}
        # One that is being asked is not forgotten, however many others fail meanwhile.
        async with hosts.turn("dead-950") as turn:
            assert turn.start()
            for number in range(1000, 1200):
                await ask(hosts, "failed", f"dead-{number}")
            turn.failed()
            assert len(hosts) == 101
        assert len(hosts) == 100
        assert hosts.known["dead-950"].failures == 2

    with_hosts(check)


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
