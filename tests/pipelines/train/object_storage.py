"""A run with its table and checkpoints on S3, behind a proxy that fails one request in twenty, its worker killed.

Not in the suite, for it takes minutes:

    pytest tests/pipelines/train/object_storage.py
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
import torch

from pipelines import s3, storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.train.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.hooks import Hooks
from pipelines.train.place import Place
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages
from tests.pipelines.failing_proxy import FailingProxy
from tests.pipelines.s3_server import S3Server, without_aws

from .command import started
from .conftest import run_config

_FAIL_PERCENT = 5


def config_of(table: SampleTable, folder: Path, uri: str) -> TrainConfig:
    """Two stages of 300 and 100 small steps, with a checkpoint every 20."""
    stages = [
        {"resolution": side, "images": images, "global_batch_size": 8, "lr": 1e-3}
        for side, images in ((8, 2400), (16, 800))
    ]
    return run_config(table, folder, stages=stages, checkpoint={"uri": uri, "every_images": 160}, log_every_steps=20)


@pytest.fixture
def undisturbed(table: SampleTable, tmp_path: Path) -> Checkpoint:
    """The last checkpoint of the run on a local disk, in this process."""
    config = config_of(table, tmp_path / "undisturbed", str(tmp_path / "undisturbed" / "run"))
    torch.set_num_threads(1)
    train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=Hooks())
    return open_checkpoint(config.checkpoint.uri)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FailingProxy]]:
    """A bucket that is reached through the proxy."""
    with S3Server(tmp_path / "s3") as server, FailingProxy(server.address, percent=_FAIL_PERCENT) as proxy:
        for name in set(os.environ) - set(without_aws()):
            monkeypatch.delenv(name)
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        bucket = server.make_bucket("training")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.check_bucket.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()
        yield bucket, proxy
    s3fs.S3FileSystem.clear_instance_cache()
    s3.check_bucket.cache_clear()
    print(f"requests: {dict(proxy.counts)}")
    assert proxy.num_failed > 0


def test_a_failing_storage_and_a_killed_worker_change_no_bit(
    table: SampleTable, undisturbed: Checkpoint, failing: tuple[str, FailingProxy], tmp_path: Path
) -> None:
    bucket, _ = failing
    for path in sorted(Path(table.uri).rglob("*")):
        if path.is_file():
            uri = storage.join(bucket, "table", str(path.relative_to(table.uri)))
            storage.write_bytes_atomic(uri, path.read_bytes())
    config = config_of(SampleTable.open(f"{bucket}/table"), tmp_path, f"{bucket}/run")

    def newest() -> int:
        found = list_checkpoints(config.checkpoint.uri)
        return int(found[-1].rpartition("-")[2]) if found else 0

    with started(config, tmp_path, patience_s=300) as command:
        command.wait_until(lambda: newest() >= 640)
        command.kill_worker()
        assert command.result() == 0
    last = open_checkpoint(config.checkpoint.uri)
    assert last.manifest.stage == 1
    for name in ("weights", "ema", "optimizer"):
        wanted, found = undisturbed.tensors(name), last.tensors(name)
        assert found.keys() == wanted.keys()
        assert [key for key, value in wanted.items() if not torch.equal(value, found[key])] == []
