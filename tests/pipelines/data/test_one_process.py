"""Where one worker is enough, a refresh does its work in its own process, without Ray."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.config import RefreshConfig
from pipelines.data.table.sample_table import SampleTable
from tests.pipelines.data.picture_server import PictureServer
from tests.pipelines.data.test_refresh import PATIENT, TROUBLE, configure, line, rows

_REFRESH = """
import json, sys
from pipelines.data.config import RefreshConfig
from pipelines.data.refresh import refresh
report = refresh(RefreshConfig.model_validate_json(sys.stdin.read()))
print(json.dumps(report.as_dict() | {"ray": "ray" in sys.modules}))
"""


def start(config: RefreshConfig) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _REFRESH]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert driver.stdin is not None
    driver.stdin.write(config.model_dump_json())
    driver.stdin.close()
    driver.stdin = None
    return driver


def test_everything_is_accounted_for_without_ray(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(40))
    lines = [line(url) for url in urls]
    lines[7:7] = [line(server.url(path)) for path in TROUBLE]
    config = configure(tmp_path, lines, fetch=PATIENT, run={"workers": 1, "shard_rows": 9})
    out, _ = start(config).communicate(timeout=120)
    assert '"ray": false' in out
    assert f'"links": {len(lines)}, "ok": 40, "filtered": 1, "failed": {len(TROUBLE) - 1}' in out
    found = {row["url"]: (row["outcome"], row["reason"]) for row in rows(config)}
    assert len(rows(config)) == len(lines)
    assert {path: found[server.url(path)] for path in TROUBLE} == TROUBLE
    assert [row["url"] for row in rows(config, "ok")] == urls
    assert all(server.hits[f"/{number}.jpg"] == 1 for number in range(40))


def test_interrupt_ends_at_once_and_loses_nothing_committed(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(10))
    lines = [line(url) for url in urls] + [line(server.url(f"/stall?{number}")) for number in range(30)]
    changes = {"run": {"workers": 1, "shard_rows": 10}, "fetch": {"deadline_s": 300, "retries": 0}}
    config = configure(tmp_path, lines, **changes)
    driver = start(config)
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and server.hits["/stall"] < 30:
        time.sleep(0.02)
    assert server.hits["/stall"] == 30
    driver.send_signal(signal.SIGINT)
    # Far below the deadline of what is being fetched.
    _, error = driver.communicate(timeout=60)
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert sum(shard.num_rows for shard in SampleTable.open(config.table.uri).shards(None)) in (0, 10)
    fewer = configure(tmp_path, lines[:10], run={"workers": 1, "shard_rows": 10})
    out, _ = start(fewer).communicate(timeout=60)
    assert '"links": 10' in out
    assert [row["url"] for row in rows(fewer)] == urls


@pytest.mark.usefixtures("ray_cluster")
def test_cluster_that_is_there_is_used(tmp_path: Path, server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.data.pipeline
    from pipelines.data.refresh import refresh

    calls: list[str] = []
    inner = pipelines.data.pipeline.written_on_cluster

    def counted(*args: Any) -> Any:
        calls.append("cluster")
        return inner(*args)

    monkeypatch.setattr("pipelines.data.pipeline.written_on_cluster", counted)
    urls = list(server.add_pictures(2))
    assert refresh(configure(tmp_path, [line(url) for url in urls], run={"workers": 1})).ok == 2
    assert calls == ["cluster"]
