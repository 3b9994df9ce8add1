"""An Iceberg table as a log. pyiceberg is an extra of its own: without it, only what is said then."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.core.errors import SourceError
from jobs.core.tables import EVENTS
from jobs.sources import iceberg
from tests.support.spark_tools import CLICKS, Workshop

T = 1_717_236_000


def rows(*items: str, column: str = "item") -> pa.Table:
    ts = pa.array([T] * len(items), pa.int64())
    return pa.table({"user": ["u"] * len(items), column: list(items), "ts": ts})


@pytest.fixture
def catalog(tmp_path: Path) -> Any:
    sql = pytest.importorskip("pyiceberg.catalog.sql", reason="pyiceberg is not installed")
    folder = tmp_path / "warehouse"
    folder.mkdir()
    made = sql.SqlCatalog("here", uri=f"sqlite:///{folder}/catalog.db", warehouse=str(folder))
    made.create_namespace("shop")
    return made


def test_without_pyiceberg_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyiceberg.catalog", None)
    with pytest.raises(
        SourceError, match=r"needs pyiceberg .*: pip install 'sessionmill\[iceberg\]'"
    ):
        iceberg.files_of(str(tmp_path))


@pytest.mark.slow
def test_an_iceberg_table_by_snapshot(spark: Any, tmp_path: Path, catalog: Any) -> None:
    table = catalog.create_table("shop.events", schema=rows("a").schema)
    toml = CLICKS.replace('"csv"', '"iceberg"').replace("{landing}/*.csv", table.location())
    shop = Workshop(spark, tmp_path, toml)
    table.append(rows("a", "b"))
    first = shop.run("ingest")
    assert (first.read, first.events_new) == (2, 2)
    assert shop.run("ingest").read == 0
    table.append(rows("c"))
    second = shop.run("ingest")
    assert (second.read, second.events_new) == (1, 1)
    # A deletion rewrites the file of the row; what is deleted there stays here.
    table.delete("item = 'a'")
    third = shop.run("ingest")
    assert (third.read, third.events_new, third.duplicates) == (1, 0, 1)
    table.append(rows("d"))
    newest = table.metadata_location
    table.append(rows("e"))
    shop.describe(toml.replace(table.location(), newest))  # (one snapshot alone)
    assert shop.run("ingest").events_new == 1
    assert {row["item_id"] for row in shop.rows(EVENTS)} == {"a", "b", "c", "d"}
    with pytest.raises(
        SourceError, match=r"files of the Iceberg table .*source.format = 'iceberg'"
    ):
        Workshop(spark, tmp_path / "2", toml.replace('"iceberg"', '"parquet"')).run("ingest")


def test_which_table_is_meant(
    tmp_path: Path, catalog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = catalog.create_table("shop.events", schema=rows("a").schema)
    table.append(rows("a"))
    [one] = iceberg.files_of(table.location())
    assert Path(one[0]).stat().st_size == one[1]
    monkeypatch.setattr("pyiceberg.catalog.load_catalog", lambda name: {"here": catalog}[name])
    assert iceberg.files_of("iceberg://here/shop.events") == [one]
    with pytest.raises(SourceError, match=r"cannot be opened: Table does not exist: shop.none"):
        iceberg.files_of("iceberg://here/shop.none")
    with pytest.raises(SourceError, match="is not an Iceberg table"):
        iceberg.files_of(str(tmp_path))
    with pytest.raises(SourceError, match="it is the folder of a table, without a pattern"):
        iceberg.files_of(f"{table.location()}/*")
    newest = Path(table.metadata_location)
    newest.with_name("00001-other.metadata.json").write_bytes(newest.read_bytes())
    with pytest.raises(SourceError, match="2 metadata files of one version, and only its catalog"):
        iceberg.files_of(table.location())
    newest.with_name("version-hint.text").write_text(newest.name)
    assert iceberg.files_of(table.location()) == [one]


def test_files_with_other_names_are_refused(catalog: Any) -> None:
    table = catalog.create_table("shop.events", schema=rows("a").schema)
    table.append(rows("a"))
    with table.update_schema() as change:
        change.rename_column("item", "sku")
    with pytest.raises(
        SourceError, match=r"is 'item' there, and 'sku' in the table: have the files"
    ):
        iceberg.files_of(table.location())
    table.overwrite(rows("b", column="sku"))
    assert len(iceberg.files_of(table.location())) == 1
    with table.update_schema() as change:
        change.add_column("item", table.schema().find_type("sku"))
    with table.update_schema() as change:
        change.delete_column("sku")
    with table.update_schema() as change:
        change.rename_column("item", "sku")
    with pytest.raises(SourceError, match="is 'sku' there, and 'another column' in the table"):
        iceberg.files_of(table.location())


def test_deleted_rows_that_are_still_in_the_files_are_refused(
    catalog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = catalog.create_table("shop.events", schema=rows("a").schema)
    table.append(rows("a"))
    planned = list(table.scan().plan_files())
    planned[0].delete_files.add(planned[0].file)  # (pyiceberg itself writes none)
    monkeypatch.setattr("pyiceberg.table.DataScan.plan_files", lambda _: planned)
    with pytest.raises(SourceError, match="has deleted rows that are still in its data files"):
        iceberg.files_of(table.location())
