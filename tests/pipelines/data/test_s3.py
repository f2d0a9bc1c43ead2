"""Refreshes on a real S3 server: the list and the table are there, and some of the requests fail."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import s3fs

from jobs import refresh, stats
from pipelines import s3, storage
from pipelines.benchmark.data.noop import sample_rows
from pipelines.data.config import FiltersConfig
from pipelines.data.stats import table_stats
from pipelines.data.table import keys
from pipelines.data.table.commit import commit
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.sample_table import SampleTable
from pipelines.data.table.shards import write_shard
from tests.pipelines.data.accounting_proof import Proof
from tests.pipelines.data.trouble_server import TroubleServer
from tests.pipelines.failing_proxy import FAILURES, FailingProxy
from tests.pipelines.s3_server import OWNER, READER, S3Server

LINE = b"http://127.0.0.1:9/x.jpg\ta caption of some words\n"


def config_file(folder: Path, list_uri: str, table_uri: str) -> str:
    path = folder / "refresh.yaml"
    path.write_text(
        f"source: {{uri: '{list_uri}'}}\ntable: {{uri: '{table_uri}'}}\nfetch: {{retries: 0}}\ntracking: null\n"
    )
    return str(path)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for the names of Ray's sockets, which may have 107 letters in all."""
    folder = Path(tempfile.mkdtemp(prefix="mdm-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def failing(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, *, percent: float, delay_s: float = 0.0
) -> Iterator[FailingProxy]:
    with FailingProxy(s3_server.address, percent=percent, seed=2, delay_s=delay_s) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def test_failing_requests_change_nothing(
    short_folder: Path, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TroubleServer(300) as server, failing(s3_server, monkeypatch, percent=5) as proxy:
        proof = Proof(server, short_folder, bucket, shard_rows=75, deadline_s=4, num_workers=1)
        proof.check_first("table")
        proof.check_nothing_new("table")
    assert proof.checks.failed == []
    assert proof.checks.num_passed == 23
    assert sum(proxy.counts[kind] for kind in FAILURES) > 5


def test_kills_of_the_driver_and_of_a_worker_change_nothing(
    short_folder: Path, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TroubleServer(300, seed=1) as server, failing(s3_server, monkeypatch, percent=5):
        local = Proof(server, short_folder, str(short_folder / "local"), shard_rows=50, deadline_s=4, num_workers=1)
        code, _, _ = local.refresh("undisturbed")
        assert code == 0
        proof = Proof(server, short_folder, bucket, shard_rows=20, deadline_s=4)
        proof.check_kills(["driver", "worker"], seed=1, undisturbed=local.table("undisturbed"), work_s=4)
    assert proof.checks.failed == []


def test_two_at_once_make_one_table(
    short_folder: Path, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TroubleServer(200, seed=5) as server, failing(s3_server, monkeypatch, percent=5):
        proof = Proof(server, short_folder, bucket, shard_rows=25, deadline_s=4, num_workers=1)
        proof.check_two_at_once("table")
    assert proof.checks.failed == []


def commit_pictures(uri: str, *, num_shards: int, shard_rows: int, picture_bytes: int) -> keys.Keys:
    """Makes a table of the links 0.jpg, 1.jpg and so on, with pictures of random bytes; returns its ids, sorted."""
    pictures = random.Random(0)
    urls = [f"http://127.0.0.1:9/{number}.jpg" for number in range(num_shards * shard_rows)]
    images = [pictures.randbytes(picture_bytes) for _ in urls]
    rows = sample_rows(urls, images, ["a caption"] * len(urls), datetime.now(UTC))
    parts = [rows.slice(shard_rows * number, shard_rows) for number in range(num_shards)]
    shards = [write_shard(uri, f"00000000-{number:06d}", "ok", part) for number, part in enumerate(parts)]
    commit(Ledger(uri, now_s=time.time()), shards, FiltersConfig())
    return np.sort(keys.from_column(rows["id"]))


def test_pictures_are_not_fetched_to_see_what_there_is(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a refresh's look at the table, and by statistics: of 12 MB, the columns that they are about."""
    uri = f"{bucket}/table"
    ids = commit_pictures(uri, num_shards=2, shard_rows=300, picture_bytes=20_000)
    with failing(s3_server, monkeypatch, percent=0) as proxy:
        s3.check_bucket.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()
        found, _ = Ledger(uri, now_s=time.time()).look_up(ids)
        told = table_stats(uri)
    assert (found.tolist(), told["rows"]) == ([True] * 600, 600)
    assert told["ok_bytes"] > 12_000_000
    # Ids and hashes alone are 29 kB that nothing compresses.
    assert 29_000 < proxy.counts["answer_bytes"] < 1_000_000


def test_many_files_are_asked_for_at_once(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a refresh's look at the table, and by a choice of rows; one after the other, a distant server takes hours."""
    uri = f"{bucket}/table"
    # Two row groups each, and between their columns more than is worth reading.
    ids = commit_pictures(uri, num_shards=80, shard_rows=200, picture_bytes=300)
    with failing(s3_server, monkeypatch, percent=0, delay_s=0.3) as looking:
        s3fs.S3FileSystem.clear_instance_cache()
        found, _ = Ledger(uri, now_s=time.time()).look_up(ids)
    with failing(s3_server, monkeypatch, percent=0, delay_s=0.3) as choosing:
        s3fs.S3FileSystem.clear_instance_cache()
        chosen = list(SampleTable.open(uri).query("select id from samples where url like '%7.jpg'"))
    assert (found.sum(), sum(batch.num_rows for batch in chosen)) == (16_000, 1600)
    assert looking.mean_at_once > 10
    assert choosing.mean_at_once > 20


def test_versions_and_statistics_are_read_from_s3(
    tmp_path: Path,
    bucket: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage.write_bytes_atomic(f"{bucket}/list.tsv", LINE + LINE.replace(b"x.jpg", b"y.jpg"))
    config = config_file(tmp_path, f"{bucket}/list.tsv", f"{bucket}/table")
    with failing(s3_server, monkeypatch, percent=5):
        # In a process of its own: Ray's workers in this one's cluster began without the address of the server.
        command = [sys.executable, "-m", "jobs.refresh", "--config", config, "--json"]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        made = json.loads(run.stdout.splitlines()[-1])
        assert (made["links"], made["failed"], made["reasons"]) == (2, 2, {"private_address": 2})
        assert stats.main([f"{bucket}/table", "--json"]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (told["rows"], told["failed"], told["table_version"]) == (2, 2, made["table_version"])
        assert [s.num_rows for s in SampleTable.open(f"{bucket}/table", made["table_version"]).shards(None)] == [2]
        assert SampleTable.open(f"{bucket}/table", 0).shards(None) == ()


@pytest.mark.parametrize("place", ["list", "table"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-one"}, "SignatureDoesNotMatch; the secret is not that of the key: correct"),
        ({"bucket": "s3://no-such-bucket"}, "NoSuchBucket; make the bucket, or correct its name"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "no S3 server answers"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials in the environment"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(
    tmp_path: Path,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    changes: dict[str, str | None],
    message: str,
) -> None:
    storage.write_bytes_atomic(f"{bucket}/list.tsv", LINE)
    (tmp_path / "list.tsv").write_bytes(LINE)
    where = changes.get("bucket") or bucket
    uris = {"list": str(tmp_path / "list.tsv"), "table": str(tmp_path / "table")}
    uris[place] = f"{where}/list.tsv" if place == "list" else f"{where}/table"
    for name, value in changes.items():
        if name.startswith("AWS"):
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    s3.check_bucket.cache_clear()
    began_s = time.monotonic()
    assert refresh.main(["--config", config_file(tmp_path, uris["list"], uris["table"]), "--json"]) == 2
    assert_one_message(capsys, "refresh", where, message)
    if place == "table" and message != "no S3 server answers":
        s3.check_bucket.cache_clear()
        assert stats.main([uris["table"], "--json"]) == 2
        assert_one_message(capsys, "stats", where, message)
    # Not a measurement: deltalake and botocore, left to themselves, try for minutes.
    assert time.monotonic() - began_s < 120
    assert not (tmp_path / "table").exists()


def assert_one_message(capsys: pytest.CaptureFixture[str], command: str, where: str, message: str) -> None:
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["exit_code"] == 2
    assert message in result["error"]
    assert result["error"].startswith(where)
    told = [line for line in captured.err.splitlines() if line.startswith(f"mdm {command}:")]
    assert told == [f"mdm {command}: {result['error']}"]
    assert "Traceback" not in captured.err
    assert not any(secret in captured.err + captured.out for secret in (OWNER[1], "wrong-one"))


def test_table_that_may_not_be_written_is_one_message(
    tmp_path: Path,
    bucket: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "list.tsv").write_bytes(LINE)
    for name, value in s3_server.environment(READER).items():
        monkeypatch.setenv(name, value)
    config = config_file(tmp_path, str(tmp_path / "list.tsv"), f"{bucket}/table")
    assert refresh.main(["--config", config, "--json"]) == 1
    captured = capsys.readouterr()
    error = json.loads(captured.out.splitlines()[-1])["error"]
    assert error.startswith(f"could not make a table at {bucket}/table: ")
    assert "AccessDenied" in error
    assert "Traceback" not in captured.err


def test_a_commit_never_replaces_a_version(bucket: str, s3_server: S3Server) -> None:
    """What keeps two refreshes apart: a put of a version that is there is refused by the server."""
    import pyarrow as pa
    from deltalake import CommitProperties, DeltaTable, write_deltalake
    from deltalake.exceptions import CommitFailedError
    from deltalake.transaction import AddAction, RemoveAction

    uri = f"{bucket}/table"
    write_deltalake(uri, pa.table({"x": [1]}), storage_options=storage.delta_options(uri))
    one, two = (DeltaTable(uri, storage_options=storage.delta_options(uri)) for _ in range(2))
    once = CommitProperties(max_commit_retries=0)
    for delta, path in ((one, "first.parquet"), (two, "second.parquet")):
        actions: list[AddAction | RemoveAction] = [AddAction(path, 1, {}, 1, True, "{}")]
        with contextlib.nullcontext() if delta is one else pytest.raises(CommitFailedError):
            delta.create_write_transaction(actions, "append", delta.schema(), commit_properties=once)
    log = s3_server.filesystem().cat_file(f"{uri}/_delta_log/00000000000000000001.json")
    assert b"first.parquet" in log
    assert b"second.parquet" not in log
