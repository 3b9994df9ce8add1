"""Nights that one process takes, compared with the same nights in Spark."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from jobs.bronze import landing, night
from jobs.core.errors import SchemaError
from jobs.core.plan import Algorithm, Engine, Plan, Publish, Thresholds
from jobs.core.tables import EVENTS, FILES, REJECTS
from jobs.lake.context import Context
from jobs.lake.delta import Lake
from jobs.pipeline.steps import one_job
from tests.support.spark_tools import Workshop

T, DAY = 1_700_006_400, 86_400  # 2023-11-15
SOURCE = """
[source]
name = "clicks"
landing = "{landing}/*.csv"
format = "csv"
[columns]
user_id = "user"
item_id = "item"
event_ts = "ts"
event_type = "kind"
value = "value"
tie_break = "tie"
[time]
unit = "s"
[sessions]
lateness_days = 2
[feedback]
negative = ["value < 0"]
[quality]
max_reject_share = 0.9
"""
NIGHTS = ("2023-11-15", "2023-11-16", "2023-11-17")


def line(dice: random.Random, number: int) -> str:
    """Few users, items and times: lines repeat each other, and those of other nights."""
    pick = dice.choice
    times = [str(T + (number - pick((0, 0, 1, 5))) * DAY + dice.randrange(3))] * 20
    user, item = pick((*"abab", "\u00fc", "")), pick(("i1", "i1", "\u65e5\u672c"))
    ts, value = pick((*times, "not a time", "")), pick(("1", "1", "1", "-2.5", "many"))
    return ",".join((user, item, ts, "view", value, pick(("", "", "2"))))


def lines_of(seed: int, number: int, count: int = 80) -> str:
    dice = random.Random(f"{seed} {number}")
    lines = [line(dice, number) for _ in range(count)]
    lines += ['"no,end' if dice.random() < 0.5 else "a,i1"][: dice.randrange(2)]
    return "user,item,ts,kind,value,tie\n" + "".join(f"{one}\n" for one in lines)


def told(result: Any) -> dict[str, Any]:
    return result.counts() | {"rejects": result.rejects, "notes": len(result.notes)}


def rows(shop: Workshop, table: Any) -> list[dict[str, Any]]:
    """Without stamps; files by their names."""
    found = shop.rows(table)
    for row in found:
        for name in ("file", "ingest_file"):
            row[name] = Path(row[name]).name if row.get(name) else None
        for name in ("ingest_ts", "first_seen_ts", "read_ts", "modified_ms", "batch"):
            row.pop(name, None)
    return sorted(found, key=repr)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_night_here_is_the_night_in_spark(spark: Any, tmp_path: Path, seed: int) -> None:
    few = Thresholds(short_jobs=True)
    here = Workshop(spark, tmp_path / "here", SOURCE, few)
    there = Workshop(spark, tmp_path / "there", SOURCE, replace(few, read_bytes=-1))
    for number, day in enumerate(NIGHTS):
        for shop in (here, there):
            shop.land(f"{number}.csv", lines_of(seed, number))
        of = None if number == 0 and seed % 2 else day
        ours, theirs = (shop.run("ingest", of) for shop in (here, there))
        assert told(ours) == told(theirs)
        for table in (EVENTS, REJECTS, FILES):
            assert rows(here, table) == rows(there, table), table.full_name
    assert len(here.rows(EVENTS)) > 50 and {
        "late",
        "bad_event_ts",
        "missing_user_id",
        "bad_value",
    } <= {row["reason"] for row in here.rows(REJECTS)}


def test_such_a_night_needs_no_jvm(tmp_path: Path) -> None:
    shop = Workshop(None, tmp_path, SOURCE)
    lake = Lake(lambda: pytest.fail("no JVM is needed"), str(shop.lake_root), "clicks")
    duplicates = 0
    for number, day in enumerate(NIGHTS):
        shop.land(f"{number}.csv", lines_of(7, number))
        context = Context(shop.source, lake, date.fromisoformat(day), f"night-{number}")
        done = one_job(context, "ingest", "all", {})
        assert context.plans["ingest"] == Plan(
            "ingest", Algorithm.STORED_HERE, Engine.HERE, Publish.APPEND
        )
        assert done.read == done.events_new + done.duplicates + sum(done.rejects.values())
        assert done.events_new and done.rejects
        duplicates += done.duplicates
    assert duplicates > 10
    shop.land("same.csv", "\n".join((shop.landing / "0.csv").read_text().splitlines()[:9]) + "\n")
    first = date.fromisoformat(NIGHTS[0])
    same = one_job(Context(shop.source, lake, first, "same"), "ingest", "all", {})
    assert not same.events_new and same.duplicates
    again = one_job(Context(shop.source, lake, None, "again"), "ingest", "all", {})
    assert again.read == 0


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ("", "a,i1,1e9,view,1,1"),  # a time that only the rule for every line can read
        ("", "a,i1,1700006400,view,1e-9,1"),
        ("", "a,i1,1700006400,view,1,1.5"),
        ('event_id = "kind"', "a,i1,1700006400,view,1,1"),
        # Texts that are not stored as they were read.
        ('event_type = { sql = "lower(kind)" }', "a,i1,1700006400,view,1,1"),
        ('event_type = "kind"\n[privacy]\nhash_user_id = true', "a,i1,1700006400,view,1,1"),
    ],
)
def test_other_lines_are_left_to_spark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, lines: str
) -> None:
    monkeypatch.setenv("SESSIONMILL_ID_KEY", "key" * 20)
    kind = 'event_type = "kind"'
    column, _, section = (change or kind).partition("\n")
    toml = SOURCE.replace(kind, column) + section
    shop = Workshop(None, tmp_path, toml)
    text = "user,item,ts,kind,value,tie\na,i2,1700006400,view,1,1\n"
    lake = Lake(lambda: pytest.fail("no JVM is needed"), str(shop.lake_root), "clicks")
    context = Context(shop.source, lake, None, "one")
    candidate = context.candidate(EVENTS)
    for table in (EVENTS, REJECTS, FILES):
        lake.create(table)
    shop.land("a.csv", text + lines + "\n")
    assert not night.parse(context, candidate, landing.landing_files(context))
    assert not night.is_here(candidate) and not candidate.files("lines")


def test_files_of_another_log_are_named_with_the_landing(tmp_path: Path) -> None:
    shop = Workshop(None, tmp_path, SOURCE)
    lake = Lake(lambda: pytest.fail("no JVM is needed"), str(shop.lake_root), "clicks")
    shop.land("a.csv", lines_of(1, 0))
    shop.land("b.csv", "who,what\nann,i1\n")
    with pytest.raises(SchemaError) as caught:
        one_job(Context(shop.source, lake, None, "one"), "ingest", "all", {})
    said = str(caught.value)
    assert "b.csv has no column 'user', which columns.user_id names" in said
    assert (
        f"can be read: 1. If the others are not of this log, narrow source.landing = {shop.source.source.landing!r}"
        in said
    )
