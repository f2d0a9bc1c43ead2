import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdm_core.errors import ConfigError, WorkError
from pipelines import cluster
from pipelines.data.config import RefreshConfig
from pipelines.data.refresh import RefreshReport, refresh
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.sample_table import SampleTable
from tests.pipelines.data.picture_server import PictureServer

CAPTION = "a picture of waves"
PATIENT = {"deadline_s": 6}
"""For sound links beside some that are not, on a machine that others use as well."""
TROUBLE = {
    "/missing": ("failed", "http_404"),
    "/patience": ("failed", "http_404"),
    "/broken": ("failed", "http_503"),
    "/page": ("failed", "not_an_image"),
    "/truncated.jpg": ("failed", "truncated"),
    "/drip": ("failed", "deadline"),
    "/stall": ("failed", "deadline"),
    "/reset": ("failed", "connection"),
    "/liar": ("failed", "incomplete_body"),
    "/endless": ("failed", "too_large"),
    "/bomb": ("failed", "too_large"),
    "/loop": ("failed", "too_many_redirects"),
    "/to-private": ("failed", "private_address"),
    "/noai": ("filtered", "opted_out"),
}


def configure(tmp_path: Path, lines: Sequence[str], **sections: dict[str, Any]) -> RefreshConfig:
    """Returns the configuration of a refresh of a TSV list with these lines."""
    path = tmp_path / "list.tsv"
    path.write_text("".join(f"{line}\n" for line in lines))
    values: dict[str, Any] = {
        "source": {"uri": str(path), "name": "test"},
        "table": {"uri": str(tmp_path / "table")},
        "tracking": None,
        "fetch": {
            "allow_networks": ["127.0.0.1/32"],
            "deadline_s": 2,
            "max_bytes": 1 << 20,
            "retries": 1,
            "per_host": 32,
        },
        "image": {"size_px": 32, "format": "png"},
        "filters": {"min_side_px": 32},
        "run": {"shard_rows": 25, "workers": 2, "commit_every_s": 0},
    }
    for section, changes in sections.items():
        values[section] = values[section] | changes
    return RefreshConfig.model_validate(values)


def line(url: str, caption: str = CAPTION) -> str:
    return f"{url}\t{caption}"


def rows(config: RefreshConfig, outcome: str | None = None) -> list[dict[str, Any]]:
    """Returns the rows of the table, in its order."""
    table = SampleTable.open(config.table.uri)
    return [row for shard in table.shards(outcome) for row in table.read(shard).to_pylist()]


def counts(report: RefreshReport) -> dict[str, int]:
    names = ("links", "ok", "filtered", "failed", "duplicate", "malformed", "unchanged")
    return {name: getattr(report, name) for name in names}


@pytest.mark.usefixtures("ray_cluster")
def test_every_line_is_accounted_for_as_the_server_knows(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(60))
    # The same bytes under another link.
    server.files["/again.jpg"] = server.files["/3.jpg"]
    lines = [line(url) for url in urls]
    lines[10:10] = [line(server.url(path)) for path in TROUBLE]
    lines += [line(urls[5]), line(urls[6], "another caption for it")]
    lines += [line(server.url("/again.jpg")), line(server.url("/7.jpg", "127.0.0.3")), line("http://10.0.0.1/x.jpg")]
    lines += [line(server.url("/busy/8.jpg?once")), line(urls[0] + "?long", "too short")]
    lines += ["no tab here", "ftp://host/a.jpg\tnot a link", f"{server.url('/9.jpg?empty')}\t"]
    config = configure(tmp_path, lines, fetch=PATIENT)
    report = refresh(config)

    reasons = Counter(reason for _, reason in TROUBLE.values())
    reasons.update(["private_address"] * 2 + ["exact_duplicate"] * 2 + ["caption_words"])
    reasons.update(["wrong_columns", "not_a_link", "no_caption"])
    assert counts(report) == {
        "links": len(lines),
        "ok": 60,
        # Opted out, twice the same bytes as another link, one short caption.
        "filtered": 4,
        "failed": len(TROUBLE) - 1 + 2,
        "duplicate": 2,
        "malformed": 3,
        "unchanged": 0,
    }
    assert report.reasons == dict(reasons)
    extra = {"reasons", "recaptioned", "scored", "pruned", "seconds", "table_version"}
    assert set(report.as_dict()) == counts(report).keys() | extra
    assert report.table_version == SampleTable.open(config.table.uri).version

    # The server's side of it: each good picture asked for once, what may pass twice, the rest once.
    assert [server.hits[f"/{number}.jpg"] for number in range(60)] == [1] * 60
    assert (server.hits["/broken"], server.hits["/missing"], server.hits["/busy/8.jpg"]) == (2, 1, 2)
    assert set(server.hosts) == {"127.0.0.1"}

    found = {row["url"]: row for row in rows(config)}
    assert len(found) == len(rows(config)) == 65 + len(TROUBLE)
    for path, (outcome, reason) in TROUBLE.items():
        row = found[server.url(path)]
        assert (row["outcome"], row["reason"], row["image"]) == (outcome, reason, None)
        assert row["retryable"] == (reason in ("http_503", "deadline", "connection", "incomplete_body"))
    for number, url in enumerate(urls):
        _assert_row_holds(found[url], server.files[f"/{number}.jpg"])

    # Nothing is new: nothing is asked for, and the failures are not yet due.
    server.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "connect", lambda **_: pytest.fail("Ray was started with nothing to do"))
        again = refresh(config)
    assert counts(again) | {"unchanged": 0} == counts(report) | {"ok": 0, "filtered": 0, "failed": 0}
    assert again.unchanged == len(found)
    assert again.table_version == report.table_version
    assert not server.hits


def _assert_row_holds(row: dict[str, Any], body: bytes) -> None:
    whole = Image.open(io.BytesIO(body))
    expected = np.asarray(whole.resize((48, 32), Image.Resampling.BICUBIC), np.float64)
    stored = np.asarray(Image.open(io.BytesIO(row["image"])), np.float64)
    assert np.sqrt(np.mean((stored - expected) ** 2)) < 1
    assert row["sha256"] == hashlib.sha256(body).digest()
    assert row["id"] == hashlib.blake2b(row["url"].encode(), digest_size=16).digest()
    names = ("outcome", "reason", "format", "width", "height", "original_width", "original_height", "source", "caption")
    assert [row[name] for name in names] == ["ok", None, "png", 48, 32, 96, 64, "test", CAPTION]
    assert (row["attempts"], row["retryable"]) == (1, False)


@pytest.mark.usefixtures("ray_cluster")
def test_an_interrupt_right_after_a_commit_loses_nothing(
    tmp_path: Path, server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, [line(url) for url in server.add_pictures(60)])
    record = Ledger.record
    calls: list[int] = []

    def interrupted(ledger: Ledger, *arguments: Any) -> None:
        record(ledger, *arguments)
        calls.append(len(calls))
        if len(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            refresh(config)
    committed = rows(config, "ok")
    assert committed
    report = refresh(config)
    assert (report.ok, report.filtered, report.unchanged) == (60 - len(committed), 0, len(committed))
    assert sorted(row["url"] for row in rows(config)) == sorted(server.url(f"/{n}.jpg") for n in range(60))


@pytest.mark.usefixtures("ray_cluster")
def test_rows_stand_in_the_order_of_the_list(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(60))[::-1]
    urls.insert(3, server.url("/stall"))
    config = configure(tmp_path, [line(url) for url in urls], run={"shard_rows": 7})
    refresh(config)
    urls.remove(server.url("/stall"))
    assert [row["url"] for row in rows(config, "ok")] == urls
    assert [shard.num_rows for shard in SampleTable.open(config.table.uri).shards()] == [6] + [7] * 7 + [5]


@pytest.mark.usefixtures("ray_cluster")
def test_only_what_is_new_or_due_is_fetched(
    tmp_path: Path, server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = list(server.add_pictures(6))
    busy = server.url("/late.jpg")
    server.files["/late.jpg"] = b"not yet a picture"
    lines = [line(url) for url in [*urls[:3], server.url("/broken"), busy]]
    assert counts(refresh(configure(tmp_path, lines))) == {
        "links": 5, "ok": 3, "filtered": 0, "failed": 2, "duplicate": 0, "malformed": 0, "unchanged": 0,
    }  # fmt: skip
    server.forget()
    lines += [line(url) for url in urls[3:]]
    monkeypatch.setattr("pipelines.data.refresh.time.time", lambda now=time.time: now() + 3600)
    report = refresh(configure(tmp_path, lines))
    assert counts(report) == {
        "links": 8, "ok": 3, "filtered": 0, "failed": 1, "duplicate": 0, "malformed": 0, "unchanged": 4,
    }  # fmt: skip
    assert server.hits == {"/3.jpg": 1, "/4.jpg": 1, "/5.jpg": 1, "/broken": 2}
    assert Counter(row["attempts"] for row in rows(configure(tmp_path, lines), "failed")) == {1: 1, 2: 1}
    # What would not pass by itself is tried again when asked, and then has one row.
    server.files["/late.jpg"] = server.files["/0.jpg"] + b" "
    config = configure(tmp_path, lines, run={"retry_failed": "all"})
    assert counts(refresh(config)) == {
        "links": 8, "ok": 1, "filtered": 0, "failed": 1, "duplicate": 0, "malformed": 0, "unchanged": 6,
    }  # fmt: skip
    assert Counter(row["url"] for row in rows(config)) == Counter(url for url, _ in (x.split("\t") for x in lines))
    assert [row["attempts"] for row in rows(config, "ok") if row["url"] == busy] == [2]


_DRIVER = """
import sys
from pipelines.data.config import RefreshConfig
from pipelines.data.refresh import refresh
refresh(RefreshConfig.model_validate_json(sys.stdin.read()))
"""


@pytest.mark.usefixtures("ray_cluster")
def test_killed_refresh_is_continued(tmp_path: Path, server: PictureServer) -> None:
    import ray

    urls = list(server.add_pictures(120))
    server.delay_s = 0.1
    config = configure(tmp_path, [line(url) for url in urls], run={"shard_rows": 10}, fetch={"per_host": 4})
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen([sys.executable, "-c", _DRIVER], stdin=subprocess.PIPE, env=environment) as driver:
        assert driver.stdin is not None
        driver.stdin.write(config.model_dump_json().encode())
        driver.stdin.close()
        _wait_for_rows(config, 20)
        driver.send_signal(signal.SIGKILL)
    committed = {row["url"] for row in rows(config)}
    assert 20 <= len(committed) < 120
    server.forget()
    report = refresh(config)
    assert (report.ok, report.unchanged, report.links) == (120 - len(committed), len(committed), 120)
    found = rows(config)
    assert sorted(row["url"] for row in found) == sorted(urls)
    for row in found:
        _assert_row_holds(row, server.files["/" + row["url"].rpartition("/")[2]])


def _wait_for_rows(config: RefreshConfig, count: int) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            if sum(shard.num_rows for shard in SampleTable.open(config.table.uri).shards(None)) >= count:
                return
        except ConfigError:
            pass
        time.sleep(0.02)
    raise AssertionError("the refresh committed nothing in time")


@pytest.mark.usefixtures("ray_cluster")
def test_worker_that_cannot_write_is_one_message(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(30))
    refresh(configure(tmp_path, []))
    config = configure(tmp_path, [line(url) for url in urls])
    (tmp_path / "table" / "outcome=ok").write_text("in the way")
    with pytest.raises(WorkError, match=r"could not write .* bytes to .*outcome=ok") as caught:
        refresh(config)
    assert "Traceback" not in str(caught.value)
    assert rows(config) == []
    (tmp_path / "table" / "outcome=ok").unlink()
    assert refresh(config).ok == 30


def test_empty_list_makes_an_empty_table(tmp_path: Path) -> None:
    config = configure(tmp_path, [])
    assert refresh(config).as_dict() | {"table_version": 0, "seconds": 0} == {
        "links": 0, "ok": 0, "filtered": 0, "failed": 0, "duplicate": 0, "malformed": 0, "unchanged": 0,
        "reasons": {}, "recaptioned": 0, "scored": 0, "pruned": 0, "seconds": 0, "table_version": 0,
    }  # fmt: skip
    assert rows(config) == []


def test_missing_list_makes_no_table(tmp_path: Path) -> None:
    config = configure(tmp_path, [])
    Path(config.source.uri).unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        refresh(config)
    assert not Path(config.table.uri).exists()


def test_malformed_lines_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = refresh(configure(tmp_path, ["nothing", "ftp://h/a\tb"]))
    assert (report.malformed, report.reasons) == (2, {"wrong_columns": 1, "not_a_link": 1})
    assert [record.getMessage().rpartition("list.tsv ")[2] for record in caplog.records] == [
        "line 1 is malformed: wrong_columns",
        "line 2 is malformed: not_a_link",
    ]


def test_only_the_first_malformed_lines_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert refresh(configure(tmp_path, ["nothing"] * 30)).malformed == 30
    assert len(caplog.records) == 21
    assert caplog.records[-1].getMessage().endswith("list.tsv has 10 more malformed lines")


@pytest.mark.usefixtures("ray_cluster")
def test_cluster_that_is_too_small_is_refused_before_work(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(60))
    config = configure(tmp_path, [line(url) for url in urls], run={"workers": 50, "shard_rows": 1})
    with pytest.raises(ConfigError, match="CPUs"):
        refresh(config)
    assert not server.hits
