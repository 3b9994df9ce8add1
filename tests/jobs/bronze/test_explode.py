"""Lines with many events, from landing to tables: nights, rejects, replays, order of arrival."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.core.errors import SchemaError
from jobs.core.tables import EVENTS, FILES, REJECTS, SESSIONS
from tests.jobs.records.test_explode import EVENT, GA4, ga4_table
from tests.support.spark_tools import Workshop

OTTO = """
[source]
name = "otto"
landing = "{landing}/*.jsonl"
format = "jsonl"
explode = "events"

[columns]
user_id = "session"
item_id = "aid"
event_ts = "ts"
event_type = "type"

[time]
unit = "ms"

[quality]
on_exceed = "warn"
"""
T = 1_661_724_000_000


def click(aid: Any, second: int, kind: str = "clicks") -> dict[str, Any]:
    return {"aid": aid, "ts": T + 1000 * second, "type": kind}


LINES = [
    {"session": 1, "events": [click(36, 0), click(7, 1), click(36, 0), click(36, 2, "carts")]},
    {"session": 2, "events": [click(None, 3), {"aid": 5, "ts": "soon", "type": "x"}, click(5, 4)]},
    {"session": 3, "events": []},
    {"session": 4, "events": 7},
]


def text(lines: list[Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def rejects(shop: Workshop) -> set[tuple[int, int | None, str]]:
    return {(row["line"], row["element"], row["reason"]) for row in shop.rows(REJECTS)}


@pytest.mark.slow
def test_sessions_with_their_events_in_a_list(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path / "late", OTTO)
    shop.land("a.jsonl", text(LINES))
    result = shop.run()
    # Two elements of one line that agree in every mapped column are one event.
    assert (result.read, result.events_new, result.duplicates) == (8, 4, 1)
    assert rejects(shop) == {
        (2, 1, "missing_item_id"), (2, 2, "bad_event_ts"), (4, None, "unparsable"),
    }  # fmt: skip
    assert {row["raw"] for row in shop.rows(REJECTS) if row["line"] == 2} == {json.dumps(LINES[1])}
    assert len({row["raw_hash"] for row in shop.rows(REJECTS)}) == 3
    assert any(
        "1 lines have no element in source.explode = 'events'" in one for one in result.notes
    )
    assert [row["lines"] for row in shop.rows(FILES)] == [8]
    assert [row["event_count"] for row in shop.rows(SESSIONS)].count(3) == 1
    # The file grows: what is known is known.
    shop.land("a.jsonl", text([*LINES, {"session": 1, "events": [click(36, 0), click(8, 9)]}]))
    again = shop.run("ingest")
    assert (again.read, again.events_new, again.duplicates) == (10, 1, 6)
    assert len(rejects(shop)) == 3
    # Mended, single elements of a line come back.
    mended = OTTO.replace('"aid"', """{ sql = "coalesce(aid, 'no item')" }""")
    shop.describe(mended)
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (3, 1)
    assert rejects(shop) == {(2, 2, "bad_event_ts"), (4, None, "unparsable")}
    calm = Workshop(spark, tmp_path / "calm", mended)
    for number, line in enumerate([{"session": 1, "events": [click(8, 9)]}, *reversed(LINES)]):
        calm.land(f"{number}.jsonl", text([line]))
        calm.run("ingest")
    here = ("ingest_file", "ingest_ts")
    assert shop.rows(EVENTS, drop=here) == calm.rows(EVENTS, drop=here)


@pytest.mark.slow
def test_a_list_that_no_line_has_stops_the_run(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, OTTO.replace('"events"', '"event"'))
    shop.land("a.jsonl", text(LINES))
    says = (
        r"no line that was read has the column 'event' \(source\.explode\)\. Did you mean 'events'"
    )
    with pytest.raises(SchemaError, match=says):
        shop.run("ingest")


@pytest.mark.slow
def test_a_mapped_position_makes_equal_elements_two_events(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, OTTO.replace('"type"', '"type"\ntie_break = "_position"'))
    shop.land("a.jsonl", text(LINES[:1]))
    assert shop.run("ingest").events_new == 4
    places = {(row["item_id"], row["tie_break"]) for row in shop.rows(EVENTS)}
    assert places == {("36", 1), ("7", 2), ("36", 3), ("36", 4)}


@pytest.mark.slow
def test_lines_that_were_rejected_before_they_were_exploded_come_back(
    spark: Any, tmp_path: Path
) -> None:
    shop = Workshop(spark, tmp_path, OTTO.replace('explode = "events"', ""))
    good = json.dumps({"session": 9, **click(1, 1)}) + "\n"
    shop.land("a.jsonl", good + text(LINES[:2]))
    result = shop.run("ingest")
    assert result.rejects == {"missing_item_id": 2}
    assert any("with source.explode = 'events' each of" in one for one in warned(shop, result))
    shop.describe(OTTO)
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new, replayed.duplicates) == (7, 4, 1)
    # The first line has elements that cannot be used: it stays, whole.
    assert rejects(shop) == {(3, None, "missing_item_id")}
    again = shop.run("replay-rejects")
    assert (again.events_new, again.duplicates, again.rejects) == (
        0, 1, {"missing_item_id": 1, "bad_event_ts": 1},
    )  # fmt: skip


def warned(shop: Workshop, result: Any) -> list[str]:
    """What a run said of its rejects."""
    from jobs.bronze import landing, quality
    from jobs.records.file_format import file_format

    fmt = file_format(shop.source)
    rows = [
        {**row, "file_columns": None}
        for row in shop.rows(REJECTS)
        if row["reason"] == "missing_item_id"
    ]
    facts = {row["file"]: landing.FileFacts(row["file"]) for row in rows}
    assert fmt.computing is None
    return list(quality.remedies(shop.context(), {"missing_item_id": rows}, facts))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_export_of_google_analytics(spark: Any, tmp_path: Path, form: str) -> None:
    toml = OTTO[: OTTO.index("[columns]")].replace("jsonl", form).replace('"events"', '"items"')
    toml += f'[columns]\n{GA4}\n[time]\nunit = "us"\n[quality]\non_exceed = "warn"\n'
    shop = Workshop(spark, tmp_path, toml.replace("exposed_with", "# exposed_with"))
    if form == "parquet":
        table = ga4_table()
        late = table.slice(0, 1).set_column(0, "event_timestamp", pa.array(["soon"]))
        pq.write_table(pa.concat_tables([table, late]), shop.landing / "a.parquet")
    else:
        lines = [
            EVENT,
            EVENT | {"items": []},
            EVENT | {"items": None},
            EVENT | {"event_timestamp": "soon"},
        ]
        shop.land("a.jsonl", text(lines))
    result = shop.run()
    assert (result.read, result.events_new, result.rejects) == (4, 2, {"bad_event_ts": 2})
    found = {
        (row["user_id"], row["item_id"], row["source_session_id"], row["event_type"])
        for row in shop.rows(EVENTS)
    }
    assert found == {("0.1", "S1", "17", "red"), ("0.1", "S2", "17", None)}
    assert rejects(shop) == {(4, 1, "bad_event_ts"), (4, 2, "bad_event_ts")}
    mended = toml.replace("exposed_with", "# exposed_with").replace(
        '"event_timestamp"', """{ sql = "replace(event_timestamp, 'soon', '1717200000000001')" }"""
    )
    shop.describe(mended)
    replayed = shop.run("replay-rejects")
    assert (replayed.events_new, replayed.rejects, shop.rows(REJECTS)) == (2, {}, [])


MIND = """
[source]
name = "mind"
landing = "{landing}/*.tsv"
format = "csv"
delimiter = "\\t"
header = false
explode = "_4"
explode_separator = " "
explode_pattern = "(?P<item>N[0-9]+)-(?P<clicked>[01])"

[columns]
user_id = "_1"
item_id = "item"
event_ts = "_2"
event_type = { sql = "CASE clicked WHEN '1' THEN 'click' ELSE 'shown' END" }

[time]
unit = "M/d/yyyy h:mm:ss a"

[feedback]
exposed = ["shown"]
"""


@pytest.mark.slow
def test_impressions_in_one_text(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, MIND)
    shop.land(
        "b.tsv",
        "1\tU1\t11/11/2019 9:05:58 AM\tN5 N6\tN1-0 N2-1 N3\n2\tU2\t11/12/2019 6:11:30 PM\t\tN1-1\n",
    )
    result = shop.run("ingest")
    assert (result.read, result.events_new, result.rejects) == (4, 3, {"unparsable": 1})
    assert {(row["user_id"], row["item_id"], row["feedback"]) for row in shop.rows(EVENTS)} == {
        ("U1", "N1", "exposed"), ("U1", "N2", "positive"), ("U2", "N1", "positive"),
    }  # fmt: skip
    assert rejects(shop) == {(1, 3, "unparsable")}
