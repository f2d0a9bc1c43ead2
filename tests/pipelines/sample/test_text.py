"""Captions on the way to a network: how long they are padded, and what guidance goes away from."""

from typing import Any

import numpy as np
import pytest
import torch

from mdm_core.errors import ConfigError
from pipelines.sample.text import CaptionReader, TextSettings

from .conftest import WIDTH, embedding

CAPTIONS = ["a red fish", "house", "one two three four five six", "blue sky here"]


def reader(**changes: Any) -> CaptionReader:
    values: dict[str, Any] = {"encoder": "words", "max_tokens": 6, "text_dim": WIDTH}
    return CaptionReader(TextSettings(**values | changes))


def test_hidden_padding_needs_one_batch(words: list[tuple[str, int]]) -> None:
    (batch,) = reader().batches(CAPTIONS, negative="", guided=True)
    assert batch.rows == [0, 1, 2, 3]
    assert batch.negative is None
    assert batch.text[1].sum(dim=1).tolist() == [4, 2, 6, 4]
    assert words == [("words", 6)]


@pytest.mark.parametrize(
    ("negative", "guided", "lengths"),
    [
        # The end is a token as well; the empty caption is that token alone.
        ("", True, {4: [0, 3], 2: [1], 6: [2]}),
        ("not like this", True, {4: [0, 1, 3], 6: [2]}),
        ("not like this", False, {4: [0, 3], 2: [1], 6: [2]}),
        ("far more words than are kept of it", True, {6: [0, 1, 2, 3]}),
    ],
)
def test_padding_in_sight_is_as_long_as_the_longer_of_caption_and_negative(
    words: list[tuple[str, int]], negative: str, guided: bool, lengths: dict[int, list[int]]
) -> None:
    settings: dict[str, Any] = {"hides_padding": False, "negative_is_empty_caption": True}
    batches = list(reader(**settings).batches(CAPTIONS, negative=negative, guided=guided))
    assert {batch.text[0].shape[1]: batch.rows for batch in batches} == lengths
    for batch in batches:
        for row, text_emb, text_mask in zip(batch.rows, *batch.text, strict=True):
            wanted = torch.from_numpy(embedding(CAPTIONS[row], 6).astype(np.float32))
            assert torch.equal(text_emb[: len(wanted)], wanted)
            assert text_emb[len(wanted) :].count_nonzero() == 0
            assert text_mask.tolist() == [place < len(wanted) for place in range(len(text_mask))]
        assert (batch.negative is not None) == guided
        if batch.negative is not None:
            wanted = torch.from_numpy(embedding(negative, 6).astype(np.float32))
            assert batch.negative[0].shape == batch.text[0].shape
            assert all(torch.equal(row[: len(wanted)], wanted) for row in batch.negative[0])
            assert batch.negative[1].sum(dim=1).tolist() == [len(wanted)] * len(batch.rows)


def test_an_encoder_of_another_width_and_a_network_without_text_are_refused(words: list[tuple[str, int]]) -> None:
    with pytest.raises(ConfigError, match=r"text\.encoder=words:30 gives text 30 wide, and the network reads 24; give"):
        reader(encoder="words:30").load()
    with pytest.raises(ConfigError, match="the network reads no text, so it can't make pictures of captions"):
        reader(text_dim=None).load()
