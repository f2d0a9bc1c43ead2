import asyncio
import contextlib
import string
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.config import FetchConfig
from pipelines.data.fetch.fetcher import Fetcher
from pipelines.data.fetch.links import follow_link, host_of, parse_link
from tests.pipelines.data.raw_server import RawServer, ok

# What follows the host in a link, and what the server must be asked for.
SENT = {
    "": "/",
    "/": "/",
    "?w=640": "/?w=640",
    "#top": "/",
    "/a#top?no": "/a",
    "/a?q#top": "/a?q",
    "/%7Euser/%41%2f%2F%zz%": "/%7Euser/%41%2f%2F%zz%",
    "/a%20b+c?d=%26&e=+&f=%C3%BC": "/a%20b+c?d=%26&e=+&f=%C3%BC",
    "/a/../b/./c//d/": "/a/../b/./c//d/",
    "/semi;colon,comma='\"<>|^`{}[]@:!$&()*~": "/semi;colon,comma='\"<>|^`{}[]@:!$&()*~",
    "/back\\slash": "/back\\slash",
    "/?url=http://other.example/?a=b": "/?url=http://other.example/?a=b",
    "/a b": "/a%20b",
    "/ü?q=ü&p=%C3%BC": "/%C3%BC?q=%C3%BC&p=%C3%BC",
    "/画像.jpg": "/" + quote("画像.jpg"),
    "/😀": "/%F0%9F%98%80",
    "/a\tb\nc": "/abc",
    "/nul\x00\x7f": "/nul%00%7F",
    "/byte\udce9": "/byte%E9",
    "/nbsp\xa0": "/nbsp%C2%A0",
}


def test_path_and_query_are_sent_as_they_were_given() -> None:
    with RawServer(lambda path: [ok(b"")]) as server:

        async def run() -> None:
            async with Fetcher(FetchConfig(allow_networks=("127.0.0.1/32",), per_host=1)) as fetcher:
                for rest in SENT:
                    async with fetcher.fetched(f" \t{server.url(rest)}\r\n ") as body:
                        assert body == b""

        asyncio.run(run())
        assert server.request_lines == [f"GET {sent} HTTP/1.1" for sent in SENT.values()]
        hosts = {line for head in server.requests for line in head.split(b"\r\n") if line.startswith(b"Host")}
        assert hosts == {f"Host: 127.0.0.1:{server.port}".encode()}
        assert server.num_connections == 1


def is_link(text: str) -> bool:
    try:
        parse_link(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "host", "port", "scheme"),
    [
        ("http://Pictures.Example/", "pictures.example", 80, "http"),
        ("HTTPS://pictures.example", "pictures.example", 443, "https"),
        ("hTTp://pictures.example:8080?q", "pictures.example", 8080, "http"),
        ("http://pictures.example:/a", "pictures.example", 80, "http"),
        ("https://pictures.example:65535/a", "pictures.example", 65535, "https"),
        ("http://under_score.-dash-.example/", "under_score.-dash-.example", 80, "http"),
        ("http://bücher.example/", "xn--bcher-kva.example", 80, "http"),
        ("http://BÜCHER.example/", "xn--bcher-kva.example", 80, "http"),
        ("http://xn--bcher-kva.example/", "xn--bcher-kva.example", 80, "http"),
        ("http://日本語。jp/", "xn--wgv71a119e.jp", 80, "http"),
        ("http://faß.example/", "xn--fa-hia.example", 80, "http"),
        ("http://☃.example/", "xn--n3h.example", 80, "http"),
        ("http://pictures.example./", "pictures.example", 80, "http"),
        ("http://1.2.3.4.example/", "1.2.3.4.example", 80, "http"),
        ("http://8.8.2056/", "8.8.8.8", 80, "http"),
        ("http://[2606:4700:0:0::1111]:81/", "2606:4700::1111", 81, "http"),
        (f"http://{'a' * 63}.example/", f"{'a' * 63}.example", 80, "http"),
    ],
)
def test_host_port_and_scheme_are_read(text: str, host: str, port: int, scheme: str) -> None:
    link = parse_link(text)
    assert (host_of(link), link.port, link.scheme) == (host, port, scheme)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pictures.example/a.jpg",
        "//pictures.example/a.jpg",
        "http:/pictures.example/",
        "http:pictures.example",
        "http://",
        "http:///a.jpg",
        "http://?q",
        "http://:80/",
        "http://host:0/",
        "http://host:65536/",
        "http://host:-1/",
        "http://host:８０/",
        "http://host:80:80/",
        "http://host name/",
        "http://a..b/",
        "http://.a/",
        "http://a../",
        "http://a*b/",
        "http://a%2eb/",
        "http://user@host/",
        "http://user:password@host/",
        "http://@host/",
        "http://[::1/",
        "http://::1/",
        "http://[::1%25eth0]/",
        "http://[v1.a]/",
        "http://[]/",
        "http://1.2.3.4.5/",
        "http://256.0.0.1/",
        "http://09.0.0.1/",
        "http://example.1/",
        "http://host\\a",
        f"http://{'a' * 64}.example/",
        f"http://{'a.' * 130}example/",
        "http://\ud800/",
        "http://host/\ud800",
        "http://xn--\u00fc.example/",
        "ftp://host/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "data:image/png;base64,aaaa",
        "httpss://host/",
    ],
)
def test_what_is_no_link_is_refused(text: str) -> None:
    assert not is_link(text)


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b?c", "http://host.example:81/b?c"),
        ("b", "http://host.example:81/a/b"),
        ("../b", "http://host.example:81/b"),
        ("?c", "http://host.example:81/a/page?c"),
        ("", "http://host.example:81/a/page?q"),
        ("#there", "http://host.example:81/a/page?q"),
        ("//other.example/b", "http://other.example/b"),
        (" https://Other.example/%7e ", "https://other.example/%7e"),
        ("/\udce9 ü", "http://host.example:81/%E9%20%C3%BC"),
        ("HTTP://other.example:82", "http://other.example:82/"),
    ],
)
def test_redirect_is_followed_from_where_it_was_met(location: str, target: str) -> None:
    assert str(follow_link(parse_link("http://host.example:81/a/page?q"), location)) == target


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from("/?#@:[]\\%.\r\n"), max_size=40))
def test_whatever_comes_is_a_link_that_can_be_sent_or_none(rest: str) -> None:
    sent = str(parse_link(f"http://host.example/{rest}"))
    assert sent.startswith("http://host.example/")
    assert set(sent) <= set(string.ascii_letters + string.digits + string.punctuation) - {"#"}
    # Once it can be sent, it is left as it is.
    assert str(parse_link(sent)) == sent
    with contextlib.suppress(ValueError):
        assert host_of(parse_link(f"http://{rest}")).isascii()
