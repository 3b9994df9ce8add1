"""Rows put by their key: MERGE, a small table written anew, and files rewritten give one table."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.core.arrow_types import arrow_schema
from jobs.lake.change_feed import CHANGED, NEW, RETIRED
from jobs.lake.delta import Lake
from tests.jobs.lake.test_private_delta import (
    SMALL,
    Rows,
    append,
    by_delta_rs,
    by_spark,
    expected,
    fresh,
    row,
    swap,
)


def drawn_change(drawn: random.Random) -> tuple[Rows, dict[str, Rows]]:
    """A table, and what becomes of its rows, by change."""
    numbers = drawn.sample(range(20), 12)
    there = [row(f"id {n}", n) for n in numbers]
    some = drawn.sample(there, 6)
    return there, {
        CHANGED: [row(one["id"], one["number"] + 50) for one in some[:3]],
        RETIRED: some[3:5],
        NEW: [row(f"new {n}", n) for n in range(drawn.randrange(3))],
    }


def merged(lake: Lake, change: dict[str, Rows]) -> None:
    lake.merge(SMALL, lake.spark.createDataFrame(with_gone(change)))


def merged_few(lake: Lake, change: dict[str, Rows]) -> None:
    version = lake.version(SMALL)
    assert version is not None
    lake.merge_few(SMALL, with_gone(change), version, "test/merge", 1, "run")


def rewritten(lake: Lake, change: dict[str, Rows]) -> None:
    swap(lake, change, txn=1)


def with_gone(change: dict[str, Rows]) -> pa.Table:
    rows = [one | {"gone": what == RETIRED} for what, those in change.items() for one in those]
    return pa.Table.from_pylist(rows, schema=arrow_schema(SMALL.columns | {"gone": "boolean"}))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("put", [merged, merged_few, rewritten])
@pytest.mark.slow
def test_every_way_gives_the_same_table(spark: Any, tmp_path: Path, put: Any, seed: int) -> None:
    there, change = drawn_change(random.Random(seed))
    lake = fresh(spark, tmp_path)
    for part in (there[:5], there[5:]):
        append(lake, part)
    put(lake, change)
    touched = {one["id"] for those in change.values() for one in those}
    rows = [one for one in there if one["id"] not in touched] + change[CHANGED] + change[NEW]
    assert by_delta_rs(lake) == by_spark(lake) == expected(rows)


def test_rows_of_operations_tables_are_put_likewise(spark: Any, tmp_path: Path) -> None:
    """(They are never removed.)"""
    there, change = drawn_change(random.Random(5))
    lake = fresh(spark, tmp_path)
    append(lake, there)
    lake.put_small(SMALL, [tuple(one.values()) for one in change[CHANGED] + [row("new", 3)]])
    touched = {one["id"] for one in change[CHANGED]}
    rows = [one for one in there if one["id"] not in touched] + change[CHANGED] + [row("new", 3)]
    assert by_delta_rs(lake) == by_spark(lake) == expected(rows)
