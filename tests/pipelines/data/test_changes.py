"""Changes of a table that fetch nothing: captions, pruning."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mdm_core.errors import ConfigError
from pipelines import cluster
from pipelines.data.config import RefreshConfig
from pipelines.data.refresh import RefreshReport, refresh
from pipelines.data.table.sample_table import SampleTable
from tests.pipelines.data.picture_server import PictureServer
from tests.pipelines.data.test_refresh import CAPTION, configure, counts, line, rows


def without_ray(config: RefreshConfig) -> RefreshReport:
    """Runs a refresh that has nothing to fetch, and so must not start Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "connect", lambda **_: pytest.fail("Ray was started with nothing to fetch"))
        return refresh(config)


@pytest.mark.usefixtures("ray_cluster")
def test_changed_caption_is_a_new_version_of_the_row_without_a_fetch(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(12))
    lines = [line(url) for url in urls] + [line(server.url("/missing"))]
    before = refresh(configure(tmp_path, lines, run={"shard_rows": 5}))
    old = {row["url"]: row for row in rows(configure(tmp_path, lines))}
    server.forget()
    lines[3] = line(urls[3], "waves of another kind")
    lines[8] = line(urls[8], "too short")
    lines[12] = line(server.url("/missing"), "gone, and told otherwise")
    config = configure(tmp_path, lines, run={"shard_rows": 5})
    report = without_ray(config)
    assert not server.hits
    assert counts(report) == {
        "links": 13, "ok": 1, "filtered": 1, "failed": 1, "duplicate": 0, "malformed": 0, "unchanged": 10,
    }  # fmt: skip
    assert (report.recaptioned, report.reasons) == (3, {"caption_words": 1, "http_404": 1})

    new = {row["url"]: row for row in rows(config)}
    assert len(rows(config)) == len(new) == 13
    assert new[urls[3]] == old[urls[3]] | {"caption": "waves of another kind"}
    gone: dict[str, Any] = {"outcome": "filtered", "reason": "caption_words", "caption": "too short"}
    gone |= dict.fromkeys(("image", "format", "width", "height", "phash"))
    assert new[urls[8]] == old[urls[8]] | gone
    missing = server.url("/missing")
    assert new[missing] == old[missing] | {"caption": "gone, and told otherwise"}
    assert all(new[url] == old[url] for url in urls if url not in (urls[3], urls[8]))
    assert [row["url"] for row in rows(config, "ok")] == urls[:8] + urls[9:]
    # A model that was trained on the earlier version can still be traced to what it saw.
    table = SampleTable.open(config.table.uri, before.table_version)
    assert {caption for s in table.shards() for caption in table.read(s)["caption"].to_pylist()} == {CAPTION}
    assert without_ray(config).unchanged == 13


@pytest.mark.usefixtures("ray_cluster")
def test_link_left_out_for_its_caption_is_fetched_when_that_is_mended(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(4))
    lines = [line(url, "short") for url in urls]
    assert counts(refresh(configure(tmp_path, lines)))["filtered"] == 4
    assert not server.hits
    lines[2] = line(urls[2])
    lines[3] = line(urls[3], "terse")
    report = refresh(configure(tmp_path, lines))
    # The other one that changed is looked at again, and is as short as before.
    assert (report.ok, report.filtered, report.unchanged, report.recaptioned) == (1, 1, 2, 0)
    assert server.hits == {"/2.jpg": 1}
    found = {row["url"]: (row["outcome"], row["caption"]) for row in rows(configure(tmp_path, lines))}
    assert len(rows(configure(tmp_path, lines))) == 4
    assert found == {
        urls[0]: ("filtered", "short"),
        urls[1]: ("filtered", "short"),
        urls[2]: ("ok", CAPTION),
        urls[3]: ("filtered", "terse"),
    }


@pytest.mark.usefixtures("ray_cluster")
def test_links_gone_from_the_list_stay_unless_pruned_and_other_sources_stay(
    tmp_path: Path, server: PictureServer
) -> None:
    urls = list(server.add_pictures(9))
    other = [line(url) for url in urls[6:]]
    refresh(configure(tmp_path, other, source={"name": "other"}))
    refresh(configure(tmp_path, [line(url) for url in urls[:6]]))
    fewer = [line(url) for url in urls[:4]]
    assert counts(without_ray(configure(tmp_path, fewer)))["unchanged"] == 4
    assert len(rows(configure(tmp_path, fewer))) == 9
    config = configure(tmp_path, fewer, run={"prune": True})
    report = without_ray(config)
    assert (report.pruned, report.unchanged, report.links) == (2, 4, 4)
    assert sorted(row["url"] for row in rows(config)) == sorted(urls[:4] + urls[6:])
    assert Counter(row["source"] for row in rows(config)) == {"test": 4, "other": 3}
    assert without_ray(config).pruned == 0
    # A link that comes back is new.
    server.forget()
    assert refresh(configure(tmp_path, [line(urls[5])])).ok == 1
    assert server.hits == {"/5.jpg": 1}


def test_pruning_by_one_file_leaves_the_rows_of_another(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(2))
    for at, prune in ((0, False), (1, True)):
        uri = tmp_path / f"list#{at}.tsv"
        uri.write_text(line(urls[at]) + "\n")
        config = configure(tmp_path, [], source={"uri": str(uri), "name": ""}, run={"prune": prune, "workers": 1})
        assert refresh(config).pruned == 0
    assert {row["url"]: row["source"] for row in rows(config)} == {urls[0]: "list#0.tsv", urls[1]: "list#1.tsv"}


@pytest.mark.usefixtures("ray_cluster")
def test_pruning_by_nothing_is_refused(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(3))
    refresh(configure(tmp_path, [line(url) for url in urls]))
    with pytest.raises(ConfigError, match=r"has no link, and run\.prune would remove all of test"):
        refresh(configure(tmp_path, ["not a line"], run={"prune": True}))
    assert len(rows(configure(tmp_path, []))) == 3
    with pytest.raises(ValidationError, match=r"run.limit=2 reads a part of the list"):
        configure(tmp_path, [], run={"prune": True, "limit": 2})
