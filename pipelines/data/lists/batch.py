"""Rows of a list as columns: what can be used, and what is wrong with the rest."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

# What can be wrong with a row, by its code; 0 for nothing.
FAULTS = (
    "",
    "not_utf8",
    "not_text",
    "not_a_link",
    "no_caption",
    "bad_csv",
    "wrong_columns",
    "not_json",
    "line_too_long",
)
Codes: TypeAlias = npt.NDArray[np.uint8]
_LINK = re.compile(r"https?://[^\s/?#]", re.IGNORECASE)
# Nearly all links: what follows the slashes is ASCII, and can be seen to be no space without Unicode's tables.
_PLAIN_LINK = r'(?i)^https?://[!-"$-.0->@-~]'


class Row(NamedTuple):
    """One row of a list; `fault` says why it cannot be used, and is empty if it can."""

    line: int
    """Counts from 1 in each part of the list."""
    url: str = ""
    caption: str = ""
    fault: str = ""
    part: str = ""
    """URI of the part of the list."""
    origin: str = ""
    """Where the picture lies already, if it does."""


@dataclass(frozen=True)
class Batch(Sequence[Row]):
    """Rows that follow one another in one part of a list; as a sequence, its rows one by one, which is slow."""

    part: str
    """URI of the part."""
    first_line: int
    codes: Codes
    """Of each row: what is wrong with it, an index into `FAULTS`."""
    urls: pa.Array
    """Of the rows that can be used."""
    captions: pa.Array
    """Of the rows that can be used."""
    origins: pa.Array | None = None
    """Of the rows that can be used: where their pictures lie; nothing if none are known."""

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        line, code = self.first_line + index, int(self.codes[index])
        if code:
            return Row(line, fault=FAULTS[code], part=self.part)
        at = index - int(np.count_nonzero(self.codes[:index]))
        origin = "" if self.origins is None else self.origins[at].as_py()
        return Row(line, self.urls[at].as_py(), self.captions[at].as_py(), part=self.part, origin=origin)

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        """Which rows can be used."""
        return self.codes == 0

    def head(self, num_rows: int) -> "Batch":
        """Returns the first rows."""
        codes = self.codes[:num_rows]
        readable = int((codes == 0).sum())
        origins = None if self.origins is None else self.origins[:readable]
        return Batch(self.part, self.first_line, codes, self.urls[:readable], self.captions[:readable], origins)

    def count_faults(self) -> Counter[str]:
        """Returns how many rows have which fault."""
        counts = np.bincount(self.codes, minlength=len(FAULTS))
        return Counter({fault: int(count) for fault, count in zip(FAULTS, counts, strict=True) if fault and count})

    def faulty(self) -> Iterator[Row]:
        """Yields the rows that cannot be used."""
        return (self[int(at)] for at in np.flatnonzero(self.codes))


def make_batch(
    part: str, first_line: int, codes: Codes, urls: pa.Array, captions: pa.Array, origins: pa.Array | None = None
) -> Batch:
    """Returns rows of which the links and captions were looked at, spaces around them taken off.

    Args:
        part: URI of the part of the list.
        first_line: Number of the first row.
        codes: What is known to be wrong with each row.
        urls: Texts of the rows with which nothing is known to be wrong.
        captions: Of the same rows.
        origins: Of the same rows.
    """
    urls, captions = pc.utf8_trim_whitespace(urls), pc.utf8_trim_whitespace(captions)
    is_link = pc.match_substring_regex(urls, _PLAIN_LINK).to_numpy(zero_copy_only=False)
    for at in np.flatnonzero(~is_link):
        is_link[at] = _LINK.match(urls[int(at)].as_py()) is not None
    has_caption = pc.binary_length(captions).to_numpy(zero_copy_only=False) > 0
    found = np.where(is_link, np.where(has_caption, 0, FAULTS.index("no_caption")), FAULTS.index("not_a_link"))
    codes[codes == 0] = found
    if found.any():
        good = pa.array(found == 0)
        urls, captions = urls.filter(good), captions.filter(good)
        origins = None if origins is None else origins.filter(good)
    return Batch(part, first_line, codes, urls, captions, origins)
