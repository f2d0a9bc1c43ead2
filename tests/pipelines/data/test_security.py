"""What strangers' links and servers must not get: a private address, a header, a secret, our memory."""

import asyncio
import datetime
import gzip
import ipaddress
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mdm_core.errors import ConfigError, WorkError
from pipelines.data.config import FetchConfig
from pipelines.data.failure import Failure
from pipelines.data.fetch import connections
from pipelines.data.fetch.addresses import GuardedResolver, Lookup
from pipelines.data.fetch.fetcher import Fetcher
from tests.pipelines.data.raw_server import RawServer, Step, answer, ok

LOOPBACK = ("127.0.0.0/8",)
PRIVATE = Failure("private_address")
REACHED = b"reached"

# All of these lead to the server if they are let through, which the tests try first.
TO_LOOPBACK = [
    "127.0.0.1",
    "127.0.0.2",
    "2130706433",
    "0x7f000001",
    "0X7F.0x1",
    "017700000001",
    "0177.0.0.1",
    "0x7f.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.1.",
    "0.0.0.0",
    "0",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:FFFF:7f00:0001]",
    "１２７.0.0.1",
    "127。0。0。1",
    "①②⑦.⓪.⓪.①",
    "localhost",
    "LocalHost",
    "localhost.",
    "ｌｏｃａｌｈｏｓｔ",
    "pictures.example",
    "ｐictures.Example.",
]

ELSEWHERE = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "[::ffff:a9fe:a9fe]",
    "[fd00:ec2::254]",
    "10.0.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[::127.0.0.1]",
    "[fe80::1]",
    "[fec0::1]",
    "[fc00::1]",
    "[ff02::1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::f7f7:f7f7]",
    "[2001:0:808:808::80ff:fffe]",
]

UNSURE = [
    "[::1%25lo]",
    "[::1%lo]",
    "[fe80::1%eth0]",
    "127.0.0.1%2e",
    "%31%32%37.0.0.1",
    "127.0.0.256",
    "0x7f000001f",
    "127.0.0.1 ",
    "@127.0.0.1",
    "user@127.0.0.1",
    "user:password@127.0.0.1",
    "public.example@127.0.0.1",
    "public.example\\@127.0.0.1",
    "127.0.0.1\\@public.example",
]


def local_lookup(host: str) -> list[str]:
    return ["127.0.0.1"] if host.rstrip(".") in ("localhost", "pictures.example") else []


def fetch(*urls: str, lookup: Lookup | None = local_lookup, **options: Any) -> list[bytes | Failure]:
    """Returns what comes of links, asked for one after the other."""
    config = FetchConfig(**{"deadline_s": 10.0, "retries": 0, "max_bytes": 1 << 20} | options)

    async def run() -> list[bytes | Failure]:
        results = []
        async with Fetcher(config, lookup=lookup) as fetcher:
            for url in urls:
                async with fetcher.fetched(url) as body:
                    results.append(body)
        return results

    return asyncio.run(run())


def script(path: str) -> Sequence[Step]:
    if path.startswith("/to?"):
        return [answer("302 There", f"Location: {path.removeprefix('/to?')}", "Content-Length: 0")]
    return [ok(REACHED)]


@pytest.fixture
def server() -> Iterator[RawServer]:
    with RawServer(script) as server:
        yield server


@pytest.mark.parametrize("host", TO_LOOPBACK)
def test_no_form_of_a_private_address_is_connected_to(server: RawServer, host: str) -> None:
    url = server.url("/", host)
    assert fetch(url) == [PRIVATE]
    assert server.num_connections == 0
    assert fetch(url, allow_networks=(*LOOPBACK, "0.0.0.0/32")) == [REACHED]
    assert server.num_connections == 1


@pytest.mark.parametrize("host", TO_LOOPBACK)
def test_no_redirect_to_a_private_address_is_followed(server: RawServer, host: str) -> None:
    def answers(path: str) -> Sequence[Step]:
        return [answer("302 There", f"Location: http://{host}:{server.port}/", "Content-Length: 0")]

    server.script = answers
    assert fetch(server.url("/", "127.0.0.3"), allow_networks=("127.0.0.3/32",)) == [PRIVATE]
    assert server.hosts == ["127.0.0.3"]


@pytest.mark.parametrize("host", ELSEWHERE)
def test_addresses_of_other_private_networks_are_refused(server: RawServer, host: str) -> None:
    assert fetch(server.url("/", host)) == [PRIVATE]
    hop = server.url(f"/to?http://{host}:{server.port}/", "127.0.0.3")
    assert fetch(hop, allow_networks=("127.0.0.3/32",)) == [PRIVATE]
    assert server.hosts == ["127.0.0.3"]


@pytest.mark.parametrize("host", UNSURE)
def test_hosts_in_no_form_that_is_sure_are_no_links(server: RawServer, host: str) -> None:
    assert fetch(server.url("/", host), allow_networks=(*LOOPBACK, "::/0")) == [Failure("bad_url")]
    server.script = lambda path: [answer("302 There", f"Location: {server.url('/', host)}", "Content-Length: 0")]
    assert fetch(server.url(), allow_networks=(*LOOPBACK, "::/0")) == [Failure("bad_redirect")]
    assert len(server.requests) == 1


@pytest.mark.parametrize("answers", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["::1"]])
def test_name_with_one_private_address_is_refused(server: RawServer, answers: list[str]) -> None:
    assert fetch(server.url("/", "two.example"), lookup=lambda _: answers) == [PRIVATE]
    assert server.num_connections == 0


def test_name_is_looked_up_once_and_that_answer_connected_to(server: RawServer) -> None:
    answers = iter([["127.0.0.2"], ["127.0.0.1"]])
    url = server.url("/", "rebound.example")
    assert fetch(url, url, url, lookup=lambda _: next(answers), allow_networks=("127.0.0.2/32",)) == [REACHED] * 3
    assert server.hosts == ["127.0.0.2"]


def test_name_whose_later_answer_is_private_is_refused_then(server: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_DNS_CACHE_S", 0)
    server.script = lambda path: [answer("200 OK", "Content-Length: 7", "Connection: close") + REACHED]
    answers = iter([["127.0.0.2"], ["127.0.0.1"]])
    url = server.url("/", "rebound.example")
    assert fetch(url, url, lookup=lambda _: next(answers), allow_networks=("127.0.0.2/32",)) == [REACHED, PRIVATE]
    assert server.hosts == ["127.0.0.2"]


def test_address_is_checked_again_where_it_is_connected_to(server: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unchecked(self: GuardedResolver, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr(GuardedResolver, "resolve", unchecked)
    assert fetch(server.url("/", "name.example")) == [PRIVATE]
    assert server.num_connections == 0
    assert fetch(server.url("/", "name.example"), allow_networks=LOOPBACK) == [REACHED]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/", "data:image/png;base64,aaaa", "gopher://h/"]
)
def test_redirects_lead_to_nothing_but_http(server: RawServer, target: str) -> None:
    assert fetch(server.url(f"/to?{target}"), allow_networks=LOOPBACK) == [Failure("bad_redirect")]


def test_proxies_of_the_environment_are_not_asked(server: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, server.url())
        monkeypatch.setenv(name.lower(), server.url())
    with RawServer(lambda path: [ok(b"direct")]) as target:
        assert fetch(target.url(), allow_networks=LOOPBACK) == [b"direct"]
        assert server.num_connections == 0

        async def control() -> bytes:
            async with aiohttp.ClientSession(trust_env=True) as session, session.get(target.url()) as response:
                return await response.read()

        assert asyncio.run(control()) == REACHED


def test_no_line_of_a_header_can_be_slipped_in(server: RawServer) -> None:
    sly = "/a\r\nX-Slipped: 1\r\n\r\nGET /b HTTP/1.1"
    target = "/c\tX-Slipped: 1\x0b\x00\x7f d"
    server.script = lambda path: [answer("302 There", f"Location: {target}")] if "a" in path else [ok(REACHED)]
    fetch(server.url(sly), server.url("/%0d%0aX-Slipped:%201"), allow_networks=LOOPBACK)
    assert server.requests
    for head in server.requests:
        names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:-2]]
        assert sorted(names) == [b"Accept", b"Accept-Encoding", b"Host", b"User-Agent"]
        assert head.split(b"\r\n")[0].count(b" ") == 2


def test_user_agent_that_is_no_header_is_refused() -> None:
    with pytest.raises(ConfigError, match="user_agent"):
        Fetcher(FetchConfig(user_agent="mdm\r\nX-Slipped: 1"))


def test_no_cookie_is_kept(server: RawServer) -> None:
    server.script = lambda path: [ok(REACHED, "Set-Cookie: session=1; Path=/; Max-Age=999")]
    assert fetch(server.url("/1"), server.url("/2"), allow_networks=LOOPBACK) == [REACHED] * 2
    assert b"session" not in b"".join(server.requests)


def test_answer_that_nobody_asked_for_is_not_the_next_links_picture(server: RawServer) -> None:
    def answers(path: str) -> Sequence[Step]:
        if path == "/sly":
            return [ok(b"sly"), 0.05, ok(b"somebody else's")]
        return [0.2, ok(b"end")] if path == "/wait" else [ok(path.encode())]

    server.script = answers
    # The third takes long enough, at another host, for the second answer to arrive.
    wait = server.url("/wait", "127.0.0.2")
    results = fetch(server.url("/sly"), wait, server.url("/1"), server.url("/2"), allow_networks=LOOPBACK)
    assert results == [b"sly", b"end", b"/1", b"/2"]


@pytest.mark.parametrize("members", [1, 40])
def test_packed_bomb_is_stopped_at_the_limit(server: RawServer, members: int) -> None:
    body = gzip.compress(bytes(64 << 20)) if members == 1 else gzip.compress(bytes(100_000)) * members
    server.script = lambda path: [ok(body, "Content-Encoding: gzip")]
    assert len(body) < 100_000
    assert fetch(server.url(), allow_networks=LOOPBACK) == [Failure("too_large")]


def test_headers_without_end_are_refused(server: RawServer) -> None:
    server.script = lambda path: [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, 3600.0]
    assert fetch(server.url(), allow_networks=LOOPBACK) == [Failure("bad_response")]
    server.script = lambda path: [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000, 3600.0]
    assert fetch(server.url(), allow_networks=LOOPBACK) == [Failure("bad_response")]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that no authority has signed, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    form = serialization.Encoding.PEM
    private = key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + signed.public_bytes(form))
    return path


def test_certificates_are_checked(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with RawServer(script, tls=context) as server:
        assert fetch(server.url(), allow_networks=LOOPBACK) == [Failure("tls")]
        assert fetch(server.url(), allow_networks=LOOPBACK, verify_tls=False) == [REACHED]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        connections.tls_context.cache_clear()
        assert fetch(server.url(), allow_networks=LOOPBACK) == [REACHED]
        # Trusted, and for another host.
        assert fetch(server.url("/", "127.0.0.2"), allow_networks=LOOPBACK) == [Failure("tls")]
    connections.tls_context.cache_clear()


def test_machine_without_certificates_of_authorities_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    connections.tls_context.cache_clear()
    with pytest.raises(WorkError, match="install ca-certificates"):
        fetch("https://pictures.example/")
