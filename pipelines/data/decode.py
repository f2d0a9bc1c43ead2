"""From the bytes that a server sent to the picture that is stored: what a browser would show, made smaller.

Orientation is applied, colours become sRGB, what is transparent lies on white, 16 bits are scaled to 8, an animation
gives its first frame, and there are always three channels. A file that is cut short or damaged is a failure, never
half a picture.
"""

import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.fetch import Failure
from pipelines.data.filters import size_reason

# Formats that Pillow reads without running anything else (EPS, for one, would start Ghostscript), and whose size it
# tells before it decodes anything (ICO decodes what is inside it when it is opened).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")
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
_SMALL_PX = 128
_SRGB = ImageCms.createProfile("sRGB")

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
    """Perceptual hash, its 64 bits as a signed number."""


def decode(body: bytes, image: ImageConfig, filters: FiltersConfig) -> Picture | Failure:
    """Returns the picture in `body`, resized and encoded as configured, or why there is none."""
    try:
        with _open(body) as opened:
            orientation = _orientation(opened)
            width, height = opened.size
            if width * height > image.max_pixels:
                return Failure("too_many_pixels")
            if orientation in _SWAPS_SIDES:
                width, height = height, width
            if reason := size_reason(width, height, filters):
                return Failure(reason, outcome="filtered")
            target = target_size(width, height, image)
            pixels = _resize(body, opened, target[::-1] if orientation in _SWAPS_SIDES else target)
        if orientation in _TRANSPOSED:
            pixels = pixels.transpose(_TRANSPOSED[orientation])
        if image.resize == "center_crop":
            pixels = _center_square(pixels)
        return Picture(_encode(pixels, image), image.format, *pixels.size, width, height)
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


def _open(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body), formats=[name for name in _FORMATS if name in _known_formats()])


@functools.cache
def _known_formats() -> frozenset[str]:
    Image.init()
    return frozenset(Image.OPEN)


def _orientation(opened: Image.Image) -> int:
    try:
        return int(opened.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF, which says nothing of the pixels
        return 1


def _resize(body: bytes, opened: Image.Image, size: tuple[int, int]) -> Image.Image:
    if opened.format in ("JPEG", "MPO") and opened.mode in ("RGB", "L"):
        pixels = _decode_jpeg(body, opened, size)
        pixels = _to_srgb(pixels, opened.info.get("icc_profile"))
    else:
        if opened.format == "PNG":
            # Loading stops at the last pixel and leaves the checksums unread.
            _open(body).verify()
        opened.load()
        pixels = _to_rgb(opened)
    # The gap lets Pillow average whole blocks first where the result is the same to the eye.
    return pixels if pixels.size == size else pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _decode_jpeg(body: bytes, opened: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Decodes a JPEG at a half, a quarter or an eighth where that leaves at least twice the size wanted."""
    width, height = opened.size
    factor = 1
    while factor < 8 and width >= 4 * factor * size[0] and height >= 4 * factor * size[1]:
        factor *= 2
    options: dict[str, Any] = {"min_width": -(-width // factor), "min_height": -(-height // factor)}
    colours = "RGB" if opened.mode == "RGB" else "GRAY"
    try:
        array = simplejpeg.decode_jpeg(body, colours, **options)
    except ValueError as error:
        # Stray bytes between segments are common and harmless; any other complaint means damaged pixels.
        if "extraneous bytes" not in str(error):
            raise
        array = simplejpeg.decode_jpeg(body, colours, strict=False, **options)
    return Image.fromarray(array if colours == "RGB" else array[..., 0])


def _to_rgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        return _scale_deep(picture).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        flat = Image.new("RGB", picture.size, "white")
        flat.paste(_to_srgb(picture.convert("RGB"), profile), mask=alpha)
        return flat
    if picture.mode not in ("RGB", "L", "CMYK"):
        picture = picture.convert("RGB")
    return _to_srgb(picture, profile)


def _scale_deep(picture: Image.Image) -> Image.Image:
    """Returns a picture of 16 or 32 bits a channel, integer or float, as 8 bits."""
    values = np.asarray(picture, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a picture with values that are not finite")
    largest = float(values.max())
    if picture.mode == "F":
        full_scale = 1.0 if largest <= 1.0 else max(255.0, largest)
    else:
        full_scale = 65535.0 if largest <= 65535 else largest
    return Image.fromarray(np.clip(values * (255.0 / full_scale) + 0.5, 0, 255).astype(np.uint8))


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and (transform := _transform(profile, picture.mode)) is not None:
        return transform.apply(picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the way from a profile to sRGB; none where it is sRGB, is damaged, or does not fit the picture."""
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(parsed):
            return None
        return ImageCms.buildTransform(parsed, _SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _center_square(pixels: Image.Image) -> Image.Image:
    width, height = pixels.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return pixels.crop((left, top, left + side, top + side))


def _encode(pixels: Image.Image, image: ImageConfig) -> bytes:
    if image.format == "jpeg":
        # Half the colour resolution shows in small pictures, and costs them few bytes.
        subsampling = "444" if min(pixels.size) < _SMALL_PX else "420"
        array = np.ascontiguousarray(pixels)
        return bytes(simplejpeg.encode_jpeg(array, quality=image.quality, colorsubsampling=subsampling))
    buffer = io.BytesIO()
    if image.format == "webp":
        pixels.save(buffer, "WEBP", quality=image.quality)
    else:
        pixels.save(buffer, "PNG")
    return buffer.getvalue()


def _is_cut_short(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("truncated", "premature", "unexpected end", "broken data stream"))
