"""The published code's configuration (`unet_config`, `sampler_config` in its YAML files and checkpoints), as ours."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import repr as shown  # what comes from a file may be of any size
from typing import Any, Literal

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import ConfigError
from mdm_core.noise_schedule import NoiseSchedule, ScheduleKind
from mdm_core.parameterization import PredictionType
from mdm_core.thresholding import Threshold

_NUM_HEADS = 8
_NUM_ATTENTION_GROUPS = 32

# Defaults of the published code. "class" is what `AppleCheckpoint.args` adds to each object.
_NETWORK_DEFAULTS: dict[str, Any] = {
    "class": None,
    "attention_levels": "2,3",
    "conditioning_feature_dim": -1,
    "conditioning_feature_proj_dim": -1,
    "masked_cross_attention": 1,
    "micro_conditioning": None,
    "nesting": False,
    "num_attention_layers": "1",
    "num_lm_head_layers": 0,
    "num_resnets_per_resolution": "2",
    "num_temporal_attention_layers": None,
    "resnet_config": {},
    "resolution_channels": "128,256,256,512,1024",
    "skip_cond_emb": False,
    "skip_mid_blocks": False,
    "temporal_dim": None,
    "temporal_mode": False,
    "temporal_positional_encoding": False,
    "temporal_spatial_ds": False,
}
_SHELL_DEFAULTS: dict[str, Any] = _NETWORK_DEFAULTS | {
    "freeze_inner_unet": False,
    "initialize_inner_with_pretrained": None,
    "inner_config": None,
    "interp_conditioning": False,
    "skip_cond_emb": True,
    "skip_inner_unet_input": False,
    "skip_mid_blocks": True,
    "skip_normalization": False,
}
_RESNET_DEFAULTS: dict[str, Any] = {
    "class": None,
    "dropout": 0.0,
    "num_channels": -1,
    "num_groups_norm": 32,
    "output_channels": -1,
    "use_attention_ffn": False,
}
_SAMPLER_DEFAULTS: dict[str, Any] = {
    "class": None,
    "beta_end": 0.02,
    "beta_start": 1e-4,
    "loss_target_type": None,
    "num_diffusion_steps": 32,
    "predict_variances": False,  # in one of the YAML files; read nowhere
    "prediction_type": "DDPM",
    "reproject_signal": False,  # read nowhere
    "rescale_schedule": 1.0,
    "rescale_signal": None,
    "schedule_shifted": False,
    "schedule_shifted_power": 1.0,
    "schedule_type": "DDPM",
    "threshold_function": "CLIP",
}
# By name, and by the number that a pickled member of the enumeration has.
SCHEDULES: dict[str | int, ScheduleKind] = {
    "COSINE": "cosine", 0: "cosine", "DDPM": "linear", 2: "linear", "DEEPFLOYD": "squared_cosine", 3: "squared_cosine",
}  # fmt: skip
_PREDICTIONS: dict[str | int, PredictionType] = {
    "DDPM": "eps", 3: "eps", "DDIM": "eps", 4: "eps", "V_PREDICTION": "v", 5: "v",
}  # fmt: skip
THRESHOLDS: dict[str | int, Threshold] = {
    "NONE": Threshold(kind="none"), 0: Threshold(kind="none"),
    "CLIP": Threshold(), 1: Threshold(),
    "DYNAMIC": Threshold(kind="dynamic"), 2: Threshold(kind="dynamic"),
    "DYNAMIC_IF": Threshold(kind="dynamic", ratio=0.95, max_value=1.5),
    3: Threshold(kind="dynamic", ratio=0.95, max_value=1.5),
}  # fmt: skip


@dataclass(frozen=True)
class AppleDiffusion:
    """What the published code's `sampler_config` says."""

    schedule: NoiseSchedule
    prediction_type: PredictionType
    """What the network answers."""
    loss_target: PredictionType
    """Of what the loss is the error."""
    threshold: Threshold


def diffusion_from_apple(sampler_config: Mapping[str, Any], *, nested: bool) -> AppleDiffusion:
    """The noise, prediction type and threshold that the published code describes.

    Args:
        sampler_config: Keys as in the published YAML files; those that are absent have the published code's defaults.
        nested: Whether the network has shells: without a shifted schedule the published code then divides the finer
            pictures instead, and `rescale_signal` is for networks of one resolution only.

    Raises:
        ConfigError: If a key is unknown or can't be read, or has no meaning in the published code either.
    """
    values = _with_defaults(sampler_config, _SAMPLER_DEFAULTS, "sampler_config")
    if (values["rescale_schedule"] or 1) > 1:
        raise ConfigError(f"sampler_config.rescale_schedule={values['rescale_schedule']} fails in the published code")
    prediction_type = _member(values, "prediction_type", _PREDICTIONS)
    shifted = not nested or values["schedule_shifted"]
    schedule = NoiseSchedule(
        kind=_member(values, "schedule_type", SCHEDULES),
        num_timesteps=values["num_diffusion_steps"],
        shift="snr" if shifted else "signal",
        shift_power=values["schedule_shifted_power"] if shifted else 2.0,
        input_divisor=1.0 if nested else values["rescale_signal"] or 1.0,
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
    )
    return AppleDiffusion(
        schedule=schedule,
        prediction_type=prediction_type,
        loss_target=(
            prediction_type if values["loss_target_type"] is None else _member(values, "loss_target_type", _PREDICTIONS)
        ),
        threshold=_member(values, "threshold_function", THRESHOLDS),
    )


def config_from_apple(unet_config: Mapping[str, Any], *, text_dim: int | None, resolution: int) -> MatryoshkaConfig:
    """Our configuration of a network that the published code describes.

    What the published code builds but never runs is left out: a shell's middle blocks, its text layers (`cond_emb`,
    `lm_proj`, `lm_head`) and `interp_layer*`. These keys are read and change nothing: `conditioning_feature_dim`,
    which the published code overwrites with the text encoder's width; `nesting`, which follows from the place of a
    network; `freeze_inner_unet` and `initialize_inner_with_pretrained`, which are of the training; and the channels
    in `resnet_config`, which it overwrites.

    Args:
        unet_config: Keys as in the published YAML files, `inner_config` to any depth; lists may be strings, "2,2,1".
            Keys that are absent have the published code's defaults.
        text_dim: Width of the text embeddings that come in; None for no text.
        resolution: Side of the finest pictures in pixels; the sides inside follow from the number of levels.

    Raises:
        ConfigError: If a key is unknown or can't be read, or if our networks can't be built like that.
    """
    networks: list[UNetConfig] = []
    level: Mapping[str, Any] | None = unet_config
    where, width, side = "unet_config", text_dim, resolution
    while level is not None:
        is_shell = level.get("inner_config") is not None
        values = _with_defaults(level, _SHELL_DEFAULTS if is_shell else _NETWORK_DEFAULTS, where)
        network = _network(values, is_shell, width, side, where)
        networks.append(network)
        if width is not None and values["conditioning_feature_proj_dim"] > 0:
            width = values["conditioning_feature_proj_dim"]
        level, side, where = values.get("inner_config"), network.lowest_resolution, f"{where}.inner_config"
        if level is not None and not isinstance(level, Mapping):
            raise ConfigError(f"{where}={shown(level)} must be a mapping")
    # The innermost network hands the mask to all of them.
    mask_text = networks[-1].mask_text
    return MatryoshkaConfig(tuple(replace(network, mask_text=mask_text) for network in networks))


def _network(
    values: Mapping[str, Any], is_shell: bool, text_dim: int | None, resolution: int, where: str
) -> UNetConfig:
    resnet = _with_defaults(values["resnet_config"], _RESNET_DEFAULTS, f"{where}.resnet_config")
    channels = _integers(values, "resolution_channels", where)
    levels = len(channels)
    attended = _integers(values, "attention_levels", where)
    layers = _integers(values, "num_attention_layers", where, levels)
    attention = tuple(n if level in attended else 0 for level, n in enumerate(layers))
    video = _video(values)
    return UNetConfig(
        resolution=resolution,
        channels=channels,
        num_resnets=_integers(values, "num_resnets_per_resolution", where, levels),
        num_attention_layers=attention,
        time_dim=values["temporal_dim"],
        mask_text=bool(values["masked_cross_attention"]),
        micro_conditions=_micro_conditions(values["micro_conditioning"], where),
        mid_blocks=not values["skip_mid_blocks"] and not is_shell,
        attention_ffn=bool(resnet["use_attention_ffn"]),
        num_heads=_NUM_HEADS,
        num_groups=resnet["num_groups_norm"],
        num_attention_groups=_NUM_ATTENTION_GROUPS,
        dropout=resnet["dropout"],
        normalize_input=is_shell and not values["skip_normalization"],
        feed_inner=not values.get("skip_inner_unet_input", False),
        video=video,
        num_temporal_layers=_temporal_layers(values, where, levels),
        rotary_positions=bool(values["temporal_positional_encoding"]) and video == "temporal",
        **_text(values, text_dim, where, is_shell=is_shell, attends=any(attention)),
    )


def _video(values: Mapping[str, Any]) -> Literal["none", "tiles", "temporal"]:
    if not values["temporal_mode"]:
        return "none"
    return "tiles" if values["temporal_spatial_ds"] else "temporal"


def _text(
    values: Mapping[str, Any], text_dim: int | None, where: str, *, is_shell: bool, attends: bool
) -> dict[str, Any]:
    if text_dim is None or (is_shell and not attends):
        return {}
    projected = values["conditioning_feature_proj_dim"] if values["conditioning_feature_proj_dim"] > 0 else None
    if is_shell:
        # It gets the text as the innermost network projected it.
        return {"text_dim": projected or text_dim}
    if values["skip_cond_emb"]:
        raise ConfigError(f"{where}.skip_cond_emb=true: the innermost network must embed the text that it is given")
    return {"text_dim": text_dim, "text_proj_dim": projected, "num_text_layers": values["num_lm_head_layers"]}


def _temporal_layers(values: Mapping[str, Any], where: str, levels: int) -> tuple[int, ...]:
    if values["num_temporal_attention_layers"] is None:
        return ()
    layers = _integers(values, "num_temporal_attention_layers", where, levels)
    return layers if any(layers) or _video(values) == "temporal" else ()


def _with_defaults(values: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values and, for keys that are absent, the defaults; a default's type says what its key may be."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}={shown(values)} must be a mapping")
    unknown = sorted(map(str, values.keys() - defaults.keys()))
    if unknown:
        raise ConfigError(f"{where} has unknown keys {shown(unknown)}; known are {sorted(defaults.keys() - {'class'})}")
    for key, value in values.items():
        wanted = _kind_of(key, defaults[key])
        # Python counts a bool as an int.
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise ConfigError(f"{where}.{key}={shown(value)} must be {names}")
    return {**defaults, **values}


def _kind_of(key: str, default: Any) -> tuple[type, ...] | None:
    """What a value may be; None for what is read by a function of its own, or not at all."""
    if key in ("temporal_dim", "rescale_signal"):
        return (int, float, type(None))
    if isinstance(default, bool) or key == "masked_cross_attention":
        return (bool, int)
    if isinstance(default, float):
        return (int, float)
    return (int,) if isinstance(default, int) else None


def _member(values: Mapping[str, Any], key: str, known: Mapping[str | int, Any]) -> Any:
    """What a member of an enumeration means: its name, or the number of a pickled one."""
    given = values[key]
    pickled = given.get("arguments") if isinstance(given, Mapping) else None
    member = pickled[0] if isinstance(pickled, list | tuple) and len(pickled) == 1 else given
    if not isinstance(member, str | int) or member not in known:
        names = [name for name in known if isinstance(name, str)]
        raise ConfigError(f"sampler_config.{key}={shown(given)} must be one of {names}")
    return known[member]


def _integers(values: Mapping[str, Any], key: str, where: str, levels: int | None = None) -> tuple[int, ...]:
    """A list, or numbers with commas between them; a single number without a list is for every level."""
    given = values[key]
    try:
        if isinstance(given, list | tuple):
            return tuple(_whole(item) for item in given)
        text = given if isinstance(given, str) else str(_whole(given))
        numbers = tuple(int(part) for part in text.split(",") if text.strip())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.{key}={shown(given)} must be whole numbers: a list, or like '2,2,1'") from error
    return numbers * levels if levels is not None and len(numbers) == 1 else numbers


def _whole(item: Any) -> int:
    if isinstance(item, bool) or int(item) != item:
        raise ValueError(item)
    return int(item)


def _micro_conditions(given: Any, where: str) -> tuple[tuple[str, float], ...]:
    if given is None:
        return ()
    pairs = []
    for part in given.split(",") if isinstance(given, str) else [""]:
        name, colon, default = part.strip().partition(":")
        try:
            pairs.append((name, float(default)))
        except ValueError:
            colon = ""
        if not name or not colon:
            raise ConfigError(f"{where}.micro_conditioning={shown(given)} must be like 'scale:64,score:0'")
    return tuple(pairs)
