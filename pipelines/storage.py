"""Bytes at a URI: a local path or `s3://bucket/key`. Every fsspec filesystem of the project is built here.

Credentials and addresses come from the environment only (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …), never from
a configuration that is logged.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from mdm_core.errors import ConfigError, WorkError

_TEMPORARY_SUFFIX = ".partial"


def absolute(uri: str) -> str:
    """Returns the same place, a local path made absolute, so that it means the same in every process."""
    return uri if _scheme(uri) == "s3" else str(_local_path(uri))


def join(uri: str, *parts: str) -> str:
    """Returns the URI of something inside the folder `uri`."""
    return "/".join([uri.rstrip("/") or "/", *(part.strip("/") for part in parts)])


def open_uri(uri: str) -> tuple[Any, str]:
    """Returns the filesystem that holds `uri`, and its path there.

    Raises:
        ConfigError: The scheme is not one of those supported, or its package is not installed.
    """
    scheme = _scheme(uri)
    if scheme == "file":
        return fsspec.filesystem("file"), str(_local_path(uri))
    try:
        return fsspec.filesystem("s3"), uri.removeprefix("s3://")
    except ImportError as error:
        raise ConfigError(f"{uri} is on object storage, and s3fs is not installed; pip install 'mdm[s3]'") from error


def delta_options(uri: str) -> dict[str, str]:
    """Returns what deltalake needs, beyond the environment, to reach `uri`."""
    if _scheme(uri) == "s3" and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        return {"AWS_ALLOW_HTTP": "true"}
    return {}


def exists(uri: str) -> bool:
    """Returns whether there is a file or a folder at `uri`."""
    filesystem, path = open_uri(uri)
    return bool(filesystem.exists(path))


def fingerprint(uri: str) -> str:
    """Returns a short text that changes when the file at `uri` is replaced or written to."""
    filesystem, path = open_uri(uri)
    return str(filesystem.ukey(path))


def read_bytes(uri: str) -> bytes:
    """Returns the whole content of the file at `uri`.

    Raises:
        FileNotFoundError: There is none.
    """
    if _scheme(uri) == "file":
        return _local_path(uri).read_bytes()
    filesystem, path = open_uri(uri)
    return bytes(filesystem.cat_file(path))


def open_input(uri: str) -> pa.NativeFile:
    """Returns the file at `uri`, opened to read any part of it.

    Raises:
        FileNotFoundError: There is none.
    """
    if _scheme(uri) == "file":
        # pyarrow's own error has neither a number nor a type that tells a missing file from a forbidden one.
        with _local_path(uri).open("rb"):
            return pa.OSFile(str(_local_path(uri)), "rb")
    filesystem, path = open_uri(uri)
    return pa.PythonFile(filesystem.open(path, "rb"), mode="r")


def write_bytes_atomic(uri: str, data: bytes) -> None:
    """Writes a file that is there whole or not at all, whatever happens meanwhile.

    Raises:
        WorkError: It could not be written, as on a full disk. What was at `uri` before is untouched.
    """
    try:
        if _scheme(uri) == "file":
            _write_local(_local_path(uri), data)
        else:
            filesystem, path = open_uri(uri)
            filesystem.pipe_file(path, data)
    except OSError as error:
        raise _cannot_write(uri, len(data), error) from error


def list_files(uri: str) -> list[str]:
    """Returns the URIs of all files under the folder `uri`, at any depth, sorted; none if there is no such folder.

    Files that `write_bytes_atomic` has not finished are left out.
    """
    filesystem, path = open_uri(uri)
    prefix = "s3://" if _scheme(uri) == "s3" else ""
    return sorted(prefix + found for found in filesystem.find(path) if not found.endswith(_TEMPORARY_SUFFIX))


def delete(uri: str) -> None:
    """Deletes the file or the whole folder at `uri`; nothing there is no error."""
    filesystem, path = open_uri(uri)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def delete_unfinished(uri: str, *, older_than_s: float, now_s: float) -> int:
    """Deletes what writers killed in the middle left under the local folder `uri`, and returns how many files.

    On object storage a put that was cut short leaves nothing.
    """
    if _scheme(uri) == "s3" or not _local_path(uri).is_dir():
        return 0
    num_deleted = 0
    for path in _local_path(uri).rglob(f"*{_TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if now_s - path.stat().st_mtime > older_than_s:
                path.unlink()
                num_deleted += 1
    return num_deleted


def modified_s(uri: str) -> float:
    """Returns when the file at `uri` was last written, in seconds since 1970."""
    filesystem, path = open_uri(uri)
    return float(filesystem.modified(path).timestamp())


def _scheme(uri: str) -> str:
    scheme, separator, _ = uri.partition("://")
    if not uri:
        raise ConfigError("got an empty URI, wanted a local path or s3://bucket/key")
    if not separator or scheme == "file":
        return "file"
    if scheme == "s3":
        return "s3"
    raise ConfigError(f"{uri!r} has the scheme {scheme!r}, which is not supported; use a local path or s3://bucket/key")


def _local_path(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser().absolute()


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename is atomic only inside one filesystem.
    with _unlinked_on_error(path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            # Without it a machine that loses power may keep the name and lose the content.
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def _unlinked_on_error(path: Path) -> Iterator[Path]:
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _cannot_write(uri: str, num_bytes: int, error: OSError) -> WorkError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(
            f"the disk is full: could not write {num_bytes:,} bytes to {uri}; free some space and run again"
        )
    return WorkError(f"could not write {num_bytes:,} bytes to {uri}: {error}")
