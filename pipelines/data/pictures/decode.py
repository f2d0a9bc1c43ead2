"""From the bytes that a server sent to the picture that is stored: what a browser would show, made smaller.

Orientation is applied, colours become sRGB, what is transparent lies on white, 16 bits are scaled to 8, an animation
gives its first frame, and there are always three channels. A file that is cut short or damaged is a failure, never
half a picture.
"""

import functools
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.failure import Failure
from pipelines.data.filters import size_reason
from pipelines.data.pictures.colour import apply_profile, is_srgb, to_srgb
from pipelines.data.pictures.containers import complaint, format_of
from pipelines.data.pictures.phash import perceptual_hash
from pipelines.data.pictures.resize import Pixels, resize
from pipelines.data.pictures.scratch import Scratch

_ORIENTATION_TAG = 0x0112
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {5, 6, 7, 8}
_JPEG_COLOURS = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_NUM_CHANNELS = {"RGB": 3, "GRAY": 1, "CMYK": 4}
_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
# What `format: source` stores as it came; anything else becomes PNG, which loses nothing.
_KEPT_FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
_PNG_DEPTH_AT = 24
_SMALL_PX = 128
# A JPEG is decoded at a half, a quarter or an eighth where that leaves so many times the size wanted.
_SPARE = 2
_scratch = Scratch()

# The limit that counts is the configured one, which is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Picture:
    """An encoded picture as it is stored; the original sizes are those after orientation."""

    data: bytes
    format: str
    width: int
    height: int
    original_width: int
    original_height: int
    phash: int | None = None
    """Perceptual hash, its 64 bits as a signed number; none for a flat picture."""


def decode(body: bytes, image: ImageConfig, filters: FiltersConfig) -> Picture | Failure:
    """Returns the picture in `body`, resized and encoded as configured, or why there is none."""
    image_format = format_of(body)
    if image_format is None:
        return Failure("not_an_image")
    if image_format == "HEIF" and not _has_heif():
        return Failure("heif_not_installed")
    if reason := complaint(body, image_format):
        return Failure(reason)
    try:
        with _open(body, image_format) as opened:
            if has_too_many_pixels(opened.width, opened.height, image):
                return Failure("too_many_pixels")
            if reason := size_reason(opened.width, opened.height, filters):
                return Failure(reason, outcome="filtered")
            return _stored(body, opened, image)
    except UnidentifiedImageError:
        return Failure("not_an_image")
    except Exception as error:  # a damaged file raises nearly anything in a decoder
        return Failure("truncated" if _is_cut_short(error) else "corrupt")


def target_size(width: int, height: int, image: ImageConfig) -> tuple[int, int]:
    """Returns the width and height that a picture is resized to, before any crop."""
    if image.resize == "none":
        return width, height
    side = max(width, height) if image.resize == "longer_side" else min(width, height)
    if side <= image.size_px and not image.upscale:
        return width, height
    scale = image.size_px / side
    return max(1, round(width * scale)), max(1, round(height * scale))


def has_too_many_pixels(width: int, height: int, image: ImageConfig) -> bool:
    """Returns whether a picture, or what it would be enlarged to, is larger than `image.max_pixels`."""
    return max(width * height, math.prod(target_size(width, height, image))) > image.max_pixels


def _open(body: bytes, image_format: str) -> ImageFile.ImageFile:
    formats = ("JPEG", "MPO") if image_format == "JPEG" else (image_format,)
    return Image.open(io.BytesIO(body), formats=formats)


@functools.cache
def _has_heif() -> bool:
    """Returns whether HEIC files can be read, and makes Pillow read them."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


def _stored(body: bytes, opened: ImageFile.ImageFile, image: ImageConfig) -> Picture:
    is_jpeg = opened.format in ("JPEG", "MPO")
    whole = None if is_jpeg else _first_frame(opened)
    orientation = _orientation(opened)
    swaps_sides = orientation in _SWAPS_SIDES
    width, height = opened.size[::-1] if swaps_sides else opened.size
    target = target_size(width, height, image)
    lying = target[::-1] if swaps_sides else target
    pixels = _decode_jpeg(body, opened, lying) if whole is None else _resize(as_array(whole), lying)
    if orientation in _TRANSPOSED:
        pixels = as_array(as_image(pixels).transpose(_TRANSPOSED[orientation]))
    if image.resize == "center_crop":
        pixels = center_square(pixels)
    phash = perceptual_hash(pixels)
    size = pixels.shape[1], pixels.shape[0]
    if image.format == "source" and orientation == 1 and size == opened.size and _is_plain(body, opened):
        return Picture(body, _KEPT_FORMATS[str(opened.format)], width, height, width, height, phash)
    stored_format = _KEPT_FORMATS.get(str(opened.format), "png") if image.format == "source" else image.format
    data = encode_pixels(pixels, stored_format, image.quality)
    return Picture(data, stored_format, *size, width, height, phash)


def _first_frame(opened: ImageFile.ImageFile) -> Image.Image:
    """Returns what a file shows first, decoded whole, in sRGB."""
    if opened.info.get("default_image"):
        opened.seek(1)  # what lies before the first frame is for programs that know no animations
    covered = opened.tile[0].extents if opened.format == "GIF" else None
    opened.load()
    pixels = to_srgb(opened)
    if covered in (None, (0, 0, *opened.size)):
        return pixels
    # Pillow fills what the first frame leaves out with a colour of its palette, browsers with nothing.
    canvas = Image.new("RGB", opened.size, "white")
    canvas.paste(pixels.crop(covered), covered)
    return canvas


def _orientation(opened: ImageFile.ImageFile) -> int:
    exif = Image.Exif()
    try:
        # Not `getexif()`: it decodes a PNG to look for more, and believes XMP, which browsers don't.
        exif.load(opened.info.get("exif", b""))  # of TIFF there is none here: Pillow turns it itself
        return int(exif.get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF, which says nothing of the pixels
        return 1


def _is_plain(body: bytes, opened: ImageFile.ImageFile) -> bool:
    """Returns whether a file, shown as it is, is what would be stored of it."""
    return (
        opened.format in _KEPT_FORMATS
        and opened.mode in ("RGB", "L")
        and "transparency" not in opened.info
        and is_srgb(opened.info.get("icc_profile"), opened.mode)
        and getattr(opened, "n_frames", 1) == 1
        and not (opened.format == "PNG" and body[_PNG_DEPTH_AT] == 16)
    )


def _decode_jpeg(body: bytes, opened: ImageFile.ImageFile, size: tuple[int, int]) -> Pixels:
    """Returns a JPEG in sRGB at `size`, decoded no larger than needed."""
    width, height = opened.size
    factor = jpeg_factor(opened.size, size)
    is_resized = (width, height) != size
    colours = _JPEG_COLOURS[opened.mode]
    is_halved = width >= _SPARE * size[0] and height >= _SPARE * size[1]
    array = jpeg_pixels(body, opened.size, factor, colours=colours, smooth=not is_halved, lasts=not is_resized)
    if is_resized:
        # The last pixels of a smaller decoding lie partly outside the picture.
        array = resize(array, size, (0, 0, width / factor, height / factor))
    profile = opened.info.get("icc_profile")
    if is_srgb(profile, opened.mode):
        return array
    # CMYK is stored inverted, as Adobe began it and browsers take it.
    return as_array(apply_profile(as_image(255 - array if colours == "CMYK" else array), profile))


def jpeg_factor(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    """Returns by how much a JPEG of `size` may be made smaller in decoding, where it is then resized to `wanted`.

    Returns:
        1, 2, 4 or 8: the largest that leaves twice the width and height wanted.
    """
    factor = 1
    while factor < 8 and all(side >= 2 * _SPARE * factor * target for side, target in zip(size, wanted, strict=True)):
        factor *= 2
    return factor


def jpeg_pixels(
    body: bytes,
    size: tuple[int, int],
    factor: int,
    *,
    colours: str = "RGB",
    smooth: bool = True,
    lasts: bool = True,
) -> Pixels:
    """Returns the pixels of a JPEG, decoded at its size divided by 1, 2, 4 or 8 and rounded up.

    Args:
        body: The file.
        size: Its width and height.
        factor: What they are divided by.
        colours: RGB, GRAY or CMYK.
        smooth: Whether colours stored at half the resolution are interpolated. A picture that is then made half as
            large, or smaller, comes out no worse without.
        lasts: Whether the pixels are kept; else they last until this thread decodes the next one.

    Raises:
        ValueError: The file is damaged.
    """
    width, height = -(-size[0] // factor), -(-size[1] // factor)
    options: dict[str, Any] = {"min_width": width, "min_height": height, "fastupsample": not smooth}
    if not lasts:
        options["buffer"] = _scratch.bytes("jpeg", width * height * _NUM_CHANNELS[colours])
    try:
        return simplejpeg.decode_jpeg(body, colours, **options)
    except ValueError as error:
        # Stray bytes between segments are common and harmless; any other complaint means damaged pixels.
        if "extraneous bytes" not in str(error):
            raise
        return simplejpeg.decode_jpeg(body, colours, strict=False, **options)


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return pixels if pixels.shape[1::-1] == size else resize(pixels, size)


def as_array(picture: Image.Image) -> Pixels:
    """Returns the pixels (height, width, channels) of a picture of 8 bits a channel."""
    array = np.asarray(picture)
    return array if array.ndim == 3 else array[..., None]


def as_image(pixels: Pixels) -> Image.Image:
    """Returns what `as_array` was given, where that was grey, RGB or CMYK."""
    height, width, channels = pixels.shape
    return Image.frombytes(_MODES[channels], (width, height), pixels.tobytes())


def center_square(pixels: Pixels) -> Pixels:
    """Returns the largest square in the middle."""
    height, width = pixels.shape[:2]
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return pixels[top : top + side, left : left + side]


def encode_pixels(pixels: Pixels, image_format: str, quality: int) -> bytes:
    """Returns pixels, grey or RGB, as a jpeg, webp or png in RGB; of png the quality is no matter."""
    if image_format == "jpeg":
        # Half the colour resolution shows in small pictures, and costs them few bytes.
        subsampling = "444" if min(pixels.shape[:2]) < _SMALL_PX else "420"
        colours = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        return bytes(simplejpeg.encode_jpeg(colours, quality=quality, colorsubsampling=subsampling))
    buffer = io.BytesIO()
    picture = as_image(pixels).convert("RGB")
    if image_format == "webp":
        picture.save(buffer, "WEBP", quality=quality)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def _is_cut_short(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("truncated", "premature", "unexpected end", "broken data stream"))
