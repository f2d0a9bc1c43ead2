"""Which frames of a video a clip takes, and when it begins."""

import io
import math
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.data.config import ImageConfig, VideoConfig
from pipelines.data.failure import Failure
from pipelines.data.pictures.video import Clip, decode_clip
from tests.pipelines.data.videos import (
    ALL,
    CLIPS,
    EXACT,
    NUMBERED,
    Pixels,
    clip_of,
    every_frame,
    first_stretch,
    make_video,
    number_picture,
    pixels_of,
    psnr,
    read_number,
)


@pytest.mark.parametrize(
    ("container", "codec", "rate", "options"),
    [
        ("mp4", "libx264", 30, {"bf": "2", "g": "12"}),
        ("mov", "libx264", 25, {"bf": "0"}),
        ("mp4", "libx265", 24, {"x265-params": "log-level=none"}),
        ("mp4", "mpeg4", 60, {}),
        ("matroska", "libx264", 30, {"bf": "2"}),
        ("webm", "libvpx-vp9", Fraction(30000, 1001), {}),
        ("ogg", "libvpx", 30, {}),
        ("mpegts", "libx264", 30, {"bf": "2"}),
        ("flv", "libx264", 30, {"bf": "2"}),
        ("avi", "libx264", 30, {"bf": "3", "b-pyramid": "normal"}),
        ("avi", "mpeg4", 25, {"bf": "2"}),
        ("mpeg", "mpeg2video", 25, {"bf": "2"}),
        ("asf", "wmv2", 30, {}),
    ],
)
def test_frames_are_those_on_the_screen(
    container: str, codec: str, rate: int | Fraction, options: dict[str, str]
) -> None:
    rate = Fraction(rate)
    body = make_video(number_picture, 70, container=container, codec=codec, rate=rate, options=options)
    for fps in (8.0, 11.0, float(rate)):
        clip = clip_of(body, VideoConfig(num_frames=8, fps=fps, scene_cuts=False))
        # Rates are given as floats; the times of some containers are whole milliseconds.
        on_screen = [math.floor((k / fps + 1e-4) * rate) for k in range(8)]
        assert [read_number(frame) for frame in clip.frames] == on_screen
        assert (clip.width, clip.height, clip.original_width, clip.original_height) == (128, 64, 128, 64)
        assert (clip.fps, clip.start_s, clip.duration_s, clip.format) == (fps, 0.0, 8 / fps, "png")


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_frames_at_changing_rates(container: str) -> None:
    generator = np.random.default_rng(0)
    times = np.cumsum(generator.choice([7, 33, 40, 100, 400], 60)).tolist()
    body = make_video(number_picture, 60, container=container, times=times, time_base=Fraction(1, 1000))
    clip = clip_of(body, VideoConfig(num_frames=30, fps=10.0, scene_cuts=False))
    shown = [max(i for i in range(60) if times[i] - times[0] <= 100 * k) for k in range(30)]
    assert [read_number(frame) for frame in clip.frames] == shown
    assert len(set(shown)) < 30


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
def test_video_that_begins_late(container: str) -> None:
    body = make_video(number_picture, 70, container=container, times=range(45, 115))
    clip = clip_of(body)
    assert [read_number(frame) for frame in clip.frames] == [k * 30 // 8 for k in range(16)]
    assert clip.start_s == 0


def test_frames_are_shown_again_where_the_video_is_slower() -> None:
    body = make_video(number_picture, 10, rate=Fraction(4))
    clip = clip_of(body)
    assert [read_number(frame) for frame in clip.frames] == [k // 2 for k in range(16)]


@pytest.mark.parametrize(("num_frames", "fits"), [(24, True), (25, False)])
def test_length_of_a_video(num_frames: int, fits: bool) -> None:
    result = decode_clip(NUMBERED, EXACT, ALL, VideoConfig(num_frames=num_frames, fps=8.0))
    assert isinstance(result, Clip) if fits else result == Failure("too_short", outcome="filtered")


@pytest.mark.parametrize(
    ("cuts", "start"),
    [
        ([], 0),
        ([20], 6),  # shown first at k = 6, 0.75 s
        ([30], 8),
        ([56], 15),
        ([57], 0),  # its last frame is number 56
        ([15, 40], 11),
        ([20, 40, 60, 80], 0),  # no room between two, nor after the last
    ],
)
def test_clip_lies_between_cuts(cuts: list[int], start: int) -> None:
    def draw(number: int) -> Pixels:
        # Bars move all the time, and hardly matter.
        return number_picture(number) // 8 + np.uint8(100 * (sum(number >= cut for cut in cuts) % 2))

    body = make_video(draw, 130 if len(cuts) < 3 else 95, options={"qp": "0"})
    clip = clip_of(body, VideoConfig(num_frames=16, fps=8.0))
    assert clip.start_s == start / 8
    levels = [pixels_of(frame).min() > 80 for frame in clip.frames]
    assert len(set(levels)) == (2 if len(cuts) == 4 else 1)
    assert clip_of(body).start_s == 0


def test_search_for_a_stretch_has_an_end() -> None:
    def draw(number: int) -> Pixels:
        # A cut each half second, and at last, after 10 s, a long stretch.
        return np.full((32, 64, 3), 200 * (number // 15 % 2) if number < 300 else 100, np.uint8)

    clip = clip_of(make_video(draw, 390), VideoConfig(num_frames=16, fps=8.0))
    assert clip.start_s == 0
    longer = clip_of(make_video(draw, 450), VideoConfig(num_frames=32, fps=8.0))
    assert longer.start_s == 10


def test_real_clip_with_cuts_equals_a_plain_decoding_of_all_of_it() -> None:
    frames, rate = every_frame("bikes.mp4")
    shown = [int(k * rate / 8) for k in range(80)]
    start = first_stretch(frames, shown, 16)
    image = ImageConfig(size_px=128, format="png")
    clip = clip_of((CLIPS / "bikes.mp4").read_bytes(), VideoConfig(num_frames=16, fps=8.0), image)
    assert clip.start_s == start / 8 > 0
    assert (clip.width, clip.height, clip.original_width, clip.original_height) == (301, 128, 640, 272)
    for k, frame in enumerate(clip.frames):
        expected = frames[shown[start + k]].resize((301, 128), Image.Resampling.LANCZOS)
        assert psnr(pixels_of(frame), np.asarray(expected, np.float64)) > 38


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4"])
def test_real_clips(name: str) -> None:
    clip = clip_of((CLIPS / name).read_bytes(), VideoConfig(), ImageConfig(size_px=64))
    shown_size = (1280, 720) if name == "bigbuckbunny.mp4" else (round(176 * 128 / 117), 144)
    assert (clip.original_width, clip.original_height) == shown_size
    assert (clip.height, clip.start_s, len(clip.frames), clip.format) == (64, 0.0, 16, "jpeg")
    for frame in clip.frames:
        assert Image.open(io.BytesIO(frame)).size == (clip.width, clip.height)


def test_sound_beside_a_video_is_ignored() -> None:
    with av.open(str(CLIPS / "bigbuckbunny.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    frames, rate = every_frame("bigbuckbunny.mp4")
    clip = clip_of((CLIPS / "bigbuckbunny.mp4").read_bytes(), image=ImageConfig(size_px=96, format="png"))
    expected = frames[int(15 * rate / 8)].resize((clip.width, clip.height), Image.Resampling.LANCZOS)
    # PyAV takes what does not name its colours for BT.601, browsers take it for BT.709.
    grey = [np.asarray(Image.open(io.BytesIO(clip.frames[15])).convert("L"), np.float64)]
    assert psnr(grey[0], np.asarray(expected.convert("L"), np.float64)) > 30
