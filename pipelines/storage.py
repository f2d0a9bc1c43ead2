"""Bytes at a URI: a local path or `s3://bucket/key`, and `https://…` to read. Every fsspec filesystem is built here.

Credentials and addresses come from the environment only (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …), never from
a configuration that is logged.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pyarrow as pa

from mdm_core.errors import ConfigError, WorkError

_TEMPORARY_SUFFIX = ".partial"
# What a web server tells of a file that changes when the file does.
_HTTP_VERSION = ("size", "ETag", "Last-Modified", "Content-MD5", "Digest")


def absolute(uri: str) -> str:
    """Returns the same place, a local path made absolute, so that it means the same in every process."""
    return str(_local_path(uri)) if _scheme(uri) == "file" else uri


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
    if scheme == "http":
        return _http_filesystem(), uri
    path = uri.removeprefix("s3://")
    _check_bucket(path.partition("/")[0], _s3_endpoint())
    return _s3_filesystem(), path


def delta_options(uri: str) -> dict[str, str]:
    """Returns what deltalake needs, beyond the environment, to reach `uri`.

    Raises:
        ConfigError: It is on object storage, and can't be reached. deltalake would try for three minutes.
    """
    _check_writable(uri)
    if _scheme(uri) != "s3":
        return {}
    open_uri(uri)
    # A commit is a put that fails if the version is there: without it, two refreshes at once would lose one's work.
    options = {"aws_conditional_put": "etag"}
    if endpoint := _s3_endpoint():
        options |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": str(endpoint.startswith("http://")).lower()}
    return options


def exists(uri: str) -> bool:
    """Returns whether there is a file or a folder at `uri`."""
    filesystem, path = open_uri(uri)
    return bool(filesystem.exists(path))


def fingerprint(uri: str) -> str:
    """Returns a short text that changes when the file at `uri`, or any that the pattern `uri` matches, is written to.

    It changes as well when a file is added that the pattern matches.
    """
    filesystem, path = open_uri(uri)
    # What was listed before is what is asked about.
    filesystem.invalidate_cache()
    if _scheme(uri) == "http":
        with _as_os_error():
            info = filesystem.info(path)
        return _digest([info.get(field) for field in _HTTP_VERSION])
    if _is_pattern(uri):
        return _digest(sorted(_matches(uri).items()))
    return str(filesystem.ukey(path))


def expand(uri: str) -> list[str]:
    """Returns the URIs of the files that a pattern (`*`, `?`, `[…]`) matches, sorted; `uri` itself if it is none.

    A URI that names something as it stands is no pattern, nor is any at http(s), where there is nothing to list.
    """
    if not _is_pattern(uri):
        return [uri]
    filesystem, _ = open_uri(uri)
    filesystem.invalidate_cache()
    prefix = "s3://" if _scheme(uri) == "s3" else ""
    return sorted(prefix + path for path in _matches(uri))


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
    with _as_os_error():
        return pa.PythonFile(_RemoteFile(filesystem.open(path, "rb")), mode="r")


def open_stream(uri: str) -> pa.NativeFile:
    """Returns the file at `uri`, opened to read it once from its beginning to its end.

    Raises:
        FileNotFoundError: There is none.
    """
    if _scheme(uri) != "http":
        return open_input(uri)
    filesystem, path = open_uri(uri)
    with _as_os_error():
        # One request, so that it is one version of the file; a size, though unused, saves asking for it first.
        return pa.PythonFile(_RemoteFile(filesystem.open(path, "rb", block_size=0, size=1)), mode="r")


def write_bytes_atomic(uri: str, data: bytes) -> None:
    """Writes a file that is there whole or not at all, whatever happens meanwhile.

    Raises:
        WorkError: It could not be written, as on a full disk. What was at `uri` before is untouched.
    """
    _check_writable(uri)
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
    # Some S3 servers tell of an empty folder as if it were a file.
    found = (file for file in filesystem.find(path) if file != path and not file.endswith(_TEMPORARY_SUFFIX))
    return sorted(prefix + file for file in found)


def delete(uri: str) -> None:
    """Deletes the file or the whole folder at `uri`; nothing there is no error."""
    _check_writable(uri)
    filesystem, path = open_uri(uri)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def delete_unfinished(uri: str, *, older_than_s: float, now_s: float) -> int:
    """Deletes what writers killed in the middle left under the local folder `uri`, and returns how many files.

    On object storage a put that was cut short leaves nothing.
    """
    if _scheme(uri) != "file" or not _local_path(uri).is_dir():
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
    if scheme in ("http", "https"):
        return "http"
    raise ConfigError(f"{uri!r} has the scheme {scheme!r}, which is not supported; use a local path or s3://bucket/key")


def _s3_endpoint() -> str:
    """Returns the address of the S3 server; empty for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def _s3_filesystem(**options: Any) -> Any:
    # botocore reads AWS_DEFAULT_REGION only, and deltalake AWS_REGION first.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        return fsspec.filesystem(
            "s3",
            endpoint_url=_s3_endpoint() or None,
            client_kwargs={"region_name": region} if region else {},
            # Each request is tried so often by botocore, and again by s3fs, where it may pass.
            config_kwargs={"retries": {"mode": "standard", "total_max_attempts": 4}},
            # Others write there at the same time: what was listed before says nothing.
            use_listings_cache=False,
            **options,
        )
    except ImportError as error:
        raise ConfigError("s3:// needs s3fs, which is not installed; pip install 'mdm[s3]'") from error


@functools.cache
def _check_bucket(bucket: str, endpoint: str) -> None:
    """Asks once whether a bucket can be used, and says in one message why not: later errors are not so plain."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    filesystem = _s3_filesystem(skip_instance_cache=True)
    filesystem.retries = 1
    where = f"s3://{bucket} at {endpoint or 'AWS'}"
    try:
        filesystem.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ConfigError(
            f"{where} can't be used: there are no credentials in the environment; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except (BotoCoreError, ValueError) as error:
        # ValueError: the address is not one.
        raise ConfigError(
            f"{where} can't be reached: no S3 server answers ({error}); correct AWS_ENDPOINT_URL, or unset it for AWS"
        ) from error
    except OSError as error:
        answer = error.__cause__.response["Error"] if isinstance(error.__cause__, ClientError) else {}
        code = answer.get("Code", "")
        # A key that may not list may still be allowed to read or to write.
        if code != "AccessDenied":
            fix = _S3_FIXES.get(code, "check the bucket's name, AWS_ENDPOINT_URL and the credentials")
            raise ConfigError(f"{where} can't be used: it answers {code or error}; {fix}") from error


_ANOTHER_REGION = "the bucket is in another region: set AWS_REGION"
_S3_FIXES = {
    "SignatureDoesNotMatch": "the secret is not that of AWS_ACCESS_KEY_ID: correct AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "the key is not known there: correct AWS_ACCESS_KEY_ID",
    "ExpiredToken": "renew the credentials, AWS_SESSION_TOKEN too",
    "InvalidToken": "renew the credentials, AWS_SESSION_TOKEN too",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "NoSuchBucket": "make the bucket, or correct its name",
    "AuthorizationHeaderMalformed": _ANOTHER_REGION,
    "IllegalLocationConstraintException": _ANOTHER_REGION,
    "PermanentRedirect": _ANOTHER_REGION,
}


def _check_writable(uri: str) -> None:
    if _scheme(uri) == "http":
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


def _is_pattern(uri: str) -> bool:
    return _scheme(uri) != "http" and glob.has_magic(uri) and not exists(uri)


def _matches(uri: str) -> dict[str, Any]:
    filesystem, path = open_uri(uri)
    return {found: info for found, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"}


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


class _RemoteFile:
    """A file of a remote filesystem whose errors are all OSErrors.

    Args:
        file: As fsspec opens it.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return bool(self._file.closed)

    def read(self, num_bytes: int = -1) -> bytes:
        """Returns at most so many bytes, and none at the end."""
        with _as_os_error():
            return bytes(self._file.read(num_bytes))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a position, and returns it."""
        with _as_os_error():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Returns the position."""
        return int(self._file.tell())

    def close(self) -> None:
        """Closes it."""
        self._file.close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Raises what the clients of web servers and of object storage raise as an OSError of one line."""
    try:
        yield
    except aiohttp.ClientResponseError as error:
        raise OSError(f"HTTP {error.status} {error.message}") from error
    except FileNotFoundError as error:
        if isinstance(cause := error.__cause__, aiohttp.ClientResponseError):
            raise OSError(f"HTTP {cause.status} {cause.message}") from error
        if isinstance(cause, aiohttp.ClientError):
            raise OSError(str(cause)) from error
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
    except OSError:
        raise
    except Exception as error:
        # botocore's and aiohttp's errors share no class with anything; a server without ranges is a ValueError.
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error


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
