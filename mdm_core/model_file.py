"""A model in one file: weights, networks, noise schedule and what they answer (safetensors, the rest in its metadata).

Everything that is not a tensor is JSON under one key of the metadata, `mdm_model`: the library writes several keys in a
random order, and the same model is to be the same bytes. The weights are under the keys of the published checkpoints.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mdm_core.atomic_file import replacing
from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.nested_unet import build_network
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType, check_prediction_type
from mdm_core.state import check_state
from mdm_core.unet import UNet

FORMAT_VERSION = 2
"""Version of the layout that is written; 1, which has its version under a key of its own, is read as well."""


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says about its weights."""

    config: MatryoshkaConfig
    """The networks."""
    schedule: NoiseSchedule
    """What they were trained with."""
    prediction_type: PredictionType
    """What they answer."""
    metadata: dict[str, Any]
    """Anything else that was kept with them."""


@dataclass(frozen=True)
class Model(ModelHeader):
    """A model file with its network."""

    network: UNet
    """The network with the file's weights, in evaluation mode."""


def save_model(
    path: str | Path,
    network: UNet,
    *,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network with its configuration, whole or not at all.

    Args:
        path: A local file; one that is there is replaced.
        network: What to save; unwrapped, in the dtype to save it in.
        schedule: What it was trained with.
        prediction_type: What it answers.
        metadata: Anything else to keep, as JSON has it.

    Raises:
        ConfigError: If the metadata is not JSON, or the network's keys are not those of its configuration.
    """
    config = config_of(network)
    header = header_metadata(config, schedule, prediction_type, metadata or {})
    state = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    with torch.device("meta"):
        bare = build_network(config)
    try:
        check_state(bare, state, what="the network's own weights")
    except CheckpointError as error:
        raise ConfigError(f"{error}. Is it wrapped? Save the network inside the wrapper") from error
    with replacing(path) as part:
        save_file(state, part, header)


def header_metadata(
    config: MatryoshkaConfig, schedule: NoiseSchedule, prediction_type: PredictionType, metadata: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata with which a safetensors file of the networks' weights is a model file; see `save_model`."""
    check_prediction_type(prediction_type)
    values = {
        "format": FORMAT_VERSION,
        "config": config.to_dict(),
        "schedule": asdict(schedule),
        "prediction_type": prediction_type,
        "metadata": dict(metadata),
    }
    try:
        return {"mdm_model": json.dumps(values, allow_nan=False, sort_keys=True)}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must be JSON: {error}") from error


def read_header(path: str | Path) -> ModelHeader:
    """What a model file is, without its weights.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: If it is damaged, has no configuration of ours inside, or is of a newer version.
    """
    metadata, _ = _read(Path(path), "cpu", with_tensors=False)
    return parse_header(metadata, where=str(path))


def parse_header(metadata: Mapping[str, str], *, where: str) -> ModelHeader:
    """What a model file is, of the metadata of its safetensors; `where` is its place, for the message.

    Raises:
        CheckpointError: As in `read_header`.
    """
    if "mdm_model" not in metadata:
        raise CheckpointError(
            f"{where} holds tensors, but no configuration: it was not written by save_model. "
            "Build its network yourself and load the tensors into that"
        )
    try:
        values = json.loads(metadata["mdm_model"])
        if not isinstance(values, dict):
            raise ConfigError(f"wanted a JSON object, got {type(values).__name__}")
        version = values.get("format", 1)
        if type(version) is not int or version < 1:
            raise ConfigError(f"format={version!r} is no version")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{where} has format version {version}, and this code reads up to {FORMAT_VERSION}; update it"
            )
        check_prediction_type(values["prediction_type"])
        return ModelHeader(
            MatryoshkaConfig.from_dict(values["config"]),
            NoiseSchedule(**values["schedule"]),
            values["prediction_type"],
            dict(values["metadata"]),
        )
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"the configuration in {where} can't be used: {error!r}") from error


def load_model(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """The network of a model file.

    On the CPU and in the file's own dtype the weights are mapped into memory, and read when they are first used; what
    is written to them later stays in memory.

    Args:
        path: A local file.
        device: Where the network is to be.
        dtype: What its weights become; None leaves them as they are in the file.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: As `read_header`; or if a key is missing, left over or of another shape than the
            configuration inside says.
    """
    path = Path(path)
    metadata, state = _read(path, str(device), with_tensors=True)
    header = parse_header(metadata, where=str(path))
    with torch.device("meta"):
        network = build_network(header.config)
    check_state(network, state, what=f"the weights in {path}")
    # Assigned, since nothing can be copied into a network that has no memory yet.
    network.load_state_dict(state, strict=True, assign=True)
    unset = [name for name, value in _tensors_of(network) if value.device.type == "meta"]
    assert not unset, f"tensors that no file has keys for: {unset}"
    parts = (header.config, header.schedule, header.prediction_type, header.metadata)
    return Model(*parts, network.to(dtype=dtype).eval())


def config_of(network: nn.Module) -> MatryoshkaConfig:
    """The configuration that a network was built with, its shells' included.

    Raises:
        ConfigError: If it is not one of ours.
    """
    networks: list[UNetConfig] = []
    inside: object = network
    while isinstance(inside, UNet):
        networks.append(inside.config)
        inside = getattr(inside, "inner_unet", None)
    if not networks:
        raise ConfigError(f"a {type(network).__name__} is no network of ours; give the network inside the wrapper")
    return MatryoshkaConfig(tuple(networks))


def _tensors_of(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _read(path: Path, device: str, *, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            state = {key: file.get_tensor(key) for key in file.keys()} if with_tensors else {}  # noqa: SIM118
            return dict(file.metadata() or {}), state
    except SafetensorError as error:
        with path.open("rb") as opened:
            head = opened.read(2)
        reason = f"damaged, or no safetensors file ({error})"
        if head == b"PK":
            reason = "written by torch.save; a published checkpoint is read by mdm_core.apple_weights"
        raise CheckpointError(f"{path} is {reason}") from error
