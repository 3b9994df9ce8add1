"""`[source] redelivery = "replace"`: files that come again take the place of what they were."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from jobs.core import crash_points
from jobs.core.errors import SourceError
from jobs.core.plan import Thresholds
from jobs.core.source_file import load_source
from jobs.core.tables import (
    DELIVERIES,
    EVENTS,
    FILES,
    FILTERED,
    FLAGS,
    REJECTS,
    SEQUENCES,
    SESSIONS,
)
from jobs.forget.forget import forget
from tests.jobs.forget.test_forget import key
from tests.support.spark_tools import CLICKS, Workshop

assert key is not None  # (the fixture)

T = 1_700_000_000  # 2023-11-14 22:13:20 UTC
DAY = 86_400
REPLACE = CLICKS.replace('format = "csv"', 'format = "csv"\nredelivery = "replace"')


def lines(*rows: str) -> str:
    return "\n".join(["user,item,ts", *rows]) + "\n"


def at(user: str, item: str, second: int) -> str:
    return f"{user},{item},{T + second}"


def items(shop: Workshop) -> dict[str, str]:
    """Which file has which item, by the table."""
    return {row["item_id"]: Path(row["ingest_file"]).name for row in shop.rows(EVENTS)}


def delivered(shop: Workshop) -> list[tuple[str, str]]:
    return sorted((row["item_id"], Path(row["file"]).name) for row in shop.rows(DELIVERIES))


def in_sessions(shop: Workshop) -> list[list[str]]:
    return sorted([one["item_id"] for one in row["events"]] for row in shop.rows(SESSIONS))


@pytest.mark.slow
def test_a_file_that_comes_again_takes_the_place_of_what_it_was(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, REPLACE)
    shop.land("a.csv", lines(at("u", "x", 0), at("u", "y", 60), at("v", "w", 0), "u,,5", "v,q,no"))
    shop.land("b.csv", lines(at("u", "y", 60), at("u", "z", 90)))
    first = shop.run()
    assert (first.events_new, first.duplicates, first.rejects) == (
        4, 1, {"missing_item_id": 1, "bad_event_ts": 1},
    )  # fmt: skip
    assert items(shop) == {"x": "a.csv", "y": "a.csv", "w": "a.csv", "z": "b.csv"}
    assert delivered(shop) == [("y", "a.csv"), ("y", "b.csv")]

    # The other file still has y; w and a reject are gone, and x has another name.
    shop.land("a.csv", lines(at("u", "X", 0), "u,,5"))
    again = shop.run()
    assert (again.read, again.events_new, again.duplicates, again.rejects) == (
        2, 1, 0, {"missing_item_id": 1},
    )  # fmt: skip
    assert (again.events_removed, again.events_replaced) == (2, 1)
    [note] = [one for one in again.notes if "stored events were removed" in one]
    assert "2 stored events" in note and "a.csv" in note
    assert items(shop) == {"X": "a.csv", "y": "b.csv", "z": "b.csv"}
    assert [row["raw"] for row in shop.rows(REJECTS)] == ["u,,5"]
    assert in_sessions(shop) == [["X", "y", "z"]]
    assert [row["user_id"] for row in shop.rows(SEQUENCES)] == ["u"]
    before = [shop.version(one) for one in (EVENTS, DELIVERIES, REJECTS, FILES, SESSIONS)]
    nothing = shop.run()
    assert (nothing.read, nothing.events_removed) == (0, 0)
    assert before == [shop.version(one) for one in (EVENTS, DELIVERIES, REJECTS, FILES, SESSIONS)]

    # A file that is not there any more is no file that came again.
    (shop.landing / "a.csv").unlink()
    shop.land("c.csv", lines(at("u", "X", 0), at("u", "y", 60)))
    gone = shop.run()
    assert (gone.events_new, gone.duplicates, gone.events_removed) == (0, 2, 0)
    shop.land("b.csv", lines())
    shop.land("c.csv", lines(at("u", "n", 0)))
    last = shop.run()
    assert (last.events_new, last.events_removed) == (1, 2)  # (a.csv had X, and nobody has y)
    assert items(shop) == {"X": "a.csv", "n": "c.csv"}
    assert in_sessions(shop) in ([["X", "n"]], [["n", "X"]])


class Killed(Exception):
    pass


POINTS = (
    "ingest.computed", "ingest.rejects-published", "ingest.deliveries-published",
    "ingest.events-published", "ingest.rejects-cleaned",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_killed_between_two_tables_is_completed_by_the_next(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each point one run is killed while files have come again, shared and single events gone."""
    killed = Workshop(spark, tmp_path / "killed", REPLACE)
    calm = Workshop(spark, tmp_path / "calm", REPLACE)

    def night(number: int) -> dict[str, str]:
        shared = [at("u", f"s{one}", one) for one in range(10) if one % (number + 2)]
        return {
            "a.csv": lines(*shared, at("u", f"a{number}", 20), "u,,5" if number % 2 else "v,,6"),
            "b.csv": lines(*shared[number % 3 :], at("v", f"b{number // 2}", 30)),
            f"{number}.csv": lines(*shared[:2], at("w", f"c{number}", number)),
        }

    for number, name in enumerate(POINTS):
        for shop in (killed, calm):
            for file, text in night(number).items():
                shop.land(file, text)
        if number:
            with monkeypatch.context() as patch:

                def point(said: str, wanted: str = name) -> None:
                    if said == wanted:
                        raise Killed(said)

                patch.setattr(crash_points, "point", point)
                with pytest.raises(Killed):
                    killed.run("ingest")
        job = "run" if name in (POINTS[0], POINTS[-1]) else "ingest"
        killed.run(job)
        calm.run(job)
        drop = ("ingest_ts", "first_seen_ts", "ingest_file", "file")
        for table in (EVENTS, DELIVERIES, REJECTS, SESSIONS):
            assert killed.rows(table, drop) == calm.rows(table, drop), (name, table.full_name)
        assert items(killed) == items(calm) and delivered(killed) == delivered(calm)


@pytest.mark.slow
def test_a_day_takes_nothing_away_that_it_could_not_have_added(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, REPLACE + "[sessions]\nlateness_days = 2\n")
    shop.land("a.csv", lines(at("u", "old", 0), at("u", "older", -DAY), at("u", "new", 2 * DAY)))
    shop.run(day="2023-11-16")
    assert set(items(shop)) == {"old", "new"}  # (the third is late)
    assert [row["reason"] for row in shop.rows(REJECTS)] == ["late"]
    shop.land("a.csv", lines(at("u", "late", 0), at("u", "late2", -DAY)))
    result = shop.run(day="2023-11-17")
    assert (result.events_new, result.events_removed, result.rejects) == (0, 1, {"late": 2})
    assert set(items(shop)) == {"old"}
    [note] = [one for one in result.notes if "that a file no longer has stay" in one]
    assert note.startswith("1 events") and "lateness_days = 2" in note
    assert len(shop.rows(REJECTS)) == 2
    # A run without a day reaches as far as it likes.
    shop.land("a.csv", lines(at("u", "late", 0), at("u", "more", 9)))
    result = shop.run()
    assert (result.events_new, result.events_removed) == (2, 1)
    assert set(items(shop)) == {"late", "more"} and not shop.rows(REJECTS)


@pytest.mark.slow
def test_what_was_read_before_stays_until_a_reload(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, CLICKS)
    shop.land("a.csv", lines(at("u", "x", 0), at("u", "y", 60), at("u", "w", 70)))
    shop.land("b.csv", lines(at("u", "y", 60)))
    shop.run()
    shop.describe(REPLACE)
    shop.land("a.csv", lines(at("u", "n", 90)))
    result = shop.run()
    assert (result.events_new, result.events_removed) == (1, 0)
    [note] = [one for one in result.notes if "--reload" in one]
    assert note.startswith("3 events that a file no longer has stay")
    assert set(items(shop)) == {"x", "y", "w", "n"}
    result = shop.run(options={"reload": True})
    assert (result.events_new, result.events_removed, result.events_replaced) == (0, 2, 1)
    assert items(shop) == {"y": "b.csv", "n": "a.csv"}
    assert in_sessions(shop) == [["y", "n"]]
    assert shop.run(options={"reload": True}).events_removed == 0
    # From here on it is known which files have what. Unless lines are read without it again.
    shop.land("b.csv", lines())
    assert shop.run().events_removed == 1
    shop.describe(CLICKS)
    shop.land("c.csv", lines(at("u", "n", 90)))
    shop.run()
    shop.describe(REPLACE)
    shop.land("a.csv", lines())
    assert shop.run().events_removed == 0 and items(shop) == {"n": "a.csv"}
    shop.run(options={"reload": True})
    assert items(shop) == {"n": "c.csv"}


@pytest.mark.slow
def test_a_first_load_by_slices_knows_what_several_files_have(spark: Any, tmp_path: Path) -> None:
    limits = Thresholds(few_moved=-1, smallest_slice=10)
    shop = Workshop(spark, tmp_path, REPLACE, limits)
    shop.land("a.csv", lines(*(at("u", f"i{one}", one) for one in range(40))))
    shop.land("b.csv", lines(*(at("u", f"i{one}", one) for one in range(20, 60))))
    first = shop.run()
    assert (first.events_new, first.duplicates) == (60, 20)
    assert len(delivered(shop)) == 40
    shop.land("a.csv", lines(at("u", "i1", 1)))
    again = shop.run()
    assert (again.events_removed, again.events_replaced, again.duplicates) == (19, 20, 1)
    assert len(items(shop)) == 41


@pytest.mark.slow
def test_a_line_that_waits_takes_nothing_away(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, REPLACE)
    shop.land("a.csv", lines(at("u", "x", 0), at("u", "y", 60)))
    shop.run()
    path = shop.land("a.csv", lines(at("u", "z", 0)) + at("u", "y", 60))
    result = shop.run()
    assert (result.waiting, result.events_new, result.events_removed) == (1, 1, 0)
    path.write_text(path.read_text() + "\n")
    result = shop.run()
    assert (result.events_new, result.events_removed) == (0, 1)
    assert set(items(shop)) == {"y", "z"}


NATIVE = (
    REPLACE.replace('item_id = "item"', 'item_id = "item"\nevent_id = "id"\nevent_type = "kind"')
    + '\n[bots]\nuser_agent = "agent"\npolicy = "flag"\n'
)
BOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"


@pytest.mark.slow
def test_native_ids_flags_and_replays_follow_the_newest_version(spark: Any, tmp_path: Path) -> None:
    def said(*rows: tuple[str, str, str, int, str]) -> str:
        told = (f"{id_},u,{item},{kind},{T + s},{agent}" for id_, item, kind, s, agent in rows)
        return "\n".join(["id,user,item,kind,ts,agent", *told]) + "\n"

    shop = Workshop(spark, tmp_path, NATIVE)
    shop.land("a.csv", said(("1", "x", "view", 0, BOT), ("2", "y", "view", 9, "Firefox")))
    shop.land("b.csv", said(("1", "x2", "buy", 5, "Firefox"), ("3", "z", "view", 9, BOT)))
    shop.run()
    told = {row["event_id"]: (row["item_id"], row["event_type"]) for row in shop.rows(EVENTS)}
    assert told == {"1": ("x", "view"), "2": ("y", "view"), "3": ("z", "view")}
    assert {row["event_id"] for row in shop.rows(FLAGS)} == {"1", "3"}
    # Without the smaller line the other file's holds; its user agent is no bot's.
    shop.land("a.csv", said(("2", "y2", "view", 9, BOT), ("4", "", "view", 9, "Firefox")))
    result = shop.run()
    assert (result.events_replaced, result.events_removed, result.duplicates) == (2, 0, 1)
    told = {row["event_id"]: (row["item_id"], row["event_type"]) for row in shop.rows(EVENTS)}
    assert told == {"1": ("x2", "buy"), "2": ("y2", "view"), "3": ("z", "view")}
    assert {row["event_id"] for row in shop.rows(FLAGS)} == {"2", "3"}
    # What a replay lands is its file's.
    shop.describe(
        NATIVE.replace('item_id = "item"', "item_id = { sql = \"coalesce(item, 'nix')\" }")
    )
    assert shop.run("replay-rejects").events_new == 1
    shop.land("a.csv", said(("2", "y2", "view", 9, BOT)))
    assert shop.run().events_removed == 1
    shop.land("b.csv", said())
    assert shop.run().events_removed == 2
    assert {row["event_id"] for row in shop.rows(FLAGS)} == {"2"}
    assert [row["event_id"] for row in shop.rows(EVENTS)] == ["2"]


@pytest.mark.slow
def test_a_line_that_is_too_old_keeps_an_event_when_the_file_that_brought_it_changes_twice(
    spark: Any, tmp_path: Path
) -> None:
    toml = REPLACE.replace('item_id = "item"', 'item_id = "item"\nevent_id = "id"')
    toml += "[sessions]\nlateness_days = 5\n"
    shop = Workshop(spark, tmp_path, toml)
    head, days = "user,item,ts,id\n", ["2023-11-15", "2023-11-17", "2023-11-18"]
    shop.land("again.csv", head + f"u,x,{T},1\n")
    shop.run(day=days[0])
    # The event leaves its file; the line of another file has its id, and is too old to replace it.
    shop.land("again.csv", head + f"u,y,{T + 60},2\n")
    shop.land("late.csv", head + f"u,old,{T - 10 * DAY},1\n")
    shop.run(day=days[1])
    assert set(items(shop)) == {"x", "y"} and ("x", "late.csv") in delivered(shop)
    # The file that brought it comes again: the other one still has it.
    shop.land("again.csv", head + f"u,z,{T + 90},3\n")
    shop.run(day=days[2])
    assert set(items(shop)) == {"x", "z"}
    # Without it there as well, it goes.
    shop.land("late.csv", head + f"u,w,{T + 120},4\n")
    shop.run(day=days[2])
    assert set(items(shop)) == {"z", "w"}


@pytest.mark.slow
def test_lines_that_are_left_out_now_and_people_who_are_forgotten_stay_away(
    spark: Any, tmp_path: Path, key: str
) -> None:
    shop = Workshop(spark, tmp_path, REPLACE)
    both = [at("u", "x", 0), at("v", "y", 60)]
    shop.land("a.csv", lines(*both, at("v", "k", 90)))
    shop.land("b.csv", lines(*both))
    shop.run()
    done = forget(shop.context(), "u")
    assert (done["events"], done["landing_lines"]) == (1, 2)
    assert delivered(shop) == [("y", "a.csv"), ("y", "b.csv")]
    assert shop.run().read == 0  # (the files are known as they are now)
    shop.describe(
        REPLACE.replace(
            'redelivery = "replace"',
            'redelivery = "replace"\nkeep = "item <> \'k\'"\nkeep_filtered = true',
        )
    )
    shop.land("a.csv", lines(at("v", "k", 90), at("u", "x", 0)))
    result = shop.run()
    assert (result.events_removed, result.filtered) == (1, {"keep": 1})
    assert items(shop) == {"y": "b.csv"}
    assert [row["line"] for row in shop.rows(FILTERED)] == [2]
    shop.land("a.csv", lines(at("v", "k2", 90)))
    shop.run()
    assert not shop.rows(FILTERED)


@pytest.mark.slow
def test_what_others_changed_in_bronze_stays(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, REPLACE)
    shop.land("a.csv", lines(at("u", "x", 0), at("u", "y", 60), at("u", "z", 70)))
    shop.land("b.csv", lines(at("u", "y", 60)))
    shop.run()
    shop.table(EVENTS).delete("item_id = 'y'")
    shop.table(EVENTS).update(updates={"item_id": "'theirs'"}, predicate="item_id = 'x'")
    time.sleep(0.01)
    shop.land("a.csv", lines(at("u", "y", 60)))
    result = shop.run()
    assert (result.events_new, result.duplicates, result.events_removed) == (0, 1, 1)
    assert set(items(shop)) == {"theirs"}


def test_a_delta_tables_files_never_come_again(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(REPLACE.replace('format = "csv"', 'format = "delta"'))
    with pytest.raises(SourceError, match="the data files of a Delta table never are"):
        load_source(str(file))
