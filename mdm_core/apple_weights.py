"""The checkpoints that Apple published (`vis_model_*.pth`): loading them, and writing files of the same layout.

The layout is what `torch.save` makes of {"state_dict", "batch_num", "loss", "best_avg_loss", "exp_avg_loss",
"exp_avg_loss_var", "args"}. Keys of the weights have no prefix; the network inside a shell is under `inner_unet.`.
`vis_model_*` has averaged weights, `vis_model_noema_*` the last ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown  # what comes from a file may be of any size
from typing import Any

import torch
from torch import Tensor, nn

from mdm_core.apple_pickle import plain, read_pickle
from mdm_core.atomic_file import replacing
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.state import INNER_PREFIX, load_state, num_shells

_NUMBERS = ("loss", "best_avg_loss", "exp_avg_loss", "exp_avg_loss_var")
_NEVER_RUN = ("mid_blocks.", "cond_emb.", "lm_proj.", "lm_head.", "interp_layer1.", "interp_layer2.")


@dataclass(frozen=True)
class AppleCheckpoint:
    """What a published checkpoint holds."""

    state_dict: dict[str, Tensor]
    """All its tensors, in the file's order, on the CPU."""
    batch_num: int | None
    """Optimizer steps that it was trained for; None, as for every number below, if the file does not say."""
    loss: float | None
    """Loss of the last step."""
    best_avg_loss: float | None
    """The published code writes the running average here as well."""
    exp_avg_loss: float | None
    """Running average of the loss."""
    exp_avg_loss_var: float | None
    """Running variance of the loss."""
    args: Any
    """The configuration of the training as plain data (see `apple_pickle.plain`); None if there is none. Where the
    published code pickled objects, args["unet_config"] is what `config_from_apple` reads."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors that the network computes with: `state_dict` without `unused_keys`."""
        unused = set(self.unused_keys)
        return {key: value for key, value in self.state_dict.items() if key not in unused}

    @property
    def unused_keys(self) -> tuple[str, ...]:
        """Keys of layers that the published code builds in a shell, if it is told to, but never runs.

        They are the middle blocks, the text layers (the innermost network's are used instead) and `interp_layer*`.
        Our shells have none of them.
        """
        depth = num_shells(self.state_dict)
        prefixes = [INNER_PREFIX * level + name for level in range(depth) for name in _NEVER_RUN]
        return tuple(key for key in self.state_dict if key.startswith(tuple(prefixes)))


def load_apple_checkpoint(path: str | Path) -> AppleCheckpoint:
    """Reads a published checkpoint; nothing that the file asks for is run.

    While it reads, torch's own list of safe classes is set aside for the whole process: another thread that extends it
    meanwhile (`torch.serialization.add_safe_globals`) loses that.

    Args:
        path: A local file.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: If it is damaged, is something else, or asks for more than tensors, plain containers, numbers
            and the published configuration's classes.
    """
    path = Path(path)
    content = read_pickle(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        found = f"it has {shown(list(content))}" if isinstance(content, dict) else "it is no dict"
        raise CheckpointError(f'{path} has no "state_dict" with weights: {found}')
    state = content["state_dict"]
    for key, value in state.items():
        if not isinstance(key, str) or type(value) not in (Tensor, nn.Parameter) or not _is_dense(value):
            raise CheckpointError(f"{path}: {shown(key)} in its state_dict is {_kind(value)}, wanted a plain tensor")
    batch_num = _number(content, "batch_num", path)
    numbers = {name: _number(content, name, path) for name in _NUMBERS}
    return AppleCheckpoint(
        state_dict={key: value.detach() for key, value in state.items()},
        batch_num=None if batch_num is None else int(batch_num),
        args=plain(content.get("args")),
        **numbers,
    )


def load_apple_weights(network: nn.Module, source: str | Path | AppleCheckpoint) -> tuple[str, ...]:
    """Loads a published checkpoint into a network; float16 and bfloat16 weights become the network's dtype.

    Args:
        network: A network of the checkpoint's configuration (see `config_from_apple` and `preset`).
        source: A local file, or what `load_apple_checkpoint` read.

    Returns:
        Keys that were left out, as the published code never runs their layers; see `AppleCheckpoint.unused_keys`.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: As `load_apple_checkpoint`; or if a key is missing, left over or of another shape, and then
            nothing is loaded.
    """
    checkpoint = source if isinstance(source, AppleCheckpoint) else load_apple_checkpoint(source)
    what = "the checkpoint's weights" if isinstance(source, AppleCheckpoint) else f"the weights in {source}"
    load_state(network, checkpoint.weights, what=what)
    return checkpoint.unused_keys


def save_apple_checkpoint(
    network: nn.Module,
    path: str | Path,
    *,
    batch_num: int,
    loss: float = 0.0,
    exp_avg_loss: float = 0.0,
    exp_avg_loss_var: float = 0.0,
    best_avg_loss: float | None = None,
    args: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that the published code loads, whole or not at all.

    Args:
        network: What to save; unwrapped, so that no key has a prefix.
        path: A local file; one that is there is replaced.
        batch_num: Optimizer steps so far.
        loss: See `AppleCheckpoint`, as for the next three.
        exp_avg_loss: Running average of the loss.
        exp_avg_loss_var: Running variance of the loss.
        best_avg_loss: None is exp_avg_loss, as the published code writes.
        args: Anything else to keep, in plain containers; torch's restricted unpickler reads the file as it is.

    Raises:
        ConfigError: If args has anything but dicts, lists, tuples, strings, numbers, bools and None.
    """
    content = {
        "state_dict": {key: _own_storage(value) for key, value in network.state_dict().items()},
        "batch_num": int(batch_num),
        "loss": float(loss),
        "best_avg_loss": float(exp_avg_loss if best_avg_loss is None else best_avg_loss),
        "exp_avg_loss": float(exp_avg_loss),
        "exp_avg_loss_var": float(exp_avg_loss_var),
        "args": None if args is None else dict(args),
    }
    _check_plain(content["args"], "args")
    with replacing(path) as part:
        torch.save(content, part)


def _number(content: Mapping[str, Any], name: str, path: Path) -> float | None:
    value = content.get(name)
    if isinstance(value, Tensor) and value.numel() == 1 and _is_dense(value):
        value = value.item()
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
        raise CheckpointError(f"{path}: {name} is {_kind(value)}, wanted a finite number")
    return value


def _is_dense(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"


def _kind(value: Any) -> str:
    return f"a {value.layout} tensor on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _own_storage(value: Tensor) -> Tensor:
    """The tensor on the CPU, alone in its storage: `torch.save` writes the whole storage that a view is of."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise ConfigError(f"{where} is {_kind(value)}; only dicts, lists, tuples, strings and numbers are kept")
