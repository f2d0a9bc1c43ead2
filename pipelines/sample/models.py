"""What pictures are made with: a run's checkpoint, a published file, or a model file of this project."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mdm_core.apple_weights import load_apple_checkpoint, load_apple_weights
from mdm_core.config import MatryoshkaConfig
from mdm_core.errors import ConfigError
from mdm_core.model_file import load_model
from mdm_core.nested_unet import build_network
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType
from mdm_core.unet import UNet
from pipelines import storage
from pipelines.large_files import on_disk
from pipelines.sample.published import published_shape
from pipelines.sample.text import TextSettings
from pipelines.train.checkpoint import Manifest, open_checkpoint

Weights = Literal["ema", "raw", "untrained"]

_PUBLISHED, _OURS = ".pth", ".safetensors"
_PUBLISHED_ENCODER, _PUBLISHED_TOKENS = "t5:google/flan-t5-xl", 128


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that can make pictures, before its weights are read."""

    uri: str
    name: str
    """For titles."""
    images_seen: int | None = None
    """Images of all stages; None where a file doesn't say."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A network on the CPU, and what it takes to sample from it."""

    network: UNet
    schedule: NoiseSchedule
    prediction_type: PredictionType
    text: TextSettings
    manifest: Manifest | None = None
    """Of a run's checkpoint."""


def is_file(uri: str) -> bool:
    """Returns whether `uri` names one file, going by its ending."""
    return uri.endswith((_PUBLISHED, _OURS))


def find_source(uri: str) -> Source:
    """Returns the checkpoint, the newest checkpoint of the run, or the file at `uri`.

    Raises:
        ConfigError: There is none.
    """
    if is_file(uri):
        if not storage.exists(uri):
            raise ConfigError(f"checkpoint={uri}: there is no such file")
        return Source(uri=uri, name=uri.rstrip("/").rpartition("/")[2])
    checkpoint = open_checkpoint(uri)
    manifest = checkpoint.manifest
    name = str(manifest.config.get("name", "checkpoint"))
    return Source(uri=checkpoint.uri, name=name, images_seen=manifest.total_images_seen)


def load(uri: str, *, weights: Weights, encoder: str = "", max_tokens: int | None = None) -> LoadedModel:
    """Returns the model at `uri`.

    Args:
        uri: Folder of a checkpoint or of a run, or a file.
        weights: Of a checkpoint: the averaged weights, the last ones, or those that its network begins with.
        encoder: Text encoder of a file; what it was trained with, as far as that is known, if empty.
        max_tokens: Tokens of a caption, likewise.

    Raises:
        ConfigError: There is none, or it takes an encoder that is not given.
        CheckpointError: It is damaged, or no network fits it.
    """
    if not is_file(uri):
        return _of_run(uri, weights, encoder, max_tokens)
    if weights != "ema":
        raise ConfigError(f"weights={weights} is of a run's checkpoints; {uri} has only its own, leave weights out")
    with on_disk(uri) as path:
        if uri.endswith(_PUBLISHED):
            return _published(path, uri, encoder or _PUBLISHED_ENCODER, max_tokens or _PUBLISHED_TOKENS)
        return _model_file(path, uri, encoder, max_tokens)


def _of_run(uri: str, weights: Weights, encoder: str, max_tokens: int | None) -> LoadedModel:
    checkpoint = open_checkpoint(uri)
    manifest = checkpoint.manifest
    trained_with = (manifest.text_encoder, manifest.max_tokens)
    if (encoder or trained_with[0], max_tokens or trained_with[1]) != trained_with:
        raise ConfigError(
            f"text.encoder and text.max_tokens are of single files; {checkpoint.uri} was trained with "
            f"{trained_with[0]} and {trained_with[1]}, leave them out"
        )
    torch.manual_seed(int(manifest.config["seed"]))
    network = build_network(manifest.matryoshka())
    if weights != "untrained":
        network.load_state_dict(checkpoint.tensors("ema" if weights == "ema" else "weights"))
    return LoadedModel(
        network=network,
        schedule=manifest.noise_schedule(),
        prediction_type=manifest.prediction_type,
        text=_text_settings(manifest.matryoshka(), *trained_with, trained_here=True),
        manifest=manifest,
    )


def _published(path: Path, uri: str, encoder: str, max_tokens: int) -> LoadedModel:
    checkpoint = load_apple_checkpoint(path)
    shape = published_shape(checkpoint, what=uri)
    network = build_network(shape.config)
    load_apple_weights(network, checkpoint)
    text = _text_settings(shape.config, encoder, max_tokens, trained_here=False)
    return LoadedModel(network=network, schedule=shape.schedule, prediction_type=shape.prediction_type, text=text)


def _model_file(path: Path, uri: str, encoder: str, max_tokens: int | None) -> LoadedModel:
    model = load_model(path, dtype=torch.float32)
    said = model.metadata
    encoder = encoder or str(said.get("text_encoder", ""))
    if not encoder:
        raise ConfigError(f"{uri} doesn't say what encodes its captions; give --text.encoder")
    try:
        max_tokens = max_tokens or int(said.get("max_tokens", _PUBLISHED_TOKENS))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{uri} says max_tokens={said['max_tokens']!r}; give --text.max_tokens") from error
    # Only networks of the published kind attend to padding, and only `mdm train` writes how much it has seen.
    trained_here = model.config.networks[-1].mask_text or "images_seen" in said
    text = _text_settings(model.config, encoder, max_tokens, trained_here=trained_here)
    return LoadedModel(network=model.network, schedule=model.schedule, prediction_type=model.prediction_type, text=text)


def _text_settings(config: MatryoshkaConfig, encoder: str, max_tokens: int, *, trained_here: bool) -> TextSettings:
    return TextSettings(
        encoder=encoder,
        max_tokens=max_tokens,
        text_dim=config.text_dim,
        hides_padding=config.networks[-1].mask_text,
        fills=trained_here,
        # The published code drops no caption in training, and guides away from the empty one.
        negative_is_empty_caption=not trained_here,
    )
