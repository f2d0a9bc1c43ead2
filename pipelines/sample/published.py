"""What network a published checkpoint is of, and the noise that it was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mdm_core.apple_config import config_from_apple
from mdm_core.apple_weights import AppleCheckpoint
from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.nested_unet import build_network
from mdm_core.noise_schedule import NoiseSchedule, ScheduleKind
from mdm_core.parameterization import PredictionType
from mdm_core.presets import PRESETS
from mdm_core.state import INNER_PREFIX, check_state, num_shells

# By the names of the published YAML files, and by the numbers that pickled enumerations have.
_KINDS: dict[str | int, ScheduleKind] = {
    "DEEPFLOYD": "squared_cosine",
    3: "squared_cosine",
    "COSINE": "cosine",
    0: "cosine",
    "DDPM": "linear",
    2: "linear",
}
_PREDICTIONS: dict[str | int, PredictionType] = {
    "V_PREDICTION": "v",
    5: "v",
    "DDPM": "eps",
    3: "eps",
    "DDIM": "eps",
    4: "eps",
}
# Defaults of the published code, for what a sampler_config leaves out.
_SAMPLER_DEFAULTS: dict[str, Any] = {
    "num_diffusion_steps": 32,
    "schedule_type": "DDPM",
    "prediction_type": "DDPM",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "rescale_schedule": 1.0,
    "rescale_signal": None,
    "schedule_shifted": False,
    "schedule_shifted_power": 1,
}


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
    schedule, prediction_type = _noise(arguments, nested=depth > 0)
    return PublishedShape("published", config, schedule, prediction_type)


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


def _noise(arguments: Mapping[str, Any], *, nested: bool) -> tuple[NoiseSchedule, PredictionType]:
    diffusion = arguments.get("diffusion_config")
    given = diffusion.get("sampler_config") if isinstance(diffusion, Mapping) else None
    if not isinstance(given, Mapping):
        raise ConfigError('args["diffusion_config"]["sampler_config"]: the file has none, so its noise is not known')
    values = {**_SAMPLER_DEFAULTS, **given}
    kind = _KINDS.get(_member(values["schedule_type"]))
    prediction_type = _PREDICTIONS.get(_member(values["prediction_type"]))
    if kind is None or prediction_type is None or (values["rescale_schedule"] or 1) > 1:
        raise ConfigError(
            f"schedule_type={values['schedule_type']!r}, prediction_type={values['prediction_type']!r} and "
            f"rescale_schedule={values['rescale_schedule']!r} can't be sampled; known are DEEPFLOYD, COSINE and DDPM, "
            "V_PREDICTION, DDPM and DDIM, and 1"
        )
    # Nested networks without a shifted schedule have their finer pictures divided instead.
    shifted = not nested or bool(values["schedule_shifted"])
    schedule = NoiseSchedule(
        kind=kind,
        num_timesteps=values["num_diffusion_steps"],
        shift="snr" if shifted else "signal",
        shift_power=values["schedule_shifted_power"] if shifted else 2.0,
        input_divisor=1.0 if nested else values["rescale_signal"] or 1.0,
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
    )
    return schedule, prediction_type


def _member(value: Any) -> str | int:
    """The name of an enumeration's member, or its number where the file holds a pickled one."""
    numbers = value.get("arguments") if isinstance(value, Mapping) else None
    if numbers and isinstance(numbers[0], int):
        return numbers[0]
    return str(value)
