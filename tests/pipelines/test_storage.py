import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mdm_core.errors import ConfigError, WorkError
from pipelines import file_patterns, storage
from tests.pipelines.file_server import FileServer


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_bytes_come_back_as_they_were_written(tmp_path: Path, prefix: str) -> None:
    uri = storage.join(prefix + str(tmp_path), "a", "b", "file.bin")
    assert not storage.exists(uri)
    storage.write_bytes_atomic(uri, b"one")
    storage.write_bytes_atomic(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.open_input(uri).read() == b"two"
    assert storage.list_files(storage.join(prefix + str(tmp_path), "a")) == [str(tmp_path / "a/b/file.bin")]
    storage.delete(storage.join(prefix + str(tmp_path), "a"))
    storage.delete(uri)
    assert not storage.exists(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


def test_full_disk_is_one_message_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file.bin")
    storage.write_bytes_atomic(uri, b"before")

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(WorkError, match=rf"disk is full.*5 bytes to {uri}; free some space"):
        storage.write_bytes_atomic(uri, b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
    assert storage.read_bytes(uri) == b"before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_device_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: real_open(Path("/dev/full"), *a, **k))
    with pytest.raises(WorkError, match="disk is full"):
        storage.write_bytes_atomic(str(tmp_path / "file.bin"), bytes(1 << 20))
    assert not list(tmp_path.iterdir())


def test_file_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file.bin")
    storage.write_bytes_atomic(uri, b"old")
    seen: list[Any] = []
    monkeypatch.setattr(
        os, "fsync", lambda _: seen.append((storage.read_bytes(uri), storage.list_files(str(tmp_path))))
    )
    storage.write_bytes_atomic(uri, b"new")
    assert seen == [(b"old", [uri])]
    assert storage.read_bytes(uri) == b"new"


def test_what_a_killed_writer_left_is_deleted_when_old(tmp_path: Path) -> None:
    left = tmp_path / "deep" / ".x.parquet.0a1b2c3d.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    now_s = left.stat().st_mtime
    assert storage.delete_unfinished(str(tmp_path), older_than_s=10, now_s=now_s + 5) == 0
    assert storage.delete_unfinished(str(tmp_path), older_than_s=10, now_s=now_s + 11) == 1
    assert not left.exists()


def test_path_is_made_absolute_and_bucket_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == str(tmp_path / "a/b")
    assert storage.absolute("file:///a/b") == "/a/b"
    assert storage.absolute("s3://bucket/key") == "s3://bucket/key"
    assert storage.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"


def test_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_text("a")
    first = file_patterns.fingerprint(str(path))
    assert file_patterns.fingerprint(str(path)) == first
    path.write_text("ab")
    assert file_patterns.fingerprint(str(path)) != first


def test_pattern_is_the_files_that_it_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b-2.tsv", "b-10.tsv", "a[1].tsv", "deep/b-3.tsv"):
        storage.write_bytes_atomic(str(tmp_path / name), b"")
    monkeypatch.chdir(tmp_path)
    assert file_patterns.expand("b-*.tsv") == [str(tmp_path / "b-10.tsv"), str(tmp_path / "b-2.tsv")]
    assert file_patterns.expand(f"file://{tmp_path}/d*/b-?.tsv") == [str(tmp_path / "deep/b-3.tsv")]
    assert file_patterns.expand("a[1].tsv") == ["a[1].tsv"]
    assert file_patterns.expand("none.tsv") == ["none.tsv"]
    assert file_patterns.expand("*.csv") == file_patterns.expand("dee*") == []
    assert file_patterns.expand("https://host/list*.tsv?a=[b]") == ["https://host/list*.tsv?a=[b]"]


def test_web_is_read_and_never_written_to() -> None:
    with FileServer() as server:
        uri = server.url("/a%20b+c.bin")
        server.files["/a%20b+c.bin"] = b"content"
        assert storage.absolute(uri) == uri
        assert storage.open_stream(uri).read(100) == storage.open_input(uri).read(100) == b"content"
        server.etags["/a%20b+c.bin"] = '"1"'
        first = file_patterns.fingerprint(uri)
        assert file_patterns.fingerprint(uri) == first
        server.etags["/a%20b+c.bin"] = '"2"'
        assert file_patterns.fingerprint(uri) != first
        with pytest.raises(OSError, match="HTTP 404"):
            file_patterns.fingerprint(server.url("/gone"))
        assert storage.read_bytes(uri) == b"content"
        server.files["/forbidden"] = server.files["/cut"] = b"content"
        server.cut_short.add("/cut")
        for path, message in {"/gone": "No such file", "/forbidden": "HTTP 403", "/cut": "not completed"}.items():
            with pytest.raises(OSError, match=message):
                storage.read_bytes(server.url(path))
    for write in (
        lambda: storage.write_bytes_atomic(uri, b""),
        lambda: storage.delete(uri),
        lambda: storage.delta_options(uri),
    ):
        with pytest.raises(ConfigError, match="can only be read"):
            write()


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("lists/a#1.tsv", "a#1.tsv"),
        ("/lists/part-?.tsv", "part-?.tsv"),
        ("file:///lists/a%20b.tsv.gz", "a%20b.tsv.gz"),
        ("s3://bucket/lists/a#1.tsv.zst", "a#1.tsv.zst"),
        ("https://host/lists/a.tsv.gz?token=x/y#part", "a.tsv.gz"),
        ("https://host/?list=1", ""),
    ],
)
def test_name_of_a_file(uri: str, name: str) -> None:
    assert storage.file_name(uri) == name


@pytest.mark.parametrize("uri", ["", "ftp://host/file"])
def test_unknown_scheme_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://"):
        storage.exists(uri)


def test_of_many_who_create_a_file_one_does(tmp_path: Path) -> None:
    """Looking first and writing then lets two in, about once in forty times."""
    with ThreadPoolExecutor(8) as pool:
        for number in range(300):
            uri, start = str(tmp_path / str(number)), threading.Barrier(8)

            def create(who: int, uri: str = uri, start: threading.Barrier = start) -> bool:
                start.wait()
                return storage.create(uri, bytes([who]) * (who + 1))

            created = list(pool.map(create, range(8)))
            assert created.count(True) == 1
            assert storage.read_bytes(uri) == bytes([created.index(True)]) * (created.index(True) + 1)
