"""A small table, and a checkpoint with random weights that is said to have been trained on it."""

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from deltalake import WriterProperties, write_deltalake
from numpy.typing import NDArray
from PIL import Image

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.nested_unet import build_network
from pipelines.data.table.sample_table import SampleTable
from pipelines.train.checkpoint import Checkpoint, Manifest
from pipelines.train.checkpoint_writer import save_checkpoint

SIDE = 16
NUM_ROWS = 40
# True of all of them.
WHERE = "caption like 'disc %'"


def real_picture(index: int) -> NDArray[np.uint8]:
    """A disc on white, its colour and size told by the row's index."""
    rng = np.random.default_rng([7, index])
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
    picture[x**2 + y**2 < rng.uniform(9, 50)] = rng.integers(0, 256, 3)
    return picture


@pytest.fixture(scope="package")
def table(tmp_path_factory: pytest.TempPathFactory) -> SampleTable:
    """40 ok rows in three shards of several row groups, and a few that failed."""
    uri = tmp_path_factory.mktemp("evaluate") / "table"
    for first, last, outcome in ((0, 17, "ok"), (17, 30, "ok"), (30, NUM_ROWS, "ok"), (90, 93, "failed")):
        rows = []
        for index in range(first, last):
            buffer = io.BytesIO()
            Image.fromarray(real_picture(index)).save(buffer, "PNG")
            values = dict.fromkeys(SampleTable.SCHEMA.names) | {
                "id": index.to_bytes(16, "big"),
                "url": f"http://example.org/{index}",
                "caption": f"disc {index}",
                "source": "test",
                "outcome": outcome,
                "retryable": False,
                "attempts": 1,
                "fetched_at": datetime(2026, 1, 1, tzinfo=UTC),
                "image": buffer.getvalue() if outcome == "ok" else None,
            }
            rows.append(values)
        data = pa.Table.from_pylist(rows, schema=SampleTable.SCHEMA)
        groups = WriterProperties(max_row_group_size=6)
        write_deltalake(str(uri), data, mode="append", partition_by=["outcome"], writer_properties=groups)
    return SampleTable.open(str(uri))


def make_checkpoint(table: SampleTable, folder: Path, *, images_seen: int = 64, where: str | None = None) -> Checkpoint:
    """A network of 16 and 8 px; its EMA weights differ from its raw ones."""
    shared: dict[str, Any] = {"num_resnets": (1, 1), "num_groups": 4, "num_heads": 2, "time_dim": 16}
    shell = UNetConfig(resolution=16, channels=(4, 8), num_attention_layers=(0, 0), mid_blocks=False, **shared)
    inner = UNetConfig(
        resolution=8, channels=(8, 8), num_attention_layers=(0, 1), text_dim=384, text_proj_dim=8, **shared
    )
    networks = MatryoshkaConfig((shell, inner))
    manifest = Manifest(
        stage=1,
        images_seen=images_seen,
        total_images_seen=100 + images_seen,
        stage_done=True,
        network=networks.to_dict(),
        schedule={"num_timesteps": 1000, "shift_power": 1.0},
        config={"name": "discs", "seed": 3} | ({} if where is None else {"data": {"where": where}}),
        table_uri=table.uri,
        table_version=table.version,
        text_encoder="minilm",
        max_tokens=8,
        run_id="",
        code_version="0",
        metrics={},
    )
    tensors = {}
    for name, seed in (("weights", 1), ("ema", 2)):
        torch.manual_seed(seed)
        tensors[name] = build_network(networks).state_dict()
    return save_checkpoint(str(folder), manifest, tensors)


@pytest.fixture(scope="package")
def checkpoint(table: SampleTable, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(table, tmp_path_factory.mktemp("run"), where=WHERE)
