from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs import forget as forget_job
from jobs import refresh as refresh_job
from jobs.stats import main
from pipelines.data.refresh import refresh
from pipelines.data.stats import stats_figure, stats_text, table_stats
from pipelines.data.table.commit import commit
from pipelines.data.table.sample_table import SampleTable
from tests.pipelines.data.picture_server import PictureServer, draw_picture, encode
from tests.pipelines.data.test_commit import ONCE, ledger, write
from tests.pipelines.data.test_refresh import configure, line


@pytest.mark.usefixtures("ray_cluster")
def test_table_is_described_as_it_was_made(
    tmp_path: Path, server: PictureServer, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = list(server.add_pictures(6))
    server.files["/large.jpg"] = encode(draw_picture(77, 700, 600))
    lines = [line(url) for url in [*urls[:4], server.url("/large.jpg")]]
    lines += [line(server.url(f"/missing?{n}")) for n in range(3)] + [line(server.url("/page", "127.0.0.2"))]
    lines += [line(urls[0] + "?x", "short"), line("http://10.0.0.1/a")]
    config = configure(
        tmp_path, lines, fetch={"allow_networks": ["127.0.0.0/8"]}, filters={"min_side_px": 32}, run={"shard_rows": 100}
    )
    first = refresh(config)
    second = refresh(configure(tmp_path, [*lines, *map(line, urls[4:])], source={"name": "more"}))
    stats = table_stats(config.table.uri)
    assert [stats[name] for name in ("rows", "ok", "filtered", "failed")] == [13, 7, 1, 5]
    assert stats["reasons"] == {"http_404": 3, "private_address": 1, "not_an_image": 1, "caption_words": 1}
    assert stats["hosts"] == [
        {"host": "127.0.0.1", "failed": 3, "mostly": "http_404"},
        {"host": "10.0.0.1", "failed": 1, "mostly": "private_address"},
        {"host": "127.0.0.2", "failed": 1, "mostly": "not_an_image"},
    ]
    assert stats["sides_px"] == {"64": 6, "512": 1}
    files = list((tmp_path / "table").rglob("*.parquet"))
    assert stats["size_bytes"] == sum(file.stat().st_size for file in files)
    assert stats["table_version"] == SampleTable.open(config.table.uri).version
    assert [(each["source"], each["ok"], each["filtered"], each["failed"]) for each in stats["refreshes"]] == [
        ("test", 5, 1, 5),
        ("more", 2, 0, 0),
    ]
    for each, report in zip(stats["refreshes"], (first, second), strict=True):
        assert each["table_version"] == report.table_version
        assert 0 < each["seconds"] <= report.seconds + 0.1
        assert each["links_per_s"] == pytest.approx(
            (each["ok"] + each["filtered"] + each["failed"]) / each["seconds"], rel=0.01
        )

    charts: dict[str, list[Any]] = {axes.get_title(): list(axes.patches) for axes in stats_figure(stats).axes}
    assert [bar.get_width() for bar in charts["outcomes"]] == [5, 1, 7]
    assert [bar.get_width() for bar in charts["hosts that fail most"]] == [1, 1, 3]
    pace = [bar.get_height() for bar in charts["links a second of each refresh, by the version that it made"]]
    assert pace == pytest.approx(
        [11 / stats["refreshes"][0]["seconds"], 2 / stats["refreshes"][1]["seconds"]], rel=0.01
    )

    text = stats_text(stats)
    assert f"  {'http_404':<24}{3:>12}" in text.splitlines()
    drawn = tmp_path / "stats.png"
    assert main([config.table.uri, "--plot", str(drawn), "--json"]) == 0
    assert '"failed": 5' in capsys.readouterr().out
    with Image.open(drawn) as picture:
        assert picture.size == (1100, 1000)
    assert main([config.table.uri, "--plot", "stats.svg"]) == 2
    assert "stats.svg must end in .png" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_file_of_the_table_is_one_message(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(tmp_path / "table")
    commit(ledger(uri), [write(uri, 0, ["http://h/a"]), write(uri, 1, ["http://h/b"])], ONCE)
    damaged = next((tmp_path / "table").rglob("*.parquet"))
    if damage == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: 300 if damage == "cut" else 0])
    (tmp_path / "list.tsv").write_text("http://h/a\n")
    (tmp_path / "refresh.yaml").write_text(
        f"source: {{uri: {tmp_path}/list.tsv}}\ntable: {{uri: {uri}}}\ntracking: null\n"
    )
    for job, arguments in (
        (main, [uri]),
        (forget_job.main, ["--table", uri, "--urls", str(tmp_path / "list.tsv")]),
        (refresh_job.main, ["--config", str(tmp_path / "refresh.yaml")]),
    ):
        assert job(arguments) == 1
        told = capsys.readouterr().err
        assert f"{damaged} can't be read: " in told
        assert "restore it, or use another version of the table" in told
        assert "Traceback" not in told
