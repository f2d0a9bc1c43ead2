"""The corpus, its list of links and its server, against what a plain reader of both finds."""

import http.client
import io
import ipaddress
import json
import socket
import unicodedata
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from mdm_core.errors import ConfigError
from pipelines.quickstart.corpus import RENDER_PX, Corpus, build_corpus
from pipelines.quickstart.server import serve


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    return build_corpus(tmp_path / "corpus", limit=60, seed=5)


def get(url: str, *, max_bytes: int = -1) -> tuple[int, str, bytes]:
    """Returns status, content type and body, through the standard library's own client."""
    parts = urlsplit(url)
    assert ipaddress.ip_address(str(parts.hostname)) == ipaddress.ip_address("127.0.0.1")
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=5)
    connection.request("GET", parts.path)
    response = connection.getresponse()
    body = response.read() if max_bytes < 0 else response.read(max_bytes)
    connection.close()
    return response.status, response.headers["Content-Type"], body


def lines_of(corpus: Corpus) -> list[list[str]]:
    return [line.split("\t") for line in corpus.links_path.read_text(encoding="utf-8").splitlines()]


def test_the_list_holds_every_picture_once_and_one_line_in_twenty_is_trouble(whole: Corpus) -> None:
    lines = lines_of(whole)
    assert len(lines) == whole.expected["links"] == 2005
    links = Counter(line[0] for line in lines if len(line) == 2)
    first_parts = Counter(urlsplit(url).path.split("/")[1] for url in links if urlsplit(url).hostname == "127.0.0.1")
    good = {Path(url).name for url in links if urlsplit(url).path.split("/")[1] in ("pictures", "busy")}
    private = [url for url in links if urlsplit(url).hostname == "::1"]
    good -= {Path(url).name for url in private}
    files = {path.name for path in (whole.folder / "pictures").iterdir()}
    assert good == files
    assert len(files) == whole.expected["ok"] == 1905
    assert len(private) == whole.expected["kinds"]["private"]
    assert first_parts["busy"] == whole.expected["kinds"]["busy"] == 20
    for kind in ("gone", "page", "cut", "drip", "pixel"):
        assert first_parts[kind] == whole.expected["kinds"][kind], kind
    twice = [url for url, count in links.items() if count == 2]
    assert len(twice) == whole.expected["duplicate"]
    assert max(links.values()) == 2
    assert sum(len(line) == 1 for line in lines) == whole.expected["malformed"]
    outcomes = ("ok", "filtered", "failed", "duplicate", "malformed")
    assert sum(whole.expected[name] for name in outcomes) == whole.expected["links"]


def test_captions_are_unicode_s_own_names_where_those_agree(whole: Corpus) -> None:
    captions = {Path(line[0]).stem: line[1] for line in lines_of(whole) if len(line) == 2}
    assert captions["1f412"] == unicodedata.name("\N{MONKEY}").lower() == "monkey"
    assert captions["1f6b2"] == unicodedata.name("\N{BICYCLE}").lower()
    assert captions["0031-fe0f-20e3"] == "keycap 1"
    assert captions["1f1e9-1f1ea"] == "Germany"
    assert not [caption for caption in captions.values() if "flag" in caption or "skin tone" in caption]
    assert not [caption for caption in captions.values() if "_" in caption or ":" in caption.strip(":")[:1]]


def test_pictures_come_in_three_formats_and_png_keeps_its_alpha(whole: Corpus) -> None:
    formats: Counter[str | None] = Counter()
    transparent = 0
    for path in (whole.folder / "pictures").iterdir():
        with Image.open(path) as image:
            formats[image.format] += 1
            assert image.size == (RENDER_PX, RENDER_PX)
            if image.format == "PNG":
                assert image.mode == "RGBA"
                transparent += image.getchannel("A").getextrema()[0] == 0
            elif image.format == "JPEG":
                assert image.mode == "RGB"
    assert formats == {"PNG": 635, "JPEG": 635, "WEBP": 635}
    assert transparent == 635


def test_the_source_is_named_beside_the_pictures(whole: Corpus) -> None:
    text = (whole.folder / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert "OpenMoji" in text
    assert "CC BY-SA 4.0" in text
    assert "https://github.com/hfg-gmuend/openmoji" in text


def test_a_second_build_reuses_the_folder_and_its_port(small: Corpus) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.folder.rglob("*")}
    again = build_corpus(small.folder, limit=60, seed=5)
    assert again == small
    assert {path: path.stat().st_mtime_ns for path in small.folder.rglob("*")} == before


def test_the_seed_decides_the_list(small: Corpus, tmp_path: Path) -> None:
    same = build_corpus(tmp_path / "same", limit=60, seed=5, port=small.port)
    other = build_corpus(tmp_path / "other", limit=60, seed=6, port=small.port)
    assert same.links_path.read_bytes() == small.links_path.read_bytes()
    assert other.links_path.read_bytes() != small.links_path.read_bytes()


def test_a_folder_without_its_marker_is_made_again(small: Corpus) -> None:
    wanted = {path.name: path.read_bytes() for path in small.folder.rglob("*") if path.is_file()}
    (small.folder / "corpus.json").unlink()
    (small.folder / "links.tsv").write_text("cut sh")
    next((small.folder / "pictures").iterdir()).unlink()
    again = build_corpus(small.folder, limit=60, seed=5, port=small.port)
    assert again == small
    assert {path.name: path.read_bytes() for path in small.folder.rglob("*") if path.is_file()} == wanted


def test_another_seed_or_port_in_the_same_folder_is_refused(small: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"made with seed=5.*wanted seed=6.*another folder"):
        build_corpus(small.folder, limit=60, seed=6)
    with pytest.raises(ConfigError, match=rf"port={small.port}.*port=1234"):
        build_corpus(small.folder, limit=60, seed=5, port=1234)


def test_a_damaged_marker_is_named(small: Corpus) -> None:
    (small.folder / "corpus.json").write_text(json.dumps({"port": 1}))
    with pytest.raises(ConfigError, match=r"corpus\.json is damaged.*delete"):
        build_corpus(small.folder, limit=60, seed=5)


def test_every_link_does_what_its_kind_says_and_is_counted(small: Corpus) -> None:
    asked: Counter[str] = Counter()
    with serve(small) as server:
        for url in {line[0] for line in lines_of(small) if line[0].startswith(small.base_url)}:
            kind = urlsplit(url).path.split("/")[1]
            asked[kind] += 1
            status, content_type, body = get(url, max_bytes=1 if kind == "drip" else -1)
            if kind == "busy":
                assert status == 429
                status, content_type, body = get(url)
            if kind in ("pictures", "busy"):
                assert (status, body) == (200, small.picture_path(Path(url).name).read_bytes())
                assert content_type.startswith("image/")
            elif kind == "gone":
                assert status == 404
            elif kind == "page":
                assert (status, body[:15]) == (200, b"<!doctype html>")
            elif kind == "pixel":
                assert Image.open(io.BytesIO(body)).size == (1, 1)
            elif kind == "cut":
                with pytest.raises(OSError, match="truncated"):
                    Image.open(io.BytesIO(body)).load()
            else:
                assert (kind, status, len(body)) == ("drip", 200, 1)
        assert server.served["too_many"] == asked["busy"] == small.expected["kinds"]["busy"]
        assert {kind: server.served[kind] for kind in asked} == asked
        assert server.served.total() == server.requests.total() == asked.total() + asked["busy"]
        assert get(f"{small.base_url}/robots.txt")[0] == 404
        assert server.served["other"] == 1


def test_a_port_that_is_taken_is_one_message_with_the_fix(small: Corpus) -> None:
    with (
        socket.create_server(("127.0.0.1", small.port)),
        pytest.raises(ConfigError, match=rf"port {small.port} of 127\.0\.0\.1 is taken.*another folder"),
        serve(small),
    ):
        pass
    with serve(small) as server:
        assert server.served.total() == 0
