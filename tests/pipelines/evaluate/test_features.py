"""The feature network: that its weights are the trained ones and in their places."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from mdm_core.errors import CheckpointError, ConfigError
from pipelines.evaluate.features import FeatureNetwork, load_feature_network, rename_efficientnet_weights

# Of ImageNet's 1,000 classes, 281 to 285 are domestic cats.
CATS = range(281, 286)
ESPRESSO, CUP, COFFEE_MUG = 967, 968, 504


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_feature_network("efficientnet_lite0", input_px=224)


def classify(network: FeatureNetwork, picture: np.ndarray) -> int:
    """Returns the class that the network's own last layer gives to the pooled features."""
    features = torch.from_numpy(network.features([picture]))
    return int(network.module.get_submodule("classifier")(features).argmax())


def middle_square(picture: np.ndarray) -> np.ndarray:
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return picture[top : top + side, left : left + side]


def test_a_photo_of_a_cat_is_a_cat(network: FeatureNetwork) -> None:
    assert classify(network, middle_square(data.chelsea())) in CATS
    assert classify(network, middle_square(data.coffee())) in (ESPRESSO, CUP, COFFEE_MUG)


def test_features_do_not_depend_on_the_other_pictures_nor_on_the_kind_of_list(network: FeatureNetwork) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (20, 24, 24, 3), np.uint8)
    together = network.features(pictures)
    assert together.shape == (20, 1280)
    assert together.dtype == np.float32
    alone = np.concatenate([network.features([picture]) for picture in pictures])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    assert network.features([]).shape == (0, 1280)


def test_pictures_are_resized_as_pillow_does(network: FeatureNetwork) -> None:
    picture = np.asarray(Image.fromarray(middle_square(data.chelsea())).resize((96, 96), Image.Resampling.BOX))
    resized = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC))
    one, other = network.features([picture])[0], network.features([resized])[0]
    # Pillow rounds to whole numbers.
    assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(one)
    assert np.linalg.norm(one - network.features([picture[::-1]])[0]) > 0.2 * np.linalg.norm(one)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no feature network is called 'inception'; use efficientnet_lite0"):
        load_feature_network("inception")
    with pytest.raises(CheckpointError, match=r"_blocks\.16\._bn0\.weight is no weight of EfficientNet-Lite0"):
        rename_efficientnet_weights({"_blocks.16._bn0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"features\.0\.weight is no weight of EfficientNet-Lite0"):
        rename_efficientnet_weights({"features.0.weight": torch.zeros(1)})
