"""Pictures of the preview captions from a checkpoint, made by a task of its own while training goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdm_core.errors import MdmError
from pipelines.train.checkpoint import open_checkpoint
from pipelines.train.config import PreviewConfig

if TYPE_CHECKING:
    from pipelines.sample.generator import Pictures


@dataclass(frozen=True)
class Preview:
    """What Ray Train calls on each checkpoint; whatever becomes of its pictures, the training is not the worse for it.

    Ray ends a training whose validation loses its process, and waits at the end for one that no machine has room for.
    So this only waits for a task that makes the pictures, and not for ever.
    """

    config: PreviewConfig
    seed: int
    text: tuple[Tensor, Tensor]
    """The captions, encoded: (B, L, D) and (B, L)."""
    run_task: Callable[["Preview", str], "dict[int, Pictures]"]
    """Calls `pictures` elsewhere."""
    post: Callable[[dict[str, Any]], None]
    """Sends an event to the driver."""

    def __call__(self, checkpoint: Any, **where: Any) -> dict[str, float]:
        """Posts the pictures of a checkpoint, or why there are none.

        Args:
            checkpoint: Ray's name for it, which is not needed.
            where: `uri` of the checkpoint, its `stage`, and the `images` of the stage so far.
        """
        try:
            pictures = self.run_task(self, where["uri"])
        except MdmError as error:
            self.post({"warning": f"no preview of {where['uri']}: {error}"})
        else:
            self.post({"stage": where["stage"], "images": where["images"], "pictures": pictures})
        return {}

    def pictures(self, uri: str) -> "dict[int, Pictures]":
        """Pictures from the averaged weights of a checkpoint, (B, r, r, 3) uint8 by resolution.

        Raises:
            ConfigError: There is no such checkpoint, as when it was pruned meanwhile.
            CheckpointError: It is damaged.
        """
        # Imported here, so that a worker that only trains has less to import when it takes over.
        from pipelines.sample.generator import Generator

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
