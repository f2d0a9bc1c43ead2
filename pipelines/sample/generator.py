"""A trained network, ready to make pictures from captions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdm_core.conditioning import Condition
from mdm_core.denoiser import Diffusion
from mdm_core.editing import first_level, image_to_image, inpaint, upscale
from mdm_core.errors import ConfigError
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.parameterization import PredictionType
from mdm_core.samplers import SamplerRun, Sampling, sample
from mdm_core.unet import UNet
from pipelines.sample.edits import Edit
from pipelines.sample.models import Weights, load
from pipelines.sample.noise import PictureNoise, StepNoise
from pipelines.sample.text import CaptionReader, Text, TextSettings
from pipelines.train.checkpoint import Manifest

Pictures = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How pictures are made, beside what each call says."""

    sampling: Sampling = field(default_factory=lambda: Sampling(num_inference_steps=1))
    """Solver, threshold and so on; the steps and the scale of guidance are those of the call."""
    negative_caption: str = ""
    """What guidance goes away from; empty for what the network was trained with."""
    edit: Edit | None = None
    """A picture to begin with."""


class _Settings(TypedDict):
    """What sampling from noise and from pictures have in common."""

    sampling: Sampling
    condition: Condition
    step_noise: StepNoise


class Generator:
    """Makes pictures at every resolution of a network; the noise of a picture depends on its own number only."""

    def __init__(
        self,
        network: UNet,
        schedule: NoiseSchedule,
        *,
        prediction_type: PredictionType = "v",
        text: TextSettings | None = None,
    ) -> None:
        """Makes a generator.

        Args:
            network: On the device where it is to work.
            schedule: What it was trained with.
            prediction_type: What it answers.
            text: How captions are encoded for it; None where they come encoded.
        """
        self._diffusion = Diffusion(network.eval(), schedule, prediction_type)
        self._device = next(network.parameters()).device
        self._captions = None if text is None else CaptionReader(text)
        self.options = Options()
        self.resolutions = network.resolutions
        self.manifest: Manifest | None = None

    @classmethod
    def from_checkpoint(
        cls,
        uri: str,
        *,
        weights: Weights = "ema",
        device: str = "auto",
        encoder: str = "",
        max_tokens: int | None = None,
    ) -> "Generator":
        """The generator of a checkpoint, of the newest checkpoint of a run, or of a file.

        Args:
            uri: Folder of a checkpoint or of a run; a published .pth file or a .safetensors file of this project.
            weights: The averaged weights, the last ones, or the ones that a network of this shape begins with.
            device: A torch device; `auto` is the GPU where there is one.
            encoder: Text encoder of a file; see `models.load`.
            max_tokens: Tokens of a caption, likewise.

        Raises:
            ConfigError: There is no checkpoint at `uri`.
            CheckpointError: The checkpoint is damaged.
        """
        place = _device(device)
        model = load(uri, weights=weights, encoder=encoder, max_tokens=max_tokens)
        network = model.network.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = cls(network, model.schedule, prediction_type=model.prediction_type, text=model.text)
        generator.manifest = model.manifest
        return generator

    def check(self, *, guidance_scale: float | Sequence[float], num_inference_steps: int) -> None:
        """Finds out before any work whether pictures can be made like that, and loads the text encoder.

        Raises:
            ConfigError: They can't.
        """
        self._check_sampling(self._sampling(guidance_scale, num_inference_steps))
        if self._captions is not None:
            self._captions.load()

    def generate(
        self,
        captions: Sequence[str],
        *,
        noise_ids: Sequence[int],
        seed: int,
        guidance_scale: float | Sequence[float],
        num_inference_steps: int,
    ) -> list[Pictures]:
        """One (B, r, r, 3) uint8 array a resolution, finest first, for B captions.

        Args:
            captions: What the pictures show.
            noise_ids: A number for each picture, from which (with `seed`) its noise is drawn; so a picture is the
                same in whatever batch it is made.
            seed: See `noise_ids`.
            guidance_scale: 1 is off; one number, or one a resolution, finest first.
            num_inference_steps: Network calls; two a step with `heun`.
        """
        assert self._captions is not None, "a generator that encodes captions comes from a checkpoint"
        sampling = self._sampling(guidance_scale, num_inference_steps)
        self._check_sampling(sampling)
        levels = [np.empty((len(captions), side, side, 3), np.uint8) for side in self.resolutions]
        guided = any(scale != 1 for scale in sampling.guidance.scales(len(self.resolutions)))
        for batch in self._captions.batches(captions, negative=self.options.negative_caption, guided=guided):
            numbers = [noise_ids[row] for row in batch.rows]
            made = self._make(sampling, batch.text, batch.negative, self._noise(seed, numbers))
            for level, pictures in zip(levels, made, strict=True):
                level[batch.rows] = pictures
        return levels

    def generate_from_text(
        self,
        text_emb: Tensor,
        text_mask: Tensor,
        *,
        noise_ids: Sequence[int],
        seed: int,
        guidance_scale: float | Sequence[float],
        num_inference_steps: int,
    ) -> list[Pictures]:
        """See `generate`; the captions come encoded, (B, L, D) and (B, L), and guidance goes away from none."""
        sampling = self._sampling(guidance_scale, num_inference_steps)
        self._check_sampling(sampling)
        return self._make(sampling, (text_emb, text_mask), None, self._noise(seed, noise_ids))

    def _sampling(self, guidance_scale: float | Sequence[float], num_inference_steps: int) -> Sampling:
        scale = tuple(guidance_scale) if isinstance(guidance_scale, Sequence) else guidance_scale
        guidance = replace(self.options.sampling.guidance, scale=scale)
        return replace(self.options.sampling, num_inference_steps=num_inference_steps, guidance=guidance)

    def _check_sampling(self, sampling: Sampling) -> None:
        """The sampler's own checks, by a run that calls no network."""
        edit, start, begin = self.options.edit, None, ""
        if edit is not None and edit.kind == "image_to_image":
            start, begin = first_level(edit.strength, self._diffusion.schedule), f" from strength={edit.strength} down"
        like = [torch.empty(1, 3, side, side, device="meta") for side in self.resolutions]
        try:
            SamplerRun(self._diffusion, like, sampling=sampling, start=start)
        except ValueError as error:
            raise ConfigError(f"{error}{begin}") from error

    def _noise(self, seed: int, noise_ids: Sequence[int]) -> PictureNoise:
        return PictureNoise(seed=seed, noise_ids=noise_ids, resolutions=self.resolutions, device=self._device)

    def _make(
        self, sampling: Sampling, text: Text, negative: Text | None, picture_noise: PictureNoise
    ) -> list[Pictures]:
        against = None if negative is None else self._condition(negative)
        noise, edit = picture_noise.initial(), self.options.edit
        settings: _Settings = {
            "sampling": replace(sampling, guidance=replace(sampling.guidance, negative=against)),
            "condition": self._condition(text),
            "step_noise": picture_noise.of_steps(sampling.num_inference_steps - 1),
        }
        if edit is None:
            return [_to_uint8(level) for level in sample(self._diffusion, noise, **settings)]
        rows = len(text[0])
        picture = edit.picture.to(self._device).expand(rows, -1, -1, -1)
        if edit.kind == "upscale":
            x0 = upscale(self._diffusion, picture, noise, **settings)
        elif edit.kind == "inpaint":
            assert edit.mask is not None
            mask = edit.mask.to(self._device).expand(rows, -1, -1, -1)
            x0 = inpaint(self._diffusion, picture, mask, noise, **settings)
        else:
            x0 = image_to_image(self._diffusion, picture, noise, strength=edit.strength, **settings)
        return [_to_uint8(level) for level in x0]

    def _condition(self, text: Text) -> Condition:
        return Condition(text_emb=text[0].to(self._device), text_mask=text[1].to(self._device))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name} can't be used: {reason}; try auto or cpu") from error


def _to_uint8(x0: Tensor) -> Pictures:
    """(B, 3, r, r) in [-1, 1] -> (B, r, r, 3) in 0 to 255."""
    pictures: Pictures = ((x0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.ascontiguousarray(pictures)
