"""How near to a careful resize the stored pictures are."""

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.data.table.sample_table import SampleTable


def psnr_db(picture: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures of one shape; infinite where they are equal."""
    error = picture.astype(np.float64) - reference.astype(np.float64)
    mean_square = float(np.mean(error**2))
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def mean_psnr_db(
    stored: Iterator[tuple[int, bytes]], body_of: Callable[[int], bytes], *, every: int = 1
) -> dict[str, Any]:
    """The mean PSNR of stored pictures against their originals, decoded in full and resized by Pillow's Lanczos.

    Args:
        stored: Numbers and files, one at a time.
        body_of: The original of a number.
        every: Look at one picture of so many.

    Returns:
        `psnr_db`, and of how many `pictures` it is the mean; those stored without any loss are left out of it.
    """
    found = [_psnr_against_lanczos(picture, body_of(number)) for number, picture in stored if number % every == 0]
    finite = [value for value in found if math.isfinite(value)]
    return {"psnr_db": float(np.mean(finite)) if finite else None, "pictures": len(finite)}


def stored_in_table(uri: str) -> Iterator[tuple[int, bytes]]:
    """The pictures of a sample table, with the numbers that their links end in."""
    table = SampleTable.open(uri)
    for shard in table.shards("ok"):
        rows = table.read(shard, ["url", "image"])
        for url, image in zip(rows["url"].to_pylist(), rows["image"].to_pylist(), strict=True):
            yield number_of(url), image


def stored_in_tars(folder: Path) -> Iterator[tuple[int, bytes]]:
    """The pictures in the shards that img2dataset wrote, with the numbers that their links end in."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            contents = {name: file.read() for name, file in files.items() if file is not None}
        for name, content in contents.items():
            if name.endswith(".json"):
                yield number_of(json.loads(content)["url"]), contents[name.removesuffix("json") + "jpg"]


def number_of(url: str) -> int:
    """The number that a link ends in."""
    return int(url.rpartition("/")[2])


def _psnr_against_lanczos(stored: bytes, original: bytes) -> float:
    with Image.open(io.BytesIO(stored)) as picture, Image.open(io.BytesIO(original)) as whole:
        reference = whole.convert("RGB").resize(picture.size, Image.Resampling.LANCZOS)
        return psnr_db(np.asarray(picture.convert("RGB")), np.asarray(reference))
