import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdm_core.errors import ConfigError
from pipelines.data.config import SourceConfig
from pipelines.data.sources import Row, read_list


def rows(path: Path, content: bytes, limit: int | None = None, **options: Any) -> list[Row]:
    path.write_bytes(content)
    source = SourceConfig(uri=str(path), **options)
    return [row for batch in read_list(source, limit) for row in batch]


def good(line: int, name: str, caption: str) -> Row:
    return Row(line, f"http://h/{name}", caption)


def test_tsv_is_text_whatever_it_looks_like(tmp_path: Path) -> None:
    content = (
        b"\xef\xbb\xbfhttp://h/a\tplain\r\n"
        b'http://h/b\tan "unbalanced quote\n'
        b"http://h/c\tNA\n"
        b"http://h/d\t007\n"
        b"HTTPS://H/e\t2024-01-02, with, commas\n"
        b"http://h/f\ta\ttab\n"
        b"http://h/g\t\xc3\xbcber"
    )
    assert rows(tmp_path / "list.tsv", content) == [
        good(1, "a", "plain"),
        good(2, "b", 'an "unbalanced quote'),
        good(3, "c", "NA"),
        good(4, "d", "007"),
        Row(5, "HTTPS://H/e", "2024-01-02, with, commas"),
        good(6, "f", "a\ttab"),
        good(7, "g", "über"),
    ]


def test_faults_have_their_line_and_touch_no_other(tmp_path: Path) -> None:
    content = (
        b"http://h/a\tfine\n"
        b"\n"
        b"http://h/b\n"
        b"ftp://h/c\tnot a link\n"
        b"http://h/d\t   \n"
        b"http://h/e\t\xff\xfe\n"
        b"http://h/f\tfine\n"
        b"http:///path\tno host\n"
    )
    found = rows(tmp_path / "list.tsv", content)
    assert [(row.line, row.fault) for row in found] == [
        (1, ""),
        (2, "wrong_columns"),
        (3, "wrong_columns"),
        (4, "not_a_link"),
        (5, "no_caption"),
        (6, "not_utf8"),
        (7, ""),
        (8, "not_a_link"),
    ]


def test_one_odd_line_at_the_top_does_not_condemn_the_rest(tmp_path: Path) -> None:
    content = b"http://h/a\tone\ttwo\nhttp://h/b\tthree\nhttp://h/c\tfour\n"
    assert [row.fault for row in rows(tmp_path / "list.tsv", content)] == ["", "", ""]


def test_csv_quotes_hold_commas_and_end_with_their_line(tmp_path: Path) -> None:
    content = (
        b"id,page,name,contentUrl\r\n"
        b'1,p,"a, b and ""c""",http://h/1\r\n'
        b'2,p,"never closed,http://h/2\r\n'
        b"3,p,plain,http://h/3\r\n"
        b'4,p,"""",http://h/4\r\n'
        b"5,p,one,too,many,http://h/5\r\n"
    )
    options: dict[str, Any] = {"format": "csv", "header": True, "columns": {"url": "contentUrl", "caption": "name"}}
    assert rows(tmp_path / "list.csv", content, **options) == [
        good(2, "1", 'a, b and "c"'),
        Row(3, "", "", "bad_csv"),
        good(4, "3", "plain"),
        good(5, "4", '"'),
        Row(6, "", "", "wrong_columns"),
    ]


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        json.dumps({"url": "http://h/a", "caption": "b\nc", "other": 1}),
        '{"url": "http://h/b"',
        json.dumps({"url": "http://h/c", "caption": 7}),
        json.dumps({"caption": "no link"}),
        '{"url": "http://h/d", "caption": "\\ud800"}',
        "[1]",
    ]
    options: dict[str, Any] = {"format": "jsonl", "columns": {"url": "url", "caption": "caption"}}
    found = rows(tmp_path / "list.jsonl", "\n".join(lines).encode(), **options)
    assert found[0] == good(1, "a", "b\nc")
    assert [row.fault for row in found[1:]] == ["not_json", "not_text", "not_text", "not_utf8", "not_json"]


def test_parquet(tmp_path: Path) -> None:
    table = pa.table(
        {
            "n": [1, 2, 3, 4],
            "TEXT": ["one", None, "three", "four"],
            "URL": pa.array(["http://h/a", "http://h/b", "x", "http://h/d"]).dictionary_encode(),
        }
    )
    path = tmp_path / "list.parquet"
    pq.write_table(table, path, row_group_size=2)
    options: dict[str, Any] = {"format": "parquet", "columns": {"url": "URL", "caption": "TEXT"}}
    assert rows(path, path.read_bytes(), **options) == [
        good(1, "a", "one"),
        Row(2, "", "", "not_text"),
        Row(3, "x", "three", "not_a_link"),
        good(4, "d", "four"),
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_list(tmp_path: Path, suffix: str) -> None:
    content = b"".join(b"http://h/%d\tcaption %d\n" % (n, n) for n in range(50_000))
    packed = gzip.compress(content) if suffix == ".gz" else pa.Codec("zstd").compress(content, asbytes=True)
    found = rows(tmp_path / f"list.tsv{suffix}", packed)
    assert len(found) == 50_000
    assert found[-1] == good(50_000, "49999", "caption 49999")


def test_lines_are_the_same_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\xef\xbb\xbfhttp://h/a\tone\r\nhttp://h/b\ttwo\n\nhttp://h/c\tthree"
    whole = rows(tmp_path / "list.tsv", content)
    for size in (4, 5, 17):
        monkeypatch.setattr("pipelines.data.sources._READ_BYTES", size)
        assert rows(tmp_path / "list.tsv", content) == whole


def test_limit_counts_rows(tmp_path: Path) -> None:
    content = b"http://h/a\tone\nbad\nhttp://h/b\ttwo\n"
    assert [row.line for row in rows(tmp_path / "list.tsv", content, limit=2)] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uri": "/nowhere/list.tsv"}, "cannot be read: No such file"),
        ({"uri": "/"}, "cannot be read"),
        ({"uri": __file__, "format": "parquet"}, "cannot be read as parquet"),
        ({"uri": __file__, "header": True, "columns": {"url": "link", "caption": 1}}, "no column 'link'"),
        ({"uri": "gopher://list"}, "scheme 'gopher'"),
    ],
)
def test_list_that_cannot_be_read_is_one_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(read_list(SourceConfig.model_validate(options)))


def test_compressed_list_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        rows(tmp_path / "list.tsv.gz", b"http://h/a\tone\n")
