"""A run on a cluster whose machines come, go and are called back, each a raylet of its own on this host.

    pytest tests/pipelines/train/elastic.py

It takes three to four minutes, most of them Ray's, and is no part of `make test`.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster

from pipelines.data.table.sample_table import SampleTable
from pipelines.tracking import child_runs, metric_history
from pipelines.train.checkpoint import list_checkpoints, open_checkpoint
from pipelines.train.hooks import Hooks
from pipelines.train.place import Place
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .command import started
from .conftest import run_config

_MEMORY = 80 * 1024**2
# Some twenty seconds of training, of which five pass between the notice and the machine's end: a checkpoint at the
# notice is not mistaken for one that was due.
_EVERY_IMAGES = 3200


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, which sees after two seconds that a machine is gone, not after half a minute."""
    settings = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_timeout_ms": 1000}
    head = {"num_cpus": 0, "object_store_memory": _MEMORY, "include_dashboard": False, "_system_config": settings}
    made = Cluster(head_node_args=head)
    yield made
    made.shutdown()


def test_machines_that_are_called_back_come_and_go(cluster: Cluster, table: SampleTable, tmp_path: Path) -> None:
    stage = {"resolution": 8, "images": 80_000, "global_batch_size": 8, "lr": 1e-3}
    config = run_config(
        table,
        tmp_path,
        stages=[stage],
        checkpoint={"uri": str(tmp_path / "run"), "every_images": _EVERY_IMAGES, "keep": 100},
        scaling={"workers": [1, 2], "resize_every_s": 2.0},
        log_every_steps=10,
    )

    def saved() -> list[int]:
        found = list_checkpoints(config.checkpoint.uri) if (tmp_path / "run" / "stage-0").exists() else []
        return [int(uri.rpartition("-")[2]) for uri in found]

    def workers() -> float:
        return metric_history(config.tracking, run_id, "workers")[-1][1]

    _, second = (cluster.add_node(num_cpus=1, object_store_memory=_MEMORY) for _ in range(2))
    environment = {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4"}
    with started(config, tmp_path, environment=environment) as command:
        command.wait_until(lambda: bool(saved()))
        run_id = child_runs(config.tracking, open_checkpoint(config.checkpoint.uri).manifest.run_id)["stage 8 px"]
        assert workers() == 2
        _call_back(cluster, second.node_id)
        # One more checkpoint at once, long before the next would have come.
        command.wait_until(lambda: any(images % _EVERY_IMAGES for images in saved()))
        command.wait_until(lambda: workers() == 1)
        third = cluster.add_node(num_cpus=1, object_store_memory=_MEMORY)
        command.wait_until(lambda: workers() == 2)
        cluster.remove_node(third, allow_graceful=False)
        command.wait_until(lambda: workers() == 1)
        at = saved()[-1]
        command.wait_until(lambda: saved()[-1] > at)
    alone = run_config(table, tmp_path / "alone", stages=[stage | {"images": saved()[-1]}])
    train_stages(RunContext(alone, table.version, "run"), place=Place(), hooks=Hooks())
    expected = open_checkpoint(alone.checkpoint.uri).tensors("ema")
    for name, value in open_checkpoint(config.checkpoint.uri).tensors("ema").items():
        torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=0)


def _call_back(cluster: Cluster, node_id: str) -> None:
    """Says that a machine goes in five seconds, as a cloud does of a spot machine."""
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "called back"]
    when = ["--node-id", node_id, "--deadline-remaining-seconds", "5"]
    subprocess.run([*drain, *why, *when], check=True, capture_output=True)
