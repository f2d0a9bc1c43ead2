"""Makes pictures from captions with a checkpoint: one grid a resolution."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.evaluate.grids import grid_title, picture_grid, png_bytes
from pipelines.progress import Progress
from pipelines.sample.config import SampleConfig
from pipelines.sample.models import Source, find_source, is_file

if TYPE_CHECKING:
    from pipelines.evaluate.worker import MakerFactory, PictureMaker

# More than there are captions in any file, so that a caption's first picture stays the same when more are asked for.
_COPIES_APART = 2**32


@dataclass(frozen=True)
class SampleReport:
    """What was made."""

    checkpoint: str
    images_seen: int | None
    """Images that the network was trained on; None for a file, which doesn't say."""
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
        make: Makes a generator from a checkpoint; one that does all that the configuration asks for if empty.

    Raises:
        ConfigError: There is no checkpoint, no caption, or the network can't make pictures like that.
    """
    captions = [*config.captions, *_read_captions(config.captions_file)]
    if not captions:
        raise ConfigError(f"{config.captions_file} holds no caption, wanted one a line")
    source = find_source(storage.absolute(config.checkpoint))
    maker = (make or partial(_make, config))(source.uri, weights=config.weights, device=config.device)
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
    grids = {}
    for side, level in zip(maker.resolutions, levels, strict=True):
        title = _title(config, source, side)
        columns = config.pictures_per_caption if config.pictures_per_caption > 1 else None
        grid = picture_grid(level, [caption for caption, _ in wanted], title=title, columns=columns)
        grids[str(side)] = storage.join(storage.absolute(config.out), f"samples_{side}.png")
        storage.write_bytes_atomic(grids[str(side)], png_bytes(grid))
    return SampleReport(source.uri, source.images_seen, len(wanted), grids)


def _make(config: SampleConfig, uri: str, *, weights: Any, device: str) -> "PictureMaker":
    """A generator that samples as configured, all of it checked."""
    from pipelines.sample.edits import read_edit
    from pipelines.sample.generator import Generator, Options

    generator = Generator.from_checkpoint(
        uri, weights=weights, device=device, encoder=config.text.encoder, max_tokens=config.text.max_tokens
    )
    generator.options = Options(
        sampling=config.sampling(),
        negative_caption=config.negative_caption,
        edit=read_edit(config, generator.resolutions),
    )
    generator.check(guidance_scale=config.guidance_scale, num_inference_steps=config.num_inference_steps)
    return generator


def _title(config: SampleConfig, source: Source, side: int) -> str:
    return grid_title(
        source.name,
        side,
        weights=None if is_file(source.uri) else config.weights,
        images_seen=source.images_seen,
        guidance_scale=config.guidance_scale,
        num_inference_steps=config.num_inference_steps,
    )


def _read_captions(uri: str) -> list[str]:
    if not uri:
        return []
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"captions_file={uri} is not a file; give a text file with a caption a line") from error
    except OSError as error:
        raise ConfigError(
            f"captions_file={uri} can't be read: {storage.one_line(error)}; give a text file with a caption a line"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"captions_file={uri} is not UTF-8 text: {error}; save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
