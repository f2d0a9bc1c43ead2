"""What is not stored, and why: each function returns the reason, or nothing."""

from pipelines.data.config import FiltersConfig


def caption_reason(caption: str, filters: FiltersConfig) -> str | None:
    """Returns why a link with this caption is not worth fetching."""
    low, high = filters.caption_chars
    if not low <= len(caption) <= high:
        return "caption_chars"
    low, high = filters.caption_words
    if not low <= len(caption.split()) <= high:
        return "caption_words"
    return None


def size_reason(width: int, height: int, filters: FiltersConfig) -> str | None:
    """Returns why a picture of this size is not stored."""
    shorter, longer = sorted((width, height))
    if shorter < filters.min_side_px:
        return "too_small"
    if longer > filters.max_aspect * shorter:
        return "aspect"
    return None
