from pathlib import Path
from typing import Any

import pytest
import yaml

from mdm_core.errors import ConfigError
from pipelines.data import filters as filters_module
from pipelines.data.config import FiltersConfig, RefreshConfig
from pipelines.data.filters import CaptionFilter, count_words, size_reason
from pipelines.run_config import dump_config, load_config


def loaded(path: Path, filters: dict[str, Any], *flags: str) -> RefreshConfig:
    """Returns the configuration that a file with these filters, and flags, resolve to."""
    path.write_text(yaml.safe_dump({"source": {"uri": "a.tsv"}, "table": {"uri": "t"}, "filters": filters}))
    return load_config(RefreshConfig, ["--config", str(path), *flags], prog="mdm refresh", description="")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("", 0),
        ("  a  dog\tin\nthe sun ", 5),
        ("well-known artist's work", 3),
        ("Ein Hund läuft über Wiesen", 5),
        ("一只狗在草地上奔跑", 5),
        ("犬", 1),
        ("一只狗 on grass", 4),
        ("犬が走る。", 3),
        ("강아지가 풀밭을 달린다", 3),
        ("สุนัข", 3),
    ],
)
def test_words_of_a_caption(caption: str, words: int) -> None:
    assert count_words(caption) == words


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a dog in the sun", None),
        ("a b", "caption_chars"),
        ("two wordsonly", "caption_words"),
        ("a " * 257 + "x", "caption_words"),
        ("w" * 2001, "caption_chars"),
        ("一只狗在草地上奔跑", None),
    ],
)
def test_captions_are_filtered_by_length(caption: str, reason: str | None) -> None:
    assert CaptionFilter(FiltersConfig()).check(caption) == (reason, None)


def test_captions_are_filtered_by_language() -> None:
    judge = CaptionFilter(FiltersConfig(language=("en", "de")))
    assert judge.check("a dog runs across a green field") == (None, "en")
    assert judge.check("Ein Hund läuft über eine grüne Wiese") == (None, "de")
    assert judge.check("un chien court dans un champ vert") == ("language", "fr")
    assert judge.check("123 456 789") == ("language", "zxx")


def test_language_is_not_looked_at_where_it_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def detect(text: str) -> str:
        raise AssertionError(text)

    monkeypatch.setattr(filters_module, "detect_language", detect)
    assert CaptionFilter(FiltersConfig(language=("en",))).check("a b") == ("caption_chars", None)
    assert CaptionFilter(FiltersConfig()).check("a dog in the sun") == (None, None)


def test_language_that_the_detector_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"filters\.language: xx is not known"):
        CaptionFilter(FiltersConfig(language=("xx",)))


@pytest.mark.parametrize("language", ["english", "EN", "e", "en-GB", ""])
def test_language_that_is_no_code(tmp_path: Path, language: str) -> None:
    with pytest.raises(ConfigError, match=r"filters.language.0: got '.*'; wanted an ISO 639 code"):
        loaded(tmp_path / "a.yaml", {"language": [language]})


# What the papers say of a picture and its caption, apart from this project's code.
def passes_cc12m(width: int, height: int, caption: str) -> bool:
    return (
        min(width, height) > 400 and max(width, height) / min(width, height) <= 2.5 and 3 <= len(caption.split()) <= 256
    )


def passes_datacomp(width: int, height: int, caption: str) -> bool:
    has_size = min(width, height) >= 200 and max(width, height) / min(width, height) <= 3.0
    return has_size and len(caption.split()) > 2 and len(caption) > 5


@pytest.mark.parametrize(("preset", "passes"), [("cc12m", passes_cc12m), ("datacomp_basic", passes_datacomp)])
def test_presets_filter_as_the_papers_say(preset: str, passes: Any) -> None:
    filters = FiltersConfig.model_validate({"preset": preset})
    judge = CaptionFilter(filters)
    captions = ["the dog", "a b c", "a b cd", "the dog ran", "the dog ran home " * 64, "the dog ran home " * 65]
    sizes = [(a, b) for a in (199, 200, 400, 401, 600) for b in (199, 200, 400, 401, 600, 601, 1002, 1003, 1203, 1800)]
    found = {}
    for caption in captions:
        # Captions this short may be taken for another language.
        reason = None if judge.check(caption)[0] == "language" else judge.check(caption)[0]
        for width, height in sizes:
            found[caption, width, height] = reason is None and size_reason(width, height, filters) is None
    assert found == {(c, w, h): passes(w, h, c) for c in captions for w, h in sizes}
    assert {True, False} == set(found.values())


def test_preset_of_datacomp_wants_english() -> None:
    judge = CaptionFilter(FiltersConfig(preset="datacomp_basic"))
    assert judge.check("un chien court dans un champ vert") == ("language", "fr")
    assert CaptionFilter(FiltersConfig(preset="cc12m")).check("un chien court dans un champ vert") == (None, None)


def test_what_is_given_wins_over_the_preset(tmp_path: Path) -> None:
    config = loaded(tmp_path / "a.yaml", {"preset": "cc12m", "min_side_px": 64}, "--filters.max_aspect", "2")
    assert config.filters.min_side_px == 64
    assert config.filters.max_aspect == 2.0
    assert config.filters.caption_words == (3, 256)
    assert config.filters.caption_chars == (0, 1_000_000)
    no_language = loaded(tmp_path / "a.yaml", {"preset": "datacomp_basic", "language": None})
    assert no_language.filters.language is None
    by_flag = loaded(tmp_path / "a.yaml", {}, "--filters.preset", "cc12m")
    assert by_flag.filters.min_side_px == 401


@pytest.mark.parametrize("filters", [{"preset": "cc12m", "min_side_px": 1}, {"preset": "datacomp_basic"}, {}])
def test_resolved_configuration_is_printed_with_the_rules_and_reads_back_the_same(
    tmp_path: Path, filters: dict[str, Any]
) -> None:
    config = loaded(tmp_path / "a.yaml", filters)
    printed = yaml.safe_load(dump_config(config))["filters"]
    assert printed["max_aspect"] == config.filters.max_aspect
    assert printed["caption_chars"] == list(config.filters.caption_chars)
    again = loaded(tmp_path / "b.yaml", printed)
    assert again.filters == config.filters
    # Nothing hangs on the preset's name any more.
    assert loaded(tmp_path / "c.yaml", {**printed, "preset": None}).filters.min_side_px == config.filters.min_side_px


@pytest.mark.parametrize("preset", ["cc12", "datacomp"])
def test_preset_that_is_misspelt(tmp_path: Path, preset: str) -> None:
    with pytest.raises(ConfigError, match=r"filters.preset: got .*; did you mean (cc12m|datacomp_basic)\?"):
        loaded(tmp_path / "a.yaml", {"preset": preset})
