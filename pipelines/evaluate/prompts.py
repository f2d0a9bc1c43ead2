"""Which rows of a table an evaluation takes: captions to make pictures for, and real pictures to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np

from mdm_core.errors import ConfigError
from pipelines.data.table.sample_table import SampleTable, Shard
from pipelines.train.ingest.selection import select_rows


@dataclass(frozen=True)
class TableRow:
    """One ok row of a table: its number among all of them, and where it is."""

    number: int
    shard: Shard
    row: int


def draw_rows(
    table: SampleTable,
    *,
    where: str | None = None,
    key: str = "where",
    num_samples: int,
    num_reference: int,
    seed: int,
) -> tuple[list[TableRow], list[TableRow]]:
    """Returns the rows of the prompts, and those of the reference: others, as many as there are but no more than asked.

    Both are functions of the table's version, the seed and `where`.

    Args:
        table: The table.
        where: An SQL expression for the rows that count; None is all.
        key: What messages call it.
        num_samples: Prompts.
        num_reference: Others, at most.
        seed: What is drawn depends on.

    Raises:
        ConfigError: The expression is wrong, or true of too few ok rows.
        WorkError: The table can't be read.
    """
    selection = select_rows(table, where, key=key)
    count = selection.num_rows
    if count < num_samples + 2:
        meant = "" if where is None else f" of which {key}={where!r} is true"
        fixes = [f"set num_samples to {count - 2} or less"] if count >= 4 else []
        fixes += (
            ["refresh the table"] if where is None else ["set where to a looser condition, or to true for all rows"]
        )
        raise ConfigError(
            f"{table.uri} has {count} ok rows{meant} at version {table.version}, wanted num_samples={num_samples} and "
            f"2 others at least to compare with; {', or '.join(fixes)}"
        )
    drawn = np.random.default_rng(seed).choice(count, min(count, num_samples + num_reference), replace=False)
    ends = np.cumsum(selection.rows_per_group)
    shard_ends = accumulate(shard.num_rows for shard in selection.shards)
    firsts = {shard.path: end - shard.num_rows for shard, end in zip(selection.shards, shard_ends, strict=True)}

    def located(chosen: int) -> TableRow:
        number = int(np.searchsorted(ends, chosen, side="right"))
        group = selection.group(number)
        # Counted from the end of the row group.
        row = group.first_row + int(selection.chosen_rows(number)[chosen - int(ends[number])])
        return TableRow(firsts[group.shard.path] + row, group.shard, row)

    rows = [located(int(chosen)) for chosen in drawn]
    return rows[:num_samples], rows[num_samples:]


def by_shard(rows: Sequence[TableRow], *, at_most: int | None = None) -> list[list[TableRow]]:
    """Returns the rows in groups of one shard each, in the order of the table."""
    groups = [list(group) for _, group in groupby(sorted(rows, key=lambda row: row.number), lambda row: row.shard.path)]
    if at_most is None:
        return groups
    return [group[first : first + at_most] for group in groups for first in range(0, len(group), at_most)]


def read_captions(table: SampleTable, rows: Sequence[TableRow]) -> list[str]:
    """Returns the captions of `rows`, in their order."""
    found: dict[int, str] = {}
    for group in by_shard(rows):
        captions = table.read(group[0].shard, ["caption"])["caption"].take([row.row for row in group])
        found |= dict(zip((row.number for row in group), captions.to_pylist(), strict=True))
    return [found[row.number] for row in rows]
