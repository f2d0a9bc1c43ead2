"""What is not stored, and why: each function returns the reason, or nothing."""

import re

from pipelines.data.config import FiltersConfig
from pipelines.data.language import check_languages, detect_language

# Scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana and Chinese characters.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


class CaptionFilter:
    """Says which captions are worth fetching a picture for.

    Raises:
        ConfigError: It tells languages, and py3langid is not installed or does not know one of them.
    """

    def __init__(self, filters: FiltersConfig) -> None:
        self._filters = filters
        if filters.language is not None:
            check_languages(filters.language)

    def check(self, caption: str) -> tuple[str | None, str | None]:
        """Returns why a link with this caption is not fetched, and the caption's language where it was looked at."""
        reason = _length_reason(caption, self._filters)
        if reason is not None or self._filters.language is None:
            return reason, None
        language = detect_language(caption)
        return (None if language in self._filters.language else "language"), language


def count_words(caption: str) -> int:
    """Returns the number of words between spaces; where a script has none, every two characters count as a word."""
    if not caption.isascii():
        caption = _UNSPACED.sub(lambda run: " x" * -(-len(run[0]) // 2) + " ", caption)
    return len(caption.split())


def size_reason(width: int, height: int, filters: FiltersConfig) -> str | None:
    """Returns why a picture of this size is not stored."""
    shorter, longer = sorted((width, height))
    if shorter < filters.min_side_px:
        return "too_small"
    if longer > filters.max_aspect * shorter:
        return "aspect"
    return None


def _length_reason(caption: str, filters: FiltersConfig) -> str | None:
    low, high = filters.caption_chars
    if not low <= len(caption) <= high:
        return "caption_chars"
    low, high = filters.caption_words
    if not low <= count_words(caption) <= high:
        return "caption_words"
    return None
