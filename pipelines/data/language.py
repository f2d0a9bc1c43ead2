"""The language that a caption is in, by py3langid, whose model is in its package."""

import difflib
import functools
from collections.abc import Iterable
from typing import Any

from mdm_core.errors import ConfigError

NO_LANGUAGE = "zxx"
"""ISO 639's code for text in no language, as numbers are."""


def detect_language(text: str) -> str:
    """Returns the ISO 639 code of the likeliest language, of two letters where it has one; any thread may call it.

    The fewer words, the less it can tell: "blue car" is taken for Extremaduran.

    Raises:
        ConfigError: py3langid is not installed.
    """
    if not any(character.isalpha() for character in text):
        return NO_LANGUAGE
    code: str = _identifier().classify(text)[0]
    return code


def check_languages(codes: Iterable[str]) -> None:
    """Raises ConfigError if captions are never found to be in one of these languages, or py3langid is not installed."""
    known = sorted(set(_identifier().nb_classes))
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code, known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else "take one of those"
            raise ConfigError(
                f"filters.language: {code} is not known to py3langid, which tells {', '.join(known)}; {fix}"
            )


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import LanguageIdentifier
    except ImportError as error:
        raise ConfigError("filters.language needs the package py3langid; pip install 'mdm[scores]'") from error
    # One of our own: others in this process may restrict the package's to some languages.
    return LanguageIdentifier.from_model_file("data/model.npz.xz")
