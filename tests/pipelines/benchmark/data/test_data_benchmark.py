"""The whole command on few pictures, its figures worked out again from its own record and from what was served."""

import json
from typing import Any

import numpy as np
import pytest

from jobs.benchmark import main
from pipelines.benchmark.data import pictures, pipeline
from pipelines.benchmark.data.bad_links import kinds_of_links
from pipelines.benchmark.data.contenders import Cores, Run
from pipelines.benchmark.data.memory import plot_memory
from pipelines.benchmark.data.report import data_table
from pipelines.benchmark.data.steps import STEPS
from pipelines.benchmark.data.watch import Watched


def run(capsys, *argv: str) -> tuple[dict[str, Any], str]:
    code = main(["data", *argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), err


def a_run(*, seconds: float, ended_s: float, ok: int = 10) -> Run:
    watched = Watched(
        returncode=0,
        timed_out=False,
        began_s=1000.0,
        seconds=seconds,
        cpu_s=4.0,
        peak_bytes=500,
        peak_rss_bytes=600,
        largest_process_bytes=400,
        memory=[(0.0, 100)],
    )
    return Run(watched, ended_s, {"ok": ok})


def test_start_up_is_before_the_first_request_and_after_the_last_file():
    record = pictures.round_record(a_run(seconds=20.0, ended_s=1018.0), {"first_s": 1006.0, "requests": 10}, images=10)
    assert (record["before_first_request_s"], record["after_last_file_s"]) == (6.0, 2.0)
    assert record["seconds_without_startup"] == 12.0
    assert record["images_per_s"] == pytest.approx(10 / 12)


def test_the_median_round_counts():
    rounds = [
        pictures.round_record(
            a_run(seconds=seconds, ended_s=1000 + seconds), {"first_s": 1001.0, "requests": 10}, images=10
        )
        for seconds in (11.0, 3.0, 6.0)
    ]
    record = pictures.contender_record(rounds, images=10)
    assert record["images_per_s_with_startup"] == pytest.approx(10 / 6)
    assert record["images_per_s"] == pytest.approx(10 / 5)
    assert record["cpu_s_per_image"] == pytest.approx(0.4)
    assert record["rounds"] == rounds


def test_photos_and_a_refresh_with_nothing_new(capsys, tmp_path):
    argv = ["--parts", "px64,noop_refresh", "--against", "none", "--images", "6", "--rounds", "1"]
    argv += ["--warmup_images", "0", "--sample", "3", "--rows", "1500", "--folder", str(tmp_path)]
    result, err = run(capsys, *argv)
    assert set(result) == {"px64", "noop_refresh"}
    record = result["px64"]
    native = record["native"]
    (one,) = native["rounds"]
    assert one["requests"] == 6
    assert one["seconds"] == pytest.approx(
        one["before_first_request_s"] + one["seconds_without_startup"] + one["after_last_file_s"]
    )
    assert native["images_per_s_with_startup"] == pytest.approx(6 / one["seconds"])
    assert native["cpu_s_per_image"] == pytest.approx(one["cpu_s"] / 6)
    assert set(native["cpu_s_by_step"]) == set(STEPS)
    assert all(seconds > 0 for seconds in native["cpu_s_by_step"].values())
    # A JPEG of quality 95 is within 30 to 50 dB of what went into it; a wrong picture is at 10.
    assert 30 < record["psnr_native"] < 50
    assert native["psnr_pictures"] == 3
    noop = result["noop_refresh"]
    assert (noop["rows"], noop["files"], noop["table_version"]) == (1500, 2, 1)
    assert noop["peak_bytes"] > 30_000_000
    assert data_table(result) in err


def test_ratios_are_those_of_the_records(photo_server, photos, tmp_path, monkeypatch):
    seconds = {"native": 10.0, "img2dataset": 25.0}
    order: list[str] = []

    def fake_run(given: pictures.Pictures, label: str, links: Any, folder: Any) -> dict[str, Any]:
        order.append(label)
        whole = a_run(seconds=seconds[label], ended_s=1000 + seconds[label])
        return pictures.round_record(whole, {"first_s": 1004.0, "requests": links.count}, images=links.count)

    monkeypatch.setattr(pictures, "_run", fake_run)
    monkeypatch.setattr(pictures, "_quality", lambda given, label, folder: {"psnr_db": 41.5, "psnr_pictures": 2})
    monkeypatch.setattr(pictures, "_steps", lambda given, label, folder: dict.fromkeys(STEPS, 0.001))
    given = pictures.Pictures(
        folder=tmp_path,
        photos=photos,
        server=photo_server,
        image_px=256,
        images=4,
        rounds=2,
        warmup_images=2,
        sample=2,
        labels=("native", "img2dataset"),
        connections=4,
        threads=4,
        cores=Cores((0,), (0,)),
    )
    record = pictures.measure_pictures(given, lambda count, **fields: None)
    assert order == ["native", "img2dataset", "native", "img2dataset", "img2dataset", "native"]
    assert record["ratio_with_startup"] == pytest.approx(25 / 10)
    assert record["ratio"] == pytest.approx((25 - 4) / (10 - 4))
    assert (record["psnr_native"], record["psnr_img2dataset"]) == (41.5, 41.5)
    assert [len(record[label]["rounds"]) for label in seconds] == [2, 2]
    assert "3.50 × the images a second, 2.50 × with start-up" in data_table({"px256": record})


def test_bad_links_take_one_deadline(capsys, tmp_path):
    argv = ["--parts", "bad_links", "--against", "none", "--bad_links", "30", "--deadline_s", "1"]
    result, _ = run(capsys, *argv, "--folder", str(tmp_path))
    record = result["bad_links"]
    assert (record["ok"], record["bad"]) == (24, 6)
    assert sum(record["reasons"].values()) == 6
    assert record["reasons"]["deadline"] == 4
    # No stalled link is given up before its time.
    assert record["seconds_over_deadline"] == pytest.approx(record["fetch_s"] / 1.0)
    assert record["fetch_s"] > 0.5


def test_trouble_is_spread_evenly():
    kinds = kinds_of_links(1000)
    counts = dict(zip(*np.unique(kinds, return_counts=True), strict=True))
    assert counts == {"tiny": 800, "stall": 67, "drip": 67, "reset": 66}
    # In no quarter of the list are they all.
    assert all(30 < sum(kind != "tiny" for kind in kinds[at : at + 250]) < 70 for at in range(0, 1000, 250))


def test_without_img2dataset_its_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(pipeline, "PhotoServer", None)
    assert main(["data", "--parts", "px256", "--json"]) == 2
    assert "pip install 'mdm[img2dataset]'" in capsys.readouterr().err


def test_more_cores_than_there_are_are_refused(capsys):
    assert main(["data", "--cores", "100000", "--against", "none", "--json"]) == 2
    assert "cores=100000 is more than the" in capsys.readouterr().err


def test_memory_is_drawn(tmp_path):
    runs = [
        {"links": links, "seconds": 2.0, "peak_bytes": 3e8, "over_time": [[0.1, 1e8], [1.9, 3e8]]}
        for links in (10, 100)
    ]
    plot_memory({"runs": runs}, tmp_path / "plots" / "memory.png")
    from PIL import Image

    with Image.open(tmp_path / "plots" / "memory.png") as picture:
        assert picture.size == (1200, 480)
        # The lines are there: matplotlib's first two colours.
        colours = {pixel for _, pixel in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours
