"""What a network is told about each picture besides the timestep.

Legend: B rows, L text tokens, D width of the text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Text, label and micro-conditions of B pictures; what is None is not given to the network.

    Raises:
        ValueError: If the parts have different numbers of rows, or a mask has no text.
    """

    text_emb: Tensor | None = None
    """(B, L, D) token embeddings."""
    text_mask: Tensor | None = None
    """(B, L) bool, True = real token; None counts every token. A row without any is unconditional."""
    labels: Tensor | None = None
    """(B,) int class labels; -1 is none."""
    micros: Mapping[str, Tensor] = field(default_factory=dict)
    """(B,) each, by the name of the micro-condition."""

    def __post_init__(self) -> None:
        if self.text_mask is not None and (self.text_emb is None or self.text_mask.shape != self.text_emb.shape[:2]):
            text = None if self.text_emb is None else tuple(self.text_emb.shape)
            raise ValueError(f"text_mask is {tuple(self.text_mask.shape)} but text_emb is {text}; wanted (B, L) of it")
        rows = self._row_counts()
        if len(rows) > 1:
            raise ValueError(f"the parts of a condition have {sorted(rows)} rows; give all of them the same number")

    @property
    def rows(self) -> int | None:
        """B; None for a condition without parts."""
        return next(iter(self._row_counts()), None)

    @property
    def can_be_dropped(self) -> bool:
        """Whether there is a text or a label for guidance to compare with."""
        return self.text_emb is not None or self.labels is not None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `network(x_t, timestep, **arguments)`."""
        parts = {"text_emb": self.text_emb, "text_mask": self.text_mask, "labels": self.labels}
        given: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}
        return given | ({"micros": dict(self.micros)} if self.micros else {})

    def dropped(self, rows: Tensor | None = None) -> "Condition":
        """The same condition without the text and the label of some rows.

        Args:
            rows: (B,) bool, True = drop; None drops them all.
        """
        mask, labels = self.text_mask, self.labels
        if self.text_emb is not None:
            mask = self._mask()
            mask = mask & (torch.zeros_like(mask) if rows is None else ~rows[:, None])
        if labels is not None:
            labels = torch.full_like(labels, -1) if rows is None else labels.masked_fill(rows, -1)
        return Condition(text_emb=self.text_emb, text_mask=mask, labels=labels, micros=self.micros)

    def joined(self, other: "Condition") -> "Condition":
        """The rows of both, this one's first; the shorter text is padded with tokens that are not real.

        Raises:
            ValueError: If one has a part that the other lacks.
        """
        for name in ("text_emb", "labels"):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise ValueError(f"only one of the two conditions has {name}; give it to both or to neither")
        if self.micros.keys() != other.micros.keys():
            raise ValueError(
                f"micro-conditions {sorted(self.micros)} and {sorted(other.micros)} can't be joined; give both the same"
            )
        text, mask, labels = None, None, None
        if self.text_emb is not None and other.text_emb is not None:
            length = max(self.text_emb.shape[1], other.text_emb.shape[1])
            text = torch.cat(
                [_padded(part.text_emb, length, (0, 0)) for part in (self, other) if part.text_emb is not None]
            )
            same_length = self.text_emb.shape[1] == other.text_emb.shape[1]
            if self.text_mask is not None or other.text_mask is not None or not same_length:
                mask = torch.cat([_padded(part._mask(), length, ()) for part in (self, other)])
        if self.labels is not None and other.labels is not None:
            labels = torch.cat([self.labels, other.labels])
        micros = {name: torch.cat([value, other.micros[name]]) for name, value in self.micros.items()}
        return Condition(text_emb=text, text_mask=mask, labels=labels, micros=micros)

    def _row_counts(self) -> set[int]:
        return {part.shape[0] for part in (self.text_emb, self.labels, *self.micros.values()) if part is not None}

    def _mask(self) -> Tensor:
        assert self.text_emb is not None
        if self.text_mask is not None:
            return self.text_mask.bool()
        return torch.ones(self.text_emb.shape[:2], dtype=torch.bool, device=self.text_emb.device)


def drop_at_random(
    condition: Condition,
    *,
    cond_drop_prob: float,
    draws: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Condition:
    """The condition with some rows' text and label dropped, which teaches guidance (arXiv 2207.12598, algorithm 1).

    Args:
        condition: B rows.
        cond_drop_prob: Probability of each row, in [0, 1].
        draws: (B,) uniform in [0, 1); rows below the probability are dropped. None draws them.
        generator: What to draw with, where `draws` is None.

    Raises:
        ValueError: If the probability is out of range.
    """
    if not 0 <= cond_drop_prob <= 1:
        raise ValueError(f"cond_drop_prob={cond_drop_prob} must be between 0 and 1; 0.1 is usual")
    part = condition.labels if condition.text_emb is None else condition.text_emb
    if part is None:
        return condition
    if draws is None:
        device = part.device if generator is None else generator.device
        draws = torch.rand(part.shape[0], generator=generator, device=device)
    return condition.dropped((draws < cond_drop_prob).to(part.device))


def _padded(part: Tensor, length: int, inner: tuple[int, ...]) -> Tensor:
    """(B, L, …) with zeros after the last token, up to `length`."""
    return F.pad(part, (*inner, 0, length - part.shape[1]))
