"""Columns that others added: rows that are written anew keep them, and new rows have null there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from deltalake import DeltaTable, Field
from deltalake.schema import ArrayType, PrimitiveType

from jobs.core.plan import Thresholds
from jobs.core.tables import EVENTS, ITEM_ATTRIBUTES, ITEMS, REJECTS, SEQUENCES, SESSIONS, Table
from tests.support.others import HEADER, THIRD, Saved, act, catalogue, check_derived
from tests.support.spark_tools import Workshop

TABLES = (EVENTS, REJECTS, SESSIONS, ITEMS, ITEM_ATTRIBUTES, SEQUENCES)


@pytest.fixture(scope="module")
def saved(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(spark, tmp_path_factory.mktemp("columns"))


@pytest.fixture
def shop(saved: Saved) -> Iterator[Workshop]:
    shop = saved.again()
    for table in TABLES:
        path = table.path(str(shop.lake_root), "clicks")
        fields = [
            Field("theirs", PrimitiveType("string")),
            Field("their_list", ArrayType(PrimitiveType("string"), True)),
        ]
        DeltaTable(path).alter.add_columns(fields)
        name = table.key[0]
        values = {"theirs": name, "their_list": f"make_array({name}, 'x')"}
        DeltaTable(path).update(values)
    yield shop
    shop.thresholds = None


def theirs(shop: Workshop, table: Table) -> dict[str, Any]:
    return {
        tuple(row[name] for name in table.key): (row["theirs"], row["their_list"])
        for row in shop.table(table).to_pyarrow_table().to_pylist()
    }


def check(shop: Workshop, before: dict[Table, dict[str, Any]]) -> None:
    check_derived(shop)
    for table, known in before.items():
        now = theirs(shop, table)
        for key, value in now.items():
            wanted = (key[0], [key[0], "x"]) if key in known else (None, None)
            assert value == wanted, (table.full_name, key)


FEW = Thresholds()
MANY = replace(
    FEW,
    few_moved=-1,
    merged_rows=-1,
    merged_bytes=-1,
    few_bytes=-1,
    rewritten_share=2,
    read_bytes=-1,
)


WAYS = [
    pytest.param(FEW, marks=pytest.mark.slow, id="here"),
    pytest.param(MANY, marks=pytest.mark.long, id="spark"),
]


@pytest.mark.parametrize("limits", WAYS)
def test_a_night_keeps_what_others_wrote(shop: Workshop, limits: Thresholds) -> None:
    shop.thresholds = limits
    before = {table: theirs(shop, table) for table in TABLES}
    assert all(before.values())
    catalogue(shop.folder, 3)
    shop.land("3.csv", HEADER + THIRD)
    notes = shop.run().notes
    assert not [note for note in notes if "changed by another writer" in note], notes
    assert all(len(theirs(shop, one)) > len(before[one]) for one in TABLES if one is not EVENTS)
    check(shop, before)


@pytest.mark.long
def test_large_tables_are_compared_by_spark(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Thresholds, "compared_bytes", -1)
    # (Sequences follow the sessions' change feed, which has the rows that others filled.)
    versions = {table: shop.version(table) for table in TABLES if table is not SEQUENCES}
    assert not [note for note in shop.run().notes if "changed by another writer" in note]
    assert versions == {table: shop.version(table) for table in versions}
    for table in (SESSIONS, ITEMS, ITEM_ATTRIBUTES, SEQUENCES):
        act(shop, table, "update", "delta-rs")
    catalogue(shop.folder, 3)
    shop.land("3.csv", HEADER + THIRD)
    assert len([one for one in shop.run().notes if "changed by another writer" in one]) == 4
    check_derived(shop)


@pytest.mark.long
@pytest.mark.parametrize("limits", WAYS)
def test_a_table_that_is_made_anew_keeps_what_others_wrote(
    shop: Workshop, limits: Thresholds
) -> None:
    shop.thresholds = limits
    for table in (SESSIONS, ITEMS, ITEM_ATTRIBUTES, SEQUENCES):
        act(shop, table, "delete", "delta-rs")
    before = {table: theirs(shop, table) for table in TABLES}
    shop.run()
    check(shop, before)


@pytest.mark.long
def test_another_rule_keeps_what_others_wrote(shop: Workshop) -> None:
    before = {SESSIONS: theirs(shop, SESSIONS), SEQUENCES: theirs(shop, SEQUENCES)}
    toml = shop.file.read_text()
    try:
        shop.file.write_text(toml + "\n[sessions]\ngap_s = 600\n")
        shop.run("sessionize", options={"rebuild": True})
        shop.run("items")
        shop.run("sequences")
        check(shop, before)
    finally:
        shop.file.write_text(toml)
