import datetime
import email.utils
import math
import time

import pytest

from pipelines.data.fetch.headers import opted_out, retry_after_s


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("9" * 30, 1e30),
        ("9" * 400, math.inf),
        ("-5", 0),
        ("1.5", 0),
        ("1e3", 0),
        ("٣", 0),
        ("soon", 0),
        ("", 0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
        ("Mon, 01 Jan 99999999999 00:00:00 GMT", 0),
        ("Mon, 99 Foo 2020 99:99:99 GMT", 0),
        ("\x00", 0),
    ],
)
def test_retry_after_is_read(value: str, wait_s: float) -> None:
    assert retry_after_s({"Retry-After": value}) == pytest.approx(wait_s)


def test_retry_after_may_be_a_date() -> None:
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)
    # A date has whole seconds, and some time passes meanwhile.
    assert 7190 < retry_after_s({"Retry-After": email.utils.format_datetime(at, usegmt=True)}) <= 7200
    assert 7190 < retry_after_s({"Retry-After": time.asctime(at.utctimetuple())}) <= 7200
    assert retry_after_s({}) == 0


OUT = [
    ["noai"],
    ["noimageai"],
    ["NoIndex"],
    ["noimageindex"],
    ["none"],
    ["nofollow, noai"],
    ["nofollow,noai"],
    ["all", "noai"],
    ["max-image-preview:large, noai"],
    ["max-snippet:-1,max-video-preview:-1,noai"],
    ["unavailable_after: Wed, 03 Dec 2025 13:09:53 GMT, noai"],
    ["unavailable_after: 2025-12-03T13:09:53, noai"],
    ["*: noai"],
    ["otherbot: nofollow, *: noai"],
    ["otherbot: noindex", "noai"],
    ["mdm: noai"],
    ["MDM: nofollow, noai"],
    ["otherbot: all, mdm: noindex"],
]
IN = [
    [],
    [""],
    ["all"],
    ["nofollow"],
    ["noaix"],
    ["no ai"],
    ["otherbot: noai"],
    ["otherbot: nofollow, noai"],
    ["googlebot:noindex", "bingbot: noai"],
    ["max-image-preview: none"],
    ["unavailable_after: Wed, 03 Dec 2025 13:09:53 GMT"],
    ["mdm: all, otherbot: noai"],
]


@pytest.mark.parametrize("values", OUT)
def test_who_opts_out_is_left_out(values: list[str]) -> None:
    assert opted_out(values, "mdm")


@pytest.mark.parametrize("values", IN)
def test_who_does_not_is_not(values: list[str]) -> None:
    assert not opted_out(values, "mdm")
