"""A proxy in front of an S3 server that fails some requests, in a process of its own.

In a process of its own because deltalake waits for answers without letting other Python threads run: a proxy in a
thread of the process that asks would never answer.

    python -m tests.pipelines.failing_proxy 127.0.0.1:8333 --percent 5 --seed 0 --delay_s 0.03

prints its port; when its standard input ends it prints, as JSON, what it did, and ends too. Each request waits
`delay_s`, as a distant server's would.
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from types import TracebackType
from typing import Self

FAILURES = ("slow_down", "reset", "lost_answer", "cut_answer")
"""503 SlowDown; reset before the server is asked; reset in the place of its answer; reset half-way through it."""
_WEIGHTS = (3, 1, 1, 1)

_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class FailingProxy:
    """The proxy, from the outside: a process that ends with the `with` block."""

    def __init__(self, upstream: str, *, percent: float, seed: int = 0, delay_s: float = 0.0) -> None:
        self._words = [upstream, "--percent", str(percent), "--seed", str(seed), "--delay_s", str(delay_s)]
        self.counts: Counter[str] = Counter()
        """Requests by what was done with them, known when it has ended."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.failing_proxy", *self._words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        out, _ = self._process.communicate()
        self.counts = Counter(json.loads(out))

    @property
    def endpoint(self) -> str:
        """Its address, as AWS_ENDPOINT_URL wants it."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def num_failed(self) -> int:
        """Requests that it failed."""
        return sum(self.counts[kind] for kind in FAILURES)

    @property
    def mean_at_once(self) -> float:
        """Requests on their way at a time, on the mean from the first one's beginning to the last one's end."""
        return self.counts["busy_ms"] / self.counts["span_ms"]


class _Proxy:
    """The proxy, from the inside. Each request has a connection of its own, so that answers need no parsing."""

    def __init__(self, upstream: str, percent: float, seed: int, delay_s: float) -> None:
        host, _, port = upstream.partition(":")
        self._delay_s = delay_s
        self._first_s: float | None = None
        self._upstream = (host, int(port))
        self._percent = percent
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            # Clients and servers may leave.
            self.counts["left"] += 1
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        if b"expect" in headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(reader, headers)
        began_s = time.monotonic()
        self._first_s = began_s if self._first_s is None else self._first_s
        await asyncio.sleep(self._delay_s)
        try:
            await self._answer(lines, body, writer)
        finally:
            ended_s = time.monotonic()
            self.counts["busy_ms"] += round(1000 * (ended_s - began_s))
            self.counts["span_ms"] = round(1000 * (ended_s - self._first_s))

    async def _answer(self, lines: list[bytes], body: bytes, writer: asyncio.StreamWriter) -> None:
        failure = self._draw()
        self.counts[failure or "passed"] += 1
        if failure == "slow_down":
            writer.write(b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Type: application/xml\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(_SLOW_DOWN) + _SLOW_DOWN)
            await writer.drain()
            return
        if failure == "reset":
            _reset(writer)
            return
        # Neither of the two is signed.
        kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in (b"expect", b"connection")]
        answer = await self._ask(b"\r\n".join([*kept, b"Connection: close", b"", b""]) + body)
        self.counts["answer_bytes"] += len(answer)
        if failure == "cut_answer":
            writer.write(answer[: len(answer) // 2])
            await writer.drain()
        if failure is not None:
            _reset(writer)
            return
        writer.write(answer)
        await writer.drain()

    def _draw(self) -> str | None:
        if self._random.uniform(0, 100) >= self._percent:
            return None
        return self._random.choices(FAILURES, _WEIGHTS)[0]

    async def _ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


async def _read_body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> bytes:
    """Returns the body as it came, its chunks' frames too."""
    if headers.get(b"transfer-encoding", b"").lower() != b"chunked":
        return await reader.readexactly(int(headers.get(b"content-length", b"0")))
    body = b""
    while True:
        frame = await reader.readuntil(b"\r\n")
        size = int(frame.partition(b";")[0], 16)
        body += frame + await reader.readexactly(size + 2)
        if size == 0:
            return body


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with a reset: lingering for no time at all, it drops what it has not sent."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream")
    parser.add_argument("--percent", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay_s", type=float, default=0.0)
    words = parser.parse_args()
    proxy = _Proxy(words.upstream, words.percent, words.seed, words.delay_s)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print(json.dumps(proxy.counts))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
