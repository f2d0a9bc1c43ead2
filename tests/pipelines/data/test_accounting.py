import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.data.accounting_proof import Proof
from tests.pipelines.data.trouble_list import KINDS, TroubleList
from tests.pipelines.data.trouble_server import TroubleServer


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for the names of Ray's sockets, which may have 107 letters in all."""
    folder = Path(tempfile.mkdtemp(prefix="mdm-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_every_link_is_accounted_for_as_the_server_knows(short_folder: Path) -> None:
    with TroubleServer(2000) as server:
        proof = Proof(server, short_folder, str(short_folder / "data"), shard_rows=250, deadline_s=6)
        proof.check_first("table")
        proof.check_nothing_new("table")
    assert proof.checks.failed == []
    assert proof.checks.num_passed == 23
    assert {server.links.kind(number) for number in range(2000)} == set(KINDS)


def test_what_a_link_is_follows_from_its_number() -> None:
    links, again = TroubleList(500, seed=3, port=80), TroubleList(400, seed=3, port=80)
    assert list(again.lines()) == list(links.lines())[: len(list(again.lines()))]
    assert [links.kind(number) for number in range(50)] != [
        TroubleList(50, seed=4).kind(number) for number in range(50)
    ]
    # The counts are those of the lines themselves, taken apart here in another way.
    lines = [line.split(b"\t") for line in links.lines()]
    counts = links.counts()
    readable = [
        line for line in lines if len(line) == 2 and line[0].startswith(b"http") and line[1] and b"\xff" not in line[0]
    ]
    assert counts["links"] == len(lines)
    assert counts["malformed"] == len(lines) - len(readable)
    assert counts["duplicate"] == len(readable) - len({line[0] for line in readable})
    assert counts["ok"] + counts["filtered"] + counts["failed"] == 500
