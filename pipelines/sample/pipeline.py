"""Makes pictures from captions with a checkpoint: one grid a resolution."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.evaluate.grids import grid_title, picture_grid, png_bytes
from pipelines.progress import Progress
from pipelines.sample.config import SampleConfig
from pipelines.train.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from pipelines.evaluate.worker import MakerFactory

# More than there are captions in any file, so that a caption's first picture stays the same when more are asked for.
_COPIES_APART = 2**32


@dataclass(frozen=True)
class SampleReport:
    """What was made."""

    checkpoint: str
    images_seen: int
    pictures: int
    grids: dict[str, str]
    """Where the grid of each resolution is."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON holds it."""
        return asdict(self)


def sample(config: SampleConfig, *, make: "MakerFactory | None" = None) -> SampleReport:
    """Writes a grid a resolution of pictures for the captions, and returns where they are.

    Args:
        config: What to make.
        make: Makes a generator from a checkpoint; `Generator.from_checkpoint` if empty.

    Raises:
        ConfigError: There is no checkpoint, or no caption.
    """
    captions = [*config.captions, *_read_captions(config.captions_file)]
    if not captions:
        raise ConfigError(f"{config.captions_file} holds no caption, wanted one a line")
    checkpoint = open_checkpoint(storage.absolute(config.checkpoint))
    if make is None:
        from pipelines.sample.generator import Generator

        make = Generator.from_checkpoint
    maker = make(checkpoint.uri, weights=config.weights, device=config.device)
    wanted = [
        (caption, copy * _COPIES_APART + index)
        for index, caption in enumerate(captions)
        for copy in range(config.pictures_per_caption)
    ]
    levels: list[list[NDArray[np.uint8]]] = [[] for _ in maker.resolutions]
    with Progress("sample", total=len(wanted), unit="pictures") as progress:
        for first in range(0, len(wanted), config.batch_size):
            batch = wanted[first : first + config.batch_size]
            pictures = maker.generate(
                [caption for caption, _ in batch],
                noise_ids=[noise_id for _, noise_id in batch],
                seed=config.seed,
                guidance_scale=config.guidance_scale,
                num_inference_steps=config.num_inference_steps,
            )
            for level, made in zip(levels, pictures, strict=True):
                level.extend(made)
            progress.advance(len(batch))
    manifest = checkpoint.manifest
    grids = {}
    for side, level in zip(maker.resolutions, levels, strict=True):
        title = grid_title(
            str(manifest.config.get("name", "checkpoint")),
            side,
            weights=config.weights,
            images_seen=manifest.total_images_seen,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
        )
        columns = config.pictures_per_caption if config.pictures_per_caption > 1 else None
        grid = picture_grid(level, [caption for caption, _ in wanted], title=title, columns=columns)
        grids[str(side)] = storage.join(storage.absolute(config.out), f"samples_{side}.png")
        storage.write_bytes_atomic(grids[str(side)], png_bytes(grid))
    return SampleReport(checkpoint.uri, manifest.total_images_seen, len(wanted), grids)


def _read_captions(uri: str) -> list[str]:
    if not uri:
        return []
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"captions_file={uri} is not a file; give a text file with a caption a line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"captions_file={uri} is not UTF-8 text: {error}; save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
