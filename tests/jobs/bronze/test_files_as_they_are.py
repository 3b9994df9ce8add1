"""Files of a landing as other programs leave them: half written, beside others, with other marks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import write_deltalake

from jobs.core.errors import SchemaError, SourceError
from jobs.core.tables import EVENTS, FILES, REJECTS
from tests.support.spark_tools import CLICKS, Workshop

T = 1_700_000_000
HOUR = 3600


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def items(shop: Workshop) -> dict[str, str]:
    return {row["item_id"]: str(row["event_ts"])[:10] for row in shop.rows(EVENTS)}


@pytest.mark.slow
def test_a_line_that_is_being_written_waits_for_its_end(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    path = shop.land("1.csv", f"user,item,ts\na,x,{T}\nb,y,{str(T)[:6]}")
    shop.land("2.csv.tmp", "user,item\n")
    shop.land("_SUCCESS", "")
    shop.describe(CLICKS.replace("/*.csv", "/*"))
    first = shop.run("ingest")
    assert (first.read, first.events_new, first.waiting) == (1, 1, 1)
    said = " ".join(first.notes)
    assert "the last line of 1 files has no line end and waits" in said and str(path) in said
    assert "skipped 2 files of the landing" in said and "2.csv.tmp, _SUCCESS" in said
    assert [row["waiting"] for row in shop.rows(FILES)] == [1]

    # Unchanged and still young: nothing to read, and no version of a table.
    before = [shop.version(table) for table in (EVENTS, REJECTS, FILES)]
    again = shop.run("ingest")
    assert (again.read, again.waiting, again.notes) == (0, 0, [])
    assert [shop.version(table) for table in (EVENTS, REJECTS, FILES)] == before

    # The rest of the line arrives, and another one begins.
    path.write_text(path.read_text() + f"{str(T)[6:]}\nc,z,{T + 5}")
    second = shop.run("ingest")
    assert (second.read, second.events_new, second.duplicates, second.waiting) == (2, 1, 1, 1)
    assert items(shop) == {"x": "2023-11-14", "y": "2023-11-14"}

    # Nobody writes the file any more: the line is read as it stands, once.
    age(path, 2 * HOUR)
    third = shop.run("ingest")
    assert (third.read, third.events_new, third.waiting) == (3, 1, 0)
    assert shop.run("ingest").read == 0
    # 0 turns it off.
    shop.describe(CLICKS + "[landing]\npartial_line_hours = 0\n")
    shop.land("3.csv", f"user,item,ts\nd,w,{T}")
    assert shop.run("ingest").events_new == 1


@pytest.mark.slow
def test_a_line_that_waits_is_read_later_also_where_its_file_never_changes(
    spark: Any, tmp_path: Path
) -> None:
    """(The ledger of an older version, without the column, is read, too.)"""
    shop = Workshop(spark, tmp_path)
    shop.land("0.csv", f"user,item,ts\na,w,{T}\n")
    shop.run("ingest")
    old = shop.table(FILES).to_pyarrow_table().drop_columns(["waiting"])
    write_deltalake(shop.table(FILES), old, mode="overwrite", schema_mode="overwrite")
    path = shop.land("1.csv", f"user,item,ts\na,x,{T}\nb,y,{T + 1}")
    age(path, HOUR - 60)
    first = shop.run("ingest")
    assert (first.read, first.waiting) == (1, 1)
    ledger = shop.table(FILES).to_pyarrow_table()
    assert sorted(ledger["waiting"].to_pylist(), key=str) == [1, None]
    modified = pc.subtract(ledger["modified_ms"], 10 * 60_000)  # as if ten minutes had gone by
    ledger = ledger.set_column(2, "modified_ms", modified)
    write_deltalake(shop.table(FILES), ledger, mode="overwrite")
    for one in ("0.csv", "1.csv"):
        stat = (shop.landing / one).stat()
        os.utime(shop.landing / one, ns=(stat.st_atime_ns, stat.st_mtime_ns - 600 * 10**9))
    second = shop.run("ingest")
    assert (second.read, second.events_new, second.duplicates) == (2, 1, 1)
    assert shop.run("ingest").read == 0


TITLES = CLICKS.replace('format = "csv"', 'format = "csv"\ndelimiter = "\\t"\nheader = false')
TITLES = TITLES.replace('"user"', '"_0"').replace('"item"', '"_2"').replace('"ts"', '"_1"')


@pytest.mark.slow
def test_titles_with_lone_quotes(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, TITLES)
    names = ('"Foo', "Bar", "Baz", 'Qux"', "End")
    path = shop.land("a.csv", "".join(f"u{n}\t{T + n}\t{name}\n" for n, name in enumerate(names)))
    result = shop.run("ingest")
    [told] = result.notes
    assert "1 records have line ends between quotes" in told and f"line 1 of {path}" in told
    assert 'source.quote = ""' in told
    other = Workshop(spark, tmp_path / "2", TITLES.replace("header", 'quote = ""\nheader'))
    other.land("a.csv", path.read_text())
    result = other.run("ingest")
    assert (result.read, result.events_new, result.notes) == (5, 5, [])
    assert {row["item_id"] for row in other.rows(EVENTS)} == set(names)


def test_numbers_with_a_decimal_comma(spark: Any, tmp_path: Path) -> None:
    toml = CLICKS.replace('"ts"\n', '"ts"\nvalue = "price"\n').replace(
        'format = "csv"', 'format = "csv"\ndelimiter = ";"\ndecimal = ","'
    )
    shop = Workshop(spark, tmp_path, toml)
    texts = ("1,5", "1.234,5", "-12.345.678", "7", "1.5", "1,234.5", "x", "", "2,5e3")
    shop.land("a.csv", "user;item;ts;price\n" + "".join(
        f"u;i{n};{T},25;{text}\n" for n, text in enumerate(texts)))  # fmt: skip
    result = shop.run("ingest")
    assert (result.read, result.rejects) == (9, {"bad_value": 3})
    found = {row["item_id"]: row["value"] for row in shop.rows(EVENTS)}
    assert found == {
        "i0": 1.5,
        "i1": 1234.5,
        "i2": -12345678.0,
        "i3": 7.0,
        "i7": None,
        "i8": 2500.0,
    }
    assert {row["event_ts"].microsecond for row in shop.rows(EVENTS)} == {250_000}


def test_files_that_are_not_what_the_others_are_stop_the_run(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("a.csv", f"user,item,ts\na,x,{T}\n")
    shop.land("b.csv", f"b,y,{T}\nc,z,{T}\n")
    shop.land("c.csv", f"user,item,item,ts\nc,z,w,{T}\n")
    with pytest.raises(SchemaError) as error:
        shop.run("ingest")
    said = str(error.value)
    assert "b.csv has no header: its first line looks like data ('b', 'y'" in said
    assert "c.csv: the header has the column 'item' twice" in said
    assert shop.table(EVENTS).to_pyarrow_table().num_rows == 0


def test_a_folder_of_a_delta_table_is_no_folder_of_parquet(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, CLICKS.replace("csv", "parquet"))
    rows = pa.table({"user": ["a", "b"], "item": ["x", "y"], "ts": [T, T]})
    write_deltalake(str(shop.landing), rows)
    with pytest.raises(
        SourceError, match=r"files of the Delta table .*Set source\.format = 'delta'"
    ):
        shop.run("ingest")


@pytest.mark.long
def test_forgetting_keeps_a_file_compressed_as_it_was(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lzma

    from jobs.core.settings import settings
    from jobs.forget import forget

    monkeypatch.setenv("SESSIONMILL_ID_KEY", "k" * 40)
    settings.cache_clear()
    try:
        toml = CLICKS.replace("/*.csv", "/*").replace('"csv"', '"csv"\nescape = "\\\\"')
        shop = Workshop(spark, tmp_path, toml)
        path = shop.land("log", lzma.compress(f"user,item,ts\nann,x\\,y,{T}\nbob,z,{T}\n".encode()))
        assert shop.run().events_new == 2
        done = forget.forget(shop.context(), "ann")
        assert json.dumps(done, default=str)
        assert lzma.decompress(path.read_bytes()).decode() == f"user,item,ts\nbob,z,{T}\n"
        assert shop.run().read == 0 and set(items(shop)) == {"z"}
    finally:
        settings.cache_clear()


@pytest.mark.long
def test_three_thousand_files_of_ten_lines(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, CLICKS.replace("/*.csv", ""))
    for number in range(3_000):
        lines = [f"u{number % 50},i{line},{T + 60 * number + line}\n" for line in range(9)]
        shop.land(f"{number % 30:02d}/{number}.csv", "user,item,ts\n" + "".join(lines) + "u,,1\n")
    first = shop.run()
    assert (first.read, first.events_new, first.rejects) == (
        30_000,
        27_000,
        {"missing_item_id": 3_000},
    )
    assert len(shop.rows(FILES)) == 3_000
    for number in range(10):
        shop.land(f"new/{number}.csv", f"user,item,ts\nu,i,{T + number}\n")
    second = shop.run()
    assert (second.read, second.events_new) == (10, 10)
    assert shop.run().read == 0
    shop.run("validate")
