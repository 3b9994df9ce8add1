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
from deltalake import CommitProperties, DeltaTable, Transaction
from pyspark.sql import functions as F

from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import Conflict
from jobs.core.tables import Table
from jobs.lake import filesystem, private_delta
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


def staged(lake: Lake, rows: Rows) -> list[private_delta.Entry]:
    """Rows as a file of our own below the table, which no commit names."""
    folder = staging("test")
    table = pa.Table.from_pylist(rows, schema=arrow_schema(SMALL.columns))
    filesystem.write_parquet(f"{lake.path(SMALL)}/{folder}/part-0.parquet", table)
    return lake.entries(SMALL, folder)


def append(lake: Lake, rows: Rows, stats: str | None = None) -> None:
    """Args: stats: what the log says of the file; None: what its footer does."""
    version = lake.version(SMALL)
    assert version is not None
    entries = [one | ({"stats": stats} if stats else {}) for one in staged(lake, rows)]
    lake.commit(SMALL, entries, version, "test/append", version, "run-append")


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


# -- statistics -----------------------------------------------------------------------------------


def test_statistics_are_in_the_log_and_bound_the_rows(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    for rows in (FIRST, SECOND):
        append(lake, rows)
    files = lake.files_of(SMALL, 2)
    assert [one.rows for one in files] == [2, 3] and lake.rows(SMALL) == 5
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


# -- transaction identifiers ----------------------------------------------------------------------


def test_the_newest_version_of_an_application_is_in_force(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    for base, version in ((1, 5), (2, 9)):
        lake.commit(SMALL, [], base, "test/other", version, "run")
        assert DeltaTable(lake.path(SMALL)).transaction_version("test/other") == version
    assert DeltaTable(lake.path(SMALL)).transaction_version("test/append") == 0
    # Spark obeys it: it skips a commit that is not above it.
    with lake.transaction(SMALL, "test/other", 9, "run"):
        lake.read(SMALL).write.format("delta").mode("append").save(lake.path(SMALL))
    assert len(by_spark(lake)) == 2 * len(FIRST)  # `transaction` goes without it
    spark.conf.set("spark.databricks.delta.write.txnAppId", "test/other")
    spark.conf.set("spark.databricks.delta.write.txnVersion", "9")
    try:
        before = lake.version(SMALL)
        lake.read(SMALL).write.format("delta").mode("append").save(lake.path(SMALL))
        assert lake.version(SMALL) == before
    finally:
        spark.conf.unset("spark.databricks.delta.write.txnAppId")
        spark.conf.unset("spark.databricks.delta.write.txnVersion")


# -- two writers ----------------------------------------------------------------------------------


def test_of_two_appends_by_one_name_one_commits(spark: Any, tmp_path: Path) -> None:
    """delta-rs lets blind appends of both through but for the `txn` that they carry."""
    lake = fresh(spark, tmp_path)
    one, other = (DeltaTable(lake.path(SMALL)) for _ in range(2))
    by = CommitProperties(app_transactions=[Transaction("test/append", 1)])
    private_delta.add_files(one, staged(lake, FIRST), by, False)
    with pytest.raises(Conflict), conflicts(SMALL):
        private_delta.add_files(other, staged(lake, SECOND), by, False)
    assert by_delta_rs(lake) == expected(FIRST)


def test_files_are_put_in_place_of_all(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    lake.commit(SMALL, staged(lake, SECOND), 1, "test/append", 2, "run", overwrite=True)
    assert by_delta_rs(lake) == by_spark(lake) == expected(SECOND)
    assert by_delta_rs(lake, 1) == by_spark(lake, 1) == expected(FIRST)


def test_files_that_are_gone_are_not_committed(spark: Any, tmp_path: Path) -> None:
    lake = fresh(spark, tmp_path)
    append(lake, FIRST)
    entries = staged(lake, SECOND)
    Path(lake.path(SMALL), entries[0]["path"]).unlink()
    with pytest.raises(Conflict, match=r"the staged file .* was removed"):
        lake.commit(SMALL, entries, 1, "test/append", 2, "run", overwrite=True)
    assert by_delta_rs(lake) == by_spark(lake) == expected(FIRST) and lake.version(SMALL) == 1
