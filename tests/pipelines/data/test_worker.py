from pathlib import Path

from threadpoolctl import threadpool_info, threadpool_limits

from pipelines.data.worker import FetchWorker
from tests.pipelines.data.test_refresh import configure


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
