"""img2dataset's pixels, fetched by its code and imported from its shards."""

import asyncio
import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.config import RefreshConfig, SourceConfig
from pipelines.data.decode import Picture
from pipelines.data.engine import Engine, Link, Result
from pipelines.data.failure import Failure
from pipelines.data.img2dataset_engine import Img2datasetEngine
from pipelines.data.img2dataset_import import Img2datasetImport
from pipelines.data.img2dataset_messages import download_failure, resize_failure
from pipelines.data.sources import read_list
from tests.pipelines.data.img2dataset_run import read_written, run_img2dataset
from tests.pipelines.data.picture_server import PictureServer, draw_picture, encode

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
WEBDATASET: dict[str, Any] = {"output_format": "webdataset", "image_size": 32, "resize_mode": "keep_ratio"}
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


def test_what_it_is_asked_for_and_cannot_do_is_refused() -> None:
    for sections, message in (
        ({"image": {"format": "source"}}, "wanted jpeg, webp or png"),
        ({"video": {}}, "fetch.engine=img2dataset knows no videos"),
    ):
        with pytest.raises(ConfigError, match=message):
            Img2datasetEngine(config(**sections))


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


def test_shards_give_their_failures_their_filters_and_what_they_lack(server: PictureServer, tmp_path: Path) -> None:
    paths = ["/missing", "/page", "/reset", "/noai", "/loop", "/to-file", "/broken", "/liar", "/stall"]
    server.files["/small.png"] = encode(draw_picture(1, 40, 22), "PNG")
    urls = [*server.add_pictures(6), server.url("/small.png"), *map(server.url, paths), NOT_THERE]
    run_img2dataset(tmp_path / "run", urls, **WEBDATASET, min_image_size=23, compute_hash=None)
    folder = tmp_path / "run" / "out"
    written = read_written(tmp_path / "run")
    # One picture is taken out of the tar, and one is damaged.
    keys = {url: row["key"] for url, (row, _) in written.items()}
    with tarfile.open(folder / "00000.tar") as old, tarfile.open(folder / "new.tar", "w") as new:
        for member in old.getmembers():
            body = old.extractfile(member)
            assert body is not None
            data = body.read()
            if member.name == f"{keys[urls[2]]}.jpg":
                data = data[: len(data) // 2]
            member.size = len(data)
            if member.name != f"{keys[urls[1]]}.jpg":
                new.addfile(member, io.BytesIO(data))
    (folder / "new.tar").rename(folder / "00000.tar")
    imported = import_all(folder, chunk=4, filters={"min_side_px": 20, "max_aspect": 1.5})
    reasons = [imported[url].failure for url in urls]
    assert reasons == [
        None,
        Failure("missing_in_shard"),
        Failure("truncated"),
        *[None] * 3,
        Failure("too_small", outcome="filtered"),
        Failure("http_404"),
        Failure("corrupt"),
        Failure("connection", True),
        Failure("opted_out", outcome="filtered"),
        Failure("too_many_redirects"),
        Failure("bad_redirect"),
        Failure("http_503", True),
        Failure("incomplete_body", True),
        Failure("deadline", True),
        Failure("connection", True),
    ]
    # No hash was computed, so that it is of what is stored.
    stored = written[urls[0]][1]
    assert stored is not None
    assert imported[urls[0]].sha256 == sha256(stored)
    narrow = import_all(folder, filters={"min_side_px": 20, "max_aspect": 1.4})
    assert narrow[urls[0]].failure == Failure("aspect", outcome="filtered")


def test_tar_cut_short_lacks_its_last_pictures(server: PictureServer, tmp_path: Path) -> None:
    urls = list(server.add_pictures(6))
    run_img2dataset(tmp_path / "run", urls, **WEBDATASET)
    tar = tmp_path / "run" / "out" / "00000.tar"
    with tarfile.open(tar) as opened:
        pictures = [member for member in opened.getmembers() if member.name.endswith("jpg")]
        tar.write_bytes(tar.read_bytes()[: pictures[3].offset_data + 10])
    for chunk in (2, 1000):
        imported = import_all(tar.parent, chunk=chunk)
        assert sorted(result.outcome for result in imported.values()) == ["failed"] * 3 + ["ok"] * 3
    tar.unlink()
    assert {result.failure for result in import_all(tar.parent).values()} == {Failure("missing_in_shard")}


def test_shards_on_object_storage(server: PictureServer, tmp_path: Path, bucket: str) -> None:
    urls = list(server.add_pictures(5))
    run_img2dataset(tmp_path / "run", urls, **WEBDATASET, number_sample_per_shard=3)
    for path in (tmp_path / "run" / "out").iterdir():
        storage.write_bytes_atomic(f"{bucket}/out/{path.name}", path.read_bytes())
    imported = import_all(f"{bucket}/out")
    written = read_written(tmp_path / "run")
    for url in urls:
        picture = imported[url].picture
        assert isinstance(picture, Picture)
        assert picture.data == written[url][1]


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://h/a"], "caption": ["one"]}), tmp_path / "0.parquet")
    with pytest.raises(ConfigError, match="no shard of img2dataset"):
        list(read_list(SourceConfig(uri=str(tmp_path), format="img2dataset")))


@pytest.mark.parametrize(
    ("message", "failure"),
    [
        ("HTTP Error 404: Not Found", Failure("http_404")),
        ("HTTP Error 429: Too Many Requests", Failure("http_429", True)),
        ("<urlopen error timed out>", Failure("deadline", True)),
        ("The read operation timed out", Failure("deadline", True)),
        ("_ssl.c:1011: The handshake operation timed out", Failure("deadline", True)),
        ("<urlopen error [Errno -2] Name or service not known>", Failure("dns", True)),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", Failure("dns", True)),
        ("<urlopen error [Errno 8] nodename nor servname provided, or not known>", Failure("dns", True)),
        ("<urlopen error [Errno 111] Connection refused>", Failure("connection", True)),
        ("<urlopen error [Errno 113] No route to host>", Failure("connection", True)),
        ("[Errno 104] Connection reset by peer", Failure("connection", True)),
        ("Remote end closed connection without response", Failure("connection", True)),
        ("IncompleteRead(1733 bytes read, 1733 more expected)", Failure("incomplete_body", True)),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:992)>", Failure("tls")),
        ("<urlopen error EOF occurred in violation of protocol (_ssl.c:1006)>", Failure("tls")),
        ("URL can't contain control characters. '/a b' (found at least ' ')", Failure("bad_url")),
        ("'ascii' codec can't encode character '\\xfc' in position 5: ordinal not in range(128)", Failure("bad_url")),
        ("Invalid IPv6 URL", Failure("bad_url")),
        ("Use of image disallowed by X-Robots-Tag directive", Failure("opted_out", outcome="filtered")),
        ("hash mismatch", Failure("hash_mismatch")),
        ("got more than 100 headers", Failure("bad_response")),
    ],
)
def test_message_of_a_download_is_a_reason(message: str, failure: Failure) -> None:
    assert download_failure(message) == failure


def test_message_of_the_resizer_is_a_reason() -> None:
    messages = ["Image decoding error", "image too small", "image area too large", "aspect ratio too large", "OpenCV…"]
    assert [(found.reason, found.outcome) for found in map(resize_failure, messages)] == [
        ("corrupt", "failed"),
        ("too_small", "filtered"),
        ("too_many_pixels", "failed"),
        ("aspect", "filtered"),
        ("corrupt", "failed"),
    ]
