"""img2dataset's pixels, fetched by its code and imported from its shards."""

import asyncio
import hashlib
import os
import socket
import ssl
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mdm_core.errors import ConfigError
from pipelines.data.config import RefreshConfig, SourceConfig
from pipelines.data.engine import Engine, Link, Result
from pipelines.data.failure import Failure
from pipelines.data.img2dataset.engine import Img2datasetEngine
from pipelines.data.img2dataset.importing import Img2datasetImport
from pipelines.data.lists.sources import read_list
from pipelines.data.pictures.decode import Picture
from tests.pipelines.data import test_security
from tests.pipelines.data.img2dataset_run import read_written, run_img2dataset
from tests.pipelines.data.picture_server import PictureServer, draw_picture, encode
from tests.pipelines.data.raw_server import RawServer, Step

certificate = test_security.certificate

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "webdataset": (
        {"resize_mode": "keep_ratio", "resize_only_if_bigger": True, "encode_quality": 90},
        {"resize": "shorter_side", "quality": 90},
    ),
    "files": (
        {"resize_mode": "center_crop", "encode_format": "webp", "encode_quality": 80},
        {"resize": "center_crop", "format": "webp", "quality": 80, "upscale": True},
    ),
    "parquet": (
        {
            "resize_mode": "keep_ratio_largest",
            "resize_only_if_bigger": True,
            "encode_format": "png",
            "encode_quality": 6,
        },
        {"resize": "longer_side", "format": "png"},
    ),
}
NOT_THERE = "http://127.0.0.1:1/x.jpg"


def config(**sections: Any) -> RefreshConfig:
    fetch = {"engine": "img2dataset", "allow_networks": ["127.0.0.1/32"], "deadline_s": 2.0, "retries": 0}
    return RefreshConfig.model_validate(
        {
            "source": {"uri": "list", "columns": {"url": 0, "caption": 1}},
            "table": {"uri": "table"},
            "filters": {"min_side_px": 20},
            **sections,
            "fetch": fetch | sections.get("fetch", {}),
        }
    )


def run(engine: Engine, links: Sequence[Link], *, chunk: int = 1000) -> list[Result]:
    async def results() -> list[Result]:
        found = [await engine.results(links[at : at + chunk]) for at in range(0, len(links), chunk)]
        await engine.close()
        return [result for part in found for result in part]

    return asyncio.run(results())


def import_all(folder: Path | str, *, chunk: int = 1000, **sections: Any) -> dict[str, Result]:
    source = SourceConfig(uri=str(folder), format="img2dataset")
    links = [Link(row.url, row.caption, row.origin) for batch in read_list(source) for row in batch]
    return {
        link.url: result
        for link, result in zip(links, run(Img2datasetImport(config(**sections)), links, chunk=chunk), strict=True)
    }


def picture_links(server: PictureServer) -> list[str]:
    """Serves pictures of every kind that OpenCV and this project both read, and returns their links."""
    pixels = draw_picture(50, 120, 80)
    alpha = pixels.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    server.files |= {
        "/progressive.jpg": encode(draw_picture(51, 300, 200), progressive=True),
        "/turned.jpg": encode(pixels, exif=_turned()),
        "/grey.jpg": encode(pixels.convert("L")),
        "/alpha.png": encode(alpha, "PNG"),
        "/palette.png": encode(pixels.convert("P"), "PNG"),
        "/small.webp": encode(draw_picture(52, 30, 24), "WEBP"),
        "/wide.bmp": encode(draw_picture(53, 200, 70), "BMP"),
    }
    return [*server.add_pictures(4), *(server.url(path) for path in server.files if not path[1].isdigit())]


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_that_img2dataset_writes(server: PictureServer, tmp_path: Path, layout: str) -> None:
    urls = picture_links(server)
    theirs, ours = LAYOUTS[layout]
    run_img2dataset(tmp_path / "run", urls, image_size=48, output_format=layout, number_sample_per_shard=7, **theirs)
    written = read_written(tmp_path / "run")
    assert [written[url][0]["status"] for url in urls] == ["success"] * 11
    fetched = run(Img2datasetEngine(config(image={"size_px": 48, **ours})), [Link(url, "x") for url in urls])
    imported = import_all(tmp_path / "run" / "out", chunk=3)
    assert imported.keys() == set(urls)
    for url, result in zip(urls, fetched, strict=True):
        row, data = written[url]
        body = server.files[url.removeprefix(server.url(""))]
        for picture in (result.picture, imported[url].picture):
            assert isinstance(picture, Picture)
            assert picture.data == data
            sizes = picture.width, picture.height, picture.original_width, picture.original_height
            assert sizes == (row["width"], row["height"], row["original_width"], row["original_height"])
            assert picture.format == ours.get("format", "jpeg")
            assert picture.phash is not None
        assert result.sha256 == imported[url].sha256 == sha256(body)


def test_trouble_has_the_reasons_of_the_native_engine(server: PictureServer, tmp_path: Path) -> None:
    list(server.add_pictures(2))
    expected = {
        "/missing": Failure("http_404"),
        "/gone": Failure("http_410"),
        "/forbidden": Failure("http_403"),
        "/broken": Failure("http_503", True),
        "/loop": Failure("too_many_redirects"),
        "/to-private": Failure("private_address"),
        "/to-file": Failure("bad_redirect"),
        "/endless": Failure("too_large"),
        "/liar": Failure("incomplete_body", True),
        "/reset": Failure("connection", True),
        "/noai": Failure("opted_out", outcome="filtered"),
        "/page": Failure("not_an_image"),
        "/truncated.jpg": Failure("truncated"),
        "/stall": Failure("deadline", True),
        "/drip": Failure("deadline", True),
        "/redirect": None,
        "/relative": None,
        "/noai-for-other": None,
    }
    more = {
        NOT_THERE: Failure("connection", True),
        "http://host:99999/": Failure("bad_url"),
        "http://nowhere.invalid/": Failure("dns", True),
        server.url("/0.jpg", "2130706434"): Failure("private_address"),
        server.url("/0.jpg", "[::1]"): Failure("private_address"),
        server.url("/0.jpg", "127.0.0.2"): Failure("private_address"),
    }
    urls = [*map(server.url, expected), *more]
    engine = Img2datasetEngine(config(fetch={"max_bytes": 1 << 20, "deadline_s": 1.5}))
    results = run(engine, [Link(url, "x") for url in urls])
    found = {url: result.failure for url, result in zip(urls, results, strict=True)}
    assert found == {server.url(path): failure for path, failure in expected.items()} | more
    assert set(server.hosts) == {"127.0.0.1"}


def test_only_what_may_pass_is_asked_again(server: PictureServer) -> None:
    list(server.add_pictures(1))
    paths = ["/missing", "/noai", "/busy/0.jpg", "/loop", "/reset"]
    fetch = {"retries": 1, "max_redirects": 3, "deadline_s": 20.0}
    results = run(Img2datasetEngine(config(fetch=fetch)), [Link(server.url(path), "x") for path in paths])
    assert [server.hits[path] for path in paths] == [1, 1, 2, 4, 2]
    assert [result.outcome for result in results] == ["failed", "filtered", "ok", "failed", "failed"]


def test_limits_are_for_its_own_threads_only(server: PictureServer) -> None:
    import urllib.request

    url = next(server.add_pictures(1))
    [result] = run(Img2datasetEngine(config(fetch={"allow_networks": []})), [Link(url, "x")])
    assert result.failure == Failure("private_address")
    with urllib.request.urlopen(url) as response:
        assert response.read() == server.files["/0.jpg"]


def test_name_that_leads_to_a_private_address_is_refused(
    server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(server.add_pictures(1))
    answers = {"b.example": ["127.0.0.1", "127.0.0.2"], "a.example": ["127.0.0.2"], "c.example": ["127.0.0.1"]}

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    results = run(Img2datasetEngine(config()), [Link(server.url("/0.jpg", host), "x") for host in answers])
    assert [result.failure for result in results] == [*[Failure("private_address")] * 2, None]
    assert server.hosts == ["127.0.0.1"]


def test_header_that_drips_ends_at_the_deadline() -> None:
    drop: list[Step] = [0.1, b"X: y\r\n"]
    dripping: list[Step] = [b"HTTP/1.1 200 OK\r\n", *drop * 600]
    with RawServer(lambda _: dripping) as server:
        engine = Img2datasetEngine(config(fetch={"deadline_s": 0.8, "concurrency": 2}))
        results = run(engine, [Link(server.url(f"/{number}"), "x") for number in range(4)])
    assert [result.failure for result in results] == [Failure("deadline", True)] * 4
    # Its threads have ended, and not only been given up.
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("fetch_")]
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_certificates_are_checked_as_configured(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    body = encode(draw_picture(1))
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with RawServer(lambda _: [answer], tls=context) as server:
        for verify_tls, failure in ((True, Failure("tls")), (False, None)):
            engine = Img2datasetEngine(config(fetch={"verify_tls": verify_tls}))
            assert [result.failure for result in run(engine, [Link(server.url(), "x")])] == [failure]


def test_output_of_the_process_is_left_alone(server: PictureServer) -> None:
    links = [Link(url, "x") for url in server.add_pictures(4)] * 10
    before = os.fstat(1), os.fstat(2)
    run(Img2datasetEngine(config(), num_threads=4), links)
    assert (os.fstat(1).st_ino, os.fstat(2).st_ino) == tuple(found.st_ino for found in before)


def test_what_it_is_asked_for_and_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="wanted jpeg, webp or png"):
        Img2datasetEngine(config(image={"format": "source"}))
    monkeypatch.setitem(sys.modules, "img2dataset", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'mdm\[img2dataset\]'"):
        Img2datasetEngine(config())
    monkeypatch.undo()
    # Python 3.13 has no module that its resizer imports.
    monkeypatch.setitem(sys.modules, "img2dataset.resizer", None)
    monkeypatch.delattr("img2dataset.resizer")
    with pytest.raises(ConfigError, match=r"fetch.engine=img2dataset can't be used: .*Python 3.11 or 3.12"):
        Img2datasetEngine(config())


def test_sizes_are_filtered_by_what_was_fetched(server: PictureServer) -> None:
    server.files |= {
        "/s.png": encode(draw_picture(1, 30, 19), "PNG"),
        "/w.png": encode(draw_picture(1, 100, 30), "PNG"),
    }
    links = [Link(server.url(path), "x") for path in ("/s.png", "/w.png")]
    results = run(Img2datasetEngine(config(image={"max_pixels": 5000})), links)
    assert [result.failure for result in results] == [
        Failure("too_small", outcome="filtered"),
        Failure("aspect", outcome="filtered"),
    ]
    results = run(Img2datasetEngine(config(image={"max_pixels": 100})), links)
    assert [result.failure for result in results] == [Failure("too_many_pixels")] * 2
