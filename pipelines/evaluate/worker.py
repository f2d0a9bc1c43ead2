"""The part of an evaluation that runs in many processes: prompts or rows in, features out."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mdm_core.errors import ConfigError, MdmError
from pipelines.data.table.sample_table import SampleTable
from pipelines.evaluate.features import FeatureNetwork, load_feature_network
from pipelines.train.ingest.decode import decode_square

Arrays = dict[str, NDArray[Any]]


class PictureMaker(Protocol):
    """What an evaluation needs of a generator."""

    @property
    def resolutions(self) -> Sequence[int]:
        """Sides of the pictures in pixels, finest first."""

    def generate(
        self,
        captions: Sequence[str],
        *,
        noise_ids: Sequence[int],
        seed: int,
        guidance_scale: Any,
        num_inference_steps: int,
    ) -> list[NDArray[np.uint8]]:
        """Returns one (N, r, r, 3) array a resolution, finest first."""


class MakerFactory(Protocol):
    """Makes a generator from a checkpoint, as `Generator.from_checkpoint` does."""

    def __call__(self, uri: str, *, weights: Any, device: str) -> PictureMaker:
        """Returns the generator of a checkpoint with some of its weights."""


class EvaluateWorker:
    """An actor that makes pictures, reads real ones, and gives their features.

    Args:
        make: Makes a generator from a checkpoint.
        checkpoint: The checkpoint.
        table_uri: The table.
        table_version: Its version.
        feature_network: Name of the network whose features are wanted.
        resolution: Side of the pictures that are compared: real ones are brought to it as in training.
        sampling: seed, guidance_scale and num_inference_steps.
        num_shown: Made pictures are returned for the prompts before this one.
        device: A torch device.
    """

    def __init__(
        self,
        *,
        make: MakerFactory,
        checkpoint: str,
        table_uri: str,
        table_version: int,
        feature_network: str,
        resolution: int,
        sampling: Mapping[str, Any],
        num_shown: int,
        device: str,
    ) -> None:
        self._make, self._checkpoint = make, checkpoint
        self._table_uri, self._table_version = table_uri, table_version
        self._feature_network, self._resolution = feature_network, resolution
        self._sampling, self._num_shown, self._device = dict(sampling), num_shown, device
        self._makers: dict[str, PictureMaker] = {}
        self._network: FeatureNetwork | None = None
        self._table: SampleTable | None = None

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Does one task (see `made_task` and `real_task`); an error meant for the user comes back as its text."""
        arrays: Arrays = {}
        error = kind = ""
        task = json.loads(str(batch["task"][0]))
        try:
            arrays = self._real(task) if task["kind"] == "real" else self._made(task)
        except MdmError as found:
            error, kind = str(found), "config" if isinstance(found, ConfigError) else "work"
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return {
            "kind": np.array([task["kind"]]),
            "arrays": np.array([buffer.getvalue()], dtype=object),
            "error": np.array([error]),
            "error_kind": np.array([kind]),
        }

    def _made(self, task: dict[str, Any]) -> Arrays:
        weights = task["kind"]
        if weights not in self._makers:
            self._makers[weights] = self._make(self._checkpoint, weights=weights, device=self._device)
        maker = self._makers[weights]
        # A picture's noise has the number of its prompt, so it is the same however the work is cut up.
        pictures = maker.generate(task["captions"], noise_ids=task["numbers"], **self._sampling)
        numbers = np.array(task["numbers"])
        rows = numbers < self._num_shown
        arrays = {f"pictures_{side}": level[rows] for side, level in zip(maker.resolutions, pictures, strict=True)}
        return arrays | {"shown": numbers[rows], "numbers": numbers, "features": self._features(pictures[0])}

    def _real(self, task: dict[str, Any]) -> Arrays:
        if self._table is None:
            self._table = SampleTable.open(self._table_uri, self._table_version)
        (shard,) = (shard for shard in self._table.shards("ok") if shard.path == task["shard"])
        images = self._table.read(shard, ["image"])["image"].take(task["rows"]).to_pylist()
        pictures = np.stack([decode_square(image, self._resolution) for image in images])
        return {"numbers": np.array(task["numbers"]), "features": self._features(pictures)}

    def _features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self._network is None:
            self._network = load_feature_network(self._feature_network, device=self._device)
        return self._network.features(pictures)


def made_task(weights: str, numbers: Sequence[int], captions: Sequence[str]) -> str:
    """Returns the task of making pictures with some of the checkpoint's weights for prompts with these numbers."""
    return json.dumps({"kind": weights, "numbers": list(numbers), "captions": list(captions)})


def real_task(shard: str, rows: Sequence[int], numbers: Sequence[int]) -> str:
    """Returns the task of reading rows of a shard, which have these numbers in the table."""
    return json.dumps({"kind": "real", "shard": shard, "rows": list(rows), "numbers": list(numbers)})
