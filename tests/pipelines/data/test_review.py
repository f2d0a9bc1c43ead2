import json
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines.data.refresh import refresh
from pipelines.data.review import grid
from pipelines.tracking import TrackingConfig
from tests.pipelines.data.picture_server import PictureServer, draw_picture, encode
from tests.pipelines.data.test_refresh import configure, line


@pytest.mark.usefixtures("ray_cluster")
def test_refresh_is_told_to_mlflow_with_pictures_of_both_kinds(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(5))
    server.files["/tiny.jpg"] = encode(draw_picture(1, 31, 31))
    lines = [line(url) for url in [*urls, server.url("/tiny.jpg"), server.url("/missing")]]
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="data")
    config = configure(tmp_path, lines).model_copy(update={"tracking": tracking})
    report = refresh(config)
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name("data")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    metrics = run.data.metrics
    names = ("links", "ok", "filtered", "failed", "duplicate", "malformed", "unchanged", "table_version")
    assert [metrics[name] for name in names] == [7, 5, 1, 1, 0, 0, 0, report.table_version]
    assert {name: metrics[f"reason.{name}"] for name in report.reasons} == {"too_small": 1, "http_404": 1}
    assert (run.info.status, run.data.params["source.name"]) == ("FINISHED", "test")
    told = json.loads((folder / "stats.json").read_text())
    assert [told[name] for name in ("rows", "ok", "filtered", "failed", "table_version")] == [
        *(7, 5, 1, 1),
        report.table_version,
    ]
    assert told["hosts"] == [{"host": "127.0.0.1", "failed": 1, "mostly": "http_404"}]
    assert told["sides_px"] == {"64": 5}
    assert [(each["ok"], each["filtered"], each["failed"]) for each in told["refreshes"]] == [(5, 1, 1)]
    with Image.open(folder / "stats.png") as drawn:
        assert drawn.size == (1100, 1000)
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert {path.split("/")[1].split("%")[0].split("+")[0] for path in pictures} == {"kept", "filtered"}
    for path in pictures:
        picture = Image.open(client.download_artifacts(run.info.run_id, path, str(tmp_path)))
        assert picture.size == (8 * 96, 96)
        # Five tiles of eight, or one; the rest is white.
        tiles = np.asarray(picture).reshape(96, 8, 96, 3).min(axis=(0, 2, 3))
        assert (tiles < 250).sum() == (5 if "kept" in path else 1)

    # Where nothing is new, no more of the table is read than before.
    refresh(config)
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    assert [run.data.metrics["unchanged"] for run in runs] == [7, 0]
    files = [{file.path for file in client.list_artifacts(run.info.run_id)} for run in runs]
    assert files == [{"report.json"}, {"report.json", "images", "stats.json", "stats.png"}]


def test_tiles_keep_their_shape() -> None:
    wide = encode(Image.new("RGB", (200, 100), "black"), "PNG")
    sheet = np.asarray(grid([wide] * 9).convert("L"))
    assert sheet.shape == (192, 768)
    assert (sheet == 0).sum() == 9 * 96 * 48
