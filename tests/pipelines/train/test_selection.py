"""Rows chosen by an SQL condition, against the same condition asked of each row in Python."""

import pickle
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import ColumnProperties, WriterProperties, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_core.errors import ConfigError, WorkError
from pipelines.data.table.sample_table import SCHEMA, SampleTable, Shard, ensure_table
from pipelines.train.ingest.selection import Selection, select_rows

Row = dict[str, Any]


def make_row(number: int, outcome: str = "ok") -> Row:
    draw = np.random.default_rng([7, number])
    values: Row = dict.fromkeys([*SCHEMA.names, "score_sharp"])
    return values | {
        "id": number.to_bytes(16, "big"),
        "url": f"http://example.org/{number}",
        "caption": f"it's picture {number}",
        "source": "cc12m" if number % 3 else "webvid",
        "outcome": outcome,
        "retryable": False,
        "attempts": 1,
        "fetched_at": datetime(2026, 1, 1 + number % 28, tzinfo=UTC),
        "image": b"picture",
        "width": int(draw.integers(100, 400)),
        "height": int(draw.integers(100, 400)),
        "clip_similarity": None if draw.random() < 0.3 else float(np.float32(draw.random())),
        "score_sharp": None if draw.random() < 0.3 else float(np.float32(draw.random())),
    }


def append(uri: Path, rows: list[Row], row_group_rows: int = 1000, *, statistics: bool = True) -> None:
    write_deltalake(
        str(uri),
        pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, pa.field("score_sharp", pa.float32())])),
        mode="append",
        partition_by=["outcome"],
        writer_properties=WriterProperties(
            max_row_group_size=row_group_rows,
            statistics_truncate_length=16,
            default_column_properties=ColumnProperties(statistics_enabled="PAGE" if statistics else "NONE"),
        ),
    )


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> SampleTable:
    """90 ok rows in three shards of row groups of 8, 16 and 30, between 20 failed ones."""
    uri = tmp_path_factory.mktemp("scored") / "table"
    ensure_table(str(uri), ["score_sharp"])
    for number, row_group_rows in enumerate((8, 16, 30)):
        append(uri, [make_row(30 * number + row) for row in range(30)], row_group_rows)
        append(uri, [make_row(1000 + 10 * number + row, "failed") for row in range(10)])
    return SampleTable.open(str(uri))


def chosen_ids(table: SampleTable, selection: Selection) -> list[bytes]:
    """The ids of all chosen rows, looked up by shard, row group and place."""
    found: list[bytes] = []
    for number, count in enumerate(selection.rows_per_group):
        group = selection.group(number)
        ids = table.read(group.shard, ["id"])["id"].to_pylist()[group.first_row :][: group.num_rows]
        found += [ids[row] for row in selection.chosen_rows(number)]
        assert len(selection.chosen_rows(number)) == count
    return found


def more(value: float | None, than: float) -> bool:
    return value is not None and value > than


CONDITIONS: list[tuple[str, Callable[[Row], bool]]] = [
    ("clip_similarity >= 0.5 and width >= 256", lambda r: more(r["clip_similarity"], 0.5) and r["width"] >= 256),
    ("clip_similarity > 0.5", lambda r: more(r["clip_similarity"], 0.5)),
    (
        "not (clip_similarity > 0.5)",
        lambda r: r["clip_similarity"] is not None and not more(r["clip_similarity"], 0.5),
    ),
    ("clip_similarity is null", lambda r: r["clip_similarity"] is None),
    ("clip_similarity > 0.5 or width < 150", lambda r: more(r["clip_similarity"], 0.5) or r["width"] < 150),
    ("coalesce(clip_similarity, 1) > 0.5", lambda r: r["clip_similarity"] is None or r["clip_similarity"] > 0.5),
    ("source = 'cc12m' and score_sharp > 0.25", lambda r: r["source"] == "cc12m" and more(r["score_sharp"], 0.25)),
    ("least(width, height) >= 200", lambda r: min(r["width"], r["height"]) >= 200),
    ("cast(width as double) / height between 0.9 and 1.1", lambda r: 0.9 <= r["width"] / r["height"] <= 1.1),
    ("caption like 'it''s%7' -- a remark", lambda r: r["caption"].endswith("7")),
    ("fetched_at < '2026-01-10'", lambda r: r["fetched_at"].day < 10),
    ("source in ('webvid')\n  and width > 120", lambda r: r["source"] == "webvid" and r["width"] > 120),
    ("true", lambda r: True),
]


@pytest.mark.parametrize(("where", "wanted"), CONDITIONS, ids=[where for where, _ in CONDITIONS])
def test_a_condition_chooses_the_rows_that_python_chooses(
    scored: SampleTable, where: str, wanted: Callable[[Row], bool]
) -> None:
    expected = [row["id"] for row in map(make_row, range(90)) if wanted(row)]
    selection = select_rows(scored, where)
    assert sorted(chosen_ids(scored, selection)) == expected
    assert selection.num_rows == len(expected)


def test_rows_that_are_not_ok_are_never_chosen(scored: SampleTable) -> None:
    everything = select_rows(scored)
    assert everything.num_rows == select_rows(scored, "outcome = 'failed' or true").num_rows == 90
    assert sorted(chosen_ids(scored, everything)) == [number.to_bytes(16, "big") for number in range(90)]
    assert everything.rows_per_group.tolist().count(30) == 1
    assert sorted(everything.rows_per_group.tolist()) == [6, 8, 8, 8, 14, 16, 30]


@pytest.mark.parametrize("statistics", [True, False])
def test_clips_are_refused_before_they_are_read(tmp_path: Path, statistics: bool) -> None:
    rows = [make_row(number) for number in range(20)]
    for row in rows[::5]:
        row |= {"image": None, "frames": [b"frame"] * 4, "fps": 8.0}
    uri = tmp_path / "table"
    ensure_table(str(uri), ["score_sharp"])
    append(uri, rows[:12], statistics=statistics)
    append(uri, rows[12:], statistics=statistics)
    table = SampleTable.open(str(uri))
    with pytest.raises(ConfigError, match=r"4 of the rows .* are clips.*leave them out: data\.where='fps is null'"):
        select_rows(table)
    with pytest.raises(ConfigError, match=r"2 of the rows .*data\.where=.\(caption like '%1%'\) and fps is null"):
        select_rows(table, "caption like '%1%'")
    assert select_rows(table, "(caption like '%1%') and fps is null").num_rows == 9
    assert select_rows(table, "caption like '%7'").num_rows == 2
    assert select_rows(table, "fps is null").num_rows == 16


def test_equal_rows_have_an_equal_digest_and_others_another(scored: SampleTable) -> None:
    digests = [
        select_rows(scored, where).digest
        for where in (None, "true", "width > 0", "width > 200", "width >= 201", "width > 200 and height > 300")
    ]
    assert digests[0] == digests[1] == digests[2]
    assert digests[3] == digests[4]
    assert len(set(digests)) == 3
    selection = select_rows(scored, "width > 200")
    sent = pickle.loads(pickle.dumps(selection))
    assert sent.digest == selection.digest
    assert chosen_ids(scored, sent) == chosen_ids(scored, selection)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.lists(st.booleans(), max_size=20), max_size=4), max_size=5))
def test_any_layout_and_choice_comes_back(layout: list[list[list[bool]]]) -> None:
    shards = [Shard(f"{index}.parquet", sum(map(len, groups)), "ok", 1) for index, groups in enumerate(layout)]
    mask = [bit for groups in layout for group in groups for bit in group]
    selection = Selection(shards, [[len(group) for group in groups] for groups in layout], np.array(mask, bool))
    number = 0
    for shard, groups in zip(shards, layout, strict=True):
        first_row = 0
        for index, group in enumerate(groups):
            found = selection.group(number)
            assert (found.shard, found.index, found.first_row, found.num_rows) == (shard, index, first_row, len(group))
            assert selection.chosen_rows(number).tolist() == [row for row, bit in enumerate(group) if bit]
            number, first_row = number + 1, first_row + len(group)
    assert selection.rows_per_group.tolist() == [sum(group) for groups in layout for group in groups]
    assert selection.num_rows == sum(mask)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("widht >= 256", "names widht, which is no column to choose by; did you mean width?"),
        ("score_shrap > 0.5", "did you mean score_sharp?"),
        ("aesthetics > 5", "which is no column to choose by; there are id, url, caption, source,"),
        ("image is not null", "names image, which is no column to choose by; pictures are not read to choose rows"),
        ("width", "can't be evaluated: .*non-boolean.*; wanted an SQL condition, as in clip_similarity >= 0.28"),
        ("width >= 256 garbage height", "can't be evaluated"),
        ("width >", "can't be evaluated"),
        ("width > 1; drop table samples", "only supports a single SQL statement"),
        ("true) or (true", "can't be evaluated"),
        ("true) is true union all select id from samples where (true", "can't be evaluated"),
        ("id in (select id from '/etc/passwd')", "can't be evaluated: .*not found"),
        ("foo(width) > 1", "Invalid function 'foo'"),
        ("count(*) > 1", "Aggregate functions are not allowed"),
        ("width / 0 > 1", "can't be evaluated: .*DivideByZero"),
        ("random() < 0.5", r"calls random, whose value is another each time; .* write the value itself"),
        ("fetched_at > NOW()", "calls NOW, whose value is another each time"),
        ("width > 400", r"is true of none of the 90 ok rows of .* at version \d+; loosen it"),
        ("clip_similarity > null", "is true of none of the 90 ok rows"),
        ("null", "is true of none of the 90 ok rows"),
        ("caption = 'now'", "is true of none of the 90 ok rows"),
    ],
)
def test_a_wrong_condition_is_one_message(scored: SampleTable, where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        select_rows(scored, where)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    append(tmp_path / "table", [make_row(number) for number in range(4)])
    table = SampleTable.open(str(tmp_path / "table"))
    (shard,) = table.shards("ok")
    (tmp_path / "table" / shard.path).write_bytes(b"PAR1 not a table")
    with pytest.raises(WorkError, match=rf"{shard.path} can't be read: .*; restore it, or use another version"):
        select_rows(table)


def test_pictures_are_not_read(tmp_path: Path) -> None:
    """The bytes of their column are overwritten, which reading it would stumble over."""
    append(tmp_path / "table", [make_row(number) for number in range(30)])
    table = SampleTable.open(str(tmp_path / "table"))
    (shard,) = table.shards("ok")
    with table.open_shard(shard) as file:
        columns = [file.metadata.row_group(0).column(index) for index in range(file.metadata.num_columns)]
    (image,) = (column for column in columns if column.path_in_schema == "image")
    begin = image.dictionary_page_offset or image.data_page_offset
    data = bytearray((tmp_path / "table" / shard.path).read_bytes())
    data[begin : begin + image.total_compressed_size] = b"\xff" * image.total_compressed_size
    (tmp_path / "table" / shard.path).write_bytes(data)
    with pytest.raises(WorkError, match="deserialize"):
        table.read(shard, ["image"])
    assert select_rows(table, "width >= 100 and caption like '%1%'").num_rows == 12


def test_rows_that_share_an_id_are_told(tmp_path: Path) -> None:
    rows = [make_row(number) for number in range(4)]
    rows[1] |= {"id": rows[0]["id"], "width": 1}
    append(tmp_path / "table", rows)
    with pytest.raises(WorkError, match=r"is true of 3 rows of .*, whose ids 4 rows have: some rows share an id"):
        select_rows(SampleTable.open(str(tmp_path / "table")), "width > 1")


def test_a_table_without_pictures_is_refused(tmp_path: Path) -> None:
    append(tmp_path / "table", [make_row(0, "failed")])
    with pytest.raises(ConfigError, match=r"has no ok row at version 0; run `mdm refresh` first"):
        select_rows(SampleTable.open(str(tmp_path / "table")), "width > 1")
