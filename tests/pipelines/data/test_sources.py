import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from mdm_core.errors import ConfigError
from pipelines.data.config import SourceConfig
from pipelines.data.lists.batch import Row
from pipelines.data.lists.lines import read_blocks
from pipelines.data.lists.sources import read_list


def rows(path: Path, content: bytes, limit: int | None = None, **options: Any) -> list[Row]:
    path.write_bytes(content)
    source = SourceConfig(uri=str(path), **options)
    found = [row for batch in read_list(source, limit) for row in batch]
    assert {row.part for row in found} <= {str(path)}
    return [row._replace(part="") for row in found]


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
        Row(3, fault="bad_csv"),
        good(4, "3", "plain"),
        good(5, "4", '"'),
        Row(6, fault="wrong_columns"),
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
        Row(2, fault="not_text"),
        Row(3, fault="not_a_link"),
        good(4, "d", "four"),
    ]


def test_webvid_is_read_as_it_is(tmp_path: Path) -> None:
    content = (
        b"videoid,contentUrl,duration,page_dir,name\n"
        b"1066674784,https://ak.picdn.net/1066674784/preview/stock.mp4,PT00H00M05S,0288_0289,Merida, mexico - may 23\n"
        b'21179416,https://ak.picdn.net/21179416/a.mp4,PT00H00M11S,006001_006050,"Woman, at a cafe, in ""Paris"""\n'
    )
    options: dict[str, Any] = {"format": "csv", "header": True, "columns": {"url": "contentUrl", "caption": "name"}}
    # The first has a comma that nobody quoted, which csv does not allow.
    assert rows(tmp_path / "list.csv", content, **options) == [
        Row(2, fault="wrong_columns"),
        Row(3, "https://ak.picdn.net/21179416/a.mp4", 'Woman, at a cafe, in "Paris"'),
    ]


def test_name_that_stands_for_two_columns_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "csv", "header": True, "columns": {"url": "url", "caption": 2}}
    with pytest.raises(ConfigError, match="'url' 2 times, at 0 and 1; give its position"):
        rows(tmp_path / "list.csv", b"url,url,text\nhttp://h/a,http://h/b,one\n", **options)
    options["columns"] = {"url": 1, "caption": 2}
    assert rows(tmp_path / "l", b"url,url,text\nx,http://h/b,one\n", **options) == [good(2, "b", "one")]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
)
def test_parquet_text_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    # The third is no UTF-8; as text it can only be stored by writers who do not look.
    values = pa.array([b" one ", None, b"\xff", "vier ü".encode()], pa.binary())
    if pa.types.is_string(kind):
        captions = pa.StringArray.from_buffers(4, values.buffers()[1], values.buffers()[2], values.buffers()[0])
    elif pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        values = pa.array([b" one ", None, b"\xef\xbf\xbd", "vier ü".encode()], pa.binary())
        captions = values.cast(pa.string()).cast(kind)
    else:
        captions = values.cast(kind)
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"u": ["http://h/a", "http://h/b", "http://h/c", "http://h/d"], "c": captions}), path)
    found = rows(path, path.read_bytes(), format="parquet")
    third = good(3, "c", "\ufffd") if values[2].as_py() == b"\xef\xbf\xbd" else Row(3, fault="not_utf8")
    assert found == [good(1, "a", "one"), Row(2, fault="not_text"), third, good(4, "d", "vier ü")]


@pytest.mark.parametrize("values", [[1, None], [["a"], []], [{"a": "b"}, None], [None, None]])
def test_parquet_column_that_is_no_text(tmp_path: Path, values: list[Any]) -> None:
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"u": ["http://h/a", "http://h/b"], "c": values}), path)
    assert [row.fault for row in rows(path, path.read_bytes(), format="parquet")] == ["not_text", "not_text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("http://h/a\tone\n".encode("utf-16"), "is UTF-16 and not UTF-8"),
        ("\ufeffhttp://h/a\tone\n".encode("utf-16-be"), "is UTF-16 and not UTF-8"),
        (gzip.compress(b"http://h/a\tone\n"), "let it end in .gz"),
        (pa.Codec("zstd").compress(b"http://h/a\tone\n", asbytes=True), "let it end in .zst"),
        (b"PAR1....", "set source.format: parquet"),
        (b"http://h/a\tone\rhttp://h/b\ttwo\r", "CR alone"),
    ],
)
def test_what_is_no_text_is_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows(tmp_path / "list.tsv", content)


def test_line_that_is_too_long_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.lists.lines.MAX_LINE_BYTES", 40)
    monkeypatch.setattr("pipelines.data.lists.lines._READ_BYTES", 16)
    (tmp_path / "list").write_bytes(b"one\n" + b"x" * 1000 + b"\ntwo\n")
    assert list(read_blocks(str(tmp_path / "list"))) == [b"one\n", None, b"two\n"]


@pytest.mark.parametrize("size", [7, 64, 1 << 20])
def test_line_that_is_too_long_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in ("lines", "delimited", "sources"):
        monkeypatch.setattr(f"pipelines.data.lists.{module}.MAX_LINE_BYTES", 40)
    monkeypatch.setattr("pipelines.data.lists.lines._READ_BYTES", size)
    long, fits = b"http://h/b\t" + b"x" * 30, b"http://h/c\t" + b"x" * 29
    content = b"\n".join([b"http://h/a\tone", long, fits, long * 9, b"http://h/d\ttwo", long])
    found = rows(tmp_path / "list.tsv", content)
    assert [row.fault for row in found] == ["", "line_too_long", "", "line_too_long", "", "line_too_long"]
    assert [row.line for row in found] == [1, 2, 3, 4, 5, 6]
    objects = [json.dumps({"url": "http://h/", "caption": text}).encode() for text in ("a", "ü" * 30, "b")]
    found = rows(tmp_path / "l", b"\n".join(objects), format="jsonl", columns={"url": "url", "caption": "caption"})
    assert [row.fault for row in found] == ["", "line_too_long", ""]


def test_lines_are_the_same_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\xef\xbb\xbfhttp://h/a\tone\r\nhttp://h/b\ttwo\n\nhttp://h/c\tthree"
    whole = rows(tmp_path / "list.tsv", content)
    for size in (4, 5, 17):
        monkeypatch.setattr("pipelines.data.lists.lines._READ_BYTES", size)
        assert rows(tmp_path / "list.tsv", content) == whole


@pytest.mark.parametrize("columns", [{"url": -1}, {"caption": -1}])
@pytest.mark.parametrize("list_format", ["tsv", "parquet"])
def test_column_is_not_counted_from_the_end(columns: dict[str, int], list_format: str) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        SourceConfig.model_validate({"uri": "list", "format": list_format, "columns": columns})


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
        ({"uri": "/nowhere/*.tsv"}, "matches nothing; wanted a file"),
        ({"uri": "/nowhere", "format": "img2dataset"}, "matches nothing; wanted a folder"),
    ],
)
def test_list_that_cannot_be_read_is_one_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(read_list(SourceConfig.model_validate(options)))
