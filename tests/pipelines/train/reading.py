"""Readers with small settings, and how what they read is compared."""

from pathlib import Path
from typing import Any

import torch

from pipelines.data.table.sample_table import SampleTable
from pipelines.embed.store import EmbeddingStore
from pipelines.train.ingest.batch import Batch
from pipelines.train.ingest.reader import BatchReader
from pipelines.train.ingest.selection import select_rows

Read = dict[str, Any]


def reader(table: SampleTable, where: str | None = None, **changes: Any) -> BatchReader:
    values: dict[str, Any] = {
        "resolutions": (16, 8),
        "seed": 3,
        "stage": 0,
        "num_timesteps": 1000,
        "max_tokens": 8,
        "drop_prob": 0.25,
        "flip": True,
        "shuffle_row_groups": 3,
    }
    return BatchReader(table, EmbeddingStore.open(table, "minilm"), select_rows(table, where), **(values | changes))


def steps(
    table: SampleTable,
    count: int,
    *,
    first: int = 0,
    batch: int = 12,
    rank: int = 0,
    workers: int = 1,
    micro: int | None = None,
    **changes: Any,
) -> list[tuple[Batch, ...]]:
    with reader(table, **changes) as opened:
        found = opened.steps(first, global_batch_size=batch, rank=rank, workers=workers, micro_batch_size=micro)
        return [next(found) for _ in range(count)]


def joined(parts: list[Batch]) -> Read:
    """All that batches hold, one after the other; the text cut to its real tokens, as it is padded to the longest."""
    return {
        "x0": torch.cat([part.x0 for part in parts]),
        "timestep": torch.cat([part.timestep for part in parts]),
        "noise": [torch.cat(level) for level in zip(*(part.noise for part in parts), strict=True)],
        "tokens": [int(row.sum()) for part in parts for row in part.text_mask],
        "text": [row[row.any(dim=1)] for part in parts for row in part.text_emb],
        "ids": [one for part in parts for one in part.ids],
    }


def assert_same(a: Read, b: Read) -> None:
    assert a["ids"] == b["ids"]
    assert a["tokens"] == b["tokens"]
    assert torch.equal(a["x0"], b["x0"])
    assert torch.equal(a["timestep"], b["timestep"])
    assert all(torch.equal(x, y) for x, y in zip(a["noise"] + a["text"], b["noise"] + b["text"], strict=True))


def embeddings_of(table: SampleTable, index: int) -> Path:
    return Path(EmbeddingStore.open(table, "minilm").uri_of(table.shards("ok")[index]))
