import sys
from concurrent.futures import ThreadPoolExecutor

import py3langid
import pytest

from mdm_core.errors import ConfigError
from pipelines.data import language
from pipelines.data.language import check_languages, detect_language

CAPTIONS = {
    "a dog runs across a green field in the sun": "en",
    "Ein Hund läuft über eine grüne Wiese": "de",
    "un chien court dans un champ vert au soleil": "fr",
    "un perro corre por el campo verde": "es",
    "собака бежит по зелёному полю": "ru",
    "犬が緑の草原を走る": "ja",
    "一只狗在草地上奔跑": "zh",
    "강아지가 풀밭을 달린다": "ko",
    "สุนัขวิ่งในทุ่งหญ้า": "th",
}


def test_languages_are_told_apart() -> None:
    assert {caption: detect_language(caption) for caption in CAPTIONS} == CAPTIONS


@pytest.mark.parametrize("text", ["", " \n", "123 456", "2020-01-02", "!?… 🐶"])
def test_text_without_letters_is_in_no_language(text: str) -> None:
    assert detect_language(text) == "zxx"


def test_what_others_do_with_the_package_changes_nothing() -> None:
    py3langid.set_languages(["de", "fr"])
    try:
        assert detect_language("a dog runs across a green field in the sun") == "en"
    finally:
        py3langid.set_languages(None)


def test_threads_get_what_one_gets() -> None:
    captions = list(CAPTIONS) * 40
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(detect_language, captions)) == list(CAPTIONS.values()) * 40


def test_codes_that_are_never_found() -> None:
    check_languages(["en", "de", "yue"])
    with pytest.raises(ConfigError, match=r"filters.language: uko is not known .*, uk, .*; did you mean uk\?"):
        check_languages(["en", "uko"])


def test_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError, match=r"pip install 'mdm\[scores\]'"):
        detect_language("a dog")
