"""Expressions, `keep` and `[bots]` from landing to tables: nights, replays, filters that come later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import RejectShareError, SchemaError, SourceError
from jobs.core.plan import Thresholds
from jobs.core.tables import EVENTS, FILTERED, FLAGS, REJECTS, RUNS, SESSIONS
from jobs.forget.forget import forget
from tests.jobs.forget.test_forget import key
from tests.support.spark_tools import Workshop

assert key is not None  # (the fixture)

WEB = """
[source]
name = "web"
landing = "{landing}/*.log"
format = "combined_log"
keep = "method = 'GET' AND status BETWEEN 200 AND 299"
keep_filtered = true

[columns]
user_id = "host"
item_id = { sql = "regexp_extract(path, '^/product/([0-9]+)', 1)" }
event_ts = "time"

[bots]
user_agent = "user_agent"
patterns = ["^shop-monitor"]

[quality]
max_reject_share = 0.9
"""
BOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"


def line(second: int, request: str, status: int = 200, agent: str | None = "Firefox") -> str:
    head = f'10.0.0.{second % 3} - - [10/Oct/2023:13:00:{second:02d} +0000] "{request}" {status} 5'
    return head + (f' "-" "{agent}"' if agent else "")


LOG = [
    line(1, "GET /product/17?from=mail HTTP/1.1"),
    line(2, "GET /product/17?from=mail HTTP/1.1", 404),
    line(3, "POST /product/18 HTTP/1.1"),
    line(4, "GET /logo.png HTTP/1.1"),  # no product: a reject
    line(5, "GET /product/19 HTTP/1.1", agent=BOT),
    line(6, "GET /product/20 HTTP/1.1", agent="shop-monitor/1.0"),
    line(7, "GET /product/21 HTTP/1.1", agent=None),  # no user agent says nothing
    line(8, "GET /product/17?from=ad HTTP/1.1"),
    "no line of a log",
]


def items(shop: Workshop) -> list[str]:
    return sorted(row["item_id"] for row in shop.rows(EVENTS))


def aside(shop: Workshop) -> list[tuple[int, str]]:
    return sorted((row["line"], row["reason"]) for row in shop.rows(FILTERED))


def told(shop: Workshop) -> dict[str, int]:
    """The counts of the newest run."""
    run = max(shop.rows(RUNS), key=lambda row: row["started_ts"])
    return dict(run["counts"])


@pytest.mark.slow
def test_a_web_log_becomes_products_that_people_saw(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WEB)
    shop.land("a.log", "\n".join(LOG) + "\n")
    result = shop.run()
    assert items(shop) == ["17", "17", "21"]
    assert result.filtered == {"keep": 2, "bot": 2}
    assert result.rejects == {"missing_item_id": 1, "unparsable": 1}
    assert result.read == 9 == result.events_new + result.duplicates + 2 + 4
    assert aside(shop) == [(2, "keep"), (3, "keep"), (5, "bot"), (6, "bot")]
    assert [row["raw"] for row in shop.rows(FILTERED) if row["line"] == 2] == [LOG[1]]
    counts = told(shop)
    assert (counts["filtered"], counts["filtered_keep"], counts["filtered_bot"]) == (4, 2, 2)
    [run] = shop.rows(RUNS)
    assert dict(run["plans"])["bots"].startswith("crawler-user-agents 1.")
    # Read again, it is known: nothing stands twice.
    shop.land("a.log", "\n".join([*LOG, line(9, "GET /product/30 HTTP/1.1", 500)]) + "\n")
    again = shop.run()
    assert (again.events_new, again.duplicates, again.filtered) == (0, 3, {"keep": 3, "bot": 2})
    assert len(aside(shop)) == 5 and len(shop.rows(REJECTS)) == 2


@pytest.mark.slow
def test_lines_that_were_left_out_come_back(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path / "late", WEB)
    shop.land("a.log", "\n".join(LOG) + "\n")
    shop.run("ingest", day="2023-10-11")
    mended = WEB.replace("method = 'GET' AND ", "").replace('patterns = ["^shop-monitor"]', "")
    shop.describe(mended)
    result = shop.run("replay-filtered")
    assert (result.read, result.events_new, result.filtered) == (4, 2, {"keep": 1, "bot": 1})
    assert items(shop) == ["17", "17", "18", "20", "21"]
    assert aside(shop) == [(2, "keep"), (5, "bot")]
    # As if they had been good the first time.
    calm = Workshop(spark, tmp_path / "calm", mended)
    calm.land("a.log", "\n".join(LOG) + "\n")
    calm.run("ingest", day="2023-10-11")
    here = ("ingest_file", "ingest_ts", "first_seen_ts", "file")
    for table in (EVENTS, REJECTS, FILTERED):
        assert shop.rows(table, drop=here) == calm.rows(table, drop=here)
    # What is left out no more and cannot be used is a reject; a reject may be left out.
    shop.describe(
        mended.replace("'^/product/", "'^/products/").replace(
            "status BETWEEN", "bytes < 9 OR status BETWEEN"
        )
    )
    result = shop.run("replay-filtered")
    assert (result.events_new, result.rejects) == (0, {"missing_item_id": 1})
    assert aside(shop) == [(5, "bot")]
    assert sorted(row["line"] for row in shop.rows(REJECTS)) == [2, 4, 9]
    shop.describe(mended.replace('keep = "', "keep = \"path NOT LIKE '%.png' AND "))
    result = shop.run("replay-rejects")
    assert (result.events_new, result.filtered) == (0, {"keep": 2})
    assert aside(shop) == [(2, "keep"), (4, "keep"), (5, "bot")]
    assert [row["line"] for row in shop.rows(REJECTS)] == [9]


@pytest.mark.slow
def test_a_filter_that_is_added_holds_from_then_on_and_a_reload_applies_it_to_all(
    spark: Any, tmp_path: Path
) -> None:
    plain = WEB.replace('keep = "method', '# keep = "method').replace("keep_filtered = true", "")
    plain = plain[: plain.index("[bots]")] + plain[plain.index("[quality]") :]
    shop = Workshop(spark, tmp_path / "late", plain)
    shop.land("gone.log", line(50, "GET /product/99 HTTP/1.1", 500) + "\n")
    shop.land("a.log", "\n".join(LOG) + "\n")
    assert shop.run().filtered == {}
    assert items(shop) == ["17", "17", "17", "18", "19", "20", "21", "99"]
    (shop.landing / "gone.log").unlink()
    shop.describe(WEB)
    assert not any("are new" in one for one in shop.run().notes)  # nothing was read
    shop.land("b.log", line(20, "GET /product/40 HTTP/1.1", 301) + "\n")
    result = shop.run()
    assert (result.read, result.filtered, result.events_removed) == (1, {"keep": 1}, 0)
    [note] = [one for one in result.notes if "--reload" in one and "keep and [bots] are new" in one]
    assert "python -m jobs run --source web --reload" in note
    shop.land("c.log", line(21, "GET /product/41 HTTP/1.1") + "\n")
    assert not any("are new" in one for one in shop.run().notes)  # it is said once
    assert len(shop.rows(EVENTS)) == 9
    result = shop.run(options={"reload": True})
    assert (result.events_removed, result.events_new) == (4, 0)
    assert any(
        "1 events are of files that are no longer in the landing" in one for one in result.notes
    )
    assert items(shop) == ["17", "17", "21", "41", "99"]
    assert aside(shop) == [(1, "keep"), (2, "keep"), (3, "keep"), (5, "bot"), (6, "bot")]
    seen = [event["item_id"] for row in shop.rows(SESSIONS) for event in row["events"]]
    assert sorted(seen) == items(shop)
    again = shop.run(options={"reload": True})
    assert (again.events_removed, again.events_new) == (0, 0)
    # Taken away again: a reload brings all of them back.
    shop.describe(plain)
    back = shop.run(options={"reload": True})
    assert items(shop) == ["17", "17", "17", "18", "19", "20", "21", "40", "41", "99"]
    assert (back.events_new, back.filtered, shop.rows(FILTERED)) == (5, {}, [])


SHOP = """
[source]
name = "flags"
landing = "{landing}/*.csv"
format = "csv"
types = { price = "double" }

[columns]
user_id = { sql = "coalesce(user_id, anonymous_id)" }
item_id = "item"
event_ts = { sql = "strptime(day || ' ' || clock, '%Y-%m-%d %H:%M:%S')" }
event_type = { sql = "CASE WHEN is_buy = '1' THEN 'buy' WHEN is_cart = '1' THEN 'cart' ELSE 'view' END" }
value = { sql = "price * CAST(number AS INTEGER)" }

[time]
zone = "Europe/Paris"

[quality]
on_exceed = "warn"
"""
HEAD = "user_id,anonymous_id,item,day,clock,is_cart,is_buy,price,number\n"
ROWS = [
    "ann,a1,i1,2024-07-01,10:00:00,0,0,1.5,2\n",
    ",a1,i2,2024-07-01,10:01:00,1,0,,1\n",
    "NULL,a1,i3,2024-07-01,10:02:00,1,1,2.5,1\n",
    ",,i4,2024-07-01,10:03:00,0,0,1,1\n",
    "ann,a1,i5,2024-07-01,never,0,0,1,1\n",
    "ann,a1,i6,2024-07-01,10:05:00,0,0,1,two\n",
    "ann,a1,i7,2024-07-01,10:06:00,0,0,1 EUR,1\n",
]


@pytest.mark.long
def test_a_line_that_an_expression_fails_on_is_rejected_alone(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, SHOP)
    shop.land("a.csv", HEAD + "".join(ROWS))
    result = shop.run("ingest")
    found = {
        row["item_id"]: (
            row["user_id"],
            row["event_type"],
            row["value"],
            f"{row['event_ts']:%H:%M}",
        )
        for row in shop.rows(EVENTS)
    }
    assert found == {
        "i1": ("ann", "view", 3.0, "08:00"), "i2": ("a1", "cart", None, "08:01"),
        "i3": ("a1", "buy", 2.5, "08:02"),
    }  # fmt: skip
    assert {row["line"]: row["reason"] for row in shop.rows(REJECTS)} == {
        5: "missing_user_id", 6: "bad_event_ts", 7: "bad_value", 8: "bad_value",
    }  # fmt: skip
    assert result.read == 7
    mended = SHOP.replace("CAST(number AS INTEGER)", "coalesce(TRY_CAST(number AS INTEGER), 2)")
    shop.describe(mended)
    again = shop.run("replay-rejects")
    assert (again.events_new, again.rejects) == (
        1,
        {"missing_user_id": 1, "bad_event_ts": 1, "bad_value": 1},
    )
    # The night by the mended file says the same, and so does another order of arrival.
    nights = Workshop(spark, tmp_path / "nights", mended)
    for number, row in enumerate(reversed(ROWS)):
        nights.land(f"{number}.csv", HEAD + row)
        nights.run("ingest")
    here = ("ingest_file", "ingest_ts")
    assert nights.rows(EVENTS, drop=here) == shop.rows(EVENTS, drop=here)


@pytest.mark.slow
def test_an_event_is_the_same_by_a_column_and_by_an_expression(spark: Any, tmp_path: Path) -> None:
    text = HEAD + ROWS[0]
    shop = Workshop(spark, tmp_path, SHOP)
    shop.land("a.csv", text)
    shop.run("ingest")
    [before] = shop.rows(EVENTS)
    shop.describe(SHOP.replace('item_id = "item"', """item_id = { sql = "trim(item || ' ')" }"""))
    shop.land("b.csv", text)
    result = shop.run("ingest")
    assert (result.events_new, result.duplicates) == (0, 1)
    assert shop.rows(EVENTS) == [before]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{ price =", "{ prise =", r"source\.types names 'prise'.*did you mean 'price'"),
        ("coalesce(user_id,", "coalesce(userid,", r"columns\.user_id\.sql = .*character 10 .*no column 'userid': did you mean 'user_id'"),
        ("price * CAST(number AS INTEGER)", "number * 2", r"columns\.value\.sql .*number.*types = \{ number = "),
        ("coalesce(user_id, anonymous_id)", "price", r"columns\.user_id\.sql .*it gives DOUBLE.*floating point"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_before_spark_starts(
    spark: Any, tmp_path: Path, old: str, new: str, says: str
) -> None:
    shop = Workshop(spark, tmp_path, SHOP.replace(old, new))
    shop.land("a.csv", HEAD + ROWS[0])
    context = shop.context()
    context.lake._start = lambda: pytest.fail("Spark was started")
    from jobs.bronze import ingest

    with pytest.raises((SchemaError, SourceError), match=says):
        ingest.compute(context)


@pytest.mark.slow
def test_a_run_that_filters_leave_nothing_usable_of_fails(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WEB)
    shop.land("a.log", "\n".join([LOG[1], LOG[3]]) + "\n")
    with pytest.raises(
        RejectShareError, match=r"1 of 1 lines cannot be used.*\n.*\n.*columns\.item_id"
    ):
        shop.run("ingest")
    shop.land("a.log", LOG[1] + "\n")
    result = shop.run("ingest")
    assert result.filtered == {"keep": 1}
    assert any("left out all 1 lines" in note for note in result.notes)


@pytest.mark.long
def test_events_of_bots_can_be_flagged(spark: Any, tmp_path: Path, key: None) -> None:
    toml = WEB.replace("keep_filtered = true", "").replace("[bots]", '[bots]\npolicy = "flag"')
    shop = Workshop(spark, tmp_path, toml)
    shop.land("a.log", "\n".join(LOG) + "\n")
    result = shop.run("ingest")
    assert (result.events_new, result.filtered) == (5, {"keep": 2})
    assert any("2 more events are flagged" in note for note in result.notes)
    flagged = {row["event_id"]: row["flag"] for row in shop.rows(FLAGS)}
    items_of = {row["event_id"]: row["item_id"] for row in shop.rows(EVENTS)}
    assert {items_of[one]: flag for one, flag in flagged.items()} == {"19": "bot", "20": "bot"}
    shop.land("a.log", "\n".join([*LOG, line(9, "GET /product/40 HTTP/1.1", agent=BOT)]) + "\n")
    shop.run("ingest")
    assert len(shop.rows(FLAGS)) == 3
    done = forget(shop.context(), "10.0.0.2")  # who made the event of line 5
    assert (done["events"], len(shop.rows(FLAGS))) == (2, 2)
    assert {row["event_id"] for row in shop.rows(FLAGS)} < {
        row["event_id"] for row in shop.rows(EVENTS)
    }


@pytest.mark.slow
def test_many_lines_go_the_same_way(spark: Any, tmp_path: Path) -> None:
    """(Compiled plans, a first load by slices of time.)"""
    shop = Workshop(spark, tmp_path, WEB, Thresholds(short_jobs=False))
    shop.land("a.log", "\n".join(LOG) + "\n")
    result = shop.run("ingest")
    assert (result.events_new, result.filtered) == (3, {"keep": 2, "bot": 2})
    assert aside(shop) == [(2, "keep"), (3, "keep"), (5, "bot"), (6, "bot")]
