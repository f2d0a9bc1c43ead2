"""Files named by a pattern of URIs or by one URI: which they are, and whether they have changed."""

import glob
import hashlib
from typing import Any

from pipelines import storage
from pipelines.remote import as_os_error

# What a web server tells of a file that changes when the file does.
_HTTP_VERSION = ("size", "ETag", "Last-Modified", "Content-MD5", "Digest")


def expand(uri: str) -> list[str]:
    """Returns the URIs of the files that a pattern (`*`, `?`, `[…]`) matches, sorted; `uri` itself if it is none.

    A URI that names something as it stands is no pattern, nor is any at http(s), where there is nothing to list.
    """
    if not _is_pattern(uri):
        return [uri]
    filesystem, _ = storage.open_uri(uri)
    filesystem.invalidate_cache()
    prefix = "s3://" if storage.scheme(uri) == "s3" else ""
    return sorted(prefix + path for path in _matches(uri))


def fingerprint(uri: str) -> str:
    """Returns a short text that changes when the file at `uri`, or any that the pattern `uri` matches, is written to.

    It changes as well when a file is added that the pattern matches.
    """
    filesystem, path = storage.open_uri(uri)
    # What was listed before is what is asked about.
    filesystem.invalidate_cache()
    if _is_pattern(uri):
        return _digest(sorted(_matches(uri).items()))
    with as_os_error():
        if storage.scheme(uri) == "http":
            return _digest([filesystem.info(path).get(field) for field in _HTTP_VERSION])
        return str(filesystem.ukey(path))


def _is_pattern(uri: str) -> bool:
    return storage.scheme(uri) != "http" and glob.has_magic(uri) and not storage.exists(uri)


def _matches(uri: str) -> dict[str, Any]:
    filesystem, path = storage.open_uri(uri)
    with as_os_error():
        return {found: info for found, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"}


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
