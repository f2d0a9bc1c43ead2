"""A small table with embeddings beside it, made without the pipeline's own writers, and a run to train on it."""

import hashlib
import io
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import WriterProperties, write_deltalake
from PIL import Image

from pipelines import storage
from pipelines.data.table.sample_table import SampleTable, row_group_sizes
from pipelines.embed.store import EncoderInfo, embedding_folder, encode_embeddings, write_info
from pipelines.train.config import TrainConfig

WIDTH, SIDE = 12, 16


def picture(index: int) -> np.ndarray[Any, Any]:
    """A picture that can be told from every other by its colours."""
    return np.random.default_rng([1, index]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def row_id(index: int) -> bytes:
    """The id of a row."""
    return hashlib.blake2b(str(index).encode(), digest_size=16).digest()


def make_table(
    folder: Path,
    rows_per_shard: tuple[int, ...],
    *,
    row_group_rows: int = 100,
    draw: Callable[[int], np.ndarray[Any, Any]] = picture,
    infinite: int | None = None,
) -> SampleTable:
    """A table of `ok` rows, and embeddings of 2 to 5 tokens whose first number is the row's index, or is infinite."""
    uri, index = str(folder / "table"), 0
    for count in rows_per_shard:
        rows: list[dict[str, Any]] = []
        for number in range(index, index + count):
            buffer = io.BytesIO()
            Image.fromarray(draw(number)).save(buffer, "PNG")
            values: dict[str, Any] = dict.fromkeys(SampleTable.SCHEMA.names)
            values |= {
                "id": row_id(number),
                "url": f"http://example.org/{number}",
                "caption": f"caption {number}",
                "source": "test",
                "outcome": "ok",
                "retryable": False,
                "attempts": 1,
                "fetched_at": datetime(2026, 1, 1, tzinfo=UTC),
                "image": buffer.getvalue(),
                "format": "png",
                "width": SIDE,
                "height": SIDE,
            }
            rows.append(values)
        index += count
        write_deltalake(
            uri,
            pa.Table.from_pylist(rows, schema=SampleTable.SCHEMA),
            mode="append",
            partition_by=["outcome"],
            writer_properties=WriterProperties(max_row_group_size=row_group_rows),
        )
    table = SampleTable.open(uri)
    info = EncoderInfo("minilm", WIDTH, 8)
    write_info(table.uri, info)
    for shard in table.shards("ok"):
        with table.open_shard(shard) as file:
            rows_of, row_groups = file.read(columns=["id", "caption"]), row_group_sizes(file)
        numbers = [int(caption.split()[1]) for caption in rows_of["caption"].to_pylist()]
        embeddings = []
        for number in numbers:
            one = np.random.default_rng([2, number]).standard_normal((2 + number % 4, WIDTH)).astype(np.float16)
            one[0, 0] = np.inf if number == infinite else number
            embeddings.append(one)
        data = encode_embeddings(rows_of["id"], embeddings, info, row_groups)
        storage.write_bytes_atomic(storage.join(embedding_folder(table.uri, "minilm"), shard.path), data)
    return table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> SampleTable:
    """40 rows in three shards."""
    return make_table(tmp_path_factory.mktemp("table"), (17, 13, 10))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> SampleTable:
    """40 rows in three shards with row groups of 4; the last of each has fewer."""
    return make_table(tmp_path_factory.mktemp("grouped"), (17, 13, 10), row_group_rows=4)


@pytest.fixture
def copied(grouped: SampleTable, tmp_path: Path) -> SampleTable:
    """A copy of it that a test may damage."""
    return SampleTable.open(str(shutil.copytree(grouped.uri, tmp_path / "table")))


def run_config(table: SampleTable, folder: Path, **changes: Any) -> TrainConfig:
    """Two small stages, 8 and 16 px."""
    network = {"num_resnets": [1, 1], "num_groups": 4, "num_heads": 2, "time_dim": 16}
    values: dict[str, Any] = {
        "name": "test",
        "data": {"table": table.uri, "shuffle_row_groups": 2},
        "text": {"max_tokens": 8},
        "model": {
            "networks": [
                {"resolution": 16, "channels": [4, 8], "num_attention_layers": [0, 0], "mid_blocks": False, **network},
                {"resolution": 8, "channels": [8, 8], "num_attention_layers": [0, 1], "text_proj_dim": 8, **network},
            ]
        },
        "stages": [
            {"resolution": 8, "images": 48, "global_batch_size": 8, "lr": 2e-3, "warmup_images": 16},
            {"resolution": 16, "images": 32, "global_batch_size": 8, "lr": 2e-3, "decay": "linear"},
        ],
        "checkpoint": {"uri": str(folder / "run"), "every_images": 16},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        "log_every_steps": 2,
    }
    return TrainConfig.model_validate(values | changes)
