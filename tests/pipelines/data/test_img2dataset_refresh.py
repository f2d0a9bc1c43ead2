"""img2dataset's engine, and its folders, through a whole refresh."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from pipelines.data.config import RefreshConfig
from pipelines.data.refresh import RefreshReport, refresh
from tests.pipelines.data.img2dataset_run import read_written, run_img2dataset
from tests.pipelines.data.picture_server import PictureServer, draw_picture, encode
from tests.pipelines.data.test_refresh import configure, counts, line, rows

pytestmark = pytest.mark.skipif(importlib.util.find_spec("img2dataset") is None, reason="img2dataset is not installed")

Told = tuple[str, str | None]
IMAGE = {"size_px": 48, "format": "jpeg", "quality": 90}
THEIRS = {"image_size": 48, "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "encode_quality": 90}
TROUBLE = {
    "/missing": ("failed", "http_404"),
    "/page": ("failed", "not_an_image"),
    "/noai": ("filtered", "opted_out"),
    "/to-file": ("failed", "bad_redirect"),
}


def serve(server: PictureServer) -> list[str]:
    """Returns the links of eight pictures, then of one that is too small and of one with the bytes of the first."""
    urls = list(server.add_pictures(8))
    server.files |= {"/tiny.png": encode(draw_picture(9, 31, 31), "PNG"), "/again.jpg": server.files["/0.jpg"]}
    return [*urls, server.url("/tiny.png"), server.url("/again.jpg")]


def identity(url: str) -> bytes:
    return hashlib.blake2b(url.encode(), digest_size=16).digest()


def assert_accounted(report: RefreshReport, config: RefreshConfig, wanted: dict[str, Told]) -> None:
    """Asserts that the report and the table both say what is wanted of each link, and each link has one row."""
    found = rows(config)
    assert {row["url"]: (row["outcome"], row["reason"]) for row in found} == wanted
    assert sorted(row["id"] for row in found) == sorted(map(identity, wanted))
    outcomes = [outcome for outcome, _ in wanted.values()]
    assert {name: getattr(report, name) for name in ("ok", "filtered", "failed")} == {
        name: outcomes.count(name) for name in ("ok", "filtered", "failed")
    }


def test_refresh_by_its_engine_stores_what_it_would_write(tmp_path: Path, server: PictureServer) -> None:
    urls = serve(server)
    troubled: dict[str, Told] = {server.url(path): told for path, told in TROUBLE.items()}
    lines = [line(url) for url in (*urls, *troubled)] + [line(urls[1]), "no tab here", line(urls[2] + "?x", "short")]
    config = configure(
        tmp_path,
        lines,
        fetch={"engine": "img2dataset", "deadline_s": 10, "retries": 0},
        image=IMAGE,
        run={"workers": 1, "shard_rows": 5},
    )
    report = refresh(config)
    assert counts(report) == {
        "links": 17, "ok": 8, "filtered": 4, "failed": 3, "duplicate": 1, "malformed": 1, "unchanged": 0,
    }  # fmt: skip
    wanted: dict[str, Told] = dict.fromkeys(urls[:8], ("ok", None)) | {
        urls[8]: ("filtered", "too_small"),
        urls[9]: ("filtered", "exact_duplicate"),
        urls[2] + "?x": ("filtered", "caption_words"),
    }
    assert_accounted(report, config, wanted | troubled)
    assert dict(server.hits) == dict.fromkeys((*server.files, *TROUBLE), 1)

    run_img2dataset(tmp_path / "run", urls[:8], **THEIRS, output_format="webdataset")
    written = read_written(tmp_path / "run")
    for row in rows(config, "ok"):
        told, data = written[row["url"]]
        assert row["image"] == data
        assert row["sha256"] == hashlib.sha256(server.files[row["url"].removeprefix(server.url(""))]).digest()
        assert [row[name] for name in ("width", "height", "original_width", "original_height")] == [72, 48, 96, 64]
        assert [told[name] for name in ("width", "height", "original_width", "original_height")] == [72, 48, 96, 64]

    server.forget()
    again = refresh(config)
    assert (again.ok, again.filtered, again.failed, again.unchanged) == (0, 0, 0, 15)
    assert not server.hits


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_refresh_of_its_folder_holds_what_lies_there(tmp_path: Path, server: PictureServer, layout: str) -> None:
    urls = serve(server)
    troubled: dict[str, Told] = {server.url(path): told for path, told in TROUBLE.items()}
    listed = [*urls, *troubled, urls[3]]
    run_img2dataset(tmp_path / "run", listed, **THEIRS, output_format=layout, number_sample_per_shard=4)
    written = read_written(tmp_path / "run")
    server.forget()
    config = configure(
        tmp_path,
        [],
        source={"uri": str(tmp_path / "run" / "out"), "format": "img2dataset"},
        filters={"caption_words": [2, 256]},
        run={"workers": 1, "shard_rows": 3},
    )
    report = refresh(config)
    assert not server.hits
    assert counts(report) == {
        "links": 15, "ok": 8, "filtered": 3, "failed": 3, "duplicate": 1, "malformed": 0, "unchanged": 0,
    }  # fmt: skip
    wanted: dict[str, Told] = dict.fromkeys(urls[:8], ("ok", None)) | {
        urls[8]: ("filtered", "too_small"),
        urls[9]: ("filtered", "exact_duplicate"),
    }
    # Pages are nothing that OpenCV can read, and it does not say more than that.
    assert_accounted(report, config, wanted | troubled | {server.url("/page"): ("failed", "corrupt")})
    assert sum(row["status"] == "success" for row, _ in written.values()) == 10
    for row in rows(config, "ok"):
        told, data = written[row["url"]]
        assert (row["image"], row["sha256"].hex()) == (data, told["sha256"])
        assert row["sha256"] == hashlib.sha256(server.files[row["url"].removeprefix(server.url(""))]).digest()
        assert row["caption"] == f"caption {listed.index(row['url'])}"
        assert [row[name] for name in ("width", "height", "original_width", "original_height")] == [72, 48, 96, 64]

    again = refresh(config)
    assert (again.ok, again.filtered, again.failed, again.unchanged) == (0, 0, 0, 14)
    assert again.table_version == report.table_version
