"""Files too large to hold in memory: written to and read from URIs by way of this machine's disk.

Those of object storage pass through the folder for temporary files (`TMPDIR`), which must hold one of them.
"""

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines import storage
from pipelines.remote import as_os_error

# S3 parts in flight at once, of 50 MB each: s3fs would hold ten of them in memory.
_MAX_PARTS = 4


@contextlib.contextmanager
def replacing(uri: str) -> Iterator[Path]:
    """A local path to write to, whose content is at `uri` when the block ends: whole, or not at all.

    What was at `uri` before stays there until then, and for good if the block raises.

    Raises:
        WorkError: It could not be written, as on a full disk.
    """
    filesystem, path = storage.open_uri(uri)
    part = Path(tempfile.gettempdir(), f"mdm-{secrets.token_hex(8)}")
    if not uri.startswith("s3://"):
        target = Path(path)
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}{storage.TEMPORARY_SUFFIX}")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that their owner alone can read.
        if uri.startswith("s3://"):
            with as_os_error():
                filesystem.put_file(str(part), path, max_concurrency=_MAX_PARTS)
        else:
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.replace(path)
    except OSError as error:
        raise storage.cannot_write(uri, part.stat().st_size if part.exists() else 0, error) from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def on_disk(uri: str) -> Iterator[Path]:
    """The file at `uri` on this machine's disk, copied there for the block if it is on object storage.

    Raises:
        FileNotFoundError: There is none.
        OSError: It could not be read.
    """
    filesystem, path = storage.open_uri(uri)
    if not uri.startswith("s3://"):
        if not Path(path).is_file():
            raise FileNotFoundError(path)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="mdm-") as folder:
        copy = Path(folder) / path.rpartition("/")[2]
        with as_os_error():
            filesystem.get_file(path, str(copy), max_concurrency=_MAX_PARTS)
        yield copy


def sha256(path: Path) -> str:
    """The SHA-256 of a local file, read in pieces, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
