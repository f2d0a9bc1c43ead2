"""A trained network, ready to make pictures from captions."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdm_core.conditioning import Condition
from mdm_core.errors import ConfigError
from mdm_core.guidance import Guidance
from mdm_core.nested_unet import build_network
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.samplers import Sampling, sample
from mdm_core.unet import UNet
from pipelines.text_encoder import TextEncoder, load_text_encoder
from pipelines.train.batches import pad_text
from pipelines.train.checkpoint import Manifest, open_checkpoint

Pictures = NDArray[np.uint8]


class Generator:
    """Makes pictures at every resolution of a network; the noise of a picture depends on its own number only."""

    def __init__(self, network: UNet, schedule: NoiseSchedule) -> None:
        self._network = network.eval()
        self._device = next(network.parameters()).device
        self._schedule = schedule
        self._encoder: TextEncoder | None = None
        self.resolutions = network.resolutions
        self.manifest: Manifest | None = None

    @classmethod
    def from_checkpoint(
        cls, uri: str, *, weights: Literal["ema", "raw", "untrained"] = "ema", device: str = "auto"
    ) -> "Generator":
        """The generator of a checkpoint, or of the newest checkpoint of a run.

        Args:
            uri: Folder of a checkpoint or of a run.
            weights: The averaged weights, the last ones, or the ones that a network of this shape begins with.
            device: A torch device; `auto` is the GPU where there is one.

        Raises:
            ConfigError: There is no checkpoint at `uri`.
            CheckpointError: The checkpoint is damaged.
        """
        checkpoint = open_checkpoint(uri)
        place = _device(device)
        torch.manual_seed(int(checkpoint.manifest.config["seed"]))
        network = build_network(checkpoint.manifest.matryoshka())
        if weights != "untrained":
            network.load_state_dict(checkpoint.tensors("ema" if weights == "ema" else "weights"))
        network = network.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = cls(network, checkpoint.manifest.noise_schedule())
        generator.manifest = checkpoint.manifest
        return generator

    def generate(
        self,
        captions: Sequence[str],
        *,
        noise_ids: Sequence[int],
        seed: int,
        guidance_scale: float,
        num_inference_steps: int,
    ) -> list[Pictures]:
        """One (B, r, r, 3) uint8 array a resolution, finest first, for B captions.

        Args:
            captions: What the pictures show.
            noise_ids: A number for each picture, from which (with `seed`) its noise is drawn; so a picture is the
                same in whatever batch it is made.
            seed: See `noise_ids`.
            guidance_scale: 1 is off.
            num_inference_steps: Network calls.
        """
        assert self.manifest is not None, "a generator that encodes captions comes from a checkpoint"
        if self._encoder is None:
            self._encoder = load_text_encoder(self.manifest.text_encoder, max_tokens=self.manifest.max_tokens)
        embeddings = self._encoder.encode(list(captions))
        text_emb, text_mask = pad_text(embeddings, width=self._encoder.width, length=self.manifest.max_tokens)
        return self.generate_from_text(
            text_emb,
            text_mask,
            noise_ids=noise_ids,
            seed=seed,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
        )

    def generate_from_text(
        self,
        text_emb: Tensor,
        text_mask: Tensor,
        *,
        noise_ids: Sequence[int],
        seed: int,
        guidance_scale: float,
        num_inference_steps: int,
    ) -> list[Pictures]:
        """See `generate`; the captions come encoded, (B, L, D) and (B, L)."""
        num_timesteps = self._schedule.num_timesteps
        if not 1 <= num_inference_steps <= num_timesteps:
            raise ConfigError(
                f"num_inference_steps={num_inference_steps} must be between 1 and {num_timesteps}, "
                "the noise levels that the network was trained with"
            )
        draws = [np.random.default_rng([seed, number]) for number in noise_ids]
        noise = [
            torch.from_numpy(np.stack([draw.standard_normal((3, side, side), dtype=np.float32) for draw in draws]))
            .to(self._device)
            .contiguous(memory_format=torch.channels_last)
            for side in self.resolutions
        ]
        x0 = sample(
            self._network,
            noise,
            schedule=self._schedule,
            sampling=Sampling(num_inference_steps=num_inference_steps, guidance=Guidance(scale=guidance_scale)),
            condition=Condition(text_emb=text_emb.to(self._device), text_mask=text_mask.to(self._device)),
        )
        return [_to_uint8(level) for level in x0]


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
