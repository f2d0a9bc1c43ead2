"""Lists of links, read as they are: everything is text, one line is one row, and nothing is guessed.

A line that cannot be read is a row with a fault, and its neighbours are not touched. Lists are streamed: one batch of
rows is in memory at a time.
"""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.config import SourceConfig

_LINK = re.compile(r"https?://[^\s/?#]", re.IGNORECASE)
_BATCH_ROWS = 10_000
_READ_BYTES = 1 << 20
_MAX_LINE_BYTES = 16 << 20
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Row(NamedTuple):
    """One row of a list; `fault` says why it cannot be used, and is empty if it can."""

    line: int
    url: str
    caption: str
    fault: str = ""


def read_list(source: SourceConfig, limit: int | None = None) -> Iterator[list[Row]]:
    """Yields the rows of a list in batches, in order; at most `limit` rows.

    Raises:
        ConfigError: There is no such list, or it is not in the format that was named.
    """
    readers: dict[str, Callable[[SourceConfig], Iterator[Row]]] = {
        "tsv": _read_tsv,
        "csv": _read_csv,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }
    rows = itertools.islice(readers[source.format](source), limit)
    try:
        while batch := list(itertools.islice(rows, _BATCH_ROWS)):
            yield batch
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(f"{source.uri} cannot be read as {source.format}: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"the list {source.uri} cannot be read: {error.strerror or error}; check source.uri"
        ) from error


def _row(line: int, url: object, caption: object) -> Row:
    try:
        url = url.decode("utf-8") if isinstance(url, bytes) else url
        caption = caption.decode("utf-8") if isinstance(caption, bytes) else caption
    except UnicodeDecodeError:
        return Row(line, "", "", "not_utf8")
    if not isinstance(url, str) or not isinstance(caption, str):
        return Row(line, "", "", "not_text")
    url, caption = url.strip(), caption.strip()
    if not _LINK.match(url):
        return Row(line, url, caption, "not_a_link")
    if not caption:
        return Row(line, url, caption, "no_caption")
    return Row(line, url, caption)


def _read_tsv(source: SourceConfig) -> Iterator[Row]:
    return _read_delimited(source, lambda line: line.split("\t"), joint="\t")


def _read_csv(source: SourceConfig) -> Iterator[Row]:
    def split(line: str) -> list[str] | None:
        try:
            # Strict, and a line at a time: a quote that is never closed must not swallow the rows below it.
            return next(csv.reader([line], strict=True))
        except (csv.Error, StopIteration):
            return None

    return _read_delimited(source, split, joint=None)


def _read_delimited(source: SourceConfig, split: Callable[[str], list[str] | None], joint: str | None) -> Iterator[Row]:
    lines = _lines(source.uri)
    first_line = 1
    names: list[str] = []
    if source.header:
        names = split(next(lines, b"").decode("utf-8", "replace")) or []
        first_line = 2
    url_at = _position(source.columns.url, names, source.uri)
    caption_at = _position(source.columns.caption, names, source.uri)
    head = list(itertools.islice(lines, 1000))
    num_columns = len(names) or _usual_columns(head, split, least=max(url_at, caption_at) + 1)
    for number, raw in enumerate(itertools.chain(head, lines), first_line):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            yield Row(number, "", "", "not_utf8")
            continue
        cells = split(text)
        if cells is None:
            yield Row(number, "", "", "bad_csv")
            continue
        if len(cells) > num_columns and joint is not None and caption_at == num_columns - 1:
            # The separator occurs in the caption, which nothing in the format forbids.
            cells[caption_at:] = [joint.join(cells[caption_at:])]
        if len(cells) != num_columns:
            yield Row(number, "", "", "wrong_columns")
            continue
        yield _row(number, cells[url_at], cells[caption_at])


def _usual_columns(lines: list[bytes], split: Callable[[str], list[str] | None], least: int) -> int:
    """Returns how many columns most of the lines have: one odd line at the top must not condemn the rest."""
    cells = (split(line.decode("utf-8", "replace")) for line in lines)
    counts = Counter(len(row) for row in cells if row is not None and len(row) >= least)
    return counts.most_common(1)[0][0] if counts else least


def _position(column: int | str, names: list[str], uri: str) -> int:
    if isinstance(column, int):
        if names and column >= len(names):
            raise ConfigError(f"{uri} has {len(names)} columns, and no column {column}; positions count from 0")
        return column
    if column not in names:
        raise ConfigError(f"{uri} has no column {column!r}; it has {', '.join(map(repr, names))}")
    return names.index(column)


def _read_jsonl(source: SourceConfig) -> Iterator[Row]:
    for number, raw in enumerate(_lines(source.uri), 1):
        try:
            record = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            yield Row(number, "", "", "not_utf8")
            continue
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            yield Row(number, "", "", "not_json")
            continue
        url, caption = record.get(source.columns.url), record.get(source.columns.caption)
        try:
            f"{url}{caption}".encode()
        except UnicodeEncodeError:
            # Half a surrogate pair, which JSON can spell and no encoding can hold.
            yield Row(number, "", "", "not_utf8")
            continue
        yield _row(number, url, caption)


def _read_parquet(source: SourceConfig) -> Iterator[Row]:
    number = 0
    with storage.open_input(source.uri) as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        columns = [
            names[_position(column, names, source.uri)] for column in (source.columns.url, source.columns.caption)
        ]
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns):
            for url, caption in zip(*(_texts(batch[column]) for column in columns), strict=True):
                number += 1
                yield _row(number, url, caption)


def _texts(column: pa.Array) -> list[Any]:
    """Returns the values of a column, those that are text as bytes: nothing says that they are valid UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return list(column.to_pylist())


def _lines(uri: str) -> Iterator[bytes]:
    """Yields lines without their ends (LF or CRLF), and without a byte-order mark at the top."""
    rest = b""
    first = True
    with _open_stream(uri) as stream:
        while block := stream.read(_READ_BYTES):
            if first:
                block, first = block.removeprefix(b"\xef\xbb\xbf"), False
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            if len(rest) > _MAX_LINE_BYTES:
                raise ConfigError(f"{uri} has a line longer than {_MAX_LINE_BYTES:,} bytes; is it a list of links?")
            for line in lines:
                yield line.removesuffix(b"\r")
    if rest:
        yield rest.removesuffix(b"\r")


def _open_stream(uri: str) -> pa.NativeFile:
    file = storage.open_input(uri)
    for suffix, compression in _COMPRESSIONS.items():
        if uri.endswith(suffix):
            return pa.CompressedInputStream(file, compression)
    return file
