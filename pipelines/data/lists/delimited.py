"""Lists of which a line is cells between tabs or commas."""

import csv
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mdm_core.errors import ConfigError
from pipelines.data.config import SourceConfig
from pipelines.data.lists.batch import FAULTS, Batch, Codes, make_batch
from pipelines.data.lists.lines import MAX_LINE_BYTES, is_utf8, read_blocks

_HEAD_LINES = 1000
_LF, _CR, _QUOTE = b'\n\r"'
_Numbers = npt.NDArray[np.int64]

# The module's own limit is of 128 KiB a cell, which no other format has.
csv.field_size_limit(MAX_LINE_BYTES)


class _Layout(NamedTuple):
    """Where the cells of a line are."""

    separator: int
    is_csv: bool
    num_columns: int
    url_at: int
    caption_at: int

    @property
    def may_hold_separators(self) -> bool:
        """Whether the last cell is the rest of the line: in tsv nothing forbids tabs in a caption that comes last."""
        return not self.is_csv and self.caption_at == self.num_columns - 1


def read_delimited(part: str, source: SourceConfig) -> Iterator[Batch]:
    """Yields the rows of a tsv or csv list.

    Raises:
        ConfigError: It has no such columns, or is no text.
    """
    is_csv = source.format == "csv"
    separator = "," if is_csv else "\t"
    blocks = read_blocks(part)
    names: list[str] = []
    line = 1
    if source.header:
        first = next(blocks, b"")
        if first == b"":
            return
        header, _, rest = (first or b"").partition(b"\n")
        names = _split(header.decode("utf-8", "replace").removesuffix("\r"), separator) or []
        blocks = itertools.chain([rest] if rest else [], blocks)
        line = 2
    url_at, caption_at = (find_column(column, names, part) for column in (source.columns.url, source.columns.caption))
    head = _head(blocks)
    num_columns = len(names) or _usual_columns(head, separator, least=max(url_at, caption_at) + 1)
    layout = _Layout(ord(separator), is_csv, num_columns, url_at, caption_at)
    for block in itertools.chain(head, blocks):
        batch = _too_long(part, line) if block is None else _read_block(part, line, block, layout)
        line += len(batch)
        yield batch


def find_column(column: int | str, names: list[str], part: str) -> int:
    """Returns the position of a column, given by position or by name.

    Raises:
        ConfigError: There is none, or more than one.
    """
    if isinstance(column, int):
        if names and column >= len(names):
            raise ConfigError(f"{part} has {len(names)} columns, and no column {column}; positions count from 0")
        return column
    if column not in names:
        raise ConfigError(f"{part} has no column {column!r}; it has {', '.join(map(repr, names))}")
    if names.count(column) > 1:
        at = " and ".join(str(at) for at, name in enumerate(names) if name == column)
        raise ConfigError(f"{part} has the column {column!r} {names.count(column)} times, at {at}; give its position")
    return names.index(column)


def _head(blocks: Iterator[bytes | None]) -> list[bytes | None]:
    """Returns the first blocks, enough for a thousand lines if there are so many."""
    head: list[bytes | None] = []
    num_lines = 0
    while num_lines < _HEAD_LINES:
        try:
            block = next(blocks)
        except StopIteration:
            break
        head.append(block)
        num_lines += 1 if block is None else block.count(b"\n")
    return head


def _usual_columns(head: list[bytes | None], separator: str, least: int) -> int:
    """Returns how many columns most of the first lines have: one odd line at the top must not condemn the rest."""
    lines = b"".join(block for block in head if block).split(b"\n", _HEAD_LINES)[:_HEAD_LINES]
    cells = (_split(line.decode("utf-8", "replace").removesuffix("\r"), separator) for line in lines)
    counts = Counter(len(row) for row in cells if row is not None and len(row) >= least)
    return counts.most_common(1)[0][0] if counts else least


def _split(line: str, separator: str) -> list[str] | None:
    """Returns the cells of a line; nothing if it is not csv."""
    if separator == "\t":
        return line.split("\t")
    try:
        # Strict, and a line at a time: a quote that is never closed must not swallow the rows below it.
        return next(csv.reader((line,), strict=True))
    except (csv.Error, StopIteration):
        return None


def _too_long(part: str, line: int) -> Batch:
    nothing = pa.array([], pa.string())
    return make_batch(part, line, np.array([FAULTS.index("line_too_long")], np.uint8), nothing, nothing)


def _read_block(part: str, line: int, block: bytes, layout: _Layout) -> Batch:
    raw = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(raw == _LF)
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    starts = np.concatenate([[0], ends[:-1] + 1])
    stops = ends - ((ends > starts) & (raw[ends - 1] == _CR))
    codes = np.zeros(len(ends), np.uint8)
    codes[~_are_utf8(block, starts, stops)] = FAULTS.index("not_utf8")
    codes[ends - starts > MAX_LINE_BYTES] = FAULTS.index("line_too_long")

    separators = np.flatnonzero(raw == layout.separator)
    first = np.searchsorted(separators, starts)
    num_cells = np.searchsorted(separators, stops) - first + 1
    fits = num_cells == layout.num_columns
    if layout.may_hold_separators:
        fits |= num_cells > layout.num_columns
    is_odd = np.zeros(len(ends), bool)
    if layout.is_csv:
        marks = np.flatnonzero((raw == _QUOTE) | (raw == _CR))
        is_odd = np.searchsorted(marks, stops) > np.searchsorted(marks, starts)
    codes[(codes == 0) & ~fits & ~is_odd] = FAULTS.index("wrong_columns")

    plain = (codes == 0) & ~is_odd
    texts = []
    for at in (layout.url_at, layout.caption_at):
        begin = starts[plain] if at == 0 else separators[first[plain] + at - 1] + 1
        end = stops[plain] if at == layout.num_columns - 1 else separators[first[plain] + at]
        texts.append(_cut(block, begin, end))
    if is_odd.any():
        odd = (codes == 0) & is_odd
        lines = [block[start:stop] for start, stop in zip(starts[odd].tolist(), stops[odd].tolist(), strict=True)]
        odd_texts = _parse_odd_lines(lines, np.flatnonzero(odd), codes, layout)
        order = pa.array(np.argsort(np.concatenate([np.flatnonzero(plain), np.flatnonzero(odd & (codes == 0))])))
        texts = [pa.concat_arrays(both).take(order) for both in zip(texts, odd_texts, strict=True)]
    return make_batch(part, line, codes, *texts)


def _are_utf8(block: bytes, starts: _Numbers, stops: _Numbers) -> npt.NDArray[np.bool_]:
    if is_utf8(block):
        return np.ones(len(starts), bool)
    return np.array([is_utf8(block[start:stop]) for start, stop in zip(starts, stops, strict=True)])


def _cut(block: bytes, begin: _Numbers, end: _Numbers) -> pa.Array:
    """Returns the texts of a block from each `begin` to its `end`; they follow one another."""
    if not len(begin):
        return pa.array([], pa.string())
    # One array of the texts and of what is between them, which costs no copy; then every other one.
    offsets = np.stack([begin, end], axis=1).astype(np.int32).ravel()
    all_texts = pa.Array.from_buffers(pa.string(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(block)])
    return all_texts.take(pa.array(np.arange(0, len(offsets), 2)))


def _parse_odd_lines(lines: list[bytes], numbers: _Numbers, codes: Codes, layout: _Layout) -> list[pa.Array]:
    """Returns the links and captions of csv lines that have quotes; sets the codes of those that can't be read."""
    urls: list[str] = []
    captions: list[str] = []
    for at, line in enumerate(lines):
        cells = _split(line.decode("utf-8"), ",")
        if cells is None:
            codes[numbers[at]] = FAULTS.index("bad_csv")
        elif len(cells) != layout.num_columns:
            codes[numbers[at]] = FAULTS.index("wrong_columns")
        else:
            urls.append(cells[layout.url_at])
            captions.append(cells[layout.caption_at])
    return [pa.array(urls, pa.string()), pa.array(captions, pa.string())]
