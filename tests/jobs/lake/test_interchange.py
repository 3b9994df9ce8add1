"""Other engines read every table after each of the everyday settings, or say that they cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from jobs.core.tables import Table
from jobs.lake.spark import compile_plans
from tests.jobs.lake.test_foreign_settings import HANDLED, TABLES, say
from tests.support.others import Saved, act
from tests.support.spark_tools import Workshop

EVERYDAY = ("row tracking", "in-commit timestamps", "clustering", "deletion vectors", "column mapping",
            "V2 checkpoints", "default columns", "a constraint that holds", "INT96", "OPTIMIZE")  # fmt: skip
Keys = list[tuple[Any, ...]]


def names(table: Table) -> list[str]:
    return [name for name in table.key if table.columns[name] == "string"]


def by_polars(path: str, table: Table) -> Keys:
    return [tuple(row) for row in pl.scan_delta(path).collect().select(names(table)).rows()]


def by_delta_rs(path: str, table: Table) -> Keys:
    """delta-rs's own SQL, whose answer DuckDB takes."""
    engine = QueryBuilder().register("asked", DeltaTable(path))
    rows = pa.table(engine.execute(f"SELECT {', '.join(names(table))} FROM asked"))
    assert rows.num_rows
    return duckdb.sql("SELECT * FROM rows").fetchall()


READERS: dict[str, Callable[[str, Table], Keys]] = {
    "Polars": by_polars, "delta-rs and DuckDB": by_delta_rs,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    # (Polars finds no file of a Delta table in a folder with a blank or an umlaut: docs/lake.md.)
    return Saved(spark, tmp_path_factory.mktemp("interchange"), lake="lake")


@pytest.fixture
def shop(saved: Saved) -> Iterator[Workshop]:
    yield saved.again()


@pytest.mark.long
@pytest.mark.parametrize("name", EVERYDAY)
def test_other_engines_read_every_table(shop: Workshop, name: str) -> None:
    compile_plans(shop.spark, True)
    for table in TABLES:
        say(shop, table, HANDLED[name])
        if name == "deletion vectors":
            act(shop, table, "delete", "spark")
    for table in TABLES:
        path = table.path(str(shop.lake_root), "clicks")
        wanted = shop.spark.read.format("delta").load(path).select(*names(table)).collect()
        for who, read in READERS.items():
            if (who, name) in REFUSES:
                with pytest.raises(Exception, match=REFUSES[who, name]):
                    read(path, table)
            else:
                assert sorted(read(path, table)) == sorted(map(tuple, wanted)), (who, table)


REFUSES = {("Polars", "V2 checkpoints"): "not yet supported by the polars delta scanner"}
