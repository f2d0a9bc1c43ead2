"""What the headers of an answer ask for."""

import email.utils
import math
import time
from collections.abc import Iterable, Mapping

_OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "none"}
# Directives with a value: what comes before their colon is not the name of a crawler.
_WITH_VALUE = {"unavailable_after", "max-image-preview", "max-snippet", "max-video-preview"}


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Returns the seconds that `Retry-After` asks to wait, given as a number or a date; 0 where it asks for nothing."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        wait_s = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError, OSError):
        return 0.0
    return max(wait_s, 0.0) if math.isfinite(wait_s) else 0.0


def opted_out(values: Iterable[str], agent: str) -> bool:
    """Returns whether `X-Robots-Tag` headers keep the picture from everyone, or from `agent` by name."""
    for value in values:
        ours = True
        for part in value.split(","):
            name, colon, directive = part.partition(":")
            name = name.strip().lower()
            # The name of a crawler: what follows is for it, up to the next name. A name has no spaces, a date does.
            if colon and name not in _WITH_VALUE and " " not in name:
                ours = name in ("*", agent.lower())
                part = directive
            if ours and part.strip().lower() in _OPT_OUTS:
                return True
    return False
