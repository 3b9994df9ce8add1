"""Everyday lines typed by DuckDB, held against `typed_events`, the rule for every line."""

from __future__ import annotations

import random
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import functions as F

from jobs.core.source_file import Source
from jobs.reading import typed_arrow
from jobs.reading.typed_arrow import ASIDE, WRITTEN, Typer, Typing, pattern_of, raw_hash
from jobs.reading.typed_events import typed_events
from jobs.records.records import RECORD_SCHEMA

UNITS = (
    "s", "ms", "us", "iso8601", "yyyy-MM-dd HH:mm:ss", "dd/MMM/yyyy:HH:mm:ss Z", "yyyyMMddHHmm",
    "yyyy-MM-dd'T'HH:mm:ss.SSS",
)  # fmt: skip
EVERYDAY = {
    "s": "1506826988", "ms": "1506826988744", "us": "1506826988744001",
    "iso8601": "2024-03-01T10:11:12.5Z", "yyyy-MM-dd HH:mm:ss": "2024-03-01 10:11:12",
    "dd/MMM/yyyy:HH:mm:ss Z": "19/May/2015:10:05:03 +0200", "yyyyMMddHHmm": "202403011011",
    "yyyy-MM-dd'T'HH:mm:ss.SSS": "2024-03-01T10:11:12.123",
}  # fmt: skip
TIMES = (
    *EVERYDAY.values(), "0", "-1", "007", "+5", " 5", "1e9", "1_000", "1506826988.25", "9" * 17,
    "9" * 19, "4102444800000", "", "x", "2024-03-01", "2024-03-01 10:11", "2024-03-01 10",
    "2024-02-30T10:11:12Z", "2024-03-01T24:00:00Z", "2024-03-01T10:11:60Z",
    "2024-03-01T10:11:12+13:59", "2024-03-01T10:11:12-14:00", "2024-03-01T10:11:12+01",
    "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2024-03-01 10:11:12,5", "2024-3-1 1:2:3",
    "2024-03-01T10:11:12.1234567Z", "2024-03-01T10:11:12Z\n", "31/Feb/2015:10:05:03 +0200", "17/May/2015:10:05:03 +0200",
    "17/may/2015:10:05:03 +0200", "17/Mai/2015:10:05:03 +0200", "1582-10-10T00:00:00Z",
    "2024-02-29 23:59:59", "2023-02-29 23:59:59", "202402301011", "2024-03-01 10:11:12.999999",
)  # fmt: skip
VALUES = (None, "1", "1.0", "4.50", "-0", "0.0", "0.001", "0.0009", "9999999", "10000000", "1e3",
          "123456.789012", "-7.25", "007.10", ".5", "5.", "nan", "inf", "x", "1_0", " 3", "1,5")  # fmt: skip
TIES = (None, "0", "-3", "+4", "007", "9223372036854775808", "1.0", "x", "999999999999999999")
TEXTS = ("a", "ä", "日本", "🤦🏼‍♂️", "a b", "a'b", '"', "\\", "u:1", None)


def source(unit: str, **more: Any) -> Source:
    columns = {
        "user_id": "u", "item_id": "i", "event_ts": "t", "event_type": "e", "value": "v",
        "tie_break": "b", "source_session_id": "s",
    }  # fmt: skip
    return Source.model_validate(
        {
            "source": {"name": "x", "landing": "x", "format": more.pop("format", "csv")}
            | more.pop("source", {}),
            "columns": columns | more.pop("columns", {}),
            "time": {"unit": unit, "zone": more.pop("zone", "UTC")},
            "feedback": {"negative": ["value < 3", "skip"], "exposed": ["show"]},
            **more,
        }
    )


def records(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    whole = [
        {"kind": "record", "file": "f", "line": at, "raw": f"line {at}", **row}
        for at, row in enumerate(rows)
    ]
    return pa.RecordBatch.from_pylist(whole, schema=RECORD_SCHEMA)


def some(
    count: int, times: tuple[str | None, ...], seed: int, values: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    pick = chance.choice
    return [
        {
            "user_id": pick(TEXTS), "item_id": pick(TEXTS), "event_ts": pick(times),
            "event_type": pick((*TEXTS, "show", "skip")), "value": pick((*VALUES, *values)),
            "tie_break": pick(TIES), "source_session_id": pick(TEXTS), "event_id": pick(TEXTS),
            "exposed_with": pick((None, None, None, [], ["a"])), "anonymous_id": pick(TEXTS),
            "filtered": pick((None,) * 9 + ("filtered",)),
            "kind": pick(("record",) * 9 + ("unparsable",)),
        }
        for _ in range(count)
    ]  # fmt: skip


def everyday(
    typing: Typing, batch: pa.RecordBatch, folder: Path
) -> tuple[pa.Table, pa.RecordBatch]:
    typer = Typer(typing, str(folder), "lines")
    left = typer.take(batch)
    files = typer.close()
    lines = pq.read_table(files[0]) if files else typing.schema.empty_table()
    return lines, left


def by_rule(
    spark: Any, batch: pa.RecordBatch, of: Source, oldest: date | None, hashed: bool = True
) -> pa.Table:
    day = None if oldest is None else F.lit(oldest)
    table = spark.createDataFrame(pa.Table.from_batches([batch]))
    return typed_events(table, of, day, hashed).toArrow()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["hash", "native", "identity"])
def test_everyday_lines_are_what_the_rule_says(
    spark: Any, tmp_path: Path, unit: str, kind: str
) -> None:
    who = {"identity": {"anonymous_id": "a"}} if kind == "identity" else {}
    of = source(unit, columns={"event_id": "n"} if kind == "native" else {}, **who)
    oldest = date(2015, 5, 18)
    typing = Typing.of(of, oldest)
    assert typing is not None
    rows = some(3000, (*TIMES, *[EVERYDAY[unit]] * 20), len(unit) + len(kind))
    if kind != "identity":
        rows = [row | {"anonymous_id": None} for row in rows]
    batch = records(rows)
    lines, left = everyday(typing, batch, tmp_path)
    ruled = by_rule(spark, batch, of, oldest).to_pylist()
    expected = {row["line"]: row for row in ruled}
    assert lines.num_rows > 100
    assert sorted([*lines["line"].to_pylist(), *left["line"].to_pylist()]) == sorted(expected)
    for row in lines.to_pylist():
        want = expected[row["line"]]
        names = [n for n in WRITTEN if n in want]
        assert {n: row[n] for n in names} == {n: want[n] for n in names}
        assert want["reason"] is None and want["raw"] is None


BROKEN = (
    "not a time",
    "yesterday",
    "2024-03-01T10:11:12 MEZ",
    "12:30",
    "1.2e3x",
    "\u0664\u0662",
    "1d",
)
"""And no numbers, with letters that times and numbers have, and without."""


@pytest.mark.parametrize(
    "unit",
    [
        one
        if one in ("ms", "iso8601", "yyyy-MM-dd HH:mm:ss")
        else pytest.param(one, marks=pytest.mark.slow)
        for one in UNITS
    ],
)
def test_lines_set_aside_are_what_the_rule_says(spark: Any, tmp_path: Path, unit: str) -> None:
    """Late lines, and those that are no events for a reason that is sure, with their texts."""
    of, oldest = source(unit), date(2024, 3, 2)
    typing = Typing.of(of, oldest, aside=True)
    assert typing is not None and typing.aside
    rows = some(4000, (*TIMES, *BROKEN, *[EVERYDAY[unit]] * 20), len(unit), BROKEN)
    batch = records([row | {"anonymous_id": None} for row in rows])
    lines, left = everyday(typing, batch, tmp_path)
    ruled = by_rule(spark, batch, of, oldest, hashed=False).to_pylist()
    expected = {row["line"]: row for row in ruled}
    assert sorted([*lines["line"].to_pylist(), *left["line"].to_pylist()]) == sorted(expected)
    reasons = set()
    for row in lines.to_pylist():
        want = expected[row["line"]]
        reasons.add(row["reason"])
        names = ASIDE if row["reason"] else WRITTEN | ASIDE
        names = [n for n in (*names, "reason", "file") if n in want]
        assert {n: row[n] for n in names} == {n: want[n] for n in names}
    sure = {"unparsable", "missing_user_id", "missing_item_id", "bad_event_ts", "bad_value"}
    assert reasons == {None, *sure}
    assert any(row["raw"] and row["reason"] is None for row in lines.to_pylist())  # late


def test_hashes_of_texts_are_sparks(spark: Any) -> None:
    rows = [(text, element) for text in (*TEXTS, "", "x" * 100) for element in (None, 0, 7, 2**40)]
    frame = spark.createDataFrame(rows, "raw string, element bigint")
    told = frame.select(F.hex(F.xxhash64("raw", "element"))).toArrow()[0].to_pylist()
    assert [raw_hash(*row) for row in rows] == told


@pytest.mark.parametrize(
    "more",
    [{"format": "parquet"}, {"privacy": {"hash_user_id": True}}, {"source": {"keep": "v > 1"}}],
)
def test_texts_that_are_not_stored_as_they_were_read(more: dict[str, Any]) -> None:
    typing = Typing.of(source("s", **more), None, aside=True)
    assert typing is not None and not typing.aside


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_everyday(tmp_path: Path, unit: str) -> None:
    """Common lines are not left to the slow way."""
    typing = Typing.of(source(unit), None)
    assert typing is not None
    row = {
        "user_id": "u1", "item_id": "日本", "event_ts": EVERYDAY[unit], "event_type": "view",
        "value": "4.5", "tie_break": "3", "source_session_id": None,
    }  # fmt: skip
    lines, left = everyday(
        typing, records([row, row | {"value": None, "tie_break": None}]), tmp_path
    )
    assert (lines.num_rows, left.num_rows) == (2, 0)


def test_numbers_have_the_texts_of_java(spark: Any, tmp_path: Path) -> None:
    """The text of a number is part of an event's id: DuckDB's must be Java's."""
    chance = np.random.default_rng(7)
    values = [
        *(f"{v:.{d}f}" for d in range(7) for v in 10 ** chance.uniform(-3, 7, 3000) * .9999999),
        *(str(v / 100) for v in range(0, 20_000, 7)), *(str(v / 1000) for v in range(1, 5000, 3)),
    ]  # fmt: skip
    batch = records([{"user_id": "u", "item_id": "i", "event_ts": "5", "value": v} for v in values])
    of = source("s")
    typing = Typing.of(of, None)
    assert typing is not None
    lines, _ = everyday(typing, batch, tmp_path)
    expected = dict(
        zip(
            *(by_rule(spark, batch, of, None)[n].to_pylist() for n in ("line", "event_id")),
            strict=True,
        )
    )
    found = dict(zip(lines["line"].to_pylist(), lines["event_id"].to_pylist(), strict=True))
    assert len(found) > 0.95 * len(values)
    assert {line: expected[line] for line in found} == found


def test_typed_times(spark: Any, tmp_path: Path) -> None:
    """Of Parquet: microseconds on a clock."""
    for zone in ("UTC", "Europe/Paris"):
        of = source("iso8601", format="parquet", zone=zone)
        typing = Typing.of(of, None)
        assert typing is not None
        rows = [
            {"user_id": "u", "item_id": "i", "event_ts": "1719835200000000", "clock": clock}
            for clock in ("utc", "local")
        ]
        lines, _ = everyday(typing, records(rows), tmp_path / zone)
        expected = {row["line"]: row for row in by_rule(spark, records(rows), of, None).to_pylist()}
        assert lines.num_rows == (2 if zone == "UTC" else 1)
        for row in lines.to_pylist():
            assert row["event_id"] == expected[row["line"]]["event_id"]


@pytest.mark.parametrize(
    "unit", ["dd.MM.yy HH:mm", "MMMM dd, yyyy HH:mm", "yyyy-MM-dd", "yyyy-MM-dd[ HH:mm:ss]",
             "EEE dd MMM yyyy HH:mm", "yyyy-DDD HH:mm", "yyyy-MM-dd hh:mm a", "yyyy-MM-dd HH:mm X"]
)  # fmt: skip
def test_patterns_that_are_left_to_the_rule(unit: str) -> None:
    assert pattern_of(unit) is None
    assert Typing.of(source(unit), None) is None


def test_lines_are_written_in_order_of_time(tmp_path: Path) -> None:
    typing = Typing.of(source("s"), None)
    assert typing is not None
    times = [str(1_500_000_000 + n * 7919 % 1000) for n in range(1000)]
    rows = [{"user_id": "u", "item_id": "i", "event_ts": t} for t in times]
    lines, _ = everyday(typing, records(rows), tmp_path)
    got = lines["event_ts"].to_pylist()
    assert got == sorted(got) and len(got) == 1000


def test_runs_of_long_texts_are_written_before_they_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by bytes, not by lines alone."""
    monkeypatch.setattr(typed_arrow, "RUN_BYTES", 100_000)
    typing = Typing.of(source("s"), None)
    assert typing is not None
    typer = Typer(typing, str(tmp_path), "lines")
    for at in range(10):
        typer.take(records([{"user_id": "u" * 60_000, "item_id": "i", "event_ts": str(at)}] * 2))
        assert typer.bytes < 300_000
    [file] = typer.close()
    assert pq.ParquetFile(file).num_row_groups == 10
    assert pq.read_table(file).num_rows == 20
