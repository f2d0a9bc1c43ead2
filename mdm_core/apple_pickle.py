"""Reading the published checkpoints, which are pickles, without running anything that they ask for.

A pickle names functions to call. torch's restricted unpickler knows those that make tensors and plain containers; the
published files also name the classes of their training configuration (`args`), which are not installed here. Each such
name stands for a class of ours that keeps what it is given and does nothing. Any other name refuses the file.
"""

import pickle
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdm_core.errors import CheckpointError, ConfigError

# The published code, its modules as they were called before it became a package, and what parsed its command line.
_CONFIGURATION_PACKAGES = (
    "ml_mdm",
    "language_models",
    "reader",
    "config",
    "models",
    "diffusion",
    "samplers",
    "distributed",
    "trainer",
    "simple_parsing",
    "pathlib",
)
_CONFIGURATION_NAMES = frozenset({"argparse.Namespace", "numpy.dtype"})
_NUMPY_SCALARS = frozenset({"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"})

_registry_lock = threading.Lock()


class Inert:
    """Stands in for an object of a class that is not installed: keeps what it is given, runs nothing."""

    class_name = "?"
    """The class that the file names, with its module."""
    arguments: tuple[Any, ...]
    """What it was called with."""
    state: Any
    """What its fields were set to; None if they were not."""

    def __new__(cls, *arguments: Any) -> "Inert":
        """Keeps the arguments."""
        stored = super().__new__(cls)
        stored.arguments, stored.state = arguments, None
        return stored

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote to a file, with an `Inert` for every object of the published configuration's classes.

    All tensors are on the CPU. The whole file is read, since its checksums are compared.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: If it is no such file, damaged, or asks for anything but tensors, plain containers, numbers
            and the published configuration's classes.
    """
    _check_container(path)
    with _only_known(()):
        asked_for = _globals(path)
    known = {name: stand_in for name in asked_for if (stand_in := _stand_in(name)) is not None}
    refused = sorted(asked_for - known.keys())
    if refused:
        raise CheckpointError(
            f"{path} asks for {', '.join(refused[:3])}{', …' if len(refused) > 3 else ''}, which has no place in a "
            "checkpoint and could run anything: nothing was loaded. Get the file again from where it was published"
        )
    with _only_known(tuple((stand_in, name) for name, stand_in in known.items())), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # No memory map: with one, torch does not compare a tensor's size with what the file holds for it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        except Exception as error:  # A damaged pickle raises whatever its broken instructions run into.
            raise CheckpointError(f"{path} can't be read: {_first_line(error)}") from error


def plain(value: Any) -> Any:
    """A value with every `Inert` in it replaced by a dict.

    Returns:
        Dicts, lists, tuples, strings, numbers, bools and None. An object becomes {"class": its class, **its fields};
        one made by a call, an Enum's member say, has what it was called with under "arguments". Of anything else
        (a tensor, a type) only the name of its kind is left.

    Raises:
        CheckpointError: If the value contains itself, or is nested too deep.
    """
    try:
        return _plain(value, {}, set())
    except RecursionError as error:
        raise CheckpointError("the configuration in the checkpoint is nested too deep") from error


def _plain(value: Any, done: dict[int, Any], open_: set[int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # Shared parts are converted once: a file can repeat one list in itself until it has more elements than memory.
    if id(value) in done:
        return done[id(value)]
    if id(value) in open_:
        raise CheckpointError("the configuration in the checkpoint contains itself")
    open_.add(id(value))
    result: Any
    if isinstance(value, Inert):
        result = _plain_object(value, done, open_)
    elif isinstance(value, dict):
        result = {_plain_key(key): _plain(item, done, open_) for key, item in value.items()}
    elif isinstance(value, list | tuple | set):
        items = [_plain(item, done, open_) for item in value]
        result = tuple(items) if isinstance(value, tuple) else items
    else:
        result = type(value).__name__
    open_.discard(id(value))
    done[id(value)] = result
    return result


def _plain_object(value: Inert, done: dict[int, Any], open_: set[int]) -> dict[str, Any]:
    result: dict[str, Any] = {"class": value.class_name}
    if value.arguments:
        result["arguments"] = [_plain(item, done, open_) for item in value.arguments]
    parts = value.state if isinstance(value.state, tuple) else (value.state,)
    for part in parts:
        if isinstance(part, dict):
            result |= {_plain_key(key): _plain(item, done, open_) for key, item in part.items() if key != "class"}
        elif part is not None:
            result["state"] = _plain(value.state, done, open_)
    return result


def _plain_key(key: Any) -> Any:
    return key if isinstance(key, str | int | float) or key is None else type(key).__name__


def _stand_in(name: str) -> Callable[..., Any] | None:
    if name in _NUMPY_SCALARS:
        return _numpy_scalar
    if name in _CONFIGURATION_NAMES or name.partition(".")[0] in _CONFIGURATION_PACKAGES:
        return type("Stored", (Inert,), {"class_name": name})
    return None


def _numpy_scalar(dtype: Any, data: Any) -> float | int:
    """The number that numpy pickled: the published code's running averages of the loss are numpy numbers."""
    code = dtype.arguments[0] if isinstance(dtype, Inert) and dtype.arguments else None
    order = dtype.state[1] if isinstance(dtype, Inert) and isinstance(dtype.state, tuple) else "<"
    if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise CheckpointError(f"a number of the unknown kind {code!r}")
    kind = np.dtype(code).newbyteorder(">" if order == ">" else "<")
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(raw, bytes) or len(raw) != kind.itemsize:
        raise CheckpointError(f"a number of the kind {code!r} that is not {kind.itemsize} bytes long")
    number: float | int = np.frombuffer(raw, kind)[0].item()
    return number


def _check_container(path: Path) -> None:
    """Whether the file is a zip archive whose parts all have the checksums that it says; torch compares none."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    with path.open("rb") as file:
        head = file.read(256)
    if not head.startswith(b"PK"):
        raise CheckpointError(f"{path} is no checkpoint: {_guess(head)}")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # Compressed, a small file could fill any memory.
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise CheckpointError(f"{path} has compressed parts, which torch.save never writes")
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many kinds on damaged archives.
        raise CheckpointError(f"{path} is cut short or damaged ({_first_line(error)}); get it again") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} inside it is wrong; get it again")
    if not any(part.filename.endswith("/data.pkl") for part in parts):
        raise CheckpointError(f"{path} is no checkpoint: a zip archive, but not one that torch.save wrote")


def _guess(head: bytes) -> str:
    start = head.lstrip().lower()
    if not head:
        return "it is empty"
    if start.startswith((b"<!", b"<html", b"<?xml")):
        return "it is a web page, so the download failed; get it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file it points to; get it with `git lfs pull`"
    if head[8:9] == b"{":
        return "it looks like a safetensors file; a model of ours is read by mdm_core.model_file.load_model"
    if head.startswith(b"\x80"):
        return (
            "it is a pickle of torch older than 1.6, which is not read here; where it can be trusted, convert it with "
            "torch.save(torch.load(old, weights_only=False), new)"
        )
    return "it is not what torch.save writes"


def _globals(path: Path) -> set[str]:
    """Names that the file asks for beyond those that torch itself knows as safe; nothing is unpickled."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} uses a pickle instruction that torch.save does not ({_first_line(error)}); nothing was loaded"
        ) from error
    except Exception as error:  # See `read_pickle`.
        raise CheckpointError(f"{path} can't be read: {_first_line(error)}") from error


@contextmanager
def _only_known(names: tuple[tuple[Callable[..., Any], str], ...]) -> Iterator[None]:
    """Within it torch's unpickler knows its own safe names and these, whatever else the process has added."""
    with _registry_lock:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(names))
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _first_line(error: Exception) -> str:
    # torch puts its reason after advice to load the file unrestricted, which is the last thing to do.
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return (reason.splitlines() or [type(error).__name__])[0]
