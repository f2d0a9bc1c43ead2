"""Captions as a network was trained to read them.

Legend: B captions, L tokens, D width of the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mdm_core.errors import ConfigError
from pipelines.text_encoder import TextEncoder, load_text_encoder
from pipelines.train.ingest.batch import pad_text

Text = tuple[Tensor, Tensor]
"""(B, L, D) float32 with zeros for padding, and (B, L) bool, True = real token."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How a network reads captions."""

    encoder: str
    """Name of the encoder."""
    max_tokens: int
    """Tokens of a caption that are kept."""
    text_dim: int | None
    """Width that the network reads; None for a network that reads no text."""
    hides_padding: bool = True
    """Whether attention leaves padding out. Where it doesn't, the padded length changes the picture."""
    fills: bool = False
    """Whether a network to which padding is not hidden gets `max_tokens` tokens of every caption, as it was trained
    here, and not as many as the published code gives it."""
    negative_is_empty_caption: bool = False
    """Whether guidance goes away from the encoded empty caption; else from no caption."""


@dataclass(frozen=True)
class TextBatch:
    """Captions that go through the network together."""

    rows: list[int]
    """Their places among all captions."""
    text: Text
    negative: Text | None
    """What guidance goes away from, as many rows; None is no caption."""


class CaptionReader:
    """Encodes captions; the encoder is loaded when it is first needed."""

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self._encoder: TextEncoder | None = None

    def load(self) -> TextEncoder:
        """The encoder.

        Raises:
            ConfigError: It can't be loaded, or its width is not the network's.
        """
        if self._encoder is None:
            name, wanted = self.settings.encoder, self.settings.text_dim
            if wanted is None:
                raise ConfigError("the network reads no text, so it can't make pictures of captions; use another one")
            encoder = load_text_encoder(name, max_tokens=self.settings.max_tokens)
            if encoder.width != wanted:
                raise ConfigError(
                    f"text.encoder={name} gives text {encoder.width} wide, and the network reads {wanted}; "
                    "give the encoder that it was trained with"
                )
            self._encoder = encoder
        return self._encoder

    def batches(self, captions: Sequence[str], *, negative: str, guided: bool) -> Iterator[TextBatch]:
        """The captions encoded, in as few batches as the network allows.

        A network that attends to padding gets every caption padded to `max_tokens` if it was trained here, else as the
        published code does it, to the longer of the caption and the negative one (the caption alone without guidance):
        neither batch nor caption beside it changes a picture.

        Args:
            captions: B texts.
            negative: What guidance goes away from; empty for what the network was trained with.
            guided: Whether there is guidance.
        """
        encoder, settings = self.load(), self.settings
        embeddings = encoder.encode(list(captions))
        against: NDArray[np.float16] | None = None
        if guided and (negative or settings.negative_is_empty_caption):
            against = encoder.encode([negative])[0]
        groups: dict[int, list[int]] = {}
        for row, embedding in enumerate(embeddings):
            length = max(len(embedding), 0 if against is None else len(against))
            length = settings.max_tokens if settings.fills else length
            groups.setdefault(0 if settings.hides_padding else min(length, settings.max_tokens), []).append(row)
        for length, rows in groups.items():
            text = self._padded([embeddings[row] for row in rows], length)
            yield TextBatch(rows, text, None if against is None else self._padded([against] * len(rows), length))

    def _padded(self, embeddings: Sequence[NDArray[np.float16]], length: int) -> Text:
        """At least `length` tokens of each; the longest decides where it is 0."""
        text_emb, text_mask = pad_text(embeddings, width=self.load().width, length=self.settings.max_tokens)
        more = max(0, length - text_emb.shape[1])
        return F.pad(text_emb, (0, 0, 0, more)), F.pad(text_mask, (0, more))
