"""What deltalake does not try again by itself on object storage.

It repeats requests that were refused or that got no answer. An answer that breaks off it does not ask for again, nor
does it repeat a commit, which may have been made though its answer was lost.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from deltalake.exceptions import DeltaError

_T = TypeVar("_T")
_MAX_TRIES = 8
_FIRST_WAIT_S = 0.1
_MOST_S = 60.0


def patiently(call: Callable[[], _T]) -> _T:
    """Returns what `call` returns, which is called again where a request failed in a way that may pass.

    A server that does not answer at all has been tried for minutes by deltalake itself, and is not tried again.

    Args:
        call: Something that may be done twice.
    """
    began_s = time.monotonic()
    for tries in range(_MAX_TRIES - 1):
        try:
            return call()
        except (DeltaError, OSError) as error:
            if not may_pass(error) or time.monotonic() - began_s > _MOST_S:
                raise
        time.sleep(random.uniform(0.5, 1.5) * _FIRST_WAIT_S * 2**tries)
    return call()


def may_pass(error: Exception) -> bool:
    """Returns whether a connection broke: the server did not refuse, and nothing is wrong with the table."""
    return any(words in str(error) for words in ("HTTP error", "response body"))
