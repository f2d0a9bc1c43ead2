import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from pipelines.data.engine import Result
from pipelines.data.failure import Failure
from pipelines.data.pictures.decode import Picture
from pipelines.data.table.rows import rows_of
from pipelines.data.worker import FetchWorker
from tests.pipelines.data.test_refresh import configure

CHUNK = pa.schema([("id", pa.binary(16)), ("url", pa.string()), ("caption", pa.string()), ("attempts", pa.int32())])


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_products_of_pictures_are_not_shared_among_threads(tmp_path: Path) -> None:
    with threadpool_limits(2, user_api="blas"):
        assert blas_threads() == {2}
        worker = FetchWorker(config=configure(tmp_path, []), table_uri=str(tmp_path / "table"), stem_prefix="0")
        assert blas_threads() == {1}
        worker.close()
        worker.close()
        assert blas_threads() == {2}


def fetching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch"]


def test_the_thread_that_fetches_does_not_interrupt_those_that_decode(tmp_path: Path) -> None:
    usual = os.sched_getscheduler(0)
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(os.sched_setscheduler, 0, os.SCHED_BATCH, os.sched_param(0)).result()
        except OSError as error:
            pytest.skip(f"this system lets nobody choose how a thread is scheduled: {error}")
    worker = FetchWorker(config=configure(tmp_path, []), table_uri=str(tmp_path / "table"), stem_prefix="0")
    with contextlib.closing(worker):
        (fetching,) = fetching_threads()
        ends_s = time.monotonic() + 10
        while os.sched_getscheduler(fetching.native_id or 0) != os.SCHED_BATCH:
            assert time.monotonic() < ends_s
            time.sleep(0.01)
        assert os.sched_getscheduler(0) == usual


def test_a_worker_that_nobody_holds_any_more_ends_its_thread(tmp_path: Path) -> None:
    """Ray Data lets go of a worker, and says nothing."""
    worker = FetchWorker(config=configure(tmp_path, []), table_uri=str(tmp_path / "table"), stem_prefix="0")
    (fetching,) = fetching_threads()
    del worker
    fetching.join(10)
    assert not fetching.is_alive()


@pytest.mark.parametrize("data", [[], [None], [b""], [None, b"one", b"", None, bytes(range(256)) * 100, b"x"] * 3])
def test_rows_hold_the_bytes_of_pictures_and_nothing_where_there_are_none(data: list[bytes | None]) -> None:
    results = [
        Result(failure=Failure("deadline")) if each is None else Result(picture=Picture(each, "jpeg", 1, 1, 1, 1))
        for each in data
    ]
    count = len(data)
    chunk = pa.table(
        {"id": [bytes(16)] * count, "url": ["u"] * count, "caption": ["c"] * count, "attempts": [1] * count}
    )
    rows = rows_of(chunk.cast(CHUNK), results, source_name="test", languages=[None] * count)
    rows.validate(full=True)
    assert rows["image"].to_pylist() == data
    assert rows["image"].null_count == data.count(None)


def test_more_bytes_than_fit_one_array_are_rows_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pa.array([b"one", None, b"two"], pa.binary())
    monkeypatch.setattr("pipelines.data.table.rows.MOST_BYTES", 5)
    results = [Result(picture=Picture(each, "jpeg", 1, 1, 1, 1)) if each else Result() for each in whole.to_pylist()]
    chunk = pa.table({"id": [bytes(16)] * 3, "url": ["u"] * 3, "caption": ["c"] * 3, "attempts": [1] * 3}).cast(CHUNK)
    rows = rows_of(chunk, results, source_name="test", languages=[None] * 3)
    assert rows["image"].combine_chunks() == whole
