"""What a stage begins from, where its configuration names it: a run, a checkpoint, a model file or a published `.pth`.

The driver finds the file and compares every shape with the networks before any worker starts; the workers read it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mdm_core.apple_weights import load_apple_checkpoint
from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import CheckpointError, ConfigError, WorkError
from mdm_core.model_file import parse_header
from mdm_core.nested_unet import build_network
from mdm_core.state import INNER_PREFIX, inner_network, num_shells
from pipelines import storage
from pipelines.large_files import on_disk, sha256
from pipelines.train.checkpoint import State, open_checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.tensor_files import read_header, read_tensors

log = logging.getLogger(__name__)

_PUBLISHED, _OURS = ".pth", ".safetensors"
_SHOWN = 5


@dataclass(frozen=True)
class InitialFile:
    """A file with the weights that a stage begins from."""

    uri: str
    sha256: str | None = None
    """Its checksum, where something says it."""


@dataclass(frozen=True)
class Fit:
    """How weights fit a network: by its keys."""

    matched: dict[str, str]
    """Keys of the network that take weights, and the weights' own keys."""
    fresh: tuple[str, ...]
    """Keys of the network that begin as a new network does."""
    left_over: tuple[str, ...]
    """Keys of the weights that the network has no place for."""


def find_initial_weights(config: TrainConfig, text_dim: int, *, first_stage: int = 0) -> dict[int, InitialFile]:
    """The files that stages from `first_stage` on begin from, known to fit; all keys without a match are logged.

    Args:
        config: The run.
        text_dim: Width of the text embeddings.
        first_stage: Stages before it have begun already.

    Raises:
        ConfigError: There is no such file, it is damaged, a shape is another, or nothing fits.
    """
    found = {}
    for index, stage in enumerate(config.stages):
        if index < first_stage or stage.init_from is None:
            continue
        where = f"stages.{index}.init_from={stage.init_from}"
        try:
            found[index], weights, answers = _look_at(stage.init_from)
            fit = fit_weights(config.model.matryoshka(text_dim).up_to(stage.resolution), weights)
        except (ConfigError, CheckpointError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if answers not in (None, config.model.prediction_type):
            log.warning("%s answers %s, and is trained on to answer %s", where, answers, config.model.prediction_type)
        for what, keys in (("begin anew", fit.fresh), ("of it are left out", fit.left_over)):
            if keys:
                log.warning("%s: %d keys %s: %s", where, len(keys), what, ", ".join(keys))
    return found


def read_initial_weights(file: InitialFile) -> tuple[State, str]:
    """The weights of a file, and its SHA-256.

    Raises:
        CheckpointError: It is missing, or not the file that was found.
        WorkError: It can't be read now.
    """
    try:
        if file.uri.endswith(_PUBLISHED):
            with on_disk(file.uri) as path:
                state, checksum = load_apple_checkpoint(path).weights, sha256(path)
        else:
            state, checksum = read_tensors(file.uri)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{file.uri}, which the stage begins from, is missing or damaged: {error}") from error
    except OSError as error:
        raise WorkError(f"{file.uri}, which the stage begins from, can't be read: {error}") from error
    if file.sha256 not in (None, checksum):
        raise CheckpointError(f"{file.uri} is damaged: its checksum is not the manifest's")
    return state, checksum


def begin_from(network: nn.Module, networks: MatryoshkaConfig, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into a freshly built network, or into the network inside it that they are of.

    Raises:
        ConfigError: See `fit_weights`; nothing is copied then.
    """
    fit = fit_weights(networks, weights)
    network.load_state_dict({own: weights[theirs] for own, theirs in fit.matched.items()}, strict=False)


def fit_weights(networks: MatryoshkaConfig, weights: Mapping[str, Tensor]) -> Fit:
    """How weights of the same networks, or of those inside, fit; nothing is computed with them.

    Raises:
        ConfigError: A shape is another, or nothing fits.
    """
    with torch.device("meta"):
        network = build_network(networks)
    wanted = network.state_dict()
    shells, given = num_shells(wanted), num_shells(weights)
    if given > shells:
        raise ConfigError(
            f"the weights have {given} shells around the innermost network, and the stage's networks have {shells}; "
            "begin a later stage from them, or this one from weights of its own networks or of those inside"
        )
    prefix = INNER_PREFIX * (shells - given)
    assert given == shells or inner_network(network, given) is not None
    matched = {prefix + key: key for key in weights if prefix + key in wanted}
    reshaped = [
        f"{theirs} is {tuple(weights[theirs].shape)}, wanted {tuple(wanted[own].shape)}"
        for own, theirs in matched.items()
        if weights[theirs].shape != wanted[own].shape
        or weights[theirs].is_floating_point() != wanted[own].is_floating_point()
    ]
    if reshaped or not matched:
        shown = "; ".join(reshaped[:_SHOWN]) + (
            f"; and {len(reshaped) - _SHOWN} more" if len(reshaped) > _SHOWN else ""
        )
        raise ConfigError(
            f"its weights are not those of the networks {list(networks.resolutions)[-given - 1 :]}: "
            f"{shown or 'no key is the same'}; give weights of networks of the same shape, or change model.networks"
        )
    fresh = tuple(key for key in wanted if key not in matched)
    return Fit(matched, fresh, tuple(key for key in weights if prefix + key not in wanted))


def _look_at(uri: str) -> tuple[InitialFile, Mapping[str, Tensor], str | None]:
    """A file, weights of which at least the shapes are known, and what their network answers, where that is said."""
    if not uri.endswith((_PUBLISHED, _OURS)):
        checkpoint = open_checkpoint(uri)
        file = "ema.safetensors"
        initial = InitialFile(storage.join(checkpoint.uri, file), checkpoint.manifest.files.get(file))
    else:
        initial = InitialFile(uri)
    try:
        if uri.endswith(_PUBLISHED):
            with on_disk(uri) as path:
                published = load_apple_checkpoint(path)
            if published.unused_keys:
                log.info("%s: keys of layers that never run: %s", uri, ", ".join(published.unused_keys))
            return initial, published.weights, None
        weights, metadata = read_header(initial.uri)
        answers = parse_header(metadata, where=initial.uri).prediction_type if "mdm_model" in metadata else None
        return initial, weights, answers
    except FileNotFoundError as error:
        raise ConfigError("there is no such file; give a run, a checkpoint, a .safetensors or a .pth") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"it can't be read: {error}") from error
