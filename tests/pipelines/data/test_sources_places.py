"""Where lists lie and how they are packed: in parts, compressed, on the web, on object storage."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.config import SourceConfig
from pipelines.data.lists.batch import Row
from pipelines.data.lists.sources import fingerprint, read_list
from tests.pipelines.data.test_sources import good, rows
from tests.pipelines.file_server import FileServer


def pack(content: bytes, suffix: str) -> bytes:
    return gzip.compress(content) if suffix == ".gz" else pa.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_list(tmp_path: Path, suffix: str) -> None:
    content = b"".join(b"http://h/%d\tcaption %d\n" % (n, n) for n in range(50_000))
    packed = pack(content, suffix)
    found = rows(tmp_path / f"list.tsv{suffix}", packed)
    assert len(found) == 50_000
    assert found[-1] == good(50_000, "49999", "caption 49999")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_list_in_members(tmp_path: Path, suffix: str) -> None:
    content = [b"http://h/a\tone\nhttp://h/b\tt", b"wo\n", b"http://h/c\tthree"]
    packed = b"".join(pack(part, suffix) for part in content)
    if suffix == ".zst":
        # pzstd begins each with a frame to be skipped.
        packed = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"size" + packed
    expected = [good(1, "a", "one"), good(2, "b", "two"), good(3, "c", "three")]
    assert rows(tmp_path / f"list.tsv{suffix}", packed) == expected


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_list_cut_short_is_no_shorter_list(tmp_path: Path, suffix: str) -> None:
    packed = pack(b"http://h/a\tone\n" * 1000, suffix)
    for num_bytes in (0, 1, len(packed) // 2, len(packed) - 1):
        for before in (b"", packed):
            if num_bytes or not before:
                with pytest.raises(ConfigError, match=r"list\.tsv\S+ cannot be read: "):
                    rows(tmp_path / f"list.tsv{suffix}", before + packed[:num_bytes])


def test_list_in_parts_is_one_list(tmp_path: Path) -> None:
    for name, lines in {"b-10": "http://h/c,three\n", "b-09": "http://h/a,one\nhttp://h/b\n", "c": "x,y\n"}.items():
        (tmp_path / f"{name}.csv").write_text("url,caption\n" + lines)
    (tmp_path / "b-08.csv").write_text("")
    (tmp_path / "b-00.csv").mkdir()
    columns: Any = {"url": "url", "caption": "caption"}
    source = SourceConfig(uri=f"{tmp_path}/b-*.csv", format="csv", header=True, columns=columns)
    first, second = (str(tmp_path / f"b-{number}.csv") for number in ("09", "10"))
    expected = [
        good(2, "a", "one")._replace(part=first),
        Row(3, fault="wrong_columns", part=first),
        good(2, "c", "three")._replace(part=second),
    ]
    assert [row for batch in read_list(source) for row in batch] == expected
    assert [row for batch in read_list(source, 2) for row in batch] == expected[:2]


def test_part_that_is_added_changes_the_fingerprint(tmp_path: Path) -> None:
    source = SourceConfig(uri=f"{tmp_path}/*.tsv")
    (tmp_path / "a.tsv").write_text("http://h/a\tone")
    first = fingerprint(source)
    (tmp_path / "a.txt").write_text("http://h/b\ttwo")
    assert fingerprint(source) == first
    (tmp_path / "b.tsv").write_text("http://h/b\ttwo")
    second = fingerprint(source)
    (tmp_path / "b.tsv").write_text("http://h/b\tthree")
    assert len({first, second, fingerprint(source)}) == 3


def test_list_on_the_web(tmp_path: Path) -> None:
    content = b"".join(b"http://h/%d\tcaption %d\n" % (n, n) for n in range(20_000))
    parquet = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["http://h/a"], "caption": ["one"]}), parquet)
    with FileServer() as server:
        server.files = {
            "/list.tsv": content,
            "/list.tsv.gz": gzip.compress(content),
            "/forbidden": b"",
            "/list.parquet": parquet.read_bytes(),
        }

        def captions(path: str, **options: Any) -> list[str]:
            source = SourceConfig(uri=server.url(path), **options)
            return [row.caption for batch in read_list(source) for row in batch]

        expected = [f"caption {number}" for number in range(20_000)]
        assert captions("/list.tsv") == expected
        assert captions("/list.tsv.gz?token=x") == expected
        assert server.asked == ["GET /list.tsv", "GET /list.tsv.gz?token=x"]
        assert captions("/list.parquet", format="parquet", columns={"url": "url", "caption": "caption"}) == ["one"]
        server.cut_short |= {"/list.tsv", "/list.tsv.gz", "/list.parquet"}
        for path, message in {
            "/gone.tsv": "No such file",
            "/forbidden": "HTTP 403",
            "/list.tsv": "cannot be read",
            "/list.tsv.gz": "cannot be read",
        }.items():
            with pytest.raises(ConfigError, match=rf"\Athe list http://\S+{path} .*{message}.*; check source.uri\Z"):
                captions(path)
        with pytest.raises(ConfigError, match=r"\Athe list http://\S+ cannot be read: HTTP 404"):
            captions("/gone.parquet", format="parquet")
    with pytest.raises(ConfigError, match=r"\Athe list http://\S+ cannot be read: Connect call failed"):
        list(read_list(SourceConfig(uri="http://127.0.0.1:1/list.tsv")))


def test_list_on_object_storage(bucket: str) -> None:
    parts = {"a[1]/1.tsv.gz": b"http://h/a\tone\n", "a[1]/2.tsv.gz": b"http://h/b\ttwo\n", "a[1]/3.tsv": b"x"}
    for name, content in parts.items():
        storage.write_bytes_atomic(f"{bucket}/{name}", gzip.compress(content))
    source = SourceConfig(uri=f"{bucket}/*/*.tsv.gz")
    found = [(row.part, row.line, row.caption) for batch in read_list(source) for row in batch]
    assert found == [(f"{bucket}/a[1]/1.tsv.gz", 1, "one"), (f"{bucket}/a[1]/2.tsv.gz", 1, "two")]
    assert [row.caption for batch in read_list(SourceConfig(uri=f"{bucket}/a[1]/2.tsv.gz")) for row in batch] == ["two"]
    before = fingerprint(source)
    storage.write_bytes_atomic(f"{bucket}/a[1]/2.tsv.gz", gzip.compress(b"http://h/b\tthree\n"))
    assert fingerprint(source) != before
    with pytest.raises(ConfigError, match="No such file"):
        list(read_list(SourceConfig(uri=f"{bucket}/none.tsv")))


def test_compressed_list_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        rows(tmp_path / "list.tsv.gz", b"http://h/a\tone\n")
