"""A small log through the real jobs, from files to sequences: what a person would see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import RejectShareError, RuleChanged, SchemaError, SourceError
from jobs.core.tables import EVENTS, ITEMS, REJECTS, RUNS, SEQUENCES, SESSIONS
from tests.support.spark_tools import CLICKS, Workshop

T = 1_700_000_000


def line(user: object, item: object, second: int) -> str:
    return f"{user},{item},{T + second}\n"


def test_stories(spark: Any, tmp_path: Path) -> None:
    """Each user is one story; all go through Spark in one run."""
    shop = Workshop(spark, tmp_path)
    shop.land(
        "day.csv",
        "user,item,ts\n"
        + line("ann", 1, 0) + line("ann", 2, 1800)  # exactly gap_s apart: one session
        + line("bob", 1, 0) + line("bob", 2, 1801)  # one second more: two sessions
        + line("-9223372036854775808", "007", 5)  # a 64-bit id, a leading zero
        + line('"a,""b"', '"x, y"', 7)  # commas and quotes
        + line("ann", 2, 1800)  # an exact duplicate collapses
        + line("", 3, 9) + line("cat", "", 9) + line("cat", 3, 9)[:-4] + "soon\n"
        + '"cat,3\n',
    )  # fmt: skip
    shop.land("empty.csv", "")
    shop.land("header-only.csv", "user,item,ts\n")
    result = shop.run()
    assert (result.read, result.events_new, result.duplicates) == (11, 6, 1)
    assert result.rejects == {
        "missing_user_id": 1, "missing_item_id": 1, "bad_event_ts": 1, "unparsable": 1,
    }  # fmt: skip
    assert (result.sessions_new, result.sessions_retired, result.runaways) == (5, 0, 0)

    sessions = {(row["user_id"], row["events"][0]["item_id"]): row for row in shop.rows(SESSIONS)}
    assert [e["item_id"] for e in sessions["ann", "1"]["events"]] == ["1", "2"]
    assert sessions["bob", "1"]["event_count"] == sessions["bob", "2"]["event_count"] == 1
    assert ("-9223372036854775808", "007") in sessions and ('a,"b', "x, y") in sessions

    rejects = {row["reason"]: row for row in shop.rows(REJECTS)}
    assert rejects["unparsable"]["raw"] == '"cat,3' and rejects["unparsable"]["line"] == 12
    assert rejects["missing_user_id"]["line"] == 9
    assert rejects["missing_user_id"]["file"].endswith("landing of files/day.csv")
    assert rejects["missing_user_id"]["run_day"] is None

    names = {row["item_index"]: row["item_id"] for row in shop.rows(ITEMS)}
    assert [names[i] for i in range(1, 5)] == ["1", "007", "x, y", "2"]  # by first_seen_ts
    sequences = {row["user_id"]: row for row in shop.rows(SEQUENCES)}
    assert sequences["bob"]["session_ordinal"] == [1, 2]
    assert [names[i] for i in sequences["bob"]["item_index"]] == ["1", "2"]
    assert sequences["bob"]["feedback"] == ["positive"] * 2
    assert sequences["bob"]["exposed_items"] == [[], []]

    # A second night only adds; a file that comes again, or grew, brings only what is new.
    before = {row["session_id"]: row for row in shop.rows(SESSIONS)}
    shop.land("day-again.csv", (shop.landing / "day.csv").read_bytes())
    shop.land("night.csv", "user,item,ts\n" + line("ann", 3, 90_000) + line("bob", 9, 1802))
    second = shop.run(day="2023-11-15")
    assert (second.read, second.events_new, second.duplicates) == (13, 2, 7)
    assert (second.sessions_new, second.sessions_changed, second.sessions_retired) == (1, 1, 0)
    after = {row["session_id"]: row for row in shop.rows(SESSIONS)}
    assert set(before) < set(after)
    assert {
        i: n for n, i in ((r["item_id"], r["item_index"]) for r in shop.rows(ITEMS))
    }.items() >= (names.items())

    # And a run that finds nothing new writes no version.
    tables = (EVENTS, REJECTS, SESSIONS, ITEMS, SEQUENCES)
    versions = [shop.version(table) for table in tables]
    third = shop.run()
    assert third.read == 0 and [shop.version(table) for table in tables] == versions

    outcomes = [(row["job"], row["outcome"]) for row in shop.rows(RUNS)]
    assert outcomes == [("run", "ok")] * 3


@pytest.mark.slow
def test_late_lines_are_rejects_until_a_run_without_a_day(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("a.csv", "user,item,ts\n" + line("u", 1, 0) + line("u", 2, -40 * 86_400))
    night = shop.run("ingest", day="2023-11-14")
    assert (night.read, night.events_new, night.rejects) == (2, 1, {"late": 1})
    assert [row["raw"] for row in shop.rows(REJECTS)] == [line("u", 2, -40 * 86_400).strip()]
    assert str(shop.rows(REJECTS)[0]["run_day"]) == "2023-11-14"
    shop.land("b.csv", (shop.landing / "a.csv").read_bytes())
    (shop.landing / "a.csv").touch()
    history = shop.run("ingest")
    assert (history.read, history.events_new, history.duplicates) == (4, 1, 3)
    assert shop.rows(REJECTS) == []  # the line is an event now


def test_a_run_says_what_looks_wrong(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = 'unit = "ms"\nany_year = true'
    toml = CLICKS.replace('unit = "s"', unit) + '[quality]\non_exceed = "warn"\n'
    shop = Workshop(spark, tmp_path, toml)
    shop.land("1.csv", "user,item,ts\n" + line("u", 1, 0) + line("u", 2, 61))
    [note] = shop.run("ingest").notes
    assert "between 1970-01-" in note and "time.unit = 'ms'" in note
    shop.land("2.csv", "user,item,ts\nu,1,yesterday\nu,2,later\n")
    assert shop.run("ingest").rejects == {"bad_event_ts": 2}
    said = capsys.readouterr().out
    assert "2 of 2 lines cannot be used (100.0%; 2 bad_event_ts)" in said
    assert "line 2 of" in said and "'u,1,yesterday'" in said and "replay-rejects" in said
    [note] = shop.run("ingest").notes
    assert "bronze.rejects has 2 lines" in note and "replay-rejects --source clicks" in note
    for file in shop.landing.iterdir():
        file.unlink()
    assert "matches no file this time" in shop.run("ingest").notes[0]


@pytest.mark.long
def test_what_stops_a_run_before_it_writes(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, CLICKS + "[quality]\nmax_reject_share = 0.4\non_exceed='fail'")
    with pytest.raises(SourceError, match="matches no file"):
        shop.run("ingest")
    shop.land("1.csv", "user,item,ts\n" + line("u", 1, 0) + line("u", 2, 61))
    shop.run()
    tables = (EVENTS, SESSIONS, SEQUENCES)
    versions = [shop.version(table) for table in tables]

    shop.land("3.csv", "user,ts\n1,2\n")
    with pytest.raises(SchemaError, match=r"3\.csv has no column 'item'.*columns\.item_id"):
        shop.run()
    shop.land("3.csv", "user,item,ts\n" + line("u", 1, 1) + line("", 1, 2))
    with pytest.raises(RejectShareError, match=r"1 of 2 lines .*50.0%.*max_reject_share = 0.4"):
        shop.run()
    assert [shop.version(table) for table in tables] == versions
    assert [row["reason"] for row in shop.rows(REJECTS)] == ["missing_user_id"]

    shop.describe(CLICKS + "[sessions]\ngap_s = 60")
    with pytest.raises(RuleChanged, match="--rebuild"):
        shop.run("sessionize")
    before = shop.version(SESSIONS)
    rebuilt = shop.run("sessionize", options={"rebuild": True})
    assert rebuilt.tables[SESSIONS.full_name] == {
        "path": shop.lake.path(SESSIONS), "version": before + 1, "rows": 2,
    }  # fmt: skip
    assert rebuilt.sessions_new == 1 and rebuilt.sessions_changed == 1  # one commit, and no more
    shop.land("3.csv", "user,item,ts\n" + line("u", 1, 120))
    shop.run("ingest")
    rebuilt = shop.run("sessionize", options={"rebuild": True})  # with more events, too
    assert (rebuilt.sessions_new, rebuilt.sessions_changed) == (0, 1)
    assert shop.run("sessionize").tables[SESSIONS.full_name]["version"] == before + 2


@pytest.mark.slow
def test_native_ids_web_logs_json_and_exposures(spark: Any, tmp_path: Path) -> None:
    toml = """
[source]
name = "hotels"
landing = "{landing}/*/*.jsonl.gz"
format = "jsonl"
[columns]
user_id = "user"
item_id = "ref"
event_ts = "at"
event_type = "what"
event_id = "id"
exposed_with = "shown"
value = "price"
[time]
unit = "iso8601"
zone = "Europe/Paris"
[feedback]
positive = ["click"]
negative = ["value < 0"]
"""
    import gzip
    import json

    shop = Workshop(spark, tmp_path, toml)
    rows = [
        {"id": "e2", "user": 1, "ref": "h1", "at": "2024-01-01T10:00:00", "what": "click",
         "shown": "h1|h2|h3", "price": 10},
        {"id": "e1", "user": 1, "ref": "h4", "at": "2024-01-01T09:00:00Z", "what": "view",
         "price": "-1.5"},
        {"id": "e1", "user": 1, "ref": "h4", "at": "2024-01-01T09:00:00Z", "what": "view",
         "price": "cheap"},
        {"user": 1, "ref": "h4", "at": "2024-01-01T09:00:00Z", "what": "view"},
    ]  # fmt: skip
    shop.land("x/a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    result = shop.run()
    assert result.rejects == {"bad_value": 1, "missing_event_id": 1}
    events = {row["event_id"]: row for row in shop.rows(EVENTS)}
    assert (events["e1"]["feedback"], events["e2"]["feedback"]) == ("negative", "positive")
    assert events["e1"]["event_ts"] == events["e2"]["event_ts"]  # 10:00 in Paris is 09:00 UTC
    (sequence,) = shop.rows(SEQUENCES)
    names = {row["item_index"]: row["item_id"] for row in shop.rows(ITEMS)}
    assert [names[i] for i in sequence["item_index"]] == ["h4", "h1"]  # equal times: by id
    assert [[names[i] for i in shown] for shown in sequence["exposed_items"]] == [
        [], ["h1", "h2", "h3"],
    ]  # fmt: skip
    counts = {row["item_id"]: row["event_count"] for row in shop.rows(ITEMS)}
    assert counts == {"h1": 1, "h2": 0, "h3": 0, "h4": 1}

    # The same id again, earlier: the smallest line survives, whenever it arrives.
    rows = [{**rows[0], "at": "2024-01-01T09:59:00", "ref": "h9"},
            {**rows[1], "at": "2024-01-02T09:59:00", "ref": "h8"}]  # fmt: skip
    shop.land("y/b.jsonl.gz", gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    second = shop.run()
    assert (second.events_new, second.duplicates, second.events_replaced) == (0, 2, 1)
    (sequence,) = shop.rows(SEQUENCES)
    names = {row["item_index"]: row["item_id"] for row in shop.rows(ITEMS)}
    assert [names[i] for i in sequence["item_index"]] == ["h9", "h4"]
    assert {r["item_id"]: r["event_count"] for r in shop.rows(ITEMS)}["h1"] == 0


@pytest.mark.slow
def test_parquet_and_web_logs_end_to_end(spark: Any, tmp_path: Path) -> None:
    """The two formats whose facts come from the file itself: zones, types, numbered rows."""
    import datetime as dt

    import pyarrow as pa
    import pyarrow.parquet as pq

    shop = Workshop(spark, tmp_path, CLICKS.replace("csv", "parquet").replace('unit = "s"', ""))
    at = [dt.datetime.fromtimestamp(T + second, dt.UTC) for second in (0, 60, 60, 4000)]
    pq.write_table(
        pa.table({
            "user": pa.array([-(2**63), -(2**63), -(2**63), 2**63 - 1], pa.int64()),
            "item": pa.array(["a,b", 'c"d', 'c"d', None]),
            "ts": pa.array(at, pa.timestamp("us", "UTC")),
        }),
        shop.landing / "day.parquet",
    )  # fmt: skip
    result = shop.run()
    assert (result.read, result.events_new, result.duplicates) == (4, 2, 1)
    assert result.rejects == {"missing_item_id": 1}
    (session,) = shop.rows(SESSIONS)
    assert session["user_id"] == str(-(2**63))
    assert [event["item_id"] for event in session["events"]] == ["a,b", 'c"d']
    (reject,) = shop.rows(REJECTS)
    moment = at[3].strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert reject["line"] == 4
    assert json.loads(reject["raw"]) == {"user": str(2**63 - 1), "ts": moment}
    assert shop.run().read == 0

    web = Workshop(
        spark, tmp_path / "web", """
[source]
name = "web"
landing = "{landing}/access.log*"
format = "combined_log"
[columns]
user_id = "host"
item_id = "path"
event_ts = "time"
"""
    )  # fmt: skip
    entry = '10.0.0.1 - - [14/Nov/2023:22:13:{:02d} +0100] "GET {} HTTP/1.1" 200 5 "-" "curl"\n'
    web.land("access.log", entry.format(20, "/a") + entry.format(50, "/b?q=1") + "not a line\n")
    result = web.run()
    assert (result.events_new, result.rejects) == (2, {"unparsable": 1})
    (session,) = web.rows(SESSIONS)
    assert [event["item_id"] for event in session["events"]] == ["/a", "/b?q=1"]
    assert session["start_ts"] == dt.datetime(2023, 11, 14, 21, 13, 20, tzinfo=dt.UTC)
