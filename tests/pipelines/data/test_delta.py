import os
import subprocess
import sys
import time

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipelines import storage
from pipelines.data.table.delta import may_pass, patiently
from tests.pipelines.failing_proxy import FailingProxy
from tests.pipelines.s3_server import S3Server

BROKEN = "Generic S3 error\n ↳ Error performing GET http://host/x in 1.5ms - HTTP error\n  ↳ connection reset"
FORBIDDEN = "Generic S3 error\n ↳ Error performing GET http://host/x in 1ms - Server returned non-2xx status code 403"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.mark.parametrize("kind", [DeltaError, OSError])
def test_what_breaks_off_is_done_again(kind: type[Exception]) -> None:
    calls = []

    def work() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise kind(BROKEN)
        return "done"

    assert patiently(work) == "done"
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("error", "num_calls"),
    [
        (OSError(BROKEN), 8),
        (OSError(FORBIDDEN), 1),
        (DeltaError("corrupt"), 1),
        (KeyError(BROKEN), 1),
    ],
)
def test_what_does_not_pass_is_raised(error: Exception, num_calls: int) -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        patiently(work)
    assert caught.value is error
    assert len(calls) == num_calls


def test_a_server_that_does_not_answer_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    calls = []

    def work() -> None:
        calls.append(1)
        # Two that break off soon, and one that deltalake itself has tried for three minutes.
        now_s[0] += 180 if len(calls) == 3 else 1
        raise OSError(BROKEN)

    with pytest.raises(OSError, match="HTTP error"):
        patiently(work)
    assert len(calls) == 3


def test_errors_of_deltalake_are_told_apart(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words by which they are told are deltalake's own."""
    options = storage.delta_options(bucket)
    with pytest.raises(OSError, match="NoSuchBucket") as caught:
        DeltaTable.is_deltatable("s3://no-such-bucket/t", options)
    assert not may_pass(caught.value)
    seen = set()
    with FailingProxy(s3_server.address, percent=60, seed=3) as proxy:
        for _ in range(20):
            try:
                DeltaTable.is_deltatable(f"{bucket}/t", options | {"AWS_ENDPOINT_URL": proxy.endpoint})
            except OSError as error:
                seen.add(may_pass(error))
    assert seen == {True}
    assert proxy.counts["cut_answer"]


_WRITER = """
import sys
from pipelines.data.table.commit import commit
from pipelines.data.config import FiltersConfig
from tests.pipelines.data.test_commit import ledger, write

uri, name = sys.argv[1:]
own = ledger(uri)
for number in range(4):
    names = [f"{name}-{number}-{k}" for k in range(3)] + [f"shared-{number}"]
    assert commit(own, [write(uri, number, names)], FiltersConfig()).total == 4
"""


def test_two_writers_through_failing_requests_lose_nothing(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.pipelines.data.test_commit import links

    uri = f"{bucket}/table"
    with FailingProxy(s3_server.address, percent=10, seed=4) as proxy:
        environment = os.environ | {"AWS_ENDPOINT_URL": proxy.endpoint}
        command = [sys.executable, "-c", _WRITER, uri]
        writers = [subprocess.Popen([*command, name], env=environment) for name in ("one", "two")]
        assert [writer.wait() for writer in writers] == [0, 0]
    names = {f"{name}-{number}-{k}" for name in ("one", "two") for number in range(4) for k in range(3)}
    assert links(uri) == sorted(names | {f"shared-{number}" for number in range(4)})
    assert proxy.num_failed > 10
