"""A refresh whose rows go through a second pool of workers, for scores."""

from pathlib import Path

import pytest

from mdm_core.errors import ConfigError
from pipelines.data.config import ScoreConfig
from pipelines.data.refresh import refresh
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
    assert all(row[name] is None for url in urls[:2] for row in [found[url]] for name in names)
    scored = [found[url] for url in urls[2:]]
    expected = Scorer(config.score)([row["image"] for row in scored], [row["caption"] for row in scored])
    for name in names:
        assert [row[name] for row in scored] == pytest.approx(expected[name], abs=1e-5)
    assert [row["url"] for row in rows(config, "ok")] == urls
    # A refresh that asks for no scores leaves the columns of the table as they are.
    assert refresh(configure(tmp_path, lines)).unchanged == 7


def test_model_that_is_not_there_is_told_before_anything_is_fetched(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(1))
    score = ScoreConfig.model_validate({"clip": {"model": "ViT-B-23", "pretrained": "openai"}})
    config = configure(tmp_path, [line(urls[0])]).model_copy(update={"score": score})
    with pytest.raises(ConfigError, match="ViT-B-32"):
        refresh(config)
    assert not server.hits
