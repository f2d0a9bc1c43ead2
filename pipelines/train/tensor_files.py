"""Tensors in a file at a URI: safetensors, written and read past this process's memory."""

import errno
import json
import os
import struct
from collections.abc import Callable, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import storage
from pipelines.large_files import on_disk, replacing, sha256

_MAX_HEADER_BYTES = 100_000_000
"""As the library has it."""


def write_tensors(
    uri: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    before_commit: Callable[[], None] = lambda: None,
) -> str:
    """Writes a file, whole or not at all, and returns its SHA-256.

    Args:
        uri: Where to.
        tensors: On any device; those on the CPU are written from where they are.
        metadata: What the file says beside its tensors.
        before_commit: Called when all is written, and nothing can be seen yet; what it raises keeps it so.

    Raises:
        WorkError: It could not be written, as on a full disk.
    """
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(uri) as path:
        try:
            save_file(on_cpu, path, dict(metadata) if metadata else None)
        except SafetensorError as error:
            # The library has no other class for what the system refuses.
            full = f"(os error {errno.ENOSPC})" in str(error)
            reason = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(str(error))
            raise storage.cannot_write(uri, sum(value.nbytes for value in on_cpu.values()), reason) from error
        checksum = sha256(path)
        before_commit()
    return checksum


def read_tensors(uri: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, on the CPU, and its SHA-256.

    The tensors are mapped from the file, or from a copy of it that is gone with them: they take memory once they are
    read or written to, and what is written stays in memory.

    Raises:
        FileNotFoundError: There is no file.
        OSError: It can't be read.
        SafetensorError: It is no such file.
    """
    with on_disk(uri) as path:
        return load_file(path), sha256(path)


def read_header(uri: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file says of its tensors, without reading them: each on the `meta` device, and the metadata.

    Their shapes are the file's; of their types, only whether they hold fractions.

    Raises:
        FileNotFoundError: There is no file.
        OSError: It can't be read.
        SafetensorError: It is no such file.
    """
    with storage.open_input(uri) as file:
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if size > _MAX_HEADER_BYTES:
            raise SafetensorError("it is no safetensors file")
        try:
            header = json.loads(file.read(size))
            metadata = header.pop("__metadata__", {})
            shapes = {
                name: torch.empty(
                    said["shape"], dtype=torch.float32 if "F" in said["dtype"] else torch.int64, device="meta"
                )
                for name, said in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SafetensorError(f"its header is damaged: {error!r}") from error
    return shapes, metadata
