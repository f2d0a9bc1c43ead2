"""A refresh whose rows go through a second pool of workers, for scores."""

from pathlib import Path
from typing import Any

import pytest

from mdm_core.errors import ConfigError
from pipelines.data.config import ScoreConfig
from pipelines.data.refresh import RefreshReport, refresh
from pipelines.data.score import Scorer
from pipelines.data.table.sample_table import SampleTable
from tests.pipelines.data.picture_server import PictureServer
from tests.pipelines.data.test_refresh import configure, counts, line, rows
from tests.pipelines.data.test_score import TEXTS, weights  # noqa: F401 (a fixture)


@pytest.mark.usefixtures("ray_cluster")
def test_scores_are_columns_and_leave_nothing_out(
    tmp_path: Path,
    server: PictureServer,
    weights: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Workers are in another folder.
    monkeypatch.chdir(weights)
    urls = list(server.add_pictures(7))
    lines = [line(url, f"a picture of waves, number {number}") for number, url in enumerate(urls)]
    plain = configure(tmp_path, lines[:2], run={"shard_rows": 3})
    refresh(plain)
    score = {"clip": {"model": "local-dir:own", "device": "cpu"}, "nsfw": True}
    score["zero_shot"] = {"watermark": list(TEXTS)}
    config = configure(tmp_path, [*lines, line(server.url("/missing"))], run={"shard_rows": 3}).model_copy(
        update={"score": ScoreConfig.model_validate(score)}
    )
    report = refresh(config)
    assert counts(report) == {
        "links": 8, "ok": 5, "filtered": 0, "failed": 1, "duplicate": 0, "malformed": 0, "unchanged": 2,
    }  # fmt: skip
    names = ["clip_similarity", "score_nsfw", "score_watermark"]
    assert SampleTable.open(config.table.uri).schema.names[-2:] == names[1:]
    found = {row["url"]: row for row in rows(config)}
    # Those that came before there were scores have them too, and are not fetched again.
    assert report.scored == 2
    assert server.hits["/0.jpg"] == server.hits["/1.jpg"] == 1
    scored = [found[url] for url in urls]
    expected = Scorer(config.score)([row["image"] for row in scored], [row["caption"] for row in scored])
    for name in names:
        assert [row[name] for row in scored] == pytest.approx(expected[name], abs=1e-5)
    assert [row["url"] for row in rows(config, "ok")] == urls
    # A refresh that asks for no scores leaves the columns of the table as they are.
    assert refresh(configure(tmp_path, lines)).unchanged == 7


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("is_on_cluster", [True, False])
def test_rows_of_the_list_that_lack_a_score_get_it_without_a_fetch(
    tmp_path: Path,
    server: PictureServer,
    weights: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    is_on_cluster: bool,
) -> None:
    monkeypatch.setattr("pipelines.data.refresh._needs_cluster", lambda *_: is_on_cluster)
    urls = list(server.add_pictures(6))
    lines = [line(url, f"a picture of waves, number {number}") for number, url in enumerate(urls)]
    clip = {"model": f"local-dir:{weights / 'own'}", "device": "cpu"}

    def run(lines: list[str], **score: Any) -> tuple[RefreshReport, dict[str, dict[str, Any]]]:
        config = configure(tmp_path, lines, run={"shard_rows": 4})
        config = config.model_copy(update={"score": ScoreConfig.model_validate({"clip": clip} | score)})
        report = refresh(config)
        return report, {row["url"]: row for row in rows(config)}

    _, old = run(lines[:5])
    refresh(configure(tmp_path, lines[5:]))
    server.forget()
    lines[1] = line(urls[1], "a picture of something else")
    lines[2] = line(urls[2], "too short")
    # The last one is not in the list, and stays as it is.
    report, new = run(lines[:5])
    assert (report.recaptioned, report.scored, report.ok, report.filtered) == (2, 1, 1, 1)
    score = ScoreConfig.model_validate({"clip": clip, "zero_shot": {"watermark": TEXTS}})
    expected = Scorer(score)([old[urls[1]]["image"]], ["a picture of something else"])
    assert new[urls[1]]["clip_similarity"] == pytest.approx(expected["clip_similarity"][0], abs=1e-5)
    assert abs(new[urls[1]]["clip_similarity"] - old[urls[1]]["clip_similarity"]) > 1e-4
    assert (new[urls[2]]["outcome"], new[urls[2]]["clip_similarity"]) == ("filtered", None)
    assert new[urls[5]]["clip_similarity"] is None
    assert all(new[url] == old[url] for url in (urls[0], *urls[3:5]))

    # A column more: the similarities that are there are left alone.
    report, more = run(lines, zero_shot={"watermark": TEXTS})
    kept = [url for url in urls if url != urls[2]]
    assert (report.scored, report.unchanged) == (5, 6)
    expected = Scorer(score)([more[url]["image"] for url in kept], [more[url]["caption"] for url in kept])
    for name, values in expected.items():
        assert [more[url][name] for url in kept] == pytest.approx(values, abs=1e-5)
    assert len(more) == 6
    again, _ = run(lines, zero_shot={"watermark": TEXTS})
    assert (again.scored, again.table_version) == (0, report.table_version)
    assert not server.hits


def test_model_that_is_not_there_is_told_before_anything_is_fetched(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(1))
    score = ScoreConfig.model_validate({"clip": {"model": "ViT-B-23", "pretrained": "openai"}})
    config = configure(tmp_path, [line(urls[0])]).model_copy(update={"score": score})
    with pytest.raises(ConfigError, match="ViT-B-32"):
        refresh(config)
    assert not server.hits
