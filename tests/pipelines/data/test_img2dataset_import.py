"""Shards that img2dataset wrote, taken as they are; and what it says went wrong."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.config import SourceConfig
from pipelines.data.failure import Failure
from pipelines.data.img2dataset.messages import download_failure, resize_failure
from pipelines.data.lists.sources import read_list
from pipelines.data.pictures.decode import Picture
from tests.pipelines.data.img2dataset_run import read_written, run_img2dataset
from tests.pipelines.data.picture_server import PictureServer, draw_picture, encode
from tests.pipelines.data.test_img2dataset import NOT_THERE, import_all, sha256

WEBDATASET: dict[str, Any] = {"output_format": "webdataset", "image_size": 32, "resize_mode": "keep_ratio"}


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
        failures = [result.failure for result in imported.values()]
        assert failures.count(None) == failures.count(Failure("missing_in_shard")) == 3
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
