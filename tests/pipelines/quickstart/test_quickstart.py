"""The whole pipeline as a user runs it: killed in the middle, run again, and once more with nothing left to do."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.table.sample_table import SampleTable
from pipelines.quickstart.config import QuickstartConfig
from pipelines.quickstart.corpus import Corpus, build_corpus
from pipelines.tracking import TrackingConfig, child_runs
from pipelines.train.checkpoint import list_checkpoints

PICTURES, SAMPLES = 64, 12


def command(out: Path) -> list[str]:
    sizes = {"pictures": PICTURES, "images_16px": 640, "images_32px": 320, "num_samples": SAMPLES}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "jobs.quickstart", "--out", str(out), "--json", *flags]


def run(out: Path) -> tuple[dict[str, Any], str]:
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run killed with SIGKILL once a checkpoint stood, the run that went on from there, and one more."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    with (out.parent / "killed.err").open("wb") as errors:
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=errors)
        deadline_s = time.monotonic() + 600
        while not (stood := list_checkpoints(str(out / "training"))):
            assert process.poll() is None, (out.parent / "killed.err").read_text()[-5000:]
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    resumed, said = run(out)
    again, said_again = run(out)
    return {"out": out, "stood": stood, "resumed": resumed, "said": said, "again": again, "said_again": said_again}


@pytest.fixture(scope="module")
def corpus(runs: dict[str, Any]) -> Corpus:
    return build_corpus(runs["out"] / "corpus", limit=PICTURES)


def test_more_samples_than_pictures_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(
        ValueError, match=r"num_samples=256 leaves no real pictures .* pictures=200; use num_samples=100"
    ):
        QuickstartConfig(pictures=200)


def test_the_table_holds_what_the_corpus_serves(runs: dict[str, Any], corpus: Corpus) -> None:
    table = SampleTable.open(str(runs["out"] / "table"))
    rows = {outcome: sum(shard.num_rows for shard in table.shards(outcome)) for outcome in ("ok", "filtered", "failed")}
    assert rows == {outcome: corpus.expected[outcome] for outcome in rows}
    assert rows["ok"] == PICTURES
    for shard in table.shards("ok"):
        stored = table.read(shard, ["url", "caption", "image"]).to_pylist()
        captions = dict(line.split("\t")[:2] for line in corpus.links_path.read_text().splitlines() if "\t" in line)
        for row in stored:
            assert row["caption"] == captions[row["url"]]
            source = Image.open(corpus.picture_path(row["url"].rpartition("/")[2])).convert("RGBA")
            white = Image.new("RGBA", source.size, "white")
            shown = Image.alpha_composite(white, source).convert("RGB").resize((32, 32), Image.Resampling.BOX)
            got = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"), dtype=float)
            # Two ways to average 4 by 4 pixels differ at outlines, and nowhere else.
            assert np.abs(got - np.asarray(shown, dtype=float)).mean() < 8


def test_every_line_of_the_list_is_accounted_for(runs: dict[str, Any], corpus: Corpus) -> None:
    for result in (runs["resumed"], runs["again"]):
        counts = result["refresh"]
        outcomes = ("ok", "filtered", "failed", "duplicate", "malformed", "unchanged")
        assert sum(counts[outcome] for outcome in outcomes) == counts["links"] == corpus.expected["links"]
        assert counts["unchanged"] == sum(corpus.expected[outcome] for outcome in ("ok", "filtered", "failed"))
        assert counts["duplicate"] == corpus.expected["duplicate"]
        assert counts["malformed"] == corpus.expected["malformed"]


def test_the_run_went_on_from_the_checkpoint_that_stood(runs: dict[str, Any]) -> None:
    assert runs["stood"]
    first = next(json.loads(line) for line in runs["said"].splitlines() if line.startswith('{"progress": "train"'))
    assert first["done"] > 0
    stages = runs["resumed"]["train"]["stages"]
    assert [(stage["resolution"], stage["images_seen"]) for stage in stages] == [(16, 640), (32, 320)]
    for stage in stages:
        assert 0 < stage["loss_last"] < stage["loss_first"]
        assert stage["images_per_s"] > 0


def test_a_run_with_nothing_left_fetches_and_trains_nothing(runs: dict[str, Any]) -> None:
    assert "0 requests answered" in runs["said_again"]
    assert "nothing left to train" in runs["said_again"]
    for part in ("train", "evaluate", "mlflow_run_id"):
        assert runs["again"][part] == runs["resumed"][part]


def test_what_it_names_is_there(runs: dict[str, Any]) -> None:
    out: Path = runs["out"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary == runs["again"]
    assert set(summary["evaluate"]) == {"fd_efficientnet_lite0", "fd_floor", "fd_untrained", "kid"}
    for name in ("samples_16.png", "samples_32.png", "loss.png"):
        with Image.open(out / name) as picture:
            colours = picture.convert("RGB").getcolors(picture.width * picture.height)
        assert colours is None or len(colours) > 50
        assert f"{name}" in runs["said"]
    tracking = TrackingConfig(uri=f"sqlite:///{out / 'mlflow.db'}", experiment="quickstart")
    names = set(child_runs(tracking, summary["mlflow_run_id"]))
    assert {"stage 16 px", "stage 32 px"} < names
    assert "OpenMoji" in (out / "corpus" / "ATTRIBUTION.txt").read_text()
