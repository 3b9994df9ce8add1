"""What `jobs/lake/private_delta.py` relies on, sentence by sentence of its docstring: each is asserted
on a small table, as delta-rs and Spark read it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import functions as F

from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import Conflict
from jobs.core.tables import Table
from jobs.lake import change_feed, filesystem, private_delta
from jobs.lake.change_feed import CHANGED, NEW, RETIRED
from jobs.lake.data_files import staging
from jobs.lake.delta import Lake
from jobs.lake.delta_errors import conflicts
from tests.support.spark_tools import Workshop

SMALL = Table(
    layer="silver", name="small", key=("id",), order=("at",), feed=True, doc="For these tests.",
    columns={
        "id": "string", "number": "int", "many": "bigint", "real": "double", "at": "timestamp",
        "day": "date", "texts": "array<string>",
        "events": "array<struct<id:string,at:timestamp>>",
    },
)  # fmt: skip
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
Rows = list[dict[str, Any]]


def row(name: str, number: int) -> dict[str, Any]:
    at = NOON + timedelta(hours=number, microseconds=1)
    return {
        "id": name, "number": number, "many": 2**40 + number, "real": number / 3, "at": at,
        "day": date(2024, 5, 1 + number % 20), "texts": [name, None][: number % 3],
        "events": [{"id": name, "at": at}],
    }  # fmt: skip


FIRST = [row("a", 1), row("b", 2), row("c", 3)]
SECOND = [row("y", 11), row("z", 12)]


class Swapped:
    """Two files, then `a` changed, `b` retired and `d` new, in one commit: (version 2 -> 3)."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        for rows in (FIRST, SECOND):
            append(lake, rows)
        self.now = [row("a", 7), FIRST[2], row("d", 4), *SECOND]
        swap(lake, {CHANGED: [row("a", 7)], RETIRED: [FIRST[1]], NEW: [row("d", 4)]}, txn=5)


def staged(lake: Lake, rows: Rows) -> list[private_delta.Entry]:
    """Rows as a file of our own below the table, which no commit names."""
    folder = staging("test")
    table = pa.Table.from_pylist(rows, schema=arrow_schema(SMALL.columns))
    filesystem.write_parquet(f"{lake.path(SMALL)}/{folder}/part-0.parquet", table)
    return lake.entries(SMALL, folder)


def append(lake: Lake, rows: Rows) -> None:
    version = lake.version(SMALL)
    assert version is not None
    lake.commit(SMALL, staged(lake, rows), version, "test/append", version, "run-append")


def swap(lake: Lake, changes: dict[str, Rows], txn: int, seen: int | None = None) -> None:
    """Rows replaced by their key: `Put` and `Rewrite` make the files, `Lake.swap` the commit."""
    path, folder = lake.path(SMALL), staging("test")
    seen = lake.version(SMALL) if seen is None else seen
    assert seen is not None
    schema = arrow_schema(SMALL.columns | {"change": "string"})
    rows = [one | {"change": change} for change, those in changes.items() for one in those]
    candidate = pa.Table.from_pylist(rows, schema=schema)
    part, keys = (
        lake.folder("_candidates", folder, "part.parquet"),
        lake.folder("_candidates", folder, "keys.parquet"),
    )
    filesystem.write_parquet(part, candidate)
    old = candidate.filter(pa.compute.is_in(candidate["change"], pa.array([CHANGED, RETIRED])))
    filesystem.write_parquet(keys, old.select(["id", "change"]))
    feed = f"{path}/{private_delta.CHANGE_FEED}"
    done = private_delta.Put(SMALL.columns, f"{path}/{folder}", feed)(part)
    task = private_delta.Rewrite(SMALL.columns, "id", keys, f"{path}/{folder}", feed, None)
    files = lake.files_of(SMALL, seen)
    for one in files:
        done += task(one.path)
    replaced = {one["old"] for one in done}
    lake.swap(
        SMALL, [one for one in files if one.path in replaced],
        lake.entries(SMALL, folder, [one["new"] for one in done if one["new"]]),
        [one["feed"] for one in done if one["feed"]], seen, "test/swap", txn, "run-swap",
    )  # fmt: skip


def by_delta_rs(lake: Lake, version: int | None = None) -> Rows:
    found = DeltaTable(lake.path(SMALL), version=version)
    return sorted(filesystem.rows_of(found).to_table().to_pylist(), key=lambda one: one["id"])


def by_spark(lake: Lake, version: int | None = None) -> Rows:
    made = lake.read(SMALL, version).toArrow().cast(arrow_schema(SMALL.columns))
    return sorted(made.to_pylist(), key=lambda one: one["id"])


def expected(rows: Rows) -> Rows:
    table = pa.Table.from_pylist(rows, schema=arrow_schema(SMALL.columns))
    return sorted(table.to_pylist(), key=lambda one: one["id"])


def fresh(spark: Any, folder: Path) -> Lake:
    lake = Workshop(spark, folder).lake
    lake.create(SMALL)
    return lake


@pytest.fixture(scope="module")
def swapped(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Swapped:
    """A table that nothing here changes."""
    return Swapped(fresh(spark, tmp_path_factory.mktemp("swapped")))


# -- data files -----------------------------------------------------------------------------------


def test_a_file_that_no_commit_names_is_no_part_of_the_table(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    entries = staged(lake, FIRST)
    assert by_delta_rs(lake) == by_spark(lake) == [] and lake.version(SMALL) == 0
    lake.commit(SMALL, entries, 0, "test/append", 1, "run")
    assert by_delta_rs(lake) == by_spark(lake) == expected(FIRST)


def test_our_files_have_the_types_that_spark_writes(spark: Any, tmp_path: Path) -> None:
    """Column by column, lists and structs too: `arrow_schema` is what Delta assumes of a file."""
    lake = fresh(spark, tmp_path)
    [ours] = staged(lake, FIRST)
    lake.commit(SMALL, [ours], 0, "test/append", 1, "run")
    [theirs] = lake.stage(SMALL, lake.read(SMALL).coalesce(1), "spark")

    def leaves(entry: private_delta.Entry) -> list[tuple[Any, ...]]:
        schema = pq.ParquetFile(f"{lake.path(SMALL)}/{entry['path']}").schema
        columns = [schema.column(place) for place in range(len(schema.names))]
        return [
            (one.path.replace(".element", ""), one.physical_type, str(one.logical_type),
             one.max_repetition_level)
            for one in columns
        ]  # fmt: skip

    assert leaves(ours) == leaves(theirs)
    assert (
        lake.read(SMALL).schema.simpleString()
        == f"struct<{','.join(f'{n}:{t}' for n, t in SMALL.columns.items())}>"
    )


# -- add and remove -------------------------------------------------------------------------------


def test_what_was_swapped_is_read_and_the_rest_untouched(swapped: Swapped) -> None:
    lake = swapped.lake
    assert by_delta_rs(lake) == by_spark(lake) == expected(swapped.now)
    before, after = ({one.path for one in lake.files_of(SMALL, version)} for version in (2, 3))
    assert len(before & after) == 1  # the file without any of the keys


def test_older_versions_stay_readable(swapped: Swapped) -> None:
    for version, rows in ((0, []), (1, FIRST), (2, FIRST + SECOND)):
        assert by_delta_rs(swapped.lake, version) == expected(rows)
        assert by_spark(swapped.lake, version) == expected(rows)


def test_a_commit_is_one_set_of_actions_and_says_whose(swapped: Swapped) -> None:
    [newest, *_] = swapped.lake.history(SMALL, 2)
    assert newest["version"] == 3 and newest["userMetadata"] == "run-swap"
    assert swapped.lake.changed_rows(SMALL, 2)


# -- statistics -----------------------------------------------------------------------------------


def test_statistics_are_in_the_log_and_bound_the_rows(swapped: Swapped) -> None:
    files = swapped.lake.files_of(SMALL, 3)
    assert sum(one.rows for one in files) == len(swapped.now) == swapped.lake.rows(SMALL)
    for one in files:
        ats = filesystem.read_parquet(one.path, ["at"])["at"].cast(pa.int64()).to_pylist()
        assert one.first_us("at") <= min(ats) and max(ats) <= one.last_us("at")


def test_a_column_that_is_left_out_may_have_anything(spark: Any, tmp_path: Path) -> None:
    """A filter by a column of which a file says nothing finds its rows; one by bounds that no value
    is equal to does, too."""
    lake = fresh(spark, tmp_path)
    [entry] = staged(lake, FIRST)
    wide = '{"numRecords": 3, "minValues": {"number": -100}, "maxValues": {"number": 100}, "nullCount": {"number": 0}}'
    lake.commit(SMALL, [entry | {"stats": wide}], 0, "test/append", 1, "run")
    append(lake, SECOND)
    spark.conf.set("spark.databricks.delta.stats.skipping", "true")
    for column, value, name in (("id", "b", "b"), ("number", 3, "c"), ("many", 2**40 + 12, "z")):
        found = lake.read(SMALL).where(F.col(column) == F.lit(value)).select("id").collect()
        assert [one.id for one in found] == [name], column
        rows = filesystem.rows_of(DeltaTable(lake.path(SMALL))).to_table(
            filter=ds.field(column) == value
        )
        assert rows["id"].to_pylist() == [name], column


# -- change data files ----------------------------------------------------------------------------

FEED = {
    ("a", "update_preimage", 1), ("a", "update_postimage", 7), ("b", "delete", 2),
    ("d", "insert", 4),
}  # fmt: skip


def test_the_feed_has_the_rows_of_the_change_files_and_no_others(swapped: Swapped) -> None:
    """(`c` was written anew with its file, and is no change.)"""
    lake = swapped.lake
    spark = {
        (one.id, one[change_feed.TYPE], one.number) for one in lake.changes(SMALL, 2, 3).collect()
    }
    assert spark == FEED
    columns = ["id", "number", change_feed.TYPE, change_feed.VERSION]
    feed = lake.changes_few(SMALL, 2, 3, columns).to_pylist()
    assert {(one["id"], one[change_feed.TYPE], one["number"]) for one in feed} == FEED
    assert {one[change_feed.VERSION] for one in feed} == {3} and len(feed) == len(FEED)


def test_a_commit_without_change_files_is_fed_from_its_files(swapped: Swapped) -> None:
    lake = swapped.lake
    feed = lake.changes_few(SMALL, 0, 2, ["id", change_feed.TYPE])
    assert change_feed.only_came(feed)
    assert sorted(feed["id"].to_pylist()) == [one["id"] for one in expected(FIRST + SECOND)]
    rows = lake.changes(SMALL, 0, 2).select("id", change_feed.TYPE).collect()
    assert sorted(map(tuple, rows)) == [(one["id"], "insert") for one in expected(FIRST + SECOND)]


def test_change_files_are_no_part_of_the_table(swapped: Swapped) -> None:
    root = swapped.lake.path(SMALL)
    there = list(Path(root, private_delta.CHANGE_FEED).glob("*.parquet"))
    assert len(there) == 2  # of `Put` and of `Rewrite`
    named = " ".join(swapped.lake.file_uris(SMALL, 3))
    assert not any(one.name in named for one in there)


# -- transaction identifiers ----------------------------------------------------------------------


def test_the_newest_version_of_an_application_is_in_force(spark: Any, tmp_path: Path) -> None:
    lake = Swapped(fresh(spark, tmp_path)).lake
    assert DeltaTable(lake.path(SMALL)).transaction_version("test/swap") == 5
    swap(lake, {RETIRED: [row("c", 3)]}, txn=9)
    assert DeltaTable(lake.path(SMALL)).transaction_version("test/swap") == 9
    assert DeltaTable(lake.path(SMALL)).transaction_version("test/append") == 1
    # Spark obeys it: it skips a commit that is not above it.
    with lake.transaction(SMALL, "test/swap", 9, "run"):
        lake.read(SMALL).write.format("delta").mode("append").save(lake.path(SMALL))
    assert len(by_spark(lake)) == 2 * (len(FIRST + SECOND) - 1)  # `transaction` goes without it
    spark.conf.set("spark.databricks.delta.write.txnAppId", "test/swap")
    spark.conf.set("spark.databricks.delta.write.txnVersion", "9")
    try:
        before = lake.version(SMALL)
        lake.read(SMALL).write.format("delta").mode("append").save(lake.path(SMALL))
        assert lake.version(SMALL) == before
    finally:
        spark.conf.unset("spark.databricks.delta.write.txnAppId")
        spark.conf.unset("spark.databricks.delta.write.txnVersion")


# -- two writers ----------------------------------------------------------------------------------


def test_of_two_that_read_the_same_version_one_commits(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    swap(lake, {CHANGED: [row("a", 7)]}, txn=1, seen=1)
    with pytest.raises(Conflict, match=r"silver\.small was changed by another run since version 1"):
        swap(lake, {CHANGED: [row("a", 8)]}, txn=2, seen=1)
    assert by_delta_rs(lake) == by_spark(lake) == expected([row("a", 7), *FIRST[1:]])
    assert [one["version"] for one in lake.history(SMALL, -1)] == [2, 1, 0]


def test_of_two_appends_by_one_name_one_commits(spark: Any, tmp_path: Path) -> None:
    """delta-rs lets blind appends of both through but for the `txn` that they carry."""
    lake = fresh(spark, tmp_path)
    one, other = (DeltaTable(lake.path(SMALL)) for _ in range(2))
    private_delta.add_files(one, staged(lake, FIRST), "test/append", 1, "one", False)
    with pytest.raises(Conflict), conflicts(SMALL):
        private_delta.add_files(other, staged(lake, SECOND), "test/append", 1, "other", False)
    assert by_delta_rs(lake) == expected(FIRST)


def test_files_are_put_in_place_of_all(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    lake.commit(SMALL, staged(lake, SECOND), 1, "test/append", 2, "run", overwrite=True)
    assert by_delta_rs(lake) == by_spark(lake) == expected(SECOND)
    assert by_delta_rs(lake, 1) == by_spark(lake, 1) == expected(FIRST)


def test_a_swap_of_a_file_that_is_gone_changes_nothing(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    entries = staged(lake, SECOND)
    Path(lake.path(SMALL), entries[0]["path"]).unlink()
    with pytest.raises(Conflict, match=r"the staged file .* was removed"):
        lake.swap(SMALL, lake.files_of(SMALL, 1), entries, [], 1, "test/swap", 1, "run")
    assert by_delta_rs(lake) == by_spark(lake) == expected(FIRST) and lake.version(SMALL) == 1
