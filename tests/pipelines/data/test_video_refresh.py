"""A list of links of videos, written as WebVid's is, through a whole refresh."""

import csv
import hashlib
import io
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.data.config import RefreshConfig
from pipelines.data.refresh import refresh
from tests.pipelines.data.picture_server import PictureServer, draw_picture, encode
from tests.pipelines.data.test_refresh import configure, counts, rows
from tests.pipelines.data.videos import (
    CLIPS,
    every_frame,
    first_stretch,
    make_video,
    number_picture,
    pixels_of,
    psnr,
    read_number,
)

BIKES = CLIPS / "bikes.mp4"
HEADER = ("videoid", "contentUrl", "duration", "page_dir", "name")


def configure_videos(tmp_path: Path, links: list[tuple[str, str]]) -> RefreshConfig:
    """Returns the configuration of a refresh of a list with these links and captions, in the columns of WebVid."""
    config = configure(
        tmp_path,
        [],
        source={"format": "csv", "header": True, "columns": {"url": "contentUrl", "caption": "name"}},
        fetch={"max_bytes": 2 << 20, "deadline_s": 30},
        image={"size_px": 64},
        run={"workers": 1},
    )
    with Path(config.source.uri).open("w", newline="") as file:
        written = csv.writer(file)
        written.writerow(HEADER)
        for number, (url, caption) in enumerate(links):
            written.writerow((number, url, "PT00H00M10S", "010001_010050", caption))
    values = config.model_dump() | {"video": {"num_frames": 16, "fps": 8.0, "scene_cuts": True}}
    return RefreshConfig.model_validate(values)


def shown_at(path: Path, times_s: list[float]) -> list[npt.NDArray[np.float64]]:
    """Returns the frames that are on the screen at some times, 64 pixels high, as PyAV decodes the whole file."""
    with av.open(str(path)) as container:
        frames = [(frame.time or 0.0, frame.to_image()) for frame in container.decode(video=0)]
    on_screen = [max((frame for frame in frames if frame[0] <= at), key=lambda frame: frame[0]) for at in times_s]
    size = (round(64 * frames[0][1].width / frames[0][1].height), 64)
    return [np.asarray(frame.resize(size, Image.Resampling.LANCZOS), np.float64) for _, frame in on_screen]


def test_clips_of_a_list_are_those_that_the_videos_show(tmp_path: Path, server: PictureServer) -> None:
    server.files = {
        "/bikes.mp4": BIKES.read_bytes(),
        "/numbers.mp4": make_video(number_picture, 90, options={"bf": "2", "g": "12"}),
        "/short.mp4": make_video(number_picture, 56),
        "/picture.mp4": encode(draw_picture(1)),
    }
    links = [(server.url(path), f"{path[1:-4]}, and a comma") for path in server.files]
    links += [(server.url("/missing"), "a video that is gone"), links[0], (links[0][0] + "?no-caption", "")]
    config = configure_videos(tmp_path, links)
    report = refresh(config)
    assert counts(report) == {
        "links": 7, "ok": 2, "filtered": 1, "failed": 2, "duplicate": 1, "malformed": 1, "unchanged": 0,
    }  # fmt: skip
    assert report.reasons == {"too_short": 1, "not_a_video": 1, "http_404": 1, "no_caption": 1}
    assert dict(server.hits) == dict.fromkeys((*server.files, "/missing"), 1)

    found = {row["url"].removeprefix(server.url("")): row for row in rows(config)}
    assert {path: (row["outcome"], row["reason"], row["caption"]) for path, row in found.items()} == {
        "/bikes.mp4": ("ok", None, "bikes, and a comma"),
        "/numbers.mp4": ("ok", None, "numbers, and a comma"),
        "/short.mp4": ("filtered", "too_short", "short, and a comma"),
        "/picture.mp4": ("failed", "not_a_video", "picture, and a comma"),
        "/missing": ("failed", "http_404", "a video that is gone"),
    }
    for path, body in server.files.items():
        assert found[path]["sha256"] == hashlib.sha256(body).digest()
        assert (found[path]["frames"] is None) == (found[path]["outcome"] != "ok")
    numbers = [read_number(frame) for frame in found["/numbers.mp4"]["frames"]]
    assert numbers == [k * 30 // 8 for k in range(16)]

    row = found["/bikes.mp4"]
    frames, rate = every_frame("bikes.mp4")
    start_s = first_stretch(frames, [int(k * rate / 8) for k in range(80)], 16) / 8
    assert start_s > 0
    assert (row["fps"], row["start_s"], row["duration_s"]) == (8.0, start_s, 16 / 8)
    assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (151, 64, 640, 272)
    assert (row["image"], row["format"], len(row["frames"])) == (None, "png", 16)
    shown = shown_at(BIKES, [start_s + k / 8 for k in range(16)])
    for k, frame in enumerate(row["frames"]):
        assert Image.open(io.BytesIO(frame)).size == (151, 64)
        nearness = [psnr(pixels_of(frame), pixels) for pixels in shown]
        assert np.argmax(nearness) == k
        assert nearness[k] > 38


def test_clips_that_are_there_are_not_fetched_again(tmp_path: Path, server: PictureServer) -> None:
    server.files = {"/bikes.mp4": BIKES.read_bytes()}
    config = configure_videos(tmp_path, [(server.url("/bikes.mp4"), "bikes on a road")])
    first = refresh(config)
    before = rows(config)
    server.files["/numbers.mp4"] = make_video(number_picture, 90)
    config = configure_videos(
        tmp_path, [(server.url("/bikes.mp4"), "bikes, told in other words"), (server.url("/numbers.mp4"), "more of it")]
    )
    report = refresh(config)
    assert (first.ok, report.ok, report.unchanged, report.recaptioned) == (1, 2, 0, 1)
    assert dict(server.hits) == {"/bikes.mp4": 1, "/numbers.mp4": 1}
    after = {row["url"]: row for row in rows(config)}
    kept = after[server.url("/bikes.mp4")]
    assert kept == before[0] | {"caption": "bikes, told in other words"}
