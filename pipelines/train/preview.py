"""Pictures of the preview captions from a checkpoint, made by a task of its own while training goes on."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdm_core.errors import CheckpointError, ConfigError
from pipelines.sample.generator import Generator, Pictures
from pipelines.train.checkpoint import open_checkpoint
from pipelines.train.config import PreviewConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    """What Ray Train calls on each checkpoint, where `post` sends the pictures to the driver."""

    config: PreviewConfig
    seed: int
    text: tuple[Tensor, Tensor]
    """The captions, encoded: (B, L, D) and (B, L)."""
    post: Callable[[dict[str, Any]], None]

    def __call__(self, checkpoint: Any, **where: Any) -> dict[str, float]:
        """Posts the pictures of a checkpoint; one that is gone meanwhile has none.

        Args:
            checkpoint: Ray's name for it, which is not needed.
            where: `uri` of the checkpoint, its `stage`, and the `images` of the stage so far.
        """
        uri = where["uri"]
        torch.set_num_threads(max(self.config.cpus, 1))
        try:
            pictures = self.pictures(uri)
        except (CheckpointError, ConfigError) as error:
            log.warning("no preview of %s: %s", uri, error)
            return {}
        self.post({"stage": where["stage"], "images": where["images"], "pictures": pictures})
        return {}

    def pictures(self, uri: str) -> dict[int, Pictures]:
        """Pictures from the averaged weights of a checkpoint, (B, r, r, 3) uint8 by resolution.

        Raises:
            ConfigError: There is no such checkpoint.
            CheckpointError: It is damaged.
        """
        device = "cuda" if self.config.gpus and torch.cuda.is_available() else "cpu"
        generator = Generator.from_checkpoint(open_checkpoint(uri).uri, device=device)
        levels = generator.generate_from_text(
            *self.text,
            noise_ids=range(len(self.text[0])),
            seed=self.seed,
            guidance_scale=self.config.guidance_scale,
            num_inference_steps=self.config.num_inference_steps,
        )
        return dict(zip(generator.resolutions, levels, strict=True))
