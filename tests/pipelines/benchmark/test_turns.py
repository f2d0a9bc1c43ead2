"""Processes that work when asked."""

import os
import signal

import numpy as np
import pytest
import torch

from mdm_core.errors import ConfigError, WorkError
from pipelines.benchmark.measuring import peak_memory_bytes
from pipelines.benchmark.turns import Answers, Worker


def obedient() -> Answers:
    """Answers with its process and the request, or does what the request says."""

    def answer(request: str) -> object:
        if request == "memory":
            return peak_memory_bytes(torch.device("cpu"))
        if request == "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if request == "ask for too much":
            torch.empty(10**15)
        if request == "be wrong":
            raise ConfigError("levels=9 is too much")
        return os.getpid(), request

    return answer


def reluctant() -> Answers:
    raise WorkError("the weights are not there")


def test_each_works_in_a_process_of_its_own_with_a_peak_of_its_own():
    ballast = np.ones(600_000_000, dtype=np.uint8)
    with Worker("ours", obedient) as ours, Worker("plain", obedient) as plain:
        ours.ready()
        plain.ready()
        said = [ours.ask("a", doing=""), plain.ask("b", doing=""), ours.ask("c", doing="")]
        memory = ours.ask("memory", doing="")
    assert [request for _, request in said] == ["a", "b", "c"]
    assert said[0][0] == said[2][0]
    assert len({os.getpid(), said[0][0], said[1][0]}) == 3
    # The parent's memory doesn't count as the child's.
    assert 50_000_000 < memory < peak_memory_bytes(torch.device("cpu")) - ballast.nbytes / 2


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ("be killed", WorkError, r"ours: its process was killed \(signal 9\).*make --batch.* smaller, in timed step 3"),
        (
            "ask for too much",
            WorkError,
            r"ours, in timed step 3: memory ran out \(.*\); make --batch or --channels smaller",
        ),
        ("be wrong", ConfigError, "levels=9 is too much"),
    ],
)
def test_a_process_that_ends_is_one_message(request_, kind, message):
    with Worker("ours", obedient) as worker:
        worker.ready()
        with pytest.raises(kind, match=message):
            worker.ask(request_, doing="in timed step 3")


def test_a_process_that_can_not_begin_says_why():
    message = "ours, while it was being built: the weights are not there"
    with Worker("ours", reluctant) as worker, pytest.raises(WorkError, match=message):
        worker.ready()
