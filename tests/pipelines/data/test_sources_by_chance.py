"""Lists of anything at all, compared with a second reader, and read back as they were written."""

import csv
import io
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.data.config import SourceConfig
from pipelines.data.lists.batch import Row
from pipelines.data.lists.sources import read_list
from tests.pipelines.data.slow_lists import read_slowly

NAMED = {"url": "url", "caption": "caption"}
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "list"


def rows(path: Path, **options: Any) -> list[Row]:
    return [row for batch in read_list(SourceConfig(uri=str(path), **options)) for row in batch]


# What lists are made of, and what they break on.
LINKS = [
    b"http://h/a",
    b"HTTPS://\xc3\xbc.de/",
    b"https://",
    b"ftp://x",
    b"http://\xc2\xa0",
    b"http://?",
    b"caption",
    b"007",
]
MARKS = [b"\t", b"\t", b"\t", b",", b",", b",", b'"', b'"', b'""', b"\n", b"\n", b"\n", b"\r\n", b"\r", b" ", b"\x00"]
ODD = [b"\x1c", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xef\xbb\xbf"]
OBJECTS = [
    b'{"url": "http://h/a", "caption": "b"}',
    b'{"caption": 7, "url": "http://h"}',
    b'{"url": "http://h", "url": "x"',
    b'{"url": "http://h/\\ud83d\\ude00", "caption": "\\ud800"}',
    b'{"url":"http://h","caption":"\\u0041"}',
    b'{"url": ["http://h"], "caption": {"a": "b"}}',
    b'{"n": 1e999, "caption": "c", "url": "http://h"}',
    b"[" * 2000,
]
JSON_MARKS = [
    b"{}",
    b"[1]",
    b"\n",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b"NaN",
    b"{",
    b"}",
    b",",
    b"\xff",
    b"\xc3\xbc",
    b"\x0b",
    b"\\",
]
LINES = [
    b"http://h/a\tNA\n",
    b"HTTPS://\xc3\xbc.de/\t\x1c007\xe2\x80\xa8\n",
    b"http://h/a\t\xc3\xbc\ttab\r\n",
    b'http://h/a,"b, ""c"""\n',
    b"http://h/a,b\n",
    b"x,http://\xc3\xbc/,y\r\n",
    b'"http://h/a","b",\n',
]


def contents(pieces: list[bytes]) -> Iterator[bytes]:
    """Yields lists that are put together by chance, the same each time."""
    chance = random.Random(0)
    for _ in range(40):
        yield b"".join(chance.choices(pieces, k=300))


@pytest.mark.parametrize("columns", [(0, 1), (1, 0), (0, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_any_bytes_mean_what_the_slow_reader_says(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, columns: tuple[int, int]
) -> None:
    met: Counter[str] = Counter()
    for number, content in enumerate(contents([*LINKS, *MARKS, *ODD, *LINES])):
        path.write_bytes(content)
        monkeypatch.setattr("pipelines.data.lists.lines._READ_BYTES", [1, 7, 50, 1 << 20][number % 4])
        found = rows(path, format=kind, columns={"url": columns[0], "caption": columns[1]})
        assert [row.line for row in found] == [*range(1, len(found) + 1)]
        assert [(row.fault, row.url, row.caption) for row in found] == read_slowly(content, kind, *columns)
        met.update(row.fault for row in found)
    wanted = {"", "not_utf8", "wrong_columns", "not_a_link"} | ({"bad_csv"} if kind == "csv" else set())
    assert min(met[fault] for fault in wanted) > 5


def test_any_json_means_what_the_slow_reader_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: Counter[str] = Counter()
    for number, content in enumerate(contents([*OBJECTS, *JSON_MARKS, b"\n", b"\n", b"\n"])):
        path.write_bytes(content)
        monkeypatch.setattr("pipelines.data.lists.lines._READ_BYTES", [1, 7, 50, 1 << 20][number % 4])
        found = [(row.fault, row.url, row.caption) for row in rows(path, format="jsonl", columns=NAMED)]
        assert found == read_slowly(content, "jsonl", "url", "caption")
        met.update(fault for fault, _, _ in found)
    assert min(met[fault] for fault in ("", "not_utf8", "not_json", "not_text")) > 5


links = st.builds(
    "http{}://{}/{}".format,
    st.sampled_from(["", "s"]),
    st.from_regex(r"[a-zß-ÿ0-9.-]{1,9}", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), max_size=9),
)
captions = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(str.strip)


def write_csv(pairs: list[tuple[str, str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("id", "url", "caption"), *(("1", *pair) for pair in pairs)])
    return text.getvalue().encode()


def write_parquet(pairs: list[tuple[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"caption": [pair[1] for pair in pairs], "url": [pair[0] for pair in pairs]}), sink)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Any] = {
    "tsv": (lambda pairs: "".join(f"{url}\t{text}\n" for url, text in pairs).encode(), {}),
    "csv": (write_csv, {"header": True, "columns": NAMED}),
    "jsonl": (
        lambda pairs: "\n".join(json.dumps(dict(zip(NAMED, pair, strict=True))) for pair in pairs).encode(),
        {"columns": NAMED},
    ),
    "parquet": (write_parquet, {"columns": NAMED}),
}


@QUICK
@given(pairs=st.lists(st.tuples(links, captions), min_size=1, max_size=30))
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read(path: Path, kind: str, pairs: list[tuple[str, str]]) -> None:
    if kind in ("tsv", "csv"):
        # One line is one row in these, so no caption of theirs has a line end in it.
        pairs = [(url, text.replace("\n", " ").replace("\r", " ").strip() or "x") for url, text in pairs]
    write, options = FORMATS[kind]
    path.write_bytes(write(pairs))
    found = rows(path, format=kind, **options)
    assert [(row.url, row.caption, row.fault) for row in found] == [(url, text.strip(), "") for url, text in pairs]


def test_spaces_are_the_same_to_arrow_and_to_python() -> None:
    texts = [f"{char}x{char}" for char in map(chr, range(0x110000)) if not "\ud800" <= char <= "\udfff"]
    assert pc.utf8_trim_whitespace(pa.array(texts)).to_pylist() == [text.strip() for text in texts]
