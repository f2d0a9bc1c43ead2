"""Bytes at a URI: a local path or `s3://bucket/key`, and `https://…` to read. Every fsspec filesystem is built here.

Credentials and addresses come from the environment only (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …), never from
a configuration that is logged.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import fsspec
import pyarrow as pa

from mdm_core.errors import ConfigError, WorkError
from pipelines import s3
from pipelines.remote import RemoteFile, as_os_error

TEMPORARY_SUFFIX = ".partial"
"""Ends the name of a local file that is not yet whole."""
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def absolute(uri: str) -> str:
    """Returns the same place, a local path made absolute, so that it means the same in every process."""
    return str(_local_path(uri)) if scheme(uri) == "file" else uri


def resolve(uri: str) -> str:
    """Returns the one name of a place that has several, as by links of a local disk."""
    return os.path.realpath(_local_path(uri)) if scheme(uri) == "file" else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Returns the URI of something inside the folder `uri`."""
    return "/".join([uri.rstrip("/") or "/", *(part.strip("/") for part in parts)])


def file_name(uri: str) -> str:
    """Returns the last part of a path; of a link, without what follows `?` or `#`, which in a path are letters."""
    return PurePosixPath(urlsplit(uri).path if scheme(uri) == "http" else uri).name


def scheme(uri: str) -> str:
    """Returns the kind of place that `uri` names: `file`, `s3`, or `http`, which is https too.

    Raises:
        ConfigError: It is none of them.
    """
    name, separator, _ = uri.partition("://")
    if not uri:
        raise ConfigError("got an empty URI, wanted a local path or s3://bucket/key")
    if not separator or name == "file":
        return "file"
    if name == "s3":
        return "s3"
    if name in ("http", "https"):
        return "http"
    raise ConfigError(f"{uri!r} has the scheme {name!r}, which is not supported; use a local path or s3://bucket/key")


def open_uri(uri: str) -> tuple[Any, str]:
    """Returns the filesystem that holds `uri`, and its path there.

    Raises:
        ConfigError: The scheme is not one of those supported, or its package is not installed.
    """
    kind = scheme(uri)
    if kind == "file":
        return fsspec.filesystem("file"), str(_local_path(uri))
    if kind == "http":
        return _http_filesystem(), uri
    path = uri.removeprefix("s3://")
    s3.check_bucket(path.partition("/")[0], s3.endpoint())
    return s3.filesystem(), path


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """Returns the filesystem that holds `uri` as pyarrow and Ray want it, and the path there; errors as `open_uri`."""
    from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

    filesystem, path = open_uri(uri)
    return (LocalFileSystem() if scheme(uri) == "file" else PyFileSystem(FSSpecHandler(filesystem))), path


def delta_options(uri: str) -> dict[str, str]:
    """Returns what deltalake needs, beyond the environment, to reach `uri`.

    Raises:
        ConfigError: It is on object storage, and can't be reached. deltalake would try for three minutes.
    """
    _check_writable(uri)
    if scheme(uri) != "s3":
        return {}
    open_uri(uri)
    return s3.delta_options()


def one_line(error: Exception) -> str:
    """Returns what an error says, in one line; deltalake's have many, and colours."""
    return " ".join(_COLOURS.sub("", str(error)).replace("↳", ":").split()) or type(error).__name__


def exists(uri: str) -> bool:
    """Returns whether there is a file or a folder at `uri`.

    Raises:
        WorkError: The server does not answer as it should, which says nothing of what is there.
    """
    filesystem, path = open_uri(uri)
    with _told("look at", uri):
        return bool(filesystem.exists(path))


def read_bytes(uri: str) -> bytes:
    """Returns the whole content of the file at `uri`.

    Raises:
        FileNotFoundError: There is none.
        OSError: It can't be read, whatever the storage's client calls that.
    """
    if scheme(uri) == "file":
        return _local_path(uri).read_bytes()
    filesystem, path = open_uri(uri)
    with as_os_error():
        return bytes(filesystem.cat_file(path))


def open_input(uri: str, *, read_ahead: bool = True) -> pa.NativeFile:
    """Returns the file at `uri`, opened to read any part of it.

    Args:
        uri: The file.
        read_ahead: Whether more is fetched than is asked for, as it will be wanted next; else each read is one request.

    Raises:
        FileNotFoundError: There is none.
    """
    if scheme(uri) == "file":
        # pyarrow's own error has neither a number nor a type that tells a missing file from a forbidden one.
        with _local_path(uri).open("rb"):
            return pa.OSFile(str(_local_path(uri)), "rb")
    filesystem, path = open_uri(uri)
    options = {} if read_ahead else {"cache_type": "none"}
    with as_os_error():
        return pa.PythonFile(RemoteFile(filesystem.open(path, "rb", **options)), mode="r")


def open_stream(uri: str) -> pa.NativeFile:
    """Returns the file at `uri`, opened to read it once from its beginning to its end.

    Raises:
        FileNotFoundError: There is none.
    """
    if scheme(uri) != "http":
        return open_input(uri)
    filesystem, path = open_uri(uri)
    with as_os_error():
        # One request, so that it is one version of the file; a size, though unused, saves asking for it first.
        return pa.PythonFile(RemoteFile(filesystem.open(path, "rb", block_size=0, size=1)), mode="r")


def write_bytes_atomic(uri: str, data: bytes) -> None:
    """Writes a file that is there whole or not at all, whatever happens meanwhile.

    Raises:
        WorkError: It could not be written, as on a full disk. What was at `uri` before is untouched.
    """
    _check_writable(uri)
    try:
        if scheme(uri) == "file":
            _write_local(_local_path(uri), data)
        else:
            filesystem, path = open_uri(uri)
            with as_os_error():
                filesystem.pipe_file(path, data)
    except OSError as error:
        raise cannot_write(uri, len(data), error) from error


def create(uri: str, data: bytes) -> bool:
    """Writes a small file unless there is one, and returns whether `data` is what is there now.

    Of several writers at once, with different data, one gets True: on a local disk, and on S3 where the server knows
    conditional puts. Where it doesn't, the last one wins, which `read_bytes` tells. A local file may be seen before
    its content is.

    Raises:
        WorkError: It could not be written.
    """
    _check_writable(uri)
    error: OSError | None = None
    try:
        if scheme(uri) == "file":
            path = _local_path(uri)
            path.parent.mkdir(parents=True, exist_ok=True)
            # fsspec looks whether there is a file, and then writes one.
            with path.open("xb") as file:
                file.write(data)
        else:
            filesystem, name = open_uri(uri)
            with as_os_error():
                filesystem.pipe_file(name, data, mode="create")
    except OSError as raised:
        # Another's file is an error that servers name differently; so is ours, when its answer was lost.
        error = raised
    try:
        return read_bytes(uri) == data
    except FileNotFoundError:
        raise cannot_write(
            uri, len(data), error or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        ) from error


def list_files(uri: str) -> list[str]:
    """Returns the URIs of all files under the folder `uri`, at any depth, sorted; none if there is no such folder.

    Files that `write_bytes_atomic` has not finished are left out.

    Raises:
        WorkError: The server does not answer as it should.
    """
    filesystem, path = open_uri(uri)
    prefix = "s3://" if scheme(uri) == "s3" else ""
    with _told("list the files of", uri):
        found = filesystem.find(path)
    # Some S3 servers tell of an empty folder as if it were a file.
    return sorted(prefix + file for file in found if file != path and not file.endswith(TEMPORARY_SUFFIX))


def delete(uri: str) -> None:
    """Deletes the file or the whole folder at `uri`; nothing there is no error.

    Raises:
        WorkError: It could not be deleted, or not all of it.
    """
    _check_writable(uri)
    filesystem, path = open_uri(uri)
    with contextlib.suppress(FileNotFoundError), _told("delete", uri):
        filesystem.rm(path, recursive=True)


def delete_unfinished(uri: str, *, older_than_s: float, now_s: float) -> int:
    """Deletes what writers killed in the middle left under the folder `uri`, and returns how many files.

    On object storage they are the parts of large files whose upload was cut; a put that was cut leaves nothing.

    Raises:
        WorkError: The server does not answer as it should.
    """
    if scheme(uri) == "s3":
        filesystem, folder = open_uri(uri)
        with _told("look for unfinished files in", uri):
            return s3.abort_uploads(filesystem, folder, before_s=now_s - older_than_s)
    if scheme(uri) != "file" or not _local_path(uri).is_dir():
        return 0
    num_deleted = 0
    for path in _local_path(uri).rglob(f"*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if now_s - path.stat().st_mtime > older_than_s:
                path.unlink()
                num_deleted += 1
    return num_deleted


def modified_s(uri: str) -> float:
    """Returns when the file at `uri` was last written, in seconds since 1970.

    Raises:
        FileNotFoundError: There is none.
        WorkError: The server does not answer as it should.
    """
    filesystem, path = open_uri(uri)
    with _told("look at", uri):
        return float(filesystem.modified(path).timestamp())


@contextlib.contextmanager
def _told(what: str, uri: str) -> Iterator[None]:
    """Raises any error but a missing file as a WorkError that says what could not be done."""
    try:
        with as_os_error():
            yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise WorkError(f"could not {what} {uri}: {one_line(error)}; mend it and run again") from error


def _check_writable(uri: str) -> None:
    if scheme(uri) == "http":
        raise ConfigError(f"{uri} can only be read; to write, use a local path or s3://bucket/key")


def _http_filesystem() -> Any:
    return fsspec.filesystem(
        "http",
        # Unpacking is told by names, so what a server packed on its own account must arrive as the file that it is.
        headers={"Accept-Encoding": "identity"},
        # A long list takes as long as it takes, if only something arrives.
        client_kwargs={
            "auto_decompress": False,
            "trust_env": True,
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
        },
        encoded=True,
    )


def _local_path(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser().absolute()


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename is atomic only inside one filesystem.
    with _unlinked_on_error(path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")) as temporary:
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


def cannot_write(uri: str, num_bytes: int, error: OSError) -> WorkError:
    """The error to raise for one that came while writing `num_bytes` to `uri`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(
            f"the disk is full: could not write {num_bytes:,} bytes to {uri}; free some space and run again"
        )
    return WorkError(f"could not write {num_bytes:,} bytes to {uri}: {error}")
