import asyncio
import contextlib
import random

import pytest

from pipelines.data.config import FetchConfig
from pipelines.data.failure import Failure
from pipelines.data.fetch.budget import ByteBudget, Lease
from pipelines.data.fetch.fetcher import Fetcher
from tests.pipelines.data.raw_server import RawServer, Step, answer, ok


def held(leases: list[Lease]) -> int:
    return sum(lease.held_bytes for lease in leases)


@pytest.mark.parametrize("seed", range(5))
def test_bodies_all_arrive_within_the_limit_and_the_largest(seed: int) -> None:
    rng = random.Random(seed)
    limit, largest = 1000, 400
    leases: list[Lease] = []
    most = 0

    async def body(budget: ByteBudget) -> int:
        nonlocal most
        size = rng.randint(1, largest)
        left = size
        lease = budget.lease()
        leases.append(lease)
        with contextlib.ExitStack() as end:
            end.callback(lease.give_back)
            while left:
                num_bytes = min(left, rng.randint(1, 50))
                if not lease.take(num_bytes):
                    await lease.wait(num_bytes)
                left -= num_bytes
                most = max(most, held(leases))
                assert most <= limit + largest
                await asyncio.sleep(0)
            # In use.
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
            assert lease.held_bytes == size
        assert lease.held_bytes == 0
        return size

    async def run() -> None:
        budget = ByteBudget(limit)
        tasks = [asyncio.create_task(body(budget)) for _ in range(300)]
        for _ in range(60):
            await asyncio.sleep(0)
            rng.choice(tasks).cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [result for result in done if isinstance(result, Exception)]
        assert budget.free == limit
        assert budget.privileged is None
        # Another body finds things as they were at first.
        assert await body(budget) > 0

    asyncio.run(asyncio.wait_for(run(), 20))
    # Without waiting there would have been far more, and the limit was made use of.
    assert limit < most


def test_those_that_wait_grow_in_their_order() -> None:
    async def run() -> list[int]:
        budget = ByteBudget(10)
        order: list[int] = []
        first, *others = [budget.lease() for _ in range(6)]
        assert first.take(8)
        assert first.take(8)

        async def grow(number: int) -> None:
            await others[number].wait(2)
            order.append(number)

        assert not others[0].take(2)
        tasks = [asyncio.create_task(grow(number)) for number in range(5)]
        await asyncio.sleep(0)
        first.give_back()
        await asyncio.gather(*tasks)
        assert (budget.free, budget.privileged) == (0, None)
        assert others[0].take(1)
        assert budget.privileged is others[0]
        return order

    assert asyncio.run(run()) == [0, 1, 2, 3, 4]


def test_nobody_overtakes_those_that_wait() -> None:
    async def run() -> None:
        budget = ByteBudget(10)
        small, privileged, large, late = [budget.lease() for _ in range(4)]
        assert small.take(4)
        assert privileged.take(8)
        waiting = asyncio.create_task(large.wait(7))
        await asyncio.sleep(0)
        small.give_back()
        assert budget.free == 2
        assert not late.take(1)
        privileged.give_back()
        await waiting
        assert late.take(3)

    asyncio.run(run())


BODY = random.Random(1).randbytes(300_000)


def fetch_large(server: RawServer, count: int, **limits: float) -> tuple[list[bytes | Failure], int]:
    """Returns what came of links asked for at once, and the most bytes that were held."""
    options = {"deadline_s": 5.0, "concurrency": count, "per_host": count, "max_bytes": 400_000, "retries": 0} | limits
    config = FetchConfig(allow_networks=("127.0.0.0/8",), **options)
    most = 0

    async def run() -> list[bytes | Failure]:
        async with Fetcher(config, bytes_in_flight=1_000_000) as fetcher:
            limit = fetcher.budget.free

            async def one(number: int) -> bytes | Failure:
                nonlocal most
                async with fetcher.fetched(server.url(f"/{number}")) as body:
                    # Slower than they arrive, as decoding may be.
                    most = max(most, limit - fetcher.budget.free)
                    await asyncio.sleep(0.01)
                    return body

            results = await asyncio.gather(*map(one, range(count)))
            assert fetcher.budget.free == limit
            return results

    return asyncio.run(run()), most


def test_many_large_bodies_arrive_whole_and_within_the_limit() -> None:
    with RawServer(lambda path: [ok(BODY)]) as server:
        results, most = fetch_large(server, 60)
    assert results == [BODY] * 60
    # More than the three whole bodies that fit could not be held; without a limit it would have been 18 MB.
    assert 900_000 <= most <= 1_000_000 + 400_000


def test_waiting_for_memory_does_not_use_up_the_deadline() -> None:
    def script(path: str) -> list[Step]:
        if path == "/0":
            # It begins first, and is slow enough for the others to fill the memory and wait.
            return [answer("200 OK", "Content-Length: 300000") + BODY[:1000], 0.9, BODY[1000:]]
        return [0.1, ok(BODY)]

    with RawServer(script) as server:
        config = FetchConfig(allow_networks=("127.0.0.0/8",), deadline_s=1.5, per_host=64, max_bytes=300_000, retries=0)

        async def run() -> list[bytes | Failure]:
            async with Fetcher(config, bytes_in_flight=300_000) as fetcher:

                async def one(number: int) -> bytes | Failure:
                    async with fetcher.fetched(server.url(f"/{number}")) as body:
                        # Eight of these, one after the other, take longer than the deadline.
                        await asyncio.sleep(0.3)
                        return body

                return await asyncio.gather(*map(one, range(8)))

        assert asyncio.run(run()) == [BODY] * 8


def test_deadline_goes_on_after_waiting_for_memory() -> None:
    def script(path: str) -> list[Step]:
        if path == "/used":
            return [ok(BODY)]
        return [0.2, answer("200 OK", "Content-Length: 300000") + BODY[:100_000], 3600.0]

    async def run(server: RawServer) -> list[bytes | Failure]:
        config = FetchConfig(allow_networks=("127.0.0.0/8",), deadline_s=0.6, max_bytes=300_000, retries=0)
        async with Fetcher(config, bytes_in_flight=300_000) as fetcher:

            async def one(path: str) -> bytes | Failure:
                async with fetcher.fetched(server.url(path)) as body:
                    await asyncio.sleep(0.8)
                    return body

            return await asyncio.wait_for(asyncio.gather(*map(one, ["/used", "/1", "/2"])), 20)

    with RawServer(script) as server:
        assert asyncio.run(run(server)) == [BODY] + [Failure("deadline", True)] * 2


def test_failed_bodies_give_their_memory_back() -> None:
    def script(path: str) -> list[Step]:
        return [answer("200 OK", "Transfer-Encoding: chunked"), b"7a120\r\n" + bytes(500_000) + b"\r\n0\r\n\r\n"]

    with RawServer(script) as server:
        results, _ = fetch_large(server, 30)
    assert results == [Failure("too_large")] * 30
