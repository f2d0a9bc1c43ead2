"""What tests on object storage share: a real S3 server, and a bucket of its own for each test."""

import itertools
import os
from collections.abc import Iterator

import pytest

from pipelines import s3
from tests.pipelines.s3_server import S3Server, without_aws

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket, which this process and those that it starts reach by their environment."""
    import s3fs

    for name in set(os.environ) - set(without_aws()):
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    s3.check_bucket.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_server.make_bucket(f"bucket-{next(_numbers)}")
    s3fs.S3FileSystem.clear_instance_cache()
    s3.check_bucket.cache_clear()
