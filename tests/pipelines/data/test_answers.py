"""Whatever a server answers, and whenever: what becomes of the link."""

import errno
import gzip
import random
import socket
import ssl
import threading
import zlib
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from mdm_core.errors import WorkError
from pipelines.data.failure import Failure
from pipelines.data.fetch import connections
from pipelines.data.fetch.fetcher import backoff_s
from tests.pipelines.data.fetching import fetch, fetch_all
from tests.pipelines.data.raw_server import End, RawServer, Step, answer, ok

DRIP: list[Step] = [b"x", 0.05] * 2000
STALLS: dict[str, Sequence[Step]] = {
    "/before it": [3600.0],
    "/in the status": [b"HTTP/1.1 2", 3600.0],
    "/in a header": [b"HTTP/1.1 200 OK\r\nContent-Le", 3600.0],
    "/before the body": [answer("200 OK", "Content-Length: 9"), 3600.0],
    "/in the body": [answer("200 OK", "Content-Length: 9") + b"body", 3600.0],
    "/in a chunk": [answer("200 OK", "Transfer-Encoding: chunked") + b"9\r\nbody", 3600.0],
    "/without length": [answer("200 OK") + b"body", 3600.0],
    "/by early hints": [answer("103 Early Hints"), 0.1] * 1000,
    "/by a dripping header": [b"HTTP/1.1 200 OK\r\nX: ", *DRIP],
    "/by a dripping body": [answer("200 OK", "Content-Length: 2000"), *DRIP],
    "/by packed nothing": [answer("200 OK", "Content-Encoding: gzip"), gzip.compress(b"")[:10], 3600.0],
}


def test_deadline_holds_wherever_the_server_stalls() -> None:
    with RawServer(lambda path: STALLS[path.replace("%20", " ")]) as server:
        results = fetch_all([server.url(path) for path in STALLS], deadline_s=1.0, per_host=100)
    assert results == [Failure("deadline", True)] * len(STALLS)


def test_deadline_is_one_for_all_redirects_and_tries() -> None:
    def script(path: str) -> list[Step]:
        if path == "/busy":
            return [0.5, answer("503 No", "Content-Length: 0")]
        # Each hop of two hosts is in time.
        number = int(path.removeprefix("/"))
        target = server.url(f"/{number + 1}", f"127.0.0.{1 + number % 2}")
        return [0.5, answer("302 On", f"Location: {target}", "Content-Length: 0")]

    with RawServer(script) as server:
        urls = [server.url("/0"), server.url("/busy", "127.0.0.3")]
        results = fetch_all(urls, deadline_s=1.9, max_redirects=100, retries=100, allow_networks=("127.0.0.0/8",))
        assert results[0] == Failure("deadline", True)
        assert results[1] in (Failure("deadline", True), Failure("http_503", True))
        assert len(server.requests) <= 3 + 1 + 3


def test_deadline_holds_for_handshakes_and_for_names() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        assert fetch(url, connect_timeout_s=0.3) == Failure("connect_timeout", True)
        assert fetch(url, connect_timeout_s=60.0, deadline_s=0.5) == Failure("deadline", True)
    end = threading.Event()

    def slow_lookup(host: str) -> list[str]:
        end.wait(30)
        return ["127.0.0.1"]

    try:
        assert fetch_all(["http://slow.example/"], lookup=slow_lookup, deadline_s=0.3) == [Failure("deadline", True)]
    finally:
        end.set()


OPTED_OUT = Failure("opted_out", outcome="filtered")
ANSWERS: dict[str, tuple[Sequence[Step], bytes | Failure]] = {
    "/http 1.0": ([b"HTTP/1.0 200 OK\r\n\r\nbody", End.CLOSE], b"body"),
    "/no length": ([answer("200 OK") + b"bo", b"dy", End.CLOSE], b"body"),
    "/short length": ([ok(b"body") + b" and more"], Failure("bad_response")),
    "/long length": ([answer("200 OK", "Content-Length: 9") + b"body", End.CLOSE], Failure("incomplete_body", True)),
    "/two lengths": ([answer("200 OK", "Content-Length: 4", "Content-Length: 5") + b"body!"], Failure("bad_response")),
    "/negative length": ([answer("200 OK", "Content-Length: -4") + b"body"], Failure("bad_response")),
    "/huge length": ([answer("200 OK", f"Content-Length: {10**15}"), 3600.0], Failure("too_large")),
    "/absurd length": ([answer("200 OK", f"Content-Length: {10**30}"), 3600.0], Failure("bad_response")),
    "/no body": ([ok(b"")], b""),
    "/chunks": ([answer("200 OK", "Transfer-Encoding: chunked") + b"2;x=y\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"], b"body"),
    "/trailers": (
        [answer("200 OK", "Transfer-Encoding: chunked") + b"4\r\nbody\r\n0\r\nX-Robots-Tag: noai\r\nX: y\r\n\r\n"],
        b"body",
    ),
    "/cut chunks": (
        [answer("200 OK", "Transfer-Encoding: chunked") + b"4\r\nbody\r\n", End.CLOSE],
        Failure("incomplete_body", True),
    ),
    "/bad chunks": ([answer("200 OK", "Transfer-Encoding: chunked") + b"zz\r\nbody\r\n"], Failure("bad_response")),
    "/early hints": ([answer("103 Early Hints", "Link: </a>") * 50 + ok(b"body")], b"body"),
    "/another protocol": ([answer("101 Switching", "Upgrade: h2c", "Connection: upgrade")], Failure("http_101")),
    "/no content": ([answer("204 No Content")], Failure("http_204")),
    "/partial": (
        [answer("206 Partial", "Content-Length: 4") + b"body"],
        Failure("http_206"),
    ),
    "/not modified": ([answer("304 Not Modified")], Failure("http_304")),
    "/redirect to nowhere": ([answer("302 Found", "Content-Length: 0")], Failure("http_302")),
    "/redirect to a bad link": (
        [answer("302 Found", "Location: http://[::1", "Content-Length: 0")],
        Failure("bad_redirect"),
    ),
    "/denied": ([answer("999 Denied", "Content-Length: 0")], Failure("http_999")),
    "/dead cdn": ([answer("522 Timed out", "Content-Length: 0")], Failure("http_522", True)),
    "/too soon": ([answer("425 Too Early", "Content-Length: 0")], Failure("http_425", True)),
    "/busy": ([answer("503 No", "Retry-After: 9", "Content-Length: 0")], Failure("http_503", True, retry_after_s=9.0)),
    "/missing for now": ([answer("404 No", "Retry-After: 9", "Content-Length: 0")], Failure("http_404")),
    "/rubbish": ([b"\x00\xff\xfe\r\n\r\n", End.CLOSE], Failure("bad_response")),
    "/no headers": ([b"<html>Hello</html>", End.CLOSE], Failure("bad_response")),
    "/bytes in headers": ([answer("200 OK", "X: \udcff", "Content-Length: 4") + b"body"], b"body"),
    "/nothing": ([End.CLOSE], Failure("connection", True)),
    "/reset": ([End.ABORT], Failure("connection", True)),
    "/gzip": ([ok(gzip.compress(b"body"), "Content-Encoding: gzip")], b"body"),
    "/gzip twice": ([ok(gzip.compress(b"bo") + gzip.compress(b"dy"), "Content-Encoding: GZIP")], b"body"),
    "/gzip in chunks": (
        [answer("200 OK", "Content-Encoding: gzip", "Transfer-Encoding: chunked")]
        + [b"1\r\n%c\r\n" % byte for byte in gzip.compress(b"body")]
        + [b"0\r\n\r\n"],
        b"body",
    ),
    "/cut gzip": ([ok(gzip.compress(b"body")[:-9], "Content-Encoding: gzip")], Failure("incomplete_body", True)),
    "/no gzip": ([ok(b"body", "Content-Encoding: gzip")], Failure("content_encoding")),
    "/identity": ([ok(b"body", "Content-Encoding: identity")], b"body"),
    "/deflate": ([ok(zlib.compress(b"body"), "Content-Encoding: deflate")], b"body"),
    "/brotli": ([ok(b"\x0b\x01\x80body\x03", "Content-Encoding: br")], Failure("content_encoding")),
    "/zstd": ([ok(b"body", "Content-Encoding: zstd")], Failure("content_encoding")),
    "/opted out": (
        [ok(b"body", "X-Robots-Tag: nofollow", "X-Robots-Tag: noai")],
        Failure("opted_out", outcome="filtered"),
    ),
    "/opted out by name": ([ok(b"body", "x-robots-tag: mdm: noai")], Failure("opted_out", outcome="filtered")),
}


def test_answers_of_all_kinds_are_understood() -> None:
    # One after the other: whatever one leaves behind on its connection must not reach the next.
    with RawServer(lambda path: ANSWERS[path.replace("%20", " ")][0]) as server:
        results = fetch_all([server.url(path) for path in ANSWERS], per_host=1, deadline_s=10.0)
    assert dict(zip(ANSWERS, results, strict=True)) == {path: wanted for path, (_, wanted) in ANSWERS.items()}


def test_connections_are_used_again() -> None:
    missing: list[Step] = [answer("404 No", "Content-Length: 9000") + b"x" * 1000, 0.001, b"x" * 8000]
    kinds: list[list[Step]] = [
        [ok(b"body")],
        missing,
        [answer("302 On", "Location: /0", "Content-Length: 5") + b"hello"],
    ]

    with RawServer(lambda path: kinds[int(path.removeprefix("/")) % 3]) as server:
        results = fetch_all([server.url(f"/{number}") for number in range(300)], per_host=4, deadline_s=10.0)
        assert results == [b"body", Failure("http_404"), b"body"] * 100
        assert len(server.requests) == 400
        assert server.num_connections <= 4


def test_rest_of_an_answer_is_not_waited_for_long() -> None:
    long = answer("404 No", "Content-Length: 10000000") + b"x" * 1000
    slow = answer("410 No", "Content-Length: 1000") + b"x"
    endless = answer("403 No", "Transfer-Encoding: chunked") + b"100000\r\n" + bytes(1 << 20)
    heads = {"/long": long, "/slow": slow, "/endless": endless}
    with RawServer(lambda path: [heads[path], 3600.0]) as server:
        results = fetch_all([server.url(path) for path in heads], deadline_s=60.0)
    assert results == [Failure("http_404"), Failure("http_410"), Failure("http_403")]


def test_certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ssl.SSLContext] = []
    create = ssl.create_default_context

    def counting() -> ssl.SSLContext:
        made.append(create())
        return made[-1]

    connections.tls_context.cache_clear()
    monkeypatch.setattr(ssl, "create_default_context", counting)
    for _ in range(2):
        assert fetch_all(["https://127.0.0.1:1/"] * 5) == [Failure("connection", True)] * 5
    assert len(made) == 1


def test_tries_come_later_each_time_and_never_together() -> None:
    rng = random.Random(0)
    for num_tries, middle_s in enumerate([0.5, 1.0, 2.0, 4.0]):
        waits = [backoff_s(num_tries, rng) for _ in range(1000)]
        assert middle_s / 2 <= min(waits) < 0.6 * middle_s
        assert 1.4 * middle_s < max(waits) <= middle_s * 1.5
        assert len(set(waits)) > 990


@pytest.mark.parametrize(("retry_after", "num_requests"), [("0", 2), ("1", 2), ("-1", 2), ("soon", 2), ("30", 1)])
def test_retry_after_is_honoured(retry_after: str, num_requests: int) -> None:
    no = answer("503 No", f"Retry-After: {retry_after}", "Content-Length: 0")
    with RawServer(lambda path: [no if len(server.requests) == 1 else ok(b"body")]) as server:
        result = fetch(server.url(), retries=3, deadline_s=8.0)
        assert result == (b"body" if num_requests == 2 else Failure("http_503", True, retry_after_s=30.0))
        assert len(server.requests) == num_requests


def test_full_table_of_files_is_not_the_links_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("pipelines.data.fetch.addresses.socket", SimpleNamespace(socket=full))
    with pytest.raises(WorkError, match="ulimit"):
        fetch("http://127.0.0.1:1/", retries=3)
