"""Rows of the sample table, made of what became of links."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.engine import Result
from pipelines.data.pictures.decode import Picture
from pipelines.data.pictures.video import Clip
from pipelines.data.table.sample_table import SCHEMA

_SIZES = ("format", "width", "height", "original_width", "original_height", "phash")
_CLIP = ("frames", "fps", "start_s", "duration_s")
MOST_BYTES = int(np.iinfo(np.int32).max)
"""Bytes of one array, since Arrow says in 32 bits where each of its values ends."""
THUMBNAIL = "thumbnail"
"""A column that is no part of the table: small pictures of rows that are not kept."""


def rows_of(
    chunk: pa.Table, results: Sequence[Result], *, source_name: str, languages: Sequence[str | None]
) -> pa.Table:
    """Returns a row for each link of a chunk, in its order, and `THUMBNAIL`; scores are null.

    Args:
        chunk: Columns id, url, caption and attempts.
        results: What became of each link.
        source_name: Stored with every row.
        languages: Of each caption, where it was found out.
    """
    pictures = [result.picture for result in results]
    failures = [result.failure for result in results]
    count = len(results)
    columns: dict[str, Any] = {
        "id": chunk["id"],
        "url": chunk["url"],
        "caption": chunk["caption"],
        "attempts": chunk["attempts"],
        "source": [source_name] * count,
        "outcome": [result.outcome for result in results],
        "reason": [failure and failure.reason for failure in failures],
        "retryable": [failure is not None and failure.retryable for failure in failures],
        "fetched_at": [datetime.now(UTC)] * count,
        "image": _binary([picture.data if isinstance(picture, Picture) else None for picture in pictures]),
        "sha256": [result.sha256 for result in results],
        "clip_similarity": [None] * count,
        "language": list(languages),
    }
    for name in _SIZES:
        columns[name] = [picture and getattr(picture, name) for picture in pictures]
    for name in _CLIP:
        columns[name] = [getattr(picture, name) if isinstance(picture, Clip) else None for picture in pictures]
    rows = pa.table({field.name: columns[field.name] for field in SCHEMA}, schema=SCHEMA)
    return rows.append_column(THUMBNAIL, pa.array([result.thumbnail for result in results], pa.binary()))


def _binary(values: Sequence[bytes | None]) -> pa.Array | pa.ChunkedArray:
    """Returns an array of values whose bytes were copied once; `pa.array` does it again whenever its memory is full."""
    ends = np.cumsum([0, *(len(value or b"") for value in values)])
    if ends[-1] > MOST_BYTES:
        return pa.array(values, pa.binary())  # in chunks
    is_given = np.packbits(np.array([value is not None for value in values], bool), bitorder="little")
    joined = b"".join(value or b"" for value in values)
    buffers = [pa.py_buffer(is_given), pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(joined)]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def picture_to_score(row: dict[str, Any]) -> bytes | None:
    """Returns the picture of a row (columns image and frames) that scores are about: of a clip, the middle frame."""
    if row["frames"]:
        frame: bytes = row["frames"][len(row["frames"]) // 2]
        return frame
    image: bytes | None = row["image"]
    return image
