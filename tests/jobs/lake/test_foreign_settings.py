"""Settings of a platform team, set on every table between two nights: the next night is as without,
or stops before it writes and names table, setting and the statement that takes it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jobs.core.errors import SessionmillError
from jobs.core.tables import EVENTS, ITEMS, REJECTS, SESSIONS, Table
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


@pytest.mark.parametrize("name", but(HANDLED, "column mapping"))
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
        ["ALTER TABLE {table} ADD CONSTRAINT few CHECK (item_index < 8)"],
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
