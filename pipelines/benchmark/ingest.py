"""Training on pictures read from a table, in turn with training on one batch that stays in memory."""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mdm_core.errors import WorkError
from pipelines import storage
from pipelines.benchmark.config import TrainBenchmarkConfig
from pipelines.benchmark.contender import Training
from pipelines.benchmark.data.noop import sample_rows
from pipelines.benchmark.data.photos import photo
from pipelines.benchmark.turns import Worker
from pipelines.data.config import FiltersConfig, ImageConfig
from pipelines.data.pictures.decode import Picture, decode
from pipelines.data.table.commit import commit
from pipelines.data.table.ledger import Ledger
from pipelines.data.table.sample_table import SampleTable
from pipelines.data.table.shards import write_shard
from pipelines.embed.store import EmbeddingStore, EncoderInfo, embedding_folder, encode_embeddings, write_info
from pipelines.progress import Progress
from pipelines.train.ingest.batch import Batch
from pipelines.train.ingest.reader import BatchReader
from pipelines.train.ingest.selection import select_rows

ENCODER = "random"
"""What the random embeddings are said to be made with."""
_NOWHERE = "http://127.0.0.1:9"
_ROUNDS = 3
_PHOTOS, _SHARD_ROWS, _ROW_GROUP_ROWS = 32, 500, 100
# Of ten, so that row groups are read all the time and not only at first.
_SHUFFLED_ROW_GROUPS = 4
_PREFETCH_STEPS = 2
# Steps until what was made ready while nobody waited is used up.
_SETTLING_STEPS = 2 * _PREFETCH_STEPS + 1


def measure_ingest(config: TrainBenchmarkConfig, device: torch.device) -> dict[str, Any]:
    """How much of the rate of training on a batch in memory is kept when pictures come from a table.

    Each of three rounds does as many steps with one as with the other, of the same network in the same process.

    Returns:
        `ingest_ratio`, the median of the rounds' ratios of rates; `ingest_ratios`, all of them; `data_wait_fraction`,
        the share of the time with real pictures in which the step waited for them; `with_data`, what was measured.
    """
    with tempfile.TemporaryDirectory(prefix="mdm-benchmark-") as folder:
        make_training_table(
            Path(folder) / "table",
            size_px=max(256, config.matryoshka().resolutions[0]),
            text_tokens=config.text_tokens,
            text_width=config.matryoshka().text_dim or 1,
        )
        rounds = []
        make = functools.partial(Fed, config, str(device), folder)
        with Worker("with data", make) as worker, Progress("ingest", total=_ROUNDS, unit="rounds") as progress:
            worker.ready()
            for number in range(_ROUNDS):
                rounds.append(worker.ask("round", doing=f"in round {number + 1}"))
                progress.advance(1)
    ratios = [one["in_memory_s"] / one["with_data_s"] for one in rounds]
    total = {name: sum(one[name] for one in rounds) for name in rounds[0]}
    num_steps = len(rounds) * config.steps
    return {
        "ingest_ratio": median(ratios),
        "ingest_ratios": ratios,
        "data_wait_fraction": total["wait_s"] / total["with_data_s"],
        "with_data": {
            "steps": num_steps,
            "step_s": total["with_data_s"] / num_steps,
            "in_memory_step_s": total["in_memory_s"] / num_steps,
            "cpu_s": total["with_data_cpu_s"] / num_steps,
            "in_memory_cpu_s": total["in_memory_cpu_s"] / num_steps,
            "images_per_s": config.batch * num_steps / total["with_data_s"],
            "decoding_threads": _num_threads(config),
        },
    }


class Fed:
    """A network that is trained on the table in a folder, or on the batch in memory."""

    def __init__(self, config: TrainBenchmarkConfig, device: str, folder: str) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(0)
        self._config, self._device = config, torch.device(device)
        self._training = Training(config, self._device)
        self._table = SampleTable.open(storage.join(folder, "table"))
        self._store = EmbeddingStore.open(self._table, ENCODER)
        self._next_step = 0
        for _ in range(config.warmup_steps):
            self._training.step()

    def __call__(self, request: str) -> dict[str, float]:
        """Seconds of one `round`: with the batch in memory, with data, how long of these was waited for data, and the
        processor time of all threads.
        """
        assert request == "round"
        in_memory_s, in_memory_cpu_s = self._timed(self._training.step)
        with self._reader() as reader:
            steps = self._steps(reader)
            for _ in range(_SETTLING_STEPS):
                self._training.train_on(next(steps))
            before_s = reader.wait_s
            with_data_s, with_data_cpu_s = self._timed(lambda: self._training.train_on(next(steps)))
            wait_s = reader.wait_s - before_s
        self._next_step += _SETTLING_STEPS + self._config.steps
        return {
            "in_memory_s": in_memory_s,
            "in_memory_cpu_s": in_memory_cpu_s,
            "with_data_s": with_data_s,
            "with_data_cpu_s": with_data_cpu_s,
            "wait_s": wait_s,
        }

    def _timed(self, step: Callable[[], None]) -> tuple[float, float]:
        self._synchronize()
        began_s, cpu_began_s = time.perf_counter(), time.process_time()
        for _ in range(self._config.steps):
            step()
        self._synchronize()
        return time.perf_counter() - began_s, time.process_time() - cpu_began_s

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _steps(self, reader: BatchReader) -> Iterator[Batch]:
        for (batch,) in reader.steps(self._next_step, global_batch_size=self._config.batch, rank=0, workers=1):
            yield batch.to(self._device)

    def _reader(self) -> BatchReader:
        return BatchReader(
            self._table,
            self._store,
            select_rows(self._table, "caption like 'photo%'"),
            resolutions=self._config.matryoshka().resolutions,
            seed=0,
            stage=0,
            num_timesteps=1000,
            max_tokens=self._config.text_tokens,
            drop_prob=0.1,
            flip=True,
            crop="random",
            shuffle_row_groups=_SHUFFLED_ROW_GROUPS,
            prefetch_steps=_PREFETCH_STEPS,
            num_threads=_num_threads(self._config),
            pin_memory=self._device.type == "cuda",
        )


def make_training_table(uri: Path, *, size_px: int, text_tokens: int, text_width: int, rows: int = 1000) -> None:
    """A table of photo-like JPEGs, 32 of them different, with random embeddings beside them.

    Args:
        uri: Where.
        size_px: The shorter side of the pictures.
        text_tokens: Tokens of each caption; real ones have fewer, so that less is read.
        text_width: Width of a token's embedding.
        rows: How many.
    """
    as_refresh = functools.partial(
        decode,
        image=ImageConfig(size_px=size_px, resize="shorter_side", upscale=True, format="jpeg"),
        filters=FiltersConfig(),
    )

    def stored(number: int) -> Picture:
        found = as_refresh(photo(number))
        if not isinstance(found, Picture):
            raise WorkError(f"photo {number} of the benchmark can't be stored: {found.reason}")
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = list(pool.map(stored, range(_PHOTOS)))
    draw = np.random.default_rng(0)
    captions = draw.standard_normal((_PHOTOS, text_tokens, text_width), np.float32).astype(np.float16)
    info = EncoderInfo(ENCODER, text_width, text_tokens)
    write_info(str(uri), info)
    shards = []
    for shard, begin in enumerate(range(0, rows, _SHARD_ROWS)):
        numbers = range(begin, min(begin + _SHARD_ROWS, rows))
        images = [pictures[number % _PHOTOS].data for number in numbers]
        urls, texts = [f"{_NOWHERE}/{number}" for number in numbers], [f"photo {number}" for number in numbers]
        sample = sample_rows(urls, images, texts, datetime.now(UTC))
        shards.append(write_shard(str(uri), f"00000000-{shard:06d}", "ok", sample))
        embeddings = [captions[number % _PHOTOS] for number in numbers]
        starts = range(0, len(numbers), _ROW_GROUP_ROWS)
        row_groups = [min(_ROW_GROUP_ROWS, len(numbers) - start) for start in starts]
        data = encode_embeddings(sample["id"], embeddings, info, row_groups)
        storage.write_bytes_atomic(storage.join(embedding_folder(str(uri), ENCODER), shards[-1].path), data)
    commit(Ledger(str(uri), now_s=time.time()), shards, FiltersConfig(exact_duplicates=False))


def _num_threads(config: TrainBenchmarkConfig) -> int:
    return config.data_threads or len(os.sched_getaffinity(0))
