"""What gives no clip: no video, lists of other files and addresses, sizes, damage."""

import io
import socket
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mdm_core.errors import ConfigError
from pipelines.data.config import FiltersConfig, ImageConfig, VideoConfig
from pipelines.data.failure import Failure
from pipelines.data.pictures import video as video_module
from pipelines.data.pictures.video import Clip, decode_clip
from tests.pipelines.data.videos import (
    ALL,
    EXACT,
    FROM_START,
    NUMBERED,
    clip_of,
    make_stretched,
    make_video,
    noisy,
    number_picture,
)


def encoded_picture(image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def make_sound(container: str, codec: str, *, with_cover: bool) -> bytes:
    """Two seconds of silence, with the cover of an album if wanted."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        sound: Any = output.add_stream(codec, rate=48_000)
        cover: Any = None
        if with_cover:
            cover = output.add_stream("png", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 96_000), np.float32), format="flt", layout="mono")
        samples.sample_rate = 48_000
        resampled = av.AudioResampler(format=sound.format, layout="mono", rate=48_000, frame_size=1024).resample(
            samples
        )
        if cover is not None:
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            output.mux(cover.encode(frame))
            output.mux(cover.encode(None))
        for part in resampled:
            output.mux(sound.encode(part))
        output.mux(sound.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>no</html>",
        bytes(1000),
        encoded_picture("GIF"),
        encoded_picture("WEBP"),
        encoded_picture("PNG"),
        encoded_picture("AVIF"),
        make_sound("mp3", "libmp3lame", with_cover=False),
        make_sound("mp4", "aac", with_cover=False),
        make_sound("mp4", "aac", with_cover=True),
    ],
    ids=["empty", "html", "zeros", "gif", "webp", "apng", "avif", "mp3", "m4a", "m4a with cover"],
)
def test_what_is_no_video(body: bytes) -> None:
    assert decode_clip(body, EXACT, ALL, FROM_START) == Failure("not_a_video")


def test_codec_that_is_seldom_tried_is_left_alone() -> None:
    body = make_video(number_picture, 60, container="matroska", codec="ffv1")
    assert decode_clip(body, EXACT, ALL, FROM_START) == Failure("unsupported_codec")


@pytest.fixture
def counting_server() -> Any:
    """A port of this machine, and how often it was connected to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        yield listener


def num_connections(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except TimeoutError:
            return count
        count += 1


def lists_that_open(address: str) -> dict[str, str]:
    """Files that libavformat reads by opening what they name."""
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{address}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{address}'\n",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {address[-5:]} RTP/AVP 96\n",
        "dash": f"<?xml version='1.0'?><MPD><BaseURL>{address}</BaseURL></MPD>",
    }


def test_other_files_and_addresses_are_never_opened(
    tmp_path: Path, counting_server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.ts"
    secret.write_bytes(make_video(number_picture, 90, container="mpegts"))
    port = counting_server.getsockname()[1]
    # Read without care, a list does give what it names, and does connect.
    for name in ("hls", "concat"):
        path = tmp_path / f"list.{'m3u8' if name == 'hls' else 'txt'}"
        path.write_text(lists_that_open(str(secret))[name])
        options = {"safe": "0"} if name == "concat" else {}
        with av.open(str(path), format=name, options=options) as container:
            assert sum(1 for _ in container.decode(video=0)) == 90
    path.write_text(lists_that_open(f"http://127.0.0.1:{port}/a.ts")["concat"])
    remote = {"safe": "0", "protocol_whitelist": "file,http,tcp"}
    with pytest.raises(av.FFmpegError):
        av.open(str(path), format="concat", options=remote, timeout=0.3).close()
    assert num_connections(counting_server) > 0

    bodies = [
        prefix + text.encode()
        for address in (str(secret), f"file://{secret}", f"http://127.0.0.1:{port}/a.ts", f"tcp://127.0.0.1:{port}")
        for text in lists_that_open(address).values()
        for prefix in (b"", b"\n", b"FLV\x01", b"\x1aE\xdf\xa3", b"OggS", bytes(4) + b"ftypisom")
    ]
    for body in bodies:
        assert isinstance(decode_clip(body, EXACT, ALL, FROM_START), Failure)
    # And were one of those readers chosen after all, it would get nothing.
    for name in ("hls", "concat", "sdp", "dash"):
        monkeypatch.setattr(video_module, "_reader", lambda body, name=name: name)
        for body in bodies:
            assert isinstance(decode_clip(body, EXACT, ALL, FROM_START), Failure)
    assert num_connections(counting_server) == 0


def test_size_is_checked_before_anything_is_decoded() -> None:
    at = NUMBERED.index(b"mdat") + 4
    no_pictures = NUMBERED[:at] + bytes(2000) + NUMBERED[at + 2000 :]
    assert decode_clip(no_pictures, EXACT, ALL, FROM_START) == Failure("corrupt")
    limit = EXACT.model_copy(update={"max_pixels": 128 * 64 - 1})
    assert decode_clip(no_pictures, limit, ALL, FROM_START) == Failure("too_many_pixels")
    stretched = EXACT.model_copy(update={"max_pixels": 2 * 144 * 96 - 1})
    assert decode_clip(make_stretched(Fraction(2)), stretched, ALL, FROM_START) == Failure("too_many_pixels")
    enlarged = ImageConfig(size_px=128, upscale=True, max_pixels=256 * 128)
    assert isinstance(decode_clip(NUMBERED, enlarged, ALL, FROM_START), Clip)
    limit = enlarged.model_copy(update={"max_pixels": 256 * 128 - 1})
    assert decode_clip(NUMBERED, limit, ALL, FROM_START) == Failure("too_many_pixels")


def test_sizes_are_filtered() -> None:
    small, wide = FiltersConfig(min_side_px=65, max_aspect=9), FiltersConfig(min_side_px=0, max_aspect=1.9)
    assert decode_clip(NUMBERED, EXACT, small, FROM_START) == Failure("too_small", outcome="filtered")
    assert decode_clip(NUMBERED, EXACT, wide, FROM_START) == Failure("aspect", outcome="filtered")


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi", "flv", "mpegts"])
def test_file_cut_short_is_a_failure_if_the_clip_is(container: str) -> None:
    body = make_video(noisy, 75, container=container, options={"bf": "2"})
    reasons = [decode_clip(body[: int(len(body) * part)], EXACT, ALL, FROM_START) for part in (0.02, 0.3, 0.6)]
    allowed = {"truncated", "corrupt"} if container in ("flv", "mpegts") else {"truncated"}
    assert {result.reason for result in reasons if isinstance(result, Failure)} <= allowed
    assert not any(isinstance(result, Clip) for result in reasons)
    if container not in ("mp4", "mov"):  # whose tables are at the end
        shorter = clip_of(body[: int(len(body) * 0.95)])
        assert shorter == clip_of(body)


def test_no_more_is_read_than_the_clip_takes() -> None:
    body = make_video(noisy, 120, container="matroska", options={"bf": "0"})
    half = len(body) * 3 // 5
    spoilt = body[:half] + np.random.default_rng(0).bytes(len(body) - half)
    assert clip_of(spoilt) == clip_of(body)


def test_damaged_file_is_a_failure() -> None:
    body = make_video(noisy, 75)
    at = body.index(b"mdat") + len(body) // 4
    damaged = body[:at] + np.random.default_rng(0).bytes(3000) + body[at + 3000 :]
    assert decode_clip(damaged, EXACT, ALL, FROM_START) == Failure("corrupt")


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts", "flv"])
def test_no_damage_makes_anything_but_a_clip_or_a_failure(container: str) -> None:
    body = make_video(number_picture, 70, container=container)
    generator = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(body)
        for at in generator.integers(0, len(body), generator.integers(1, 20)):
            damaged[at] = generator.integers(256)
        result = decode_clip(bytes(damaged), EXACT, ALL, FROM_START)
        assert isinstance(result, Clip | Failure)


@pytest.mark.parametrize(("rate", "is_believed"), [(200, True), (1000, False)])
def test_frames_without_end_are_not_believed(rate: int, is_believed: bool) -> None:
    body = make_video(number_picture, 900, container="matroska", codec="mpeg4", rate=Fraction(rate))
    result = decode_clip(body, EXACT, ALL, VideoConfig(num_frames=6, fps=8.0, scene_cuts=False))
    assert isinstance(result, Clip) if is_believed else result == Failure("corrupt")


def test_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"videos need the package av; pip install 'mdm\[video\]'"):
        decode_clip(NUMBERED, EXACT, ALL, FROM_START)
