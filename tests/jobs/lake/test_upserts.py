"""Rows put by their key: delta-rs's MERGE and Spark's give one table and one change feed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import Conflict
from jobs.core.plan import Thresholds
from jobs.lake import change_feed, filesystem
from jobs.lake.change_feed import CHANGED, NEW, RETIRED
from jobs.lake.delta import Lake, _merge
from jobs.lake.time_slices import Spans, spans
from tests.jobs.lake.test_private_delta import (
    FIRST,
    SECOND,
    SMALL,
    Rows,
    append,
    by_delta_rs,
    by_spark,
    expected,
    fresh,
    row,
)
from tests.support.spark_tools import Workshop

Change = dict[str, Rows]
"""What becomes of rows, by change: as they are from then on, or (retired) as they were."""


def with_change(change: Change) -> pa.Table:
    rows = [one | {"change": what} for what, those in change.items() for one in those]
    return pa.Table.from_pylist(rows, schema=arrow_schema(SMALL.columns | {"change": "string"}))


def with_gone(change: Change) -> pa.Table:
    rows = [one | {"gone": what == RETIRED} for what, those in change.items() for one in those]
    return pa.Table.from_pylist(rows, schema=arrow_schema(SMALL.columns | {"gone": "boolean"}))


def upsert(
    lake: Lake, rows: pa.Table, txn: int = 1, base: int | None = None, where: Spans | None = None
) -> None:
    base = lake.version(SMALL) if base is None else base
    assert base is not None
    lake.upsert(SMALL, rows, base, "test/merge", txn, "run-merge", where)


def by_rust(lake: Lake, change: Change, where: Spans) -> None:
    upsert(lake, with_change(change), where=where)


def by_rust_streamed(lake: Lake, change: Change, where: Spans) -> None:
    rows = with_gone(change)
    upsert(lake, pa.RecordBatchReader.from_batches(rows.schema, rows.to_batches(1)))


def by_jvm(lake: Lake, change: Change, where: Spans) -> None:
    with lake.transaction(SMALL, "test/merge", 1, "run-merge"):
        lake.merge(SMALL, lake.spark.createDataFrame(with_change(change)), where)


def drawn_change(drawn: random.Random) -> tuple[Rows, Change]:
    """A table, and what becomes of its rows, by change."""
    numbers = drawn.sample(range(20), 12)
    there = [row(f"id {n}", n) for n in numbers]
    some = drawn.sample(there, 6)
    return there, {
        CHANGED: [row(one["id"], one["number"] + 50) for one in some[:3]],
        RETIRED: some[3:5],
        NEW: [row(f"new {n}", n) for n in range(drawn.randrange(3))],
    }


def times_of(there: Rows, change: Change) -> Spans:
    """Where the stored rows lie."""
    ids = {one["id"] for what in (CHANGED, RETIRED) for one in change[what]}
    rows = pa.Table.from_pylist(there, schema=arrow_schema(SMALL.columns))
    return spans(rows.filter(pa.compute.is_in(rows["id"], pa.array(sorted(ids))))["at"], most=2)


def told(lake: Lake, change: Change, there: Rows) -> set[tuple[str, str, int]]:
    """The change feed of a change: (id, type, number)."""
    before = {one["id"]: one["number"] for one in there}
    found = {(one["id"], change_feed.INSERT, one["number"]) for one in change[NEW]}
    found |= {(one["id"], change_feed.POSTIMAGE, one["number"]) for one in change[CHANGED]}
    found |= {(one["id"], change_feed.PREIMAGE, before[one["id"]]) for one in change[CHANGED]}
    return found | {(one["id"], change_feed.DELETE, before[one["id"]]) for one in change[RETIRED]}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("put", [by_rust, by_rust_streamed, by_jvm])
@pytest.mark.slow
def test_every_way_gives_the_same_table_and_feed(
    spark: Any, tmp_path: Path, put: Any, seed: int
) -> None:
    there, change = drawn_change(random.Random(seed))
    lake = fresh(spark, tmp_path)
    for part in (there[:5], there[5:]):
        append(lake, part)
    put(lake, change, times_of(there, change))
    touched = {one["id"] for those in change.values() for one in those}
    rows = [one for one in there if one["id"] not in touched] + change[CHANGED] + change[NEW]
    assert by_delta_rs(lake) == by_spark(lake) == expected(rows)
    columns = ["id", "number", change_feed.TYPE, change_feed.VERSION]
    feed = lake.changes_few(SMALL, 2, 3, columns).to_pylist()
    wanted = told(lake, change, there)
    assert {(one["id"], one[change_feed.TYPE], one["number"]) for one in feed} == wanted
    assert len(feed) == len(wanted) and {one[change_feed.VERSION] for one in feed} == {3}
    seen = lake.changes(SMALL, 2, 3).collect()
    assert {(one.id, one[change_feed.TYPE], one.number) for one in seen} == wanted
    for version, old in ((0, []), (1, there[:5]), (2, there)):
        assert by_delta_rs(lake, version) == by_spark(lake, version) == expected(old)
    [newest] = lake.history(SMALL, 2)
    assert newest["operation"] == "MERGE" and newest["userMetadata"] == "run-merge"
    assert DeltaTable(lake.path(SMALL)).transaction_version("test/merge") == 1


def test_files_that_are_merged_stay_small(spark: Any, tmp_path: Path) -> None:
    """Also in tables of earlier versions, and after Spark has replaced the table."""
    lake = fresh(spark, tmp_path)
    assert lake.property(SMALL, "delta.targetFileSize") == "8388608"
    lake.replace(SMALL, lake.read(SMALL), {})
    assert lake.property(SMALL, "delta.targetFileSize") is None
    base = lake.version(SMALL)
    assert base is not None
    append(lake, FIRST)
    upsert(lake, with_change({CHANGED: [row("a", 7)]}))
    assert lake.property(SMALL, "delta.targetFileSize") == "8388608"
    assert by_spark(lake) == expected([row("a", 7), *FIRST[1:]])
    operations = [one["operation"] for one in lake.history(SMALL, base)]
    assert operations == ["MERGE", "SET TBLPROPERTIES", "WRITE"]


@pytest.mark.parametrize(("most", "writer"), [(3, "delta-rs"), (1, "Apache-Spark")])
def test_many_rows_are_put_by_spark(spark: Any, tmp_path: Path, most: int, writer: str) -> None:
    shop = Workshop(spark, tmp_path)
    shop.lake.create(SMALL)
    append(shop.lake, FIRST)
    context = replace(shop.context(), thresholds=Thresholds(merged_rows=most))
    candidate = context.candidate(SMALL)
    rows = with_change({CHANGED: [row("a", 7)], NEW: [row("d", 4)]})
    stored = pa.array([FIRST[0]["at"], None], pa.timestamp("us", "UTC"))
    filesystem.write_parquet(candidate.path("rows/0.parquet"), rows.append_column("was", stored))
    candidate.adopt("rows", f"{SMALL.ddl}, change string, was timestamp")
    context.upsert(SMALL, candidate, "rows", 1, "test/merge", 5, stored="was")
    assert by_delta_rs(shop.lake) == expected([row("a", 7), *FIRST[1:], row("d", 4)])
    # (Spark's commits carry one name; the guard's comes with a commit of no rows behind it.)
    *marks, newest = shop.lake.history(SMALL, 1)
    assert len(marks) == (writer != "delta-rs")
    assert newest["operation"] == "MERGE" and newest["engineInfo"].startswith(writer)
    assert newest["userMetadata"] == context.run_id
    assert DeltaTable(shop.lake.path(SMALL)).transaction_version("test/merge") == 5
    with pytest.raises(Conflict, match="since version 1"):
        context.upsert(SMALL, candidate, "rows", 1, "test/merge", 6)


def test_a_file_without_the_keys_times_is_not_read(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    for rows in (FIRST, SECOND):
        append(lake, rows)
    where = spans(pa.chunked_array([[FIRST[0]["at"], FIRST[2]["at"]]]))
    upsert(lake, with_change({CHANGED: [FIRST[0] | {"number": 7}, FIRST[2]]}), where=where)
    [newest] = lake.history(SMALL, 2)
    assert newest["operationMetrics"]["num_target_files_scanned"] == 1
    assert by_delta_rs(lake) == expected([FIRST[0] | {"number": 7}, *FIRST[1:], *SECOND])


@pytest.mark.parametrize(
    "stats", ["{}", '{"numRecords": 3}', '{"numRecords": 3, "nullCount": {"id": 0, "at": 0}}']
)
def test_a_file_of_which_the_log_says_nothing_is_read(
    spark: Any, tmp_path: Path, stats: str
) -> None:
    """(Else its row would be there twice.)"""
    lake = fresh(spark, tmp_path)
    append(lake, FIRST, stats)
    where = spans(pa.chunked_array([[FIRST[0]["at"]]]))
    upsert(lake, with_change({CHANGED: [FIRST[0] | {"number": 7}]}), where=where)
    assert by_delta_rs(lake) == expected([FIRST[0] | {"number": 7}, *FIRST[1:]])


def test_times_at_the_ends_of_the_calendar_are_found(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    ends = [
        row(name, 1) | {"at": FIRST[0]["at"].replace(year=year, month=6)}
        for name, year in (("first", 1), ("last", 9999))
    ]
    append(lake, ends)
    where = spans(pa.Table.from_pylist(ends, schema=arrow_schema(SMALL.columns))["at"])
    assert len(where) == 2
    upsert(lake, with_change({CHANGED: [one | {"number": 7} for one in ends]}), where=where)
    assert by_delta_rs(lake) == expected([one | {"number": 7} for one in ends])


@pytest.mark.parametrize("rows", [{CHANGED: []}, {RETIRED: [row("nobody", 1)]}])
def test_progress_is_recorded_where_no_row_changes(
    spark: Any, tmp_path: Path, rows: Change
) -> None:
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    upsert(lake, with_change(rows), txn=5)
    assert lake.version(SMALL) == 2 and by_delta_rs(lake) == expected(FIRST)
    assert DeltaTable(lake.path(SMALL)).transaction_version("test/merge") == 5


def test_of_two_that_read_the_same_version_one_commits(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    upsert(lake, with_change({CHANGED: [row("a", 7)]}), base=1)
    with pytest.raises(
        Conflict, match=r"^silver\.small was changed by another run since version 1$"
    ):
        upsert(lake, with_change({CHANGED: [row("a", 8)]}), txn=2, base=1)
    assert by_delta_rs(lake) == by_spark(lake) == expected([row("a", 7), *FIRST[1:]])
    assert [one["version"] for one in lake.history(SMALL, -1)] == [2, 1, 0]


@pytest.mark.parametrize("other", [{CHANGED: [row("a", 7)]}, {NEW: [row("new", 4)]}])
def test_a_commit_after_the_check_is_a_conflict_too(
    spark: Any, tmp_path: Path, other: Change
) -> None:
    """Another run commits between our look at the table and our commit: one that changes the same
    row, and one that only adds another."""
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    opened = lake.unchanged(SMALL, 1)
    upsert(lake, with_change(other))
    with pytest.raises(Conflict, match=r"^silver\.small was changed by another run meanwhile$"):
        _merge(SMALL, opened, with_change({CHANGED: [row("a", 8)]}))
    kept = [one for one in FIRST if CHANGED not in other or one["id"] != "a"]
    assert by_delta_rs(lake) == expected(kept + [one for those in other.values() for one in those])


def test_no_key_is_written_into_the_log(spark: Any, tmp_path: Path) -> None:
    """Keys may be people: `jobs forget` would have to find them there."""
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    upsert(lake, with_change({RETIRED: [FIRST[0]], NEW: [row("person", 4)]}))
    [newest] = lake.history(SMALL, 1)
    assert "person" not in str(newest)


def test_rows_of_operations_tables_are_put_likewise(spark: Any, tmp_path: Path) -> None:
    """(They are never removed.)"""
    there, change = drawn_change(random.Random(5))
    lake = fresh(spark, tmp_path)
    append(lake, there)
    lake.put_small(SMALL, [tuple(one.values()) for one in change[CHANGED] + [row("new", 3)]])
    touched = {one["id"] for one in change[CHANGED]}
    rows = [one for one in there if one["id"] not in touched] + change[CHANGED] + [row("new", 3)]
    assert by_delta_rs(lake) == by_spark(lake) == expected(rows)


def test_spans_are_cut_at_the_longest_silences() -> None:
    times = pa.chunked_array([[5_000, None, 0, 9_000_000, 9_000_500]]).cast(
        pa.timestamp("us", "UTC")
    )
    assert spans(times, 2) == [(-1_000, 6_000), (8_999_000, 9_001_500)]
    assert spans(times, 1) == [(-1_000, 9_001_500)]
    assert len(spans(times, 64)) == 4
    assert spans(times.slice(1, 1)) == []
