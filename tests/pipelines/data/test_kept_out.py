"""Pictures that a refresh keeps out: near duplicates, and those on a list of hashes."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from pipelines.data.pictures.decode import decode
from pipelines.data.refresh import refresh
from tests.pipelines.data.picture_server import PictureServer, encode
from tests.pipelines.data.test_refresh import configure, line, rows


@pytest.mark.usefixtures("ray_cluster")
def test_near_duplicates_are_left_out_within_a_refresh_and_across(tmp_path: Path, server: PictureServer) -> None:
    # The server's own pictures are separable waves, whose hashes are mostly noise; these are photographs.
    names = ("astronaut", "coffee", "chelsea", "rocket", "camera", "brick")
    photos = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]
    urls = [server.url(f"/{number}.jpg") for number in range(6)]
    for number, photo in enumerate(photos):
        server.files[f"/{number}.jpg"] = encode(photo)
    for number in (2, 5):
        photo = photos[number]
        server.files[f"/again/{number}.jpg"] = encode(photo, quality=60)
        server.files[f"/half/{number}.jpg"] = encode(photo.resize((photo.width // 2, photo.height // 2)))
    again = [line(server.url(f"/{kind}/{number}.jpg")) for kind in ("again", "half") for number in (2, 5)]
    within = [line(url) for url in urls[:4]] + again[::2]
    first = refresh(configure(tmp_path, within, filters={"near_duplicates": 4}, run={"shard_rows": 2}))
    assert (first.ok, first.reasons) == (4, {"near_duplicate": 2})
    lines = within + again[1::2] + [line(url) for url in urls[4:]]
    # The first of two that are alike stays, wherever it stood.
    second = refresh(configure(tmp_path, lines, filters={"near_duplicates": 4}, run={"shard_rows": 3}))
    assert (second.ok, second.filtered, second.reasons) == (2, 2, {"near_duplicate": 2})
    found = {row["url"].partition("://")[2].partition("/")[2]: row for row in rows(configure(tmp_path, lines))}
    assert Counter(row["outcome"] for row in found.values()) == {"ok": 6, "filtered": 4}
    assert found["again/5.jpg"]["outcome"] == "ok"
    assert [found[name]["outcome"] for name in ("half/5.jpg", "5.jpg")] == ["filtered"] * 2
    assert all(row["image"] is None and row["sha256"] for row in found.values() if row["outcome"] == "filtered")


@pytest.mark.usefixtures("ray_cluster")
def test_pictures_of_a_list_of_hashes_are_kept_out(tmp_path: Path, server: PictureServer) -> None:
    urls = list(server.add_pictures(5))
    config = configure(tmp_path, [line(url) for url in urls])
    picture = decode(server.files["/3.jpg"], config.image, config.filters)
    phash = picture.phash  # type: ignore[union-attr]
    assert phash is not None
    sha256 = hashlib.sha256(server.files["/1.jpg"]).hexdigest()
    (tmp_path / "evaluation.txt").write_text(f"# kept for evaluation\n{sha256}\n{phash % 2**64:016x}\n")
    config = configure(
        tmp_path, [line(url) for url in urls], filters={"exclude_hashes": str(tmp_path / "evaluation.txt")}
    )
    report = refresh(config)
    assert (report.ok, report.reasons) == (3, {"excluded": 2})
    assert sorted(row["url"] for row in rows(config, "filtered")) == [urls[1], urls[3]]
    assert [row["image"] for row in rows(config, "filtered")] == [None, None]
