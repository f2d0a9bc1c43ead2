import hashlib

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.table import keys

KEY = st.binary(min_size=16, max_size=16) | st.sampled_from([bytes(16), bytes(15) + b"\1", b"\1" + bytes(15)])


@settings(deadline=None)
@given(st.lists(st.lists(KEY)), st.lists(KEY))
def test_set_equals_pythons(batches: list[list[bytes]], asked: list[bytes]) -> None:
    ours, theirs = keys.KeySet(), set[bytes]()
    for batch in batches:
        ours.add(keys.from_bytes(b"".join(batch)))
        theirs.update(batch)
    assert len(ours) == len(theirs)
    asked = asked + [key for batch in batches for key in batch]
    assert ours.contains(keys.from_bytes(b"".join(asked))).tolist() == [key in theirs for key in asked]


@settings(deadline=None)
@given(st.lists(KEY))
def test_first_of_equals(values: list[bytes]) -> None:
    assert keys.is_first(keys.from_bytes(b"".join(values))).tolist() == [
        value not in values[:at] for at, value in enumerate(values)
    ]


@settings(deadline=None)
@given(st.lists(KEY), st.lists(KEY))
def test_column_in_pieces(one: list[bytes], two: list[bytes]) -> None:
    column = pa.chunked_array([pa.array(one, pa.binary()), pa.array([b"x" * 16, *two], pa.binary()).slice(1)])
    assert keys.from_column(column).tobytes() == b"".join(one + two)


def test_column_of_longer_hashes_is_cut() -> None:
    hashes = [hashlib.sha256(bytes([n])).digest() for n in range(3)]
    assert keys.from_column(pa.chunked_array([hashes])).tobytes() == b"".join(value[:16] for value in hashes)


def test_link_key_is_blake2b() -> None:
    assert keys.link_key("http://h/ü") == hashlib.blake2b("http://h/ü".encode(), digest_size=16).digest()


def test_find_in_nothing() -> None:
    assert keys.find(keys.empty(), keys.from_bytes(bytes(32))).tolist() == [-1, -1]
    assert np.array_equal(keys.find(keys.from_bytes(bytes(16)), keys.empty()), [])


@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2**32 - 1)), max_size=20), max_size=12))
def test_map_that_grows_is_a_dictionary(batches: list[list[tuple[int, int]]]) -> None:
    known: dict[int, int] = {}
    ours = keys.KeyMap(np.uint64)
    every = keys.from_bytes(b"".join(keys.link_key(str(number)) for number in range(32)))
    for batch in batches:
        known.update(batch)
        added = keys.from_bytes(b"".join(keys.link_key(str(key)) for key, _ in batch))
        ours.add(added, np.array([value for _, value in batch], np.uint64))
        found, values = ours.get(every)
        assert found.tolist() == [number in known for number in range(32)]
        assert values.tolist() == [known.get(number, 0) for number in range(32)]


def test_hashes_of_texts_tell_them_apart_and_stay_as_they_are() -> None:
    texts = [f"caption {number}" for number in range(100_000)] + ["", "ä", "a\0", "a"]
    hashes = keys.text_hashes(pa.array(texts))
    assert len(np.unique(hashes)) == len(texts)
    assert np.array_equal(keys.text_hashes(pa.chunked_array([texts[:7], texts[7:]])), hashes)
    # Another process, today or in a year, must find the same.
    assert hashes[-1] == keys.text_hashes(pa.array(["a"]))[0] == 13_950_350_942_979_735_504
