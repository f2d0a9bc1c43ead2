"""Pictures for people: grids of pictures with their captions, and curves of the loss."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_MARGIN_PX = 24
_GAP_PX = 12
_CAPTION_LINES = 2
_CAPTION_PT = 12
_TITLE_PT = 16
_LINE_PX = 15
_INK = "#1c1c1e"
_FAINT_INK = "#6b6b70"
_FRAME = "#d8d8dc"


def picture_grid(
    pictures: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    captions: Sequence[str],
    *,
    title: str = "",
    columns: int | None = None,
    cell_px: int = 96,
) -> Image.Image:
    """Returns the pictures side by side, each with its caption under it, and a title line.

    Args:
        pictures: (N, H, W, 3) uint8, or N pictures of their own sizes.
        captions: One a picture; what does not fit in two lines ends in an ellipsis.
        title: What the pictures are.
        columns: Pictures in a row; about as many as there are rows if empty.
        cell_px: Smaller pictures are enlarged by the whole number that brings them nearest to this, from below.
    """
    if len(pictures) != len(captions):
        raise ValueError(f"got {len(pictures)} pictures and {len(captions)} captions, wanted as many")
    images = [_enlarged(picture, cell_px) for picture in pictures]
    columns = columns or _num_columns(len(images))
    rows = math.ceil(len(images) / columns)
    width = max([cell_px, *(image.width for image in images)])
    height = max([1, *(image.height for image in images)])
    step_x, step_y = width + _GAP_PX, height + 6 + _CAPTION_LINES * _LINE_PX + _GAP_PX
    heading = _wrapped(title, columns * step_x - _GAP_PX, _font(_TITLE_PT), 2) if title else []
    top = _MARGIN_PX + (len(heading) * 22 + 12 if heading else 0)
    size = (2 * _MARGIN_PX + columns * step_x - _GAP_PX, top + rows * step_y - _GAP_PX + _MARGIN_PX)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for line, text in enumerate(heading):
        draw.text((_MARGIN_PX, _MARGIN_PX + 22 * line), text, fill=_INK, font=_font(_TITLE_PT))
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = _MARGIN_PX + index % columns * step_x
        y = top + index // columns * step_y
        left, upper = x + (width - image.width) // 2, y + height - image.height
        # Most of a drawing is white: without a frame nobody sees where it ends.
        draw.rectangle((left - 1, upper - 1, left + image.width, upper + image.height), outline=_FRAME)
        canvas.paste(image, (left, upper))
        for line, text in enumerate(_wrapped(caption, width, _font(_CAPTION_PT), _CAPTION_LINES)):
            draw.text(
                (x + width / 2, y + height + 6 + line * _LINE_PX),
                text,
                fill=_FAINT_INK,
                font=_font(_CAPTION_PT),
                anchor="ma",
            )
    return canvas


def grid_title(
    name: str,
    side: int,
    *,
    weights: str | None,
    images_seen: int | None,
    guidance_scale: float | Sequence[float],
    num_inference_steps: int,
) -> str:
    """Returns a line that says what the pictures of a grid are; what is None is not known, and left out."""
    said = [f"{name}: {side} px"]
    if weights is not None:
        said.append({"ema": "EMA weights", "raw": "raw weights", "untrained": "untrained weights"}[weights])
    if images_seen is not None:
        said.append(f"{images_seen:,} images seen")
    scales = guidance_scale if isinstance(guidance_scale, Sequence) else [guidance_scale]
    said.append(f"guidance {', '.join(f'{scale:g}' for scale in scales)}")
    return ", ".join([*said, f"{num_inference_steps} steps"])


def loss_plot(curves: Mapping[str, Iterable[tuple[int, float]]], *, title: str = "Training loss") -> Image.Image:
    """Returns curves of the loss over images seen: each faint as logged, and its moving average on top.

    Args:
        curves: (images seen, loss) pairs by name.
        title: Written above.
    """
    # Not pyplot, which keeps figures for the whole process and may ask for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes: Any = figure.add_subplot()
    lowest, highest = math.inf, 0.0
    for index, (name, points) in enumerate(curves.items()):
        pairs = np.array([point for point in points if math.isfinite(point[1])], float).reshape(-1, 2)
        if not len(pairs):
            continue
        smooth = _moving_average(pairs[:, 1])
        axes.plot(pairs[:, 0], pairs[:, 1], color=f"C{index}", alpha=0.25, linewidth=0.8)
        axes.plot(pairs[:, 0], smooth, color=f"C{index}", linewidth=1.8, label=f"{name}  ({smooth[-1]:.4g} at the end)")
        lowest, highest = min(lowest, smooth.min()), max(highest, smooth.max())
    if lowest > 0 and highest > 3 * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("images seen")
    axes.set_ylabel("loss")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def png_bytes(image: Image.Image) -> bytes:
    """Returns a picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _num_columns(count: int) -> int:
    """About as many as there are rows, and so that the last row is as full as can be."""
    ideal = math.ceil(math.sqrt(1.3 * count)) or 1
    return min(range(max(1, ideal * 3 // 4), ideal + 1), key=lambda columns: (-count % columns, -columns))


def _enlarged(picture: NDArray[np.uint8], cell_px: int) -> Image.Image:
    image = Image.fromarray(picture)
    factor = max(1, cell_px // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


@lru_cache
def _font(points: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's own font has Latin letters only; this one comes with matplotlib and has most alphabets.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), points)


def _wrapped(text: str, width_px: int, font: ImageFont.FreeTypeFont, max_lines: int) -> list[str]:
    """Returns `text` in lines that are at most so wide, the last of them ending in an ellipsis if more was to come."""
    words = text.split()
    lines: list[str] = []
    while words and len(lines) < max_lines:
        count = len(words)
        while count > 1 and font.getlength(" ".join(words[:count])) > width_px:
            count -= 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if not lines:
        return []
    if words:
        lines[-1] = " ".join([lines[-1], *words])
    return [_cut(line, width_px, font) for line in lines]


def _cut(line: str, width_px: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width_px:
        return line
    while line and font.getlength(line + "…") > width_px:
        line = line[:-1]
    return line.rstrip() + "…"


def _moving_average(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each value's mean with its neighbours; the window is cut at the ends."""
    half = len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
