import asyncio
import time

import pytest

from pipelines.data.config import FetchConfig
from pipelines.data.failure import Failure
from pipelines.data.fetch.fetcher import Fetcher
from tests.pipelines.data.fetching import LOOPBACK, fetch, fetch_all
from tests.pipelines.data.picture_server import PictureServer, draw_picture, encode


def test_body_arrives_as_it_was_served(server: PictureServer) -> None:
    urls = list(server.add_pictures(3))
    assert fetch_all(urls) == [server.files[f"/{number}.jpg"] for number in range(3)]


def test_fetcher_may_be_made_outside_the_loop_and_closed_more_than_once(server: PictureServer) -> None:
    (url,) = server.add_pictures(1)
    fetcher = Fetcher(FetchConfig(allow_networks=LOOPBACK))

    async def run() -> bytes | Failure:
        async with fetcher.fetched(url) as body:
            pass
        await fetcher.close()
        await fetcher.close()
        return body

    assert asyncio.run(run()) == server.files["/0.jpg"]
    asyncio.run(Fetcher(FetchConfig()).close())


@pytest.mark.parametrize(
    ("path", "reason", "retryable"),
    [
        ("/missing", "http_404", False),
        ("/gone", "http_410", False),
        ("/patience", "http_404", False),
        ("/forbidden", "http_403", False),
        ("/broken", "http_503", True),
        ("/loop", "too_many_redirects", False),
        ("/to-private", "private_address", False),
        ("/to-file", "bad_redirect", False),
        ("/endless", "too_large", False),
        ("/bomb", "too_large", False),
        ("/liar", "incomplete_body", True),
        ("/reset", "connection", True),
    ],
)
def test_trouble_has_its_reason(server: PictureServer, path: str, reason: str, retryable: bool) -> None:
    assert fetch(server.url(path)) == Failure(reason, retryable)


def test_only_five_redirects_are_followed(server: PictureServer) -> None:
    fetch(server.url("/loop"), max_redirects=5)
    assert server.hits["/loop"] == 6


@pytest.mark.parametrize(("path", "target"), [("/redirect", "/0.jpg"), ("/relative", "/1.jpg")])
def test_redirect_leads_to_the_picture(server: PictureServer, path: str, target: str) -> None:
    list(server.add_pictures(2))
    assert fetch(server.url(path)) == server.files[target]


def test_deadline_holds_whatever_the_server_does(server: PictureServer) -> None:
    start_s = time.monotonic()
    urls = [server.url(path) for path in ("/drip", "/stall", "/drip", "/stall")]
    assert fetch_all(urls, deadline_s=0.7, retries=5) == [Failure("deadline", True)] * 4
    # The drip alone would go on for longer.
    assert time.monotonic() - start_s < 20


def test_waiting_for_a_turn_does_not_use_up_the_deadline(server: PictureServer) -> None:
    urls = list(server.add_pictures(10))
    server.delay_s = 0.2
    bodies = fetch_all(urls, per_host=1, deadline_s=1.0)
    assert [type(body) for body in bodies] == [bytes] * 10


def test_slow_host_does_not_hold_the_others(server: PictureServer) -> None:
    list(server.add_pictures(1))
    stalled = [server.url("/stall", "127.0.0.2")] * 20
    start_s = time.monotonic()
    took_s: list[float] = []

    async def run() -> None:
        config = FetchConfig(allow_networks=("127.0.0.0/8",), deadline_s=20.0, concurrency=4, per_host=2)
        async with Fetcher(config) as fetcher:

            async def one(url: str) -> None:
                async with fetcher.fetched(url):
                    took_s.append(time.monotonic() - start_s)

            slow = [asyncio.create_task(one(url)) for url in stalled]
            await asyncio.wait_for(one(server.url("/0.jpg")), timeout=15)
            for task in slow:
                task.cancel()

    asyncio.run(run())
    assert len(took_s) == 1


def test_busy_server_is_asked_again(server: PictureServer) -> None:
    list(server.add_pictures(1))
    assert fetch(server.url("/busy/0.jpg"), retries=2, deadline_s=5.0) == server.files["/0.jpg"]
    assert server.hits["/busy/0.jpg"] == 2
    assert fetch(server.url("/busy/0.jpg"), retries=0) == server.files["/0.jpg"]


def test_what_will_not_pass_is_not_asked_again(server: PictureServer) -> None:
    assert fetch(server.url("/missing"), retries=5) == Failure("http_404", False)
    assert server.hits["/missing"] == 1


def test_opt_out_is_honoured(server: PictureServer) -> None:
    assert fetch(server.url("/noai")) == Failure("opted_out", outcome="filtered")
    picture = encode(draw_picture(900))
    assert fetch(server.url("/noai"), honour_opt_out=False) == picture
    assert fetch(server.url("/noai-for-other")) == picture


def test_encoded_body_is_unpacked(server: PictureServer) -> None:
    assert fetch(server.url("/gzipped")) == encode(draw_picture(902))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "[::1]", "localhost"],
)
def test_private_address_is_refused_in_every_form(server: PictureServer, host: str) -> None:
    list(server.add_pictures(1))
    assert fetch(server.url("/0.jpg", host), allow_networks=()) == Failure("private_address")
    assert not server.hits


def test_name_that_leads_to_loopback_is_refused(server: PictureServer) -> None:
    url = server.url("/0.jpg", "pictures.example")
    for answer in (["127.0.0.1"], ["::1"], ["8.8.8.8", "127.0.0.1"]):
        assert fetch(url, lookup=lambda _, answer=answer: answer, allow_networks=()) == Failure("private_address")
    assert not server.hits


def test_name_whose_answer_changes_is_reached_only_at_a_checked_address(server: PictureServer) -> None:
    list(server.add_pictures(4))
    answers = iter([["127.0.0.2"], ["127.0.0.1"], ["127.0.0.1"]])
    urls = [server.url(f"/{number}.jpg", "pictures.example") for number in range(4)]
    bodies = fetch_all(urls, lookup=lambda _: next(answers), allow_networks=("127.0.0.2/32",), per_host=1)
    assert bodies == [server.files[f"/{number}.jpg"] for number in range(4)]
    assert set(server.hosts) == {"127.0.0.2"}


def test_unknown_name_may_pass() -> None:
    def no_such_name(host: str) -> list[str]:
        raise OSError(f"{host} is not known")

    assert fetch("http://nowhere.example/0.jpg", lookup=no_such_name) == Failure("dns", True)


@pytest.mark.parametrize("url", ["http://", "http://host:99999/", "http://[::1/", "ftp://host/"])
def test_what_is_not_a_link_is_not_asked_for(url: str) -> None:
    assert fetch(url) == Failure("bad_url")


def test_percent_encoding_is_kept(server: PictureServer) -> None:
    server.files["/a b+c/ü.jpg"] = b"picture"
    assert fetch(server.url("/a%20b+c/%C3%BC.jpg")) == b"picture"
    assert fetch(server.url("/a b+c/ü.jpg")) == b"picture"
