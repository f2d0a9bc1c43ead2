"""The whole command, on networks so small that a step takes milliseconds."""

import json
from typing import Any

import pytest

from jobs.benchmark import main
from mdm_core.presets import preset
from pipelines.benchmark.flops import flops_per_picture
from pipelines.benchmark.report import table
from pipelines.benchmark.shapes import shaped

TINY = ["--channels", "32,64", "--resolution", "16", "--text_tokens", "4", "--device", "cpu", "--threads", "1"]


def run(capsys, *argv: str) -> tuple[dict[str, Any], str]:
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def check_ratios(result: dict[str, Any]) -> None:
    ours, plain = result["ours"], result["plain"]
    assert result["step_ratio"] == plain["step_s"]["median"] / ours["step_s"]["median"]
    assert result["memory_ratio"] == ours["peak_memory_bytes"] / plain["peak_memory_bytes"]
    for record in (ours, plain):
        assert record["step_s"]["fastest"] <= record["step_s"]["first_quartile"]
        assert record["step_s"]["first_quartile"] <= record["step_s"]["median"] <= record["step_s"]["third_quartile"]
        assert record["user_s"] > 0
        assert record["system_s"] >= 0
        assert record["images_per_s"] == pytest.approx(result["batch"] / record["step_s"]["median"])
        assert record["flops_per_s"] == pytest.approx(record["flops_per_step"] / record["step_s"]["median"])
        assert record["memory_before_bytes"] < record["peak_memory_bytes"]


def test_training_is_measured_against_the_plain_step(capsys):
    argv = ["train", *TINY, "--batch", "2", "--steps", "3", "--warmup_steps", "1", "--against", "plain"]
    result, err = run(capsys, *argv, "--checkpoint", "16.up.0")
    check_ratios(result)
    flops = flops_per_picture(shaped(preset("mdm-64"), channels=(32, 64), resolution=16), text_tokens=4)
    for record in (result["ours"], result["plain"]):
        assert (record["steps"], record["network_calls_per_step"]) == (3, 1)
        # What is computed twice is not counted twice.
        assert record["flops_per_step"] == 2 * flops.forward_backward
    assert result["ours"]["attention_kernels"] == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert result["plain"]["attention_kernels"] == []
    assert result["saved_bytes"] == sum(result["saved_bytes_by_level"].values())
    assert result["saved_bytes"] < result["saved_bytes_without_checkpoint"] < result["saved_bytes_of_plain"]
    assert table(result) in err


def test_network_calls_of_a_sampler_are_counted(capsys):
    argv = ["sample", *TINY, "--batch", "2", "--steps", "1", "--warmup_steps", "0", "--against", "plain"]
    result, _ = run(capsys, *argv, "--solver", "heun", "--num_inference_steps", "3", "--guidance_scale", "2")
    check_ratios(result)
    flops = flops_per_picture(shaped(preset("mdm-64"), channels=(32, 64), resolution=16), text_tokens=4)
    for record in (result["ours"], result["plain"]):
        # Heun calls twice but in its last step; guidance doubles the rows.
        assert record["network_calls_per_step"] == 5
        assert record["flops_per_step"] == 5 * 2 * 2 * flops.forward


def test_a_plan_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr("pipelines.benchmark.pipeline.Worker", None)
    result, _ = run(capsys, "train", "--preset", "mdm-1024", "--plan", "true", "--batch", "2", "--checkpoint", "all")
    assert result["parameters"] == 480_970_057
    assert result["state_bytes"] == 20 * 480_970_057
    assert result["forward_flops_per_image"] == pytest.approx(1040.1e9, rel=1e-3)
    assert 0.95 < result["recomputed_flops_per_image"] / result["forward_flops_per_image"] < 1
    assert result["saved_bytes"] < result["saved_bytes_without_checkpoint"] / 3


def test_a_plan_has_no_data_to_measure(capsys):
    assert main(["train", *TINY, "--plan", "true", "--with_data", "true"]) == 2
    assert "plan runs nothing, so with_data has nothing to measure; leave one of them out" in capsys.readouterr().err


def test_pictures_from_a_table_are_set_beside_a_batch_in_memory(capsys):
    argv = ["train", *TINY, "--batch", "1", "--steps", "2", "--warmup_steps", "1", "--with_data", "true"]
    result, err = run(capsys, *argv, "--data_threads", "1")
    fed = result["with_data"]
    assert (fed["steps"], fed["decoding_threads"]) == (6, 1)
    assert result["ingest_ratio"] == sorted(result["ingest_ratios"])[1]
    assert min(result["ingest_ratios"]) <= fed["in_memory_step_s"] / fed["step_s"] <= max(result["ingest_ratios"])
    assert fed["images_per_s"] == pytest.approx(1 / fed["step_s"])
    # On one thread a step takes no more of the processor than of the clock.
    assert 0 < fed["in_memory_cpu_s"] <= 1.1 * fed["in_memory_step_s"]
    # What is waited for is a part of the step, and taking it is no step.
    assert 0 < result["data_wait_fraction"] < 1
    assert f"{result['ingest_ratio']:.1%} of the rate with pictures from a table" in err
    # Without a baseline there is nothing to compare with.
    assert {"plain", "step_ratio", "memory_ratio"}.isdisjoint(result)
    assert result["ours"]["network_calls_per_step"] == 1
