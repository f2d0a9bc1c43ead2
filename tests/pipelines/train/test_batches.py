"""What a step trains on: a pure function of seed, stage and images seen."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.data.table import SampleTable
from pipelines.embed.store import EmbeddingStore
from pipelines.train.batches import Batch, BatchReader, CanonicalOrder, decode_square

from .conftest import picture


def reader(table: SampleTable, **changes: Any) -> BatchReader:
    values: dict[str, Any] = {
        "resolutions": (16, 8),
        "seed": 3,
        "stage": 0,
        "num_timesteps": 1000,
        "max_tokens": 8,
        "drop_prob": 0.25,
        "flip": True,
        "shuffle_shards": 2,
    }
    return BatchReader(table, EmbeddingStore.open(table, "minilm"), **(values | changes))


def steps(
    table: SampleTable, count: int, *, first: int = 0, rank: int = 0, workers: int = 1, **changes: Any
) -> list[Batch]:
    found = reader(table, **changes).steps(first, global_batch_size=12, rank=rank, workers=workers)
    return [next(found) for _ in range(count)]


def joined(parts: list[Batch]) -> dict[str, Any]:
    """All a batch holds, the text cut to its real tokens, as workers pad to their own longest."""
    texts = [row[row.any(dim=1)] for part in parts for row in part.text_emb]
    return {
        "x0": torch.cat([part.x0 for part in parts]),
        "timestep": torch.cat([part.timestep for part in parts]),
        "noise": [torch.cat(level) for level in zip(*(part.noise for part in parts), strict=True)],
        "tokens": [int(row.sum()) for part in parts for row in part.text_mask],
        "text": texts,
        "ids": [one for part in parts for one in part.ids],
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["ids"] == b["ids"]
    assert a["tokens"] == b["tokens"]
    assert torch.equal(a["x0"], b["x0"])
    assert torch.equal(a["timestep"], b["timestep"])
    assert all(torch.equal(x, y) for x, y in zip(a["noise"] + a["text"], b["noise"] + b["text"], strict=True))


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_share_exactly_what_one_would_read(table: SampleTable, workers: int) -> None:
    alone = steps(table, 5)
    shared = [steps(table, 5, rank=rank, workers=workers) for rank in range(workers)]
    for step, whole in enumerate(alone):
        assert_same(joined([whole]), joined([parts[step] for parts in shared]))


def test_reading_on_from_a_step_gives_what_an_unbroken_reader_gives(table: SampleTable) -> None:
    assert_same(joined(steps(table, 7)[4:]), joined(steps(table, 3, first=4)))


def test_every_row_comes_once_an_epoch_in_another_order_each_time(table: SampleTable) -> None:
    rows = [one for batch in steps(table, 10) for one in batch.ids]
    epochs = [rows[0:40], rows[40:80], rows[80:120]]
    for epoch in epochs:
        assert max(Counter(epoch).values()) == 1
        assert len(epoch) == 40
    assert epochs[0] != epochs[1] != epochs[2]
    assert [one for batch in steps(table, 10, seed=4) for one in batch.ids] != rows
    assert [one for batch in steps(table, 10, stage=1) for one in batch.ids] != rows


def test_a_window_of_shards_is_read_before_the_next() -> None:
    order = CanonicalOrder([5] * 6, seed=0, stage=0, shuffle_shards=2)
    shards = [row.shard for row in order.rows(0, 30)]
    windows = [set(shards[start : start + 10]) for start in (0, 10, 20)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))


def test_pictures_and_texts_are_those_of_their_rows(table: SampleTable) -> None:
    mirrored = dropped = 0
    by_id: dict[bytes, int] = {}
    for shard in table.shards("ok"):
        rows = table.read(shard, ["id", "caption"])
        captions = rows["caption"].to_pylist()
        by_id |= {one: int(text.split()[1]) for one, text in zip(rows["id"].to_pylist(), captions, strict=True)}
    batches = steps(table, 20)
    for batch in batches:
        for x0, text, mask, one in zip(batch.x0, batch.text_emb, batch.text_mask, batch.ids, strict=True):
            number = by_id[one]
            shown, wanted = x0.permute(1, 2, 0).numpy(), picture(number)
            flipped = not np.array_equal(shown, wanted)
            np.testing.assert_array_equal(shown, wanted[:, ::-1] if flipped else wanted)
            assert text[0, 0] == number
            assert int(mask.sum()) in (0, 2 + number % 4)
            mirrored, dropped = mirrored + flipped, dropped + (not mask.any())
    # 240 draws each: four standard deviations about one half and one quarter.
    assert 89 <= mirrored <= 151
    assert 33 <= dropped <= 87


def test_noise_is_standard_normal_and_new_each_time(table: SampleTable) -> None:
    batches = steps(table, 20)
    for level in range(2):
        noise = torch.cat([batch.noise[level] for batch in batches])
        assert noise.mean().abs() < 4 / noise.numel() ** 0.5
        assert noise.std().item() == pytest.approx(1, abs=0.02)
        assert len({row.flatten()[0].item() for row in noise}) == 240
    spread = torch.cat([batch.timestep for batch in batches]).double()
    assert spread.mean().item() == pytest.approx(499.5, abs=10)
    for batch in batches:
        # One timestep in each twelfth of the range.
        assert sorted(((batch.timestep + 1000 - batch.timestep.min()) % 1000 // 83).unique().tolist())[-1] >= 10


def test_a_wide_picture_gives_its_middle_square() -> None:
    import io

    from PIL import Image

    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    np.testing.assert_array_equal(decode_square(buffer.getvalue(), 8), wide[:, 8:16])
    means = wide[:, 8:16].reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(
        decode_square(buffer.getvalue(), 4).astype(float), means, atol=1
    )  # Pillow rounds after each axis
