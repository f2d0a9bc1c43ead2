"""Evaluations, against the generator and the feature network asked directly in this process."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from mdm_core.errors import ConfigError
from pipelines.data.table.sample_table import SampleTable
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.features import load_feature_network
from pipelines.evaluate.metrics import frechet_distance, kernel_distance
from pipelines.evaluate.pipeline import evaluate
from pipelines.evaluate.prompts import TableRow, draw_rows, read_captions
from pipelines.evaluate.report import EvaluateReport
from pipelines.sample.config import SampleConfig
from pipelines.sample.generator import Generator
from pipelines.sample.pipeline import sample
from pipelines.tracking import TrackingConfig, metric_history
from pipelines.train.checkpoint import Checkpoint
from tests.pipelines.evaluate.conftest import NUM_ROWS, WHERE, make_checkpoint, real_picture

NUM_SAMPLES = 12


def evaluate_config(checkpoint: Checkpoint, out: Path, **changes: object) -> EvaluateConfig:
    values = {
        "checkpoint": checkpoint.uri,
        "out": str(out),
        "num_samples": NUM_SAMPLES,
        "seed": 5,
        "guidance_scale": 2.0,
        "num_inference_steps": 3,
        "grid_pictures": 6,
        "batch_size": 5,
        "workers": 2,
        "tracking": TrackingConfig(uri=f"sqlite:///{out}/mlflow.db", experiment="test"),
    }
    return EvaluateConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def evaluated(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[EvaluateConfig, EvaluateReport]:
    out = tmp_path_factory.mktemp("out")
    config = evaluate_config(checkpoint, out)
    return config, evaluate(config)


def made_here(checkpoint: Checkpoint, weights: str, captions: Sequence[str]) -> list[NDArray[np.uint8]]:
    """The same pictures, all in one batch in this process."""
    maker = Generator.from_checkpoint(checkpoint.uri, weights=weights, device="cpu")  # type: ignore[arg-type]
    return maker.generate(captions, noise_ids=range(len(captions)), seed=5, guidance_scale=2.0, num_inference_steps=3)


def test_distances_are_those_of_the_pictures_made_in_one_process(
    evaluated: tuple[EvaluateConfig, EvaluateReport], checkpoint: Checkpoint, table: SampleTable
) -> None:
    _, report = evaluated
    prompts, reference = draw_rows(table, num_samples=NUM_SAMPLES, num_reference=10**6, seed=5)
    captions = read_captions(table, prompts)
    network = load_feature_network("efficientnet_lite0")
    numbers = [int(caption.split()[1]) for caption in captions]
    others = sorted(set(range(NUM_ROWS)) - set(numbers))
    assert len(others) == len(reference) == report.num_reference == NUM_ROWS - NUM_SAMPLES
    compared = network.features([real_picture(number) for number in others])
    sets = {
        "fd_efficientnet_lite0": network.features(made_here(checkpoint, "ema", captions)[0]),
        "fd_untrained": network.features(made_here(checkpoint, "untrained", captions)[0]),
        "fd_floor": network.features([real_picture(number) for number in numbers]),
    }
    for name, features in sets.items():
        assert report.metrics[name] == pytest.approx(frechet_distance(features, compared), rel=2e-3), name
    floor, untrained = report.metrics["fd_floor"], report.metrics["fd_untrained"]
    assert report.metrics["fd_relative"] == (report.metrics["fd_efficientnet_lite0"] - floor) / (untrained - floor)
    # Every set has at most 100 pictures, so that KID's subsets are all of the samples.
    kid = kernel_distance(sets["fd_floor"], compared, seed=0, subset_size=NUM_SAMPLES, num_subsets=400)
    assert report.metrics["kid_floor"] == pytest.approx(kid.value, abs=0.3 * (kid.high - kid.low))
    low, high = report.intervals["fd_efficientnet_lite0"]
    assert low < report.metrics["fd_efficientnet_lite0"] < high


def test_grids_show_the_pictures_made(
    evaluated: tuple[EvaluateConfig, EvaluateReport], checkpoint: Checkpoint, table: SampleTable
) -> None:
    config, report = evaluated
    prompts, _ = draw_rows(table, num_samples=NUM_SAMPLES, num_reference=1, seed=5)
    levels = made_here(checkpoint, "ema", read_captions(table, prompts))
    assert report.grids == {side: f"{config.out}/samples_{side}.png" for side in ("16", "8")}
    for side, level in zip((16, 8), levels, strict=True):
        grid = np.asarray(Image.open(f"{config.out}/samples_{side}.png"))
        for picture in level[:6]:
            shown = picture.repeat(96 // side, axis=0).repeat(96 // side, axis=1).astype(int)
            found = [
                (y, x)
                for y, x in np.argwhere((abs(grid.astype(int) - shown[0, 0]) <= 1).all(axis=-1))
                if (patch := grid[y : y + 96, x : x + 96]).shape == shown.shape and (abs(patch - shown) <= 1).all()
            ]
            assert len(found) >= 1


def test_an_unchanged_evaluation_is_reused_without_ray(
    evaluated: tuple[EvaluateConfig, EvaluateReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, report = evaluated
    monkeypatch.setattr("pipelines.cluster.connect", None)
    again = evaluate(config.model_copy(update={"workers": 1, "batch_size": 7}))
    assert again.reused
    assert not report.reused
    assert again.as_dict() | {"reused": False} == report.as_dict()
    assert evaluate(config.model_copy(update={"where": WHERE})).reused
    for change in ({"where": "true"}, {"seed": 6}, {"guidance_scale": 2.5}, {"num_samples": 11}, {"weights": "raw"}):
        with pytest.raises(TypeError, match="NoneType"):
            evaluate(config.model_copy(update=change))


def test_another_checkpoint_or_a_lost_grid_is_evaluated_again(
    evaluated: tuple[EvaluateConfig, EvaluateReport],
    table: SampleTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, report = evaluated
    monkeypatch.setattr("pipelines.cluster.connect", None)
    newer = make_checkpoint(table, tmp_path, images_seen=65)
    with pytest.raises(TypeError, match="NoneType"):
        evaluate(config.model_copy(update={"checkpoint": newer.uri}))
    grid = Path(report.grids["8"])
    data = grid.read_bytes()
    grid.unlink()
    try:
        with pytest.raises(TypeError, match="NoneType"):
            evaluate(config)
    finally:
        grid.write_bytes(data)


def test_mlflow_holds_the_numbers_the_grids_and_what_they_are_of(
    evaluated: tuple[EvaluateConfig, EvaluateReport], table: SampleTable, checkpoint: Checkpoint
) -> None:
    config, report = evaluated
    for name in ("fd_efficientnet_lite0", "fd_floor", "fd_untrained", "kid"):
        assert metric_history(config.tracking, report.mlflow_run_id, name) == [(164, report.metrics[name])]
    artifacts = Path(config.out) / "mlflow-artifacts"
    images = {path.name.partition("+")[0] for path in artifacts.rglob("images/*.png")}
    assert images == {"samples_16", "samples_8"}
    assert len(list(artifacts.rglob("training_config.yaml"))) == 1
    written = json.loads((Path(config.out) / "evaluation.json").read_text())
    assert written["checkpoint"] == checkpoint.uri
    assert (written["table"], written["table_version"], written["where"]) == (table.uri, table.version, WHERE)
    logged = MlflowClient(config.tracking.uri).get_run(report.mlflow_run_id).data.params
    assert logged["evaluate.where"] == WHERE


def test_rows_are_drawn_by_the_seed_and_never_twice(table: SampleTable) -> None:
    prompts, reference = draw_rows(table, num_samples=10, num_reference=20, seed=1)
    numbers = [row.number for row in prompts + reference]
    assert (len(prompts), len(reference), len(set(numbers))) == (10, 20, 30)
    same = draw_rows(table, num_samples=10, num_reference=20, seed=1)
    assert (prompts, reference) == same
    assert draw_rows(table, num_samples=10, num_reference=20, seed=2)[0] != prompts
    wanted = [table.read(row.shard, ["caption"])["caption"][row.row].as_py() for row in prompts]
    assert read_captions(table, prompts) == wanted
    with pytest.raises(ConfigError, match=r"has 40 ok rows at version 3, wanted num_samples=39 .* to 38 or less"):
        draw_rows(table, num_samples=39, num_reference=20, seed=1)


def test_rows_that_do_not_count_are_not_drawn(table: SampleTable) -> None:
    def drawn(where: str | None, num_samples: int = 4) -> list[TableRow]:
        prompts, reference = draw_rows(table, where=where, num_samples=num_samples, num_reference=100, seed=1)
        return prompts + reference

    where = "caption like '%3%' or caption = 'disc 20'"
    counting = {f"disc {number}" for number in range(NUM_ROWS) if "3" in str(number) or number == 20}
    some = drawn(where)
    assert len(some) == len(counting) == 14
    assert set(read_captions(table, some)) == counting
    # A row has the same number whatever is chosen: features of real pictures are kept by it.
    assert set(some) < set(drawn(None))
    with pytest.raises(ConfigError, match=r"has 14 ok rows .*num_samples=13 .* to 12 or less, or set where"):
        drawn(where, num_samples=13)
    with pytest.raises(ConfigError, match=r"has 1 ok rows .* to compare with; set where to a looser condition"):
        drawn("caption = 'disc 3'")
    with pytest.raises(ConfigError, match=r"^where='captoin is null' names captoin, .* did you mean caption"):
        drawn("captoin is null")


def test_rows_that_were_not_trained_on_do_not_count(table: SampleTable, tmp_path: Path) -> None:
    trained = make_checkpoint(table, tmp_path / "trained", where="caption = 'disc 3'")
    anywhere = make_checkpoint(table, tmp_path / "anywhere")
    link, copy = tmp_path / "link", tmp_path / "copy"
    link.symlink_to(table.uri)
    shutil.copytree(table.uri, copy)
    of_training = r"1 ok rows of which the training's data\.where=\"caption = 'disc 3'\" is true"
    given = r"1 ok rows of which where=\"caption = 'disc 4'\" is true"
    all_of_them = "40 ok rows at version 3"
    for checkpoint, changes, said in (
        (trained, {}, of_training),
        (trained, {"table": f"{table.uri}/../{Path(table.uri).name}"}, of_training),
        (trained, {"table": str(link)}, of_training),
        (trained, {"table": str(copy)}, all_of_them),
        (trained, {"where": "caption = 'disc 4'"}, given),
        (trained, {"where": "true"}, "40 ok rows of which where='true' is true"),
        (anywhere, {}, all_of_them),
    ):
        with pytest.raises(ConfigError, match=rf"has {said}.*, wanted num_samples=39 "):
            evaluate(evaluate_config(checkpoint, tmp_path / "out", num_samples=39, **changes))


def test_what_is_not_there_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        evaluate(EvaluateConfig(checkpoint=str(tmp_path), out=str(tmp_path)))
    with pytest.raises(ConfigError, match="has no version 99"):
        evaluate(evaluate_config(checkpoint, tmp_path, version=99))
    with pytest.raises(ConfigError, match="is not a table"):
        evaluate(evaluate_config(checkpoint, tmp_path, table=str(tmp_path)))


class NamedColours:
    """A generator that paints what the caption says, a little off by the noise's number."""

    resolutions = (16, 8)

    def generate(
        self,
        captions: Sequence[str],
        *,
        noise_ids: Sequence[int],
        seed: int,
        guidance_scale: float,
        num_inference_steps: int,
    ) -> list[NDArray[np.uint8]]:
        colours = {"red": (200, 0, 0), "green": (0, 200, 0)}
        levels = []
        for side in self.resolutions:
            level = np.zeros((len(captions), side, side, 3), np.uint8)
            for row, (caption, noise_id) in enumerate(zip(captions, noise_ids, strict=True)):
                level[row] = colours[caption]
                level[row, ..., 2] = noise_id >> 32
            levels.append(level)
        return levels


def test_samples_are_one_grid_a_resolution_from_the_command_line_and_a_file(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "captions.txt").write_text("\ufeffgreen\n\n", encoding="utf-8")
    config = SampleConfig(
        checkpoint=checkpoint.uri,
        captions=("red",),
        captions_file=str(tmp_path / "captions.txt"),
        pictures_per_caption=3,
        out=str(tmp_path / "out"),
        batch_size=4,
    )
    report = sample(config, make=lambda uri, *, weights, device: NamedColours())
    assert report.pictures == 6
    assert report.images_seen == 164
    for side in ("16", "8"):
        grid = np.asarray(Image.open(report.grids[side]))
        tops = {}
        for colour in ("red", "green"):
            for copy in range(3):
                wanted = (200, 0, copy) if colour == "red" else (0, 200, copy)
                found = np.argwhere((grid == wanted).all(axis=-1))
                assert len(found) == 96 * 96
                tops[colour, copy] = found.min(axis=0).tolist()
        assert tops["red", 0][0] == tops["red", 2][0] < tops["green", 0][0]
        assert tops["red", 0][1] < tops["red", 1][1] < tops["red", 2][1]


def test_samples_without_captions_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no captions: give captions, or a captions_file"):
        SampleConfig(checkpoint=checkpoint.uri)
    with pytest.raises(ConfigError, match="captions_file=/no/such is not a file"):
        sample(SampleConfig(checkpoint=checkpoint.uri, captions_file="/no/such"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no caption, wanted one a line"):
        sample(SampleConfig(checkpoint=checkpoint.uri, captions_file=str(tmp_path / "empty.txt")))
    (tmp_path / "latin.txt").write_bytes("Curaçao".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        sample(SampleConfig(checkpoint=checkpoint.uri, captions_file=str(tmp_path / "latin.txt")))
