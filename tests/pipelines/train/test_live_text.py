"""Training that encodes captions as it reads them, on a table with no embeddings beside it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.embed.live import LiveEmbeddings
from pipelines.text_encoder import load_text_encoder
from pipelines.train.checkpoint import open_checkpoint
from pipelines.train.hooks import Hooks
from pipelines.train.ingest.batch import Batch
from pipelines.train.ingest.reader import BatchReader
from pipelines.train.ingest.selection import select_rows
from pipelines.train.place import Place
from pipelines.train.preflight import open_table
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .conftest import row_id, run_config
from .listener import KilledError, Listener
from .reading import assert_same, joined

TEXT = {"max_tokens": 8, "precomputed": False}


@pytest.fixture
def bare(grouped: SampleTable, tmp_path: Path) -> SampleTable:
    """The table without embeddings."""
    uri = shutil.copytree(grouped.uri, tmp_path / "table")
    shutil.rmtree(uri / "_embeddings")
    return SampleTable.open(str(uri))


def read(table: SampleTable, *, rank: int = 0, workers: int = 1, first: int = 0, count: int = 4) -> list[Batch]:
    store = LiveEmbeddings(table, "minilm", max_tokens=8)
    settings: dict[str, Any] = {"resolutions": (16, 8), "seed": 3, "stage": 0, "num_timesteps": 1000, "max_tokens": 8}
    with BatchReader(table, store, select_rows(table), shuffle_row_groups=3, num_threads=2, **settings) as reader:
        steps = reader.steps(first, global_batch_size=12, rank=rank, workers=workers)
        return [batch for _ in range(count) for batch in next(steps)]


def test_each_row_has_the_embedding_of_its_own_caption(bare: SampleTable) -> None:
    numbers = {row_id(number): number for number in range(40)}
    wanted = load_text_encoder("minilm", max_tokens=8).encode([f"caption {number}" for number in range(40)])
    found = joined(read(bare))
    assert len(found["ids"]) == 48
    for one, text in zip(found["ids"], found["text"], strict=True):
        expected = wanted[numbers[one]].astype(np.float32)
        assert text.shape == expected.shape
        # In float16, of numbers near 1, after products whose rows were padded otherwise.
        np.testing.assert_allclose(text.numpy(), expected, atol=4e-3)


def test_workers_and_where_they_begin_change_no_bit(bare: SampleTable) -> None:
    whole = read(bare)
    shares = [read(bare, rank=rank, workers=2) for rank in range(2)]
    assert_same(joined(whole), joined([share for step in zip(*shares, strict=True) for share in step]))
    assert_same(joined(whole[2:]), joined(read(bare, first=2, count=2)))


def test_a_run_trains_and_goes_on_to_the_same_bits(bare: SampleTable, tmp_path: Path) -> None:
    stage = {"resolution": 8, "images": 96, "global_batch_size": 8, "lr": 1e-3}
    finals = []
    for name, die_after in (("whole", None), ("killed", 7)):
        folder = tmp_path / name
        checkpoint = {"uri": str(folder / "run"), "every_images": 48}
        config = run_config(bare, folder, text=TEXT, stages=[stage], checkpoint=checkpoint, log_every_steps=1)
        context = RunContext(config, bare.version, "run")
        if die_after is not None:
            with pytest.raises(KilledError):
                train_stages(context, place=Place(), hooks=Listener(die_after=die_after))
        train_stages(context, place=Place(), hooks=Hooks())
        finals.append(open_checkpoint(config.checkpoint.uri))
    whole, killed = (checkpoint.tensors("weights") for checkpoint in finals)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    assert finals[0].manifest.network["networks"][-1]["text_dim"] == 384
    assert not storage.exists(f"{bare.uri}/_embeddings/minilm/encoder.json")


def test_what_can_not_be_encoded_is_refused_before_a_run_starts(bare: SampleTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no embeddings by minilm; run `mdm embed"):
        open_table(run_config(bare, tmp_path), None)
    assert open_table(run_config(bare, tmp_path, text=TEXT), None)[1].width == 384
    for text, message in (
        ({"encoder": "t5:/nowhere"}, "/nowhere holds no config.json"),
        ({"encoder": "word2vec"}, "no text encoder is called 'word2vec'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_table(run_config(bare, tmp_path, text=TEXT | text), None)
