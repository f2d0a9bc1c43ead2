"""What network a published checkpoint is of, and the noise that it was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mdm_core.apple_config import AppleDiffusion, config_from_apple, diffusion_from_apple
from mdm_core.apple_weights import AppleCheckpoint
from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.nested_unet import build_network
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType
from mdm_core.presets import PRESETS
from mdm_core.state import INNER_PREFIX, check_state, num_shells


@dataclass(frozen=True)
class PublishedShape:
    """A published model without its weights."""

    name: str
    config: MatryoshkaConfig
    schedule: NoiseSchedule
    prediction_type: PredictionType


def published_shape(checkpoint: AppleCheckpoint, *, what: str) -> PublishedShape:
    """Returns the preset that the weights fit, or else the network that the file's own configuration describes.

    Args:
        checkpoint: What `load_apple_checkpoint` read.
        what: Names the file in messages.

    Raises:
        CheckpointError: Neither fits; the message says what was tried and why it failed.
    """
    weights = checkpoint.weights
    tried = []
    for name, preset in PRESETS.items():
        shells = len(preset.config.networks) - 1
        if shells != num_shells(weights):
            tried.append(f"{name}: it has {shells} shells, the file has {num_shells(weights)}")
            continue
        with torch.device("meta"):
            network = build_network(preset.config)
        try:
            check_state(network, weights, what=f"{name}: the file's weights")
        except CheckpointError as error:
            tried.append(str(error))
            continue
        return PublishedShape(name, preset.config, preset.schedule, "v")
    try:
        return _from_arguments(checkpoint)
    except ConfigError as error:
        tried.append(str(error))
    raise CheckpointError(f"no network is known for the weights in {what}. Tried:\n" + "\n".join(tried))


def _from_arguments(checkpoint: AppleCheckpoint) -> PublishedShape:
    arguments = checkpoint.args if isinstance(checkpoint.args, Mapping) else {}
    if not isinstance(arguments.get("unet_config"), Mapping):
        raise ConfigError('args["unet_config"]: the file has none')
    depth = num_shells(checkpoint.weights)
    config = config_from_apple(
        arguments["unet_config"],
        text_dim=_text_dim(checkpoint, INNER_PREFIX * depth),
        resolution=_resolution(arguments),
    )
    diffusion = _diffusion(arguments, nested=depth > 0)
    return PublishedShape("published", config, diffusion.schedule, diffusion.prediction_type)


def _text_dim(checkpoint: AppleCheckpoint, innermost: str) -> int | None:
    """Width of the text that comes in: the file's configuration doesn't say, its weights do."""
    for layer in ("lm_proj.weight", "cond_emb.weight"):
        if (weight := checkpoint.weights.get(innermost + layer)) is not None:
            return weight.shape[1]
    return None


def _resolution(arguments: Mapping[str, Any]) -> int:
    reader = arguments.get("reader_config")
    sides = [arguments.get("sample_image_size"), reader.get("image_size") if isinstance(reader, Mapping) else None]
    for side in sides:
        if isinstance(side, int) and side > 0:
            return side
    raise ConfigError('args["sample_image_size"] and args["reader_config"]["image_size"]: the file says no resolution')


def _diffusion(arguments: Mapping[str, Any], *, nested: bool) -> AppleDiffusion:
    diffusion = arguments.get("diffusion_config")
    given = diffusion.get("sampler_config") if isinstance(diffusion, Mapping) else None
    if not isinstance(diffusion, Mapping) or given is None:
        raise ConfigError('args["diffusion_config"]["sampler_config"]: the file has none, so its noise is not known')
    if diffusion.get("model_output_scale"):
        raise ConfigError(
            'args["diffusion_config"]["model_output_scale"] is not 0: outputs held in range by tanh are not supported'
        )
    return diffusion_from_apple(given, nested=nested)
