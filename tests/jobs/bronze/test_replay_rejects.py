"""`replay-rejects`: after a fix, lines land as if they had been good the first time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deltalake import CommitProperties, write_deltalake

from jobs.core.errors import RejectShareError
from jobs.core.tables import EVENTS, REJECTS
from tests.support.spark_tools import CLICKS, Workshop

DAY = "2024-03-10"
LOG = """user,item,ts,note
ann,1,2024-03-09T10:00:00,x
ann,"2, b",2024-03-09T10:05:00,x
ann,1,2024-03-09T10:00:00,again
bob,1,2024-01-01T10:00:00,late
bob,,2024-03-09T10:00:00,x
bob,3,1710000000,x
eve,"4,2024-03-09T10:00:00,x
"""
WRONG_UNIT = CLICKS + '[quality]\non_exceed = "warn"\n'
RIGHT_UNIT = WRONG_UNIT.replace('unit = "s"', 'unit = "iso8601"')


@pytest.mark.parametrize("form", ["csv", pytest.param("jsonl", marks=pytest.mark.long)])
@pytest.mark.long
def test_lines_rejected_for_a_wrong_unit_come_back(spark: Any, tmp_path: Path, form: str) -> None:
    wrong = WRONG_UNIT if form == "csv" else WRONG_UNIT.replace("csv", "jsonl")
    right = wrong.replace('unit = "s"', 'unit = "iso8601"\nzone = "Europe/Paris"')
    text = LOG
    if form == "jsonl":
        rows = [line.replace('"2, b"', "2; b").split(",") for line in LOG.splitlines()[1:-1]]
        text = "".join(
            f'{{"user": "{u}", "item": "{i}", "ts": "{t}"}}\n'.replace('"item": ""', '"item": null')
            for u, i, t, _ in rows
        )
    mended, first = (tmp_path / name for name in ("mended", "first"))
    mended.mkdir()
    first.mkdir()
    shop = Workshop(spark, mended, wrong)
    shop.land(f"log.{form}", text)
    before = shop.run("ingest", day=DAY)
    assert before.events_new == 1  # the only line whose time is a number
    shop.describe(right)
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (sum(before.rejects.values()), 2)
    assert (replayed.duplicates, replayed.rejects["late"]) == (1, 1)
    assert "python -m jobs run" in replayed.notes[0]

    calm = Workshop(spark, first, right)
    calm.land(f"log.{form}", text)
    calm.run("ingest", day=DAY)
    here = ("ingest_file", "ingest_ts", "first_seen_ts", "file")
    wanted = calm.rows(EVENTS, drop=here)
    # The number was good under the wrong unit, and stays the event that it was.
    assert [row for row in shop.rows(EVENTS, drop=here) if row["item_id"] != "3"] == wanted
    left = [row for row in calm.rows(REJECTS, drop=here) if "1710000000" not in row["raw"]]
    assert shop.rows(REJECTS, drop=here) == left
    assert {row["file"] for row in shop.rows(REJECTS)} == {str(shop.landing / f"log.{form}")}

    again = shop.run("replay-rejects")
    assert (again.events_new, again.duplicates) == (0, 0) and again.rejects == replayed.rejects


def pairs(shop: Workshop) -> set[tuple[str, str]]:
    return {(row["user_id"], row["item_id"]) for row in shop.rows(EVENTS)}


@pytest.mark.long
def test_lines_are_read_by_the_columns_that_their_file_had_then(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WRONG_UNIT)
    shop.land("log.csv", "user,item,ts\nann,i1,2024-03-09\nbob,i2,1710000000\n")
    assert shop.run("ingest").rejects == {"bad_event_ts": 1}
    # Delivered again with its columns in another order, and one more column.
    shop.land("log.csv", "item,agent,user,ts\ni3,x,cat,2024-03-09\ni2,x,bob,1710000000\n")
    assert shop.run("ingest").rejects == {"bad_event_ts": 1}
    shop.describe(RIGHT_UNIT)
    replayed = shop.run("replay-rejects")
    assert (replayed.events_new, replayed.rejects) == (2, {})
    assert pairs(shop) == {("ann", "i1"), ("bob", "i2"), ("cat", "i3")}
    assert shop.rows(REJECTS) == []


@pytest.mark.long
def test_a_line_that_comes_again_is_read_by_the_newest_columns(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WRONG_UNIT)
    shop.land("log.csv", "user,item,ts\nann,i1,2024-03-09\nbob,i2,1710000000\n")
    shop.run("ingest")
    [first] = shop.rows(REJECTS)
    shop.land("log.csv", "item,user,ts\nann,i1,2024-03-09\nbob,i2,1710000000\n")  # it was mistaken
    shop.run("ingest")
    [again] = shop.rows(REJECTS)
    assert again == first | {"file_columns": ["item", "user", "ts"]}
    shop.describe(RIGHT_UNIT)
    shop.run("replay-rejects")
    assert ("i1", "ann") in pairs(shop) and ("ann", "i1") not in pairs(shop)


@pytest.mark.long
def test_columns_that_nobody_maps_may_share_a_name(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WRONG_UNIT)
    shop.land("log.csv", "user,note,item,note,ts\nann,x,i1,y,2024-03-09\nbob,x,i2,y,1710000000\n")
    assert shop.run("ingest").rejects == {"bad_event_ts": 1}
    shop.describe(RIGHT_UNIT)
    replayed = shop.run("replay-rejects")
    assert (replayed.events_new, replayed.rejects) == (1, {})
    assert ("ann", "i1") in pairs(shop)


OLD_FILES = {
    "once.csv": "user,item,ts\nann,i1,2024-03-09\nbob,i2,1710000000\n",
    "twice.csv": "user,item,ts\neve,i5,2024-03-09\nbob,i3,1710000000\n",
    "grown.csv": "user,item,ts\nfay,i6,2024-03-09\nbob,i4,1710000000\n",
    "doubled.csv": "user,note,item,note,ts\ngus,x,i7,y,2024-03-09\nbob,x,i8,y,1710000000\n",
}


def without_columns(shop: Workshop) -> None:
    """`bronze.rejects` as version 0.1.0 has it."""
    place = REJECTS.path(str(shop.lake_root), "clicks")
    rows = shop.table(REJECTS).to_pyarrow_table().drop_columns(["file_columns"])
    ours = CommitProperties(custom_metadata={"userMetadata": "0" * 32})
    write_deltalake(place, rows, mode="overwrite", schema_mode="overwrite", commit_properties=ours)


@pytest.mark.long
def test_rejects_of_version_0_1_0_are_read_by_what_is_known_and_never_guessed_at(
    spark: Any, tmp_path: Path
) -> None:
    shop = Workshop(spark, tmp_path, WRONG_UNIT)
    for name, text in OLD_FILES.items():
        shop.land(name, text)
    # (By steps, as nights run: the ledger is written later than the lines were read.)
    for step in ("compute", "audit", "publish"):
        shop.run("ingest", step=step, batch="first")
    shop.land("twice.csv", "item,user,ts\ni3,bob,1710000001\n")
    shop.run("ingest")
    without_columns(shop)
    assert "file_columns" not in shop.rows(REJECTS)[0] and len(shop.rows(REJECTS)) == 4
    shop.land("grown.csv", OLD_FILES["grown.csv"] + "hal,i9,1710000002\n")
    shop.run("ingest")  # from here on by this version: the line comes again, with its columns
    there = pairs(shop)
    shop.describe(RIGHT_UNIT)
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (2, 2)
    assert pairs(shop) - there == {("ann", "i1"), ("fay", "i6")}
    note = next(note for note in replayed.notes if "were not replayed" in note)
    for words in ("2 rejected lines", f"1 of {shop.landing / 'twice.csv'}", "doubled.csv", "touch"):
        assert words in note
    assert {row["raw"] for row in shop.rows(REJECTS)} == {
        "eve,i5,2024-03-09", "gus,x,i7,y,2024-03-09",
    }  # fmt: skip
    assert {row["reason"] for row in shop.rows(REJECTS)} == {"bad_event_ts"}
    # Delivered again, they are lines as any other.
    shop.land("twice.csv", OLD_FILES["twice.csv"])
    shop.land("doubled.csv", OLD_FILES["doubled.csv"] + "gus,x,i9,y,2024-03-09\n")
    shop.run("ingest")
    assert {("eve", "i5"), ("gus", "i7"), ("gus", "i9")} < pairs(shop)
    assert {row["raw"] for row in shop.rows(REJECTS)} == {
        "bob,i3,1710000000", "bob,x,i8,y,1710000000",
    }  # fmt: skip


@pytest.mark.long
def test_rejects_of_a_run_that_failed_wait_for_the_next_run(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("log.csv", "user,item,ts\nann,i1,2024-03-09\n")
    with pytest.raises(RejectShareError):
        shop.run("ingest")
    shop.describe(RIGHT_UNIT)
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (0, 0)
    assert any("1 rejected lines are of files that no run" in note for note in replayed.notes)
    assert shop.run("ingest").events_new == 1 and shop.rows(REJECTS) == []
