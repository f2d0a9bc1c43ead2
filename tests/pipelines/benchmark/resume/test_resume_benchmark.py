"""The whole command: a real training on Ray whose worker is killed."""

import json

import pytest
import torch

from jobs.benchmark import main
from pipelines.benchmark.resume.pipeline import differences
from pipelines.benchmark.resume.report import resume_table

TINY = ["--channels", "32,32", "--resolution", "8", "--text_tokens", "2", "--batch", "2"]
STEPS = ["--steps", "12", "--checkpoint_every_steps", "3", "--kill_after_steps", "5"]


def test_a_killed_worker_costs_time_and_nothing_else(capsys):
    assert main(["resume", *TINY, *STEPS, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert (result["images"], result["repeated"], result["skipped"]) == (24, 0, 0)
    assert result["weights_equal"] is True
    # AdamW keeps a step and two moments of each weight, whose average is beside it.
    assert result["tensors"] % 5 == 0
    # A checkpoint may still be under way when the worker is killed; the one before it is then gone on from.
    assert 0 < result["steps_lost"] < 12
    assert all(seconds >= 0 for seconds in result["where"].values())
    assert sum(result["where"].values()) == pytest.approx(result["seconds"], abs=1e-3)
    assert 0 < result["seconds"] < result["seconds_to_new_step"]
    assert resume_table(result) in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--steps", "10", "--kill_after_steps", "10"],
            "kill_after_steps=10 must be less than steps=10: the step after it is waited for; try 5",
        ),
        (["--batch", "3", "--workers", "2"], "batch=3 must be divisible by workers=2; try 2 or 4"),
        (["--steps", "1"], "--steps: got 1; wanted 2 or more; the default is 24"),
    ],
)
def test_what_can_not_be_measured_is_one_message(capsys, argv, message):
    assert main(["resume", *argv]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_tensors_that_differ_are_named():
    ones, other = {"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1) + 1e-7}
    assert differences(ones, ones) == []
    assert differences(ones, other) == ["b"]
    assert differences(ones, {"a": torch.ones(2)}) == ["b"]
    assert differences({"a": torch.ones(2)}, ones) == ["b"]
