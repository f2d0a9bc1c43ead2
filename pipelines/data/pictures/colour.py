"""Colours as a browser shows them: any kind of pixel becomes 8 bits of sRGB, and what is transparent lies on white."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_SRGB = ImageCms.createProfile("sRGB")
# Profiles of printers take half a megabyte; much larger ones are no use, and would fill the memory here.
_MAX_PROFILE_BYTES = 4_000_000
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def to_srgb(picture: Image.Image) -> Image.Image:
    """Returns a decoded picture of any mode as RGB, or as L where it has no colours and no profile."""
    profile = picture.info.get("icc_profile")
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        deep, clear = picture, picture.info.get("transparency")
        picture = _scale_deep(deep)
        if clear is not None:
            return _on_white(picture, profile, Image.fromarray(np.asarray(deep) != clear))
    elif picture.mode in _WITH_ALPHA or "transparency" in picture.info:
        is_grey = picture.mode in ("LA", "La")
        picture = picture.convert("RGBA")
        return _on_white(picture.convert("L" if is_grey else "RGB"), profile, picture.getchannel("A"))
    elif picture.mode == "LAB":
        return _from_lab().apply(picture)
    elif picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode not in ("RGB", "L", "CMYK"):
        picture = picture.convert("RGB")
    return apply_profile(picture, profile)


def apply_profile(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Returns an RGB, L or CMYK picture in sRGB, as RGB; as L where it is L and has no profile that fits."""
    if profile and (transform := _transform(profile, picture.mode)) is not None:
        return transform.apply(picture)
    return picture.convert("RGB") if picture.mode == "CMYK" else picture


def is_srgb(profile: bytes | None, mode: str) -> bool:
    """Returns whether pixels of this mode are sRGB as they are."""
    return mode in ("RGB", "L") and (not profile or _transform(profile, mode) is None)


def _on_white(colours: Image.Image, profile: bytes | None, alpha: Image.Image) -> Image.Image:
    flat = Image.new("RGB", colours.size, "white")
    flat.paste(apply_profile(colours, profile).convert("RGB"), mask=alpha)
    return flat


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


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the way from a profile to sRGB; none where it is sRGB, is damaged, or does not fit the picture."""
    if len(profile) > _MAX_PROFILE_BYTES:
        return None
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(parsed):
            return None
        return ImageCms.buildTransform(parsed, _SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


@functools.cache
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), _SRGB, "LAB", "RGB")
