"""Settings of a platform team, set on every table between two nights: the next night is as without,
or stops before it writes and names table, setting and the statement that takes it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jobs.core.errors import SessionmillError
from jobs.core.tables import EVENTS, ITEM_ATTRIBUTES, ITEMS, REJECTS, SEQUENCES, SESSIONS, Table
from jobs.lake.foreign import rows_at
from jobs.lake.spark import compile_plans
from jobs.ops import maintain
from tests.jobs.lake.test_foreign_changes import but, state, third
from tests.support.others import DERIVED, Saved, act, check_derived
from tests.support.spark_tools import Workshop

TABLES = (EVENTS, REJECTS, *DERIVED)


def settings_of(**properties: str) -> list[str]:
    pairs = ", ".join(f"'delta.{name}' = '{value}'" for name, value in properties.items())
    return [f"ALTER TABLE {{table}} SET TBLPROPERTIES ({pairs})"]


# Rows written anew by a Spark with default settings have times as INT96.
INT96 = ["SET spark.sql.parquet.outputTimestampType = INT96"]
REWRITE = ["UPDATE {table} SET {key} = {key}"]
MICROS = ["SET spark.sql.parquet.outputTimestampType = TIMESTAMP_MICROS"]
HANDLED = {
    "row tracking": settings_of(enableRowTracking="true"),
    "in-commit timestamps": settings_of(enableInCommitTimestamps="true"),
    "clustering": ["ALTER TABLE {table} CLUSTER BY ({order})", "OPTIMIZE {table}"],
    "deletion vectors": settings_of(enableDeletionVectors="true"),
    "column mapping": settings_of(**{"columnMapping.mode": "name"}),
    "V2 checkpoints": settings_of(checkpointPolicy="v2"),
    "default columns": [
        "ALTER TABLE {table} ADD COLUMN theirs STRING",
        "ALTER TABLE {table} SET TBLPROPERTIES ('delta.feature.allowColumnDefaults' = 'supported')",
        "ALTER TABLE {table} ALTER COLUMN theirs SET DEFAULT 'x'",
    ],
    "a constraint that holds": ["ALTER TABLE {table} ADD CONSTRAINT named CHECK ({key} <> '')"],
    "OPTIMIZE": ["OPTIMIZE {table}"],
    "Z-order": ["OPTIMIZE {table} ZORDER BY ({key})"],
    "INT96": INT96 + REWRITE + MICROS,
    "INT96, packed": INT96 + REWRITE + ["OPTIMIZE {table}"] + MICROS,
    "no statistics": settings_of(dataSkippingNumIndexedCols="0") + REWRITE,
    "change feed off": settings_of(enableChangeDataFeed="false"),
    "change feed off and on": settings_of(enableChangeDataFeed="false")
    + REWRITE
    + settings_of(enableChangeDataFeed="true"),
    "VACUUM": [
        "SET spark.databricks.delta.retentionDurationCheck.enabled = false",
        "VACUUM {table} RETAIN 0 HOURS",
        "SET spark.databricks.delta.retentionDurationCheck.enabled = true",
    ],
}


@pytest.fixture(scope="module")
def saved(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(spark, tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def undisturbed(saved: Saved) -> dict[str, Any]:
    shop = saved.again()
    third(shop)
    shop.run()
    check_derived(shop)
    return state(shop)


@pytest.fixture
def shop(saved: Saved) -> Iterator[Workshop]:
    yield saved.again()


def say(shop: Workshop, table: Table, statements: list[str]) -> None:
    path = table.path(str(shop.lake_root), "clicks")
    order = (table.order or table.key)[0]
    for one in statements:
        shop.spark.sql(one.format(table=f"delta.`{path}`", key=table.key[0], order=order))


def read(shop: Workshop) -> dict[str, Any]:
    """`state`, as Spark reads it: pyarrow refuses some of these tables."""
    compile_plans(shop.spark, True)  # (without statistics Spark reads no deletion vectors)
    found = {}
    for table in TABLES:
        drop = ["ingest_file", "ingest_ts", "known_from", "theirs"]
        drop += [] if table is ITEMS else ["first_seen_ts"]
        path = table.path(str(shop.lake_root), "clicks")
        rows = shop.spark.read.format("delta").load(path).drop(*drop).collect()
        found[table.full_name] = sorted(str(row) for row in rows)
    return found


@pytest.fixture(scope="module")
def read_undisturbed(saved: Saved) -> dict[str, Any]:
    shop = saved.again()
    third(shop)
    shop.run()
    return read(shop)


@pytest.mark.parametrize("name", but(HANDLED))
def test_a_setting_is_handled(shop: Workshop, read_undisturbed: dict[str, Any], name: str) -> None:
    for table in TABLES:
        say(shop, table, HANDLED[name])
    third(shop)
    shop.run()
    assert read(shop) == read_undisturbed
    versions = [shop.version(table) for table in TABLES]
    assert not [note for note in shop.run().notes if "changed by another writer" in note]
    assert versions == [shop.version(table) for table in TABLES]


@pytest.mark.parametrize("name", but(("row tracking", "deletion vectors", "clustering")))
def test_statements_under_a_setting_are_repaired(
    shop: Workshop, read_undisturbed: dict[str, Any], name: str
) -> None:
    for table in TABLES:
        say(shop, table, HANDLED[name])
    for table in DERIVED:
        act(shop, table, "delete", "spark")
    third(shop)
    shop.run()
    assert read(shop) == read_undisturbed
    versions = [shop.version(table) for table in TABLES]
    assert not [note for note in shop.run().notes if "changed by another writer" in note]
    assert versions == [shop.version(table) for table in TABLES]
    act(shop, EVENTS, "delete", "spark")
    shop.run()
    for table in (EVENTS, *DERIVED):
        say(shop, table, ["REORG TABLE {table} APPLY (PURGE)"])
    shop.run()


KEEPS = ("row tracking", "in-commit timestamps", "clustering", "deletion vectors", "column mapping",
         "a constraint that holds")  # fmt: skip


@pytest.mark.parametrize("name", but(KEEPS))
def test_maintenance_under_a_setting_moves_no_row(
    shop: Workshop, read_undisturbed: dict[str, Any], name: str
) -> None:
    # (Of the setting that is tried every time, two tables: Spark's VACUUM takes its time.)
    for table in (ITEM_ATTRIBUTES, SEQUENCES) if name == "deletion vectors" else TABLES:
        say(shop, table, HANDLED[name])
    act(shop, ITEM_ATTRIBUTES, "delete", "spark")  # (with vectors, where they are on)
    before = read(shop)
    done = maintain.maintain(shop.context(), 0, {1: ["shop/1"]})
    assert sum(one["removed_files"] for one in done["tables"].values()) > 0
    assert done["freed_bytes"] > 0
    for told in (done["tables"][table.full_name] for table in TABLES):
        assert told["files_after"] <= told["files_before"]
    assert read(shop) == before
    # A version that a model needs can be read; another one cannot.
    assert shop.lake.read(SEQUENCES, 1).count() > 0
    assert rows_at(shop.lake, ITEMS, 1) is None
    assert maintain.maintain(shop.context(), 0, {1: ["shop/1"]})["freed_bytes"] == 0
    third(shop)
    notes = shop.run().notes
    assert [note for note in notes if note.startswith("gold.item_attributes was changed")]
    assert not [note for note in notes if "silver.sessions was changed" in note]
    assert read(shop) == read_undisturbed


VIOLATED = {
    EVENTS: "user_id <> 'u9'", REJECTS: "file NOT LIKE '%3.csv'", SESSIONS: "user_id <> 'u9'",
    ITEM_ATTRIBUTES: "item_id <> 'i6'", SEQUENCES: "user_id <> 'u9'",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("table", VIOLATED, ids=lambda one: one.full_name)
def test_rows_that_violate_a_constraint_of_others_are_not_written(
    shop: Workshop, table: Table
) -> None:
    say(shop, table, [f"ALTER TABLE {{table}} ADD CONSTRAINT named CHECK ({VIOLATED[table]})"])
    rows = read(shop)[table.full_name]
    third(shop)
    with pytest.raises(
        SessionmillError,
        match=rf"(?s){table.full_name} cannot be written: rows violate a constraint.*DROP CONSTRAINT",
    ):
        shop.run()
    assert read(shop)[table.full_name] == rows
    say(shop, table, ["ALTER TABLE {table} DROP CONSTRAINT named"])
    shop.run()
    check_derived(shop)


@pytest.mark.long
def test_generated_columns_of_others_are_filled(
    shop: Workshop, read_undisturbed: dict[str, Any]
) -> None:
    """(Delta has no statement that adds one: the table is replaced by one that has it.)"""
    from delta.tables import DeltaTable as SparkDeltaTable

    path = SESSIONS.path(str(shop.lake_root), "clicks")
    rows = shop.spark.read.format("delta").load(path).collect()
    made = SparkDeltaTable.replace(shop.spark).location(path)
    for name, kind in SESSIONS.columns.items():
        made = made.addColumn(name, kind)
    made.addColumn("theirs", "string", generatedAlwaysAs="upper(user_id)").execute()
    kept = shop.spark.createDataFrame(rows, SESSIONS.ddl)
    kept.write.format("delta").mode("append").save(path)
    third(shop)
    shop.run()
    assert read(shop) == read_undisturbed
    found = shop.spark.read.format("delta").load(path)
    assert found.where("NOT theirs <=> upper(user_id)").isEmpty() and found.count() > len(rows)


REFUSED = {
    "type widening": (
        SESSIONS,
        settings_of(enableTypeWidening="true"),
        r"silver\.sessions: it has features that delta-rs cannot read, typeWidening.*DROP FEATURE",
    ),
    "append only": (SESSIONS, settings_of(appendOnly="true"), "append-only.*delta.appendOnly"),
    "a column renamed": (
        SESSIONS,
        [*settings_of(**{"columnMapping.mode": "name"}),
         "ALTER TABLE {table} RENAME COLUMN user_id TO uid"],
        r"silver\.sessions: column user_id was renamed to uid by another writer: version \d+ \(RENAME COLUMN"
        r".*RENAME COLUMN uid TO user_id",
    ),
    "a constraint that does not hold": (
        ITEMS,
        ["ALTER TABLE {table} ADD CONSTRAINT few CHECK (item_index < 9)"],
        r"gold\.items cannot be written: rows violate a constraint.*DROP CONSTRAINT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", but(REFUSED, "a column renamed"))
def test_what_no_engine_can_do_is_refused_in_words(shop: Workshop, name: str) -> None:
    table, statements, says = REFUSED[name]
    say(shop, table, statements)
    third(shop)
    with pytest.raises(SessionmillError, match=f"(?s){says}"):
        shop.run()
