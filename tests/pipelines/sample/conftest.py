"""A small nested network with random weights, and an encoder of words that needs no files."""

import io
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.nested_unet import build_network
from mdm_core.unet import UNet
from pipelines.text_encoder import TextEncoder

WIDTH = 24


def small_config(**innermost: Any) -> MatryoshkaConfig:
    """16 px around 8 px."""
    shared: dict[str, Any] = {"num_resnets": (1, 1), "num_groups": 4, "num_heads": 2, "time_dim": 16}
    shell = UNetConfig(resolution=16, channels=(4, 8), num_attention_layers=(0, 0), mid_blocks=False, **shared)
    inner: dict[str, Any] = {"channels": (8, 8), "num_attention_layers": (0, 1), "text_dim": WIDTH}
    return MatryoshkaConfig((shell, UNetConfig(resolution=8, **inner | shared | innermost)))


def random_network(config: MatryoshkaConfig, seed: int = 0) -> UNet:
    """The layers that are zero at the start are not."""
    torch.manual_seed(seed)
    network = build_network(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def embedding(text: str, max_tokens: int = 128, width: int = WIDTH) -> NDArray[np.float16]:
    """One vector a word, and one for the end."""
    ids = [zlib.crc32(word.encode()) % 1000 for word in [*text.split(), "</s>"]][:max_tokens]
    vectors = [np.random.default_rng(number).standard_normal(width) for number in ids]
    return np.stack(vectors).astype(np.float16)


def word_encoder(name: str, *, max_tokens: int, device: str = "auto") -> TextEncoder:
    """Stands for `load_text_encoder`: `words:N` is N wide, and anything else WIDTH."""
    kind, _, given = name.partition(":")
    width = int(given) if kind == "words" and given else WIDTH

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        return [
            [zlib.crc32(word.encode()) % 1000 for word in [*caption.split(), "</s>"]][:max_tokens]
            for caption in captions
        ]

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        rows = [[np.random.default_rng(number).standard_normal(width) for number in row] for row in ids.tolist()]
        return torch.from_numpy(np.array(rows))

    return TextEncoder(name=name, width=width, max_tokens=max_tokens, tokenize=tokenize, forward=forward)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Puts the encoder of words in the place of all encoders; lists those that are loaded."""
    loaded: list[tuple[str, int]] = []

    def load(name: str, *, max_tokens: int) -> TextEncoder:
        loaded.append((name, max_tokens))
        return word_encoder(name, max_tokens=max_tokens)

    monkeypatch.setattr("pipelines.sample.text.load_text_encoder", load)
    return loaded


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An encoded picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_pixels(height: int, width: int | None = None, seed: int = 3) -> NDArray[np.uint8]:
    """A picture that nothing could come upon by chance."""
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), dtype=np.uint8)
