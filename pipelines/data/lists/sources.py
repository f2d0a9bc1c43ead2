"""Lists of links, read as they are: everything is text, one line is one row, and nothing is guessed.

A line that cannot be read is a row with a fault, and its neighbours are not touched. Lists are streamed: a few
megabytes of one are in memory at a time. They are read a block at a time into columns, and line by line only where a
block cannot tell what a line means.
"""

import glob
import json
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mdm_core.errors import ConfigError
from pipelines import file_patterns, storage
from pipelines.data.config import SourceConfig
from pipelines.data.lists.batch import FAULTS, Batch, Codes, Row, make_batch
from pipelines.data.lists.delimited import find_column, read_delimited
from pipelines.data.lists.lines import MAX_LINE_BYTES, is_utf8, read_blocks

__all__ = ["Batch", "Row", "fingerprint", "read_list"]

_BATCH_ROWS = 10_000
_DECODE_JSON = json.JSONDecoder().raw_decode
_JSON_SPACE = " \t\r\n"


def read_list(source: SourceConfig, limit: int | None = None) -> Iterator[Batch]:
    """Yields the rows of a list in order, part after part; at most `limit` rows.

    Raises:
        ConfigError: There is no such list, or it is not in the format that was named.
    """
    readers: dict[str, Callable[[str, SourceConfig], Iterator[Batch]]] = {
        "tsv": read_delimited,
        "csv": read_delimited,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "img2dataset": _read_parquet,
    }
    num_rows = 0
    for part in _parts(source):
        try:
            for batch in readers[source.format](part, source):
                kept = batch if limit is None else batch.head(limit - num_rows)
                num_rows += len(kept)
                yield kept
                if num_rows == limit:
                    return
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ConfigError(f"{part} cannot be read as {source.format}: {storage.one_line(error)}") from error
        except OSError as error:
            raise _unreadable(part, error) from error


def fingerprint(source: SourceConfig) -> str:
    """Returns a short text that changes when a part of a list is written to, added or taken away."""
    return file_patterns.fingerprint(_pattern(source))


def _parts(source: SourceConfig) -> list[str]:
    try:
        parts = file_patterns.expand(_pattern(source))
    except OSError as error:
        raise _unreadable(source.uri, error) from error
    if not parts:
        wanted = "a folder of *.parquet, as img2dataset writes it" if source.format == "img2dataset" else "a file"
        raise ConfigError(f"source.uri={source.uri} matches nothing; wanted {wanted}")
    return parts


def _pattern(source: SourceConfig) -> str:
    if source.format != "img2dataset":
        return source.uri
    # The folder's own name is no pattern, if there is a folder of that name.
    return storage.join(glob.escape(source.uri) if storage.exists(source.uri) else source.uri, "*.parquet")


def _unreadable(uri: str, error: OSError) -> ConfigError:
    return ConfigError(f"the list {uri} cannot be read: {error.strerror or storage.one_line(error)}; check source.uri")


def _read_jsonl(part: str, source: SourceConfig) -> Iterator[Batch]:
    url_name, caption_name = source.columns.url, source.columns.caption
    line = 1
    for block in read_blocks(part):
        lines: list[str | bytes | None] = [None] if block is None else _decoded_lines(block)
        codes = np.zeros(len(lines), np.uint8)
        urls: list[str] = []
        captions: list[str] = []
        for at, text in enumerate(lines):
            fault, url, caption = _parse_json(text, url_name, caption_name)
            if fault:
                codes[at] = FAULTS.index(fault)
            else:
                urls.append(url)
                captions.append(caption)
        yield make_batch(part, line, codes, pa.array(urls, pa.string()), pa.array(captions, pa.string()))
        line += len(lines)


def _decoded_lines(block: bytes) -> list[str | bytes | None]:
    """Returns the lines of a block: those that are not UTF-8 as they are, and None for those that are too long."""
    if len(block) <= MAX_LINE_BYTES and is_utf8(block):
        return [*block.decode("utf-8").removesuffix("\n").split("\n")]
    lines = block.removesuffix(b"\n").split(b"\n")
    return [None if len(line) > MAX_LINE_BYTES else line.decode("utf-8") if is_utf8(line) else line for line in lines]


def _parse_json(text: str | bytes | None, url_name: int | str, caption_name: int | str) -> tuple[str, str, str]:
    """Returns what is wrong with a line, if anything is, its link and its caption."""
    if not isinstance(text, str):
        return "line_too_long" if text is None else "not_utf8", "", ""
    text = text.strip(_JSON_SPACE)
    try:
        record, end = _DECODE_JSON(text)
    except (ValueError, RecursionError):
        return "not_json", "", ""
    if end != len(text) or not isinstance(record, dict):
        return "not_json", "", ""
    url, caption = record.get(url_name), record.get(caption_name)
    if not isinstance(url, str) or not isinstance(caption, str):
        return "not_text", "", ""
    # Half a surrogate pair, which JSON can spell and no encoding can hold.
    if "\\u" in text and not _is_encodable(url + caption):
        return "not_utf8", "", ""
    return "", url, caption


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(part: str, source: SourceConfig) -> Iterator[Batch]:
    wanted = (source.columns.url, source.columns.caption)
    if source.format == "img2dataset":
        wanted = ("url" if wanted[0] == 0 else wanted[0], "caption" if wanted[1] == 1 else wanted[1])
    line = 1
    with storage.open_input(part) as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        if source.format == "img2dataset" and not {"key", "status"} <= set(names):
            raise ConfigError(f"{part} has no columns key and status, so it is no shard of img2dataset")
        columns = [names[find_column(column, names, part)] for column in wanted]
        for name in columns:
            # A name may stand for two columns though only one was asked for, by its position.
            find_column(name, names, part)
        for rows in parquet.iter_batches(_BATCH_ROWS, columns=columns):
            codes = np.zeros(rows.num_rows, np.uint8)
            texts = [_texts(rows[column], codes) for column in columns]
            good = pa.array(codes == 0)
            origins = None
            if source.format == "img2dataset":
                numbers = pa.array(np.arange(line - 1, line - 1 + rows.num_rows)).cast(pa.string())
                origins = pc.binary_join_element_wise(part, numbers, "#").filter(good)
            urls, captions = (text.filter(good) for text in texts)
            yield make_batch(part, line, codes, urls, captions, origins)
            line += rows.num_rows


def _texts(column: pa.Array, codes: Codes) -> pa.Array:
    """Returns a column as text; sets the codes of the rows where it is none, and has anything there."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(is_of_type(column.type) for is_of_type in _TEXT_TYPES):
        column = pa.nulls(len(column), pa.string())
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    codes[is_null & (codes == 0)] = FAULTS.index("not_text")
    try:
        # Through bytes: nothing says that what is stored as text is UTF-8.
        return column.cast(pa.large_binary()).cast(pa.string())
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        texts = [None if value is None else _decoded(value) for value in values]
        codes[[text is None and value is not None for text, value in zip(texts, values, strict=True)]] = FAULTS.index(
            "not_utf8"
        )
        return pa.array(texts, pa.string())


_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None
