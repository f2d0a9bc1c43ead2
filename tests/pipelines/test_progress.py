"""Progress, told by a clock that the test turns."""

import io
import json

from pipelines.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_log_gets_a_line_every_few_seconds_and_a_last_one():
    clock, stream = Clock(), io.StringIO()
    with Progress("refresh", total=100, unit="links", every_s=5, stream=stream, clock=clock) as progress:
        for _ in range(10):
            clock.now_s += 2
            progress.advance(10, ok=progress.done, loss=0.123456789)
    lines = lines_of(stream)
    # 20 s, ten links every two: lines at 6, 12 and 18 s, and the end.
    assert [(line["elapsed_s"], line["done"], line.get("eta_s")) for line in lines] == [
        (6.0, 30, 14.0),
        (12.0, 60, 8.0),
        (18.0, 90, 2.0),
        (20.0, 100, None),
    ]
    assert lines[0] == {
        "progress": "refresh",
        "done": 30,
        "total": 100,
        "unit": "links",
        "per_s": 5.0,
        "elapsed_s": 6.0,
        "eta_s": 14.0,
        "ok": 20,
        "loss": 0.12346,
    }
    assert lines[-1]["state"] == "done"


def test_what_an_earlier_run_did_counts_as_done_but_not_in_the_rate():
    clock, stream = Clock(), io.StringIO()
    with Progress("train", total=1000, start=900, stream=stream, clock=clock) as progress:
        clock.now_s += 10
        progress.advance(50)
        assert (progress.done, progress.rate, progress.eta_s) == (950, 5.0, 10.0)


def test_no_total_gives_no_time_left():
    clock, stream = Clock(), io.StringIO()
    with Progress("read", stream=stream, clock=clock, every_s=1) as progress:
        clock.now_s += 2
        progress.advance(3)
    assert [line.get("eta_s", "none") for line in lines_of(stream)] == [None, "none"]


def test_an_error_is_told_in_the_last_line():
    stream = io.StringIO()
    try:
        with Progress("train", stream=stream):
            raise RuntimeError
    except RuntimeError:
        pass
    assert lines_of(stream)[-1]["state"] == "stopped"


def test_a_terminal_gets_a_bar_and_no_json():
    stream = Terminal()
    with Progress("refresh", total=4, unit="links", stream=stream) as progress:
        progress.advance(4, ok=3)
    shown = stream.getvalue()
    assert "refresh" in shown
    assert "4/4" in shown
    assert "ok 3" in shown
    assert "{" not in shown
