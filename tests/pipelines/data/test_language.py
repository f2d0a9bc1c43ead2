import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import py3langid
import pytest

from mdm_core.errors import ConfigError
from pipelines.data import language
from pipelines.data.language import check_languages, detect_language
from pipelines.data.refresh import refresh
from tests.pipelines.data.picture_server import PictureServer
from tests.pipelines.data.test_refresh import configure, line, rows

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


def test_refresh_keeps_the_languages_that_are_wanted_and_says_which_each_is(
    tmp_path: Path, server: PictureServer
) -> None:
    captions = [*CAPTIONS, "123 456 789", "Hund da"]
    urls = list(server.add_pictures(len(captions)))
    sections: dict[str, dict[str, Any]] = {
        "filters": {"language": ["en", "de", "th"]},
        "run": {"workers": 1, "shard_rows": 4},
    }
    config = configure(tmp_path, list(map(line, urls, captions)), **sections)
    report = refresh(config)
    assert (report.ok, report.filtered, report.failed) == (3, 8, 0)
    assert report.reasons == {"language": 7, "caption_words": 1}
    found = {row["url"]: row for row in rows(config)}
    languages = [*CAPTIONS.values(), "zxx", None]
    assert [found[url]["language"] for url in urls] == languages
    wanted = [number for number, language in enumerate(languages) if language in ("en", "de", "th")]
    assert [number for number, url in enumerate(urls) if found[url]["outcome"] == "ok"] == wanted
    assert [number for number, url in enumerate(urls) if found[url]["image"] is not None] == wanted
    # Nothing is fetched for a caption that is not wanted.
    assert dict(server.hits) == {f"/{number}.jpg": 1 for number in wanted}

    # The first two change places, and so do the third and one that is wanted: only the third has no picture yet.
    french, thai = captions[2], captions[8]
    captions[:3] = [captions[1], captions[0], thai]
    captions[8] = french
    server.forget()
    again = refresh(configure(tmp_path, list(map(line, urls, captions)), **sections))
    assert dict(server.hits) == {"/2.jpg": 1}
    found = {row["url"]: row for row in rows(config)}
    assert [found[urls[number]]["language"] for number in (0, 1, 2, 8)] == ["de", "en", "th", "fr"]
    assert [found[urls[number]]["reason"] for number in (0, 1, 2, 8)] == [None, None, None, "language"]
    assert found[urls[8]]["image"] is None
    assert (again.ok, again.filtered, again.unchanged, again.reasons) == (3, 1, 7, {"language": 1})
