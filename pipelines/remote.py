"""What comes from web servers and object storage, with errors of one kind."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import aiohttp


class RemoteFile:
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
        with as_os_error():
            return bytes(self._file.read(num_bytes))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a position, and returns it."""
        with as_os_error():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Returns the position."""
        return int(self._file.tell())

    def close(self) -> None:
        """Closes it."""
        self._file.close()


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
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
