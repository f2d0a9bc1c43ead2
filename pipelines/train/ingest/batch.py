"""What a network is trained on in one go.

Legend: B rows, r side of the stage's resolution, L tokens, D width of the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one worker's share of a step: all of it, or as many as fit into memory at once."""

    x0: Tensor
    """(B, 3, r, r) uint8, channels last in memory."""
    text_emb: Tensor
    """(B, L, D) float32, zeros beyond a caption's tokens."""
    text_mask: Tensor
    """(B, L) bool; a dropped caption has no real token."""
    timestep: Tensor
    """(B,) int64 in [0, N)."""
    noise: list[Tensor]
    """One (B, 3, r, r) a resolution, finest first, standard normal, channels last in memory."""
    ids: list[bytes]
    """Ids of the rows."""
    rows_per_resolution: tuple[int, ...]
    """Rows that each resolution is trained on, finest first: the first ones of the batch."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; from pinned memory it is copied while the caller goes on."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def with_copy_of_first_row(self) -> "Batch":
        """The same rows behind one more, which is the first of them and has every resolution."""
        longer = self._each(lambda tensor: torch.cat([tensor[:1], tensor]))
        counts = tuple(count + 1 for count in self.rows_per_resolution)
        return replace(longer, ids=[self.ids[0], *self.ids], rows_per_resolution=counts)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            x0=change(self.x0),
            text_emb=change(self.text_emb),
            text_mask=change(self.text_mask),
            timestep=change(self.timestep),
            noise=[change(level) for level in self.noise],
        )


def pad_text(
    captions: Sequence[NDArray[np.float16]], *, width: int, length: int, fill: bool = False, pin_memory: bool = False
) -> tuple[Tensor, Tensor]:
    """Token embeddings (L_i, D) of each caption, cut to `length` and padded to the longest of them.

    Args:
        captions: The embeddings.
        width: D.
        length: Tokens that are kept.
        fill: Whether to pad to `length`: where attention sees padding, what a caption means depends on how much of it
            there is, and must not on the captions beside it.
        pin_memory: Whether a GPU can fetch them by itself.

    Returns:
        (B, L, D) float32 with zeros for padding, and (B, L) bool, True = real token; at least one token long.
    """
    longest = length if fill else max([1, *(min(len(caption), length) for caption in captions)])
    text_emb = torch.empty(len(captions), longest, width, pin_memory=pin_memory)
    text_mask = torch.empty(len(captions), longest, dtype=torch.bool, pin_memory=pin_memory)
    # By numpy, in one thread. PyTorch would fill them with several: on a thread beside the training those are new ones,
    # more threads than processors are then known to OpenMP, and each operation of the training waits to be woken up.
    rows, mask = text_emb.numpy(), text_mask.numpy()
    for row, caption in enumerate(captions):
        tokens = caption[:length]
        rows[row, : len(tokens)], rows[row, len(tokens) :] = tokens, 0
        mask[row, : len(tokens)], mask[row, len(tokens) :] = True, False
    return text_emb, text_mask
