"""docs/formats: each ready source file, on a small file in its format that is made here."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.core.source_file import load_source
from jobs.reading.readers import read_file
from jobs.reading.typed_events import typed_events
from jobs.records.file_format import file_format
from jobs.records.records import RECORD_SCHEMA, FileFacts

FORMATS = Path(__file__).parents[3] / "docs" / "formats"
AT = datetime(2024, 6, 1, 10, tzinfo=UTC)
MS = 1_717_236_000_000
HIT = '[01/Jun/2024:12:00:00 +0200] "{} {} HTTP/1.1" 200 5 "-" "x \\"y\\""\n'
SNOWPLOW = {3: "2024-06-01 10:00:00.000", 5: "page_view", 6: "e1", 15: "u1", 35: "/p/1", 30: 'a "page',
            123: "s1"}  # fmt: skip
TRACK = {
    "anonymousId": "u1", "userId": None, "type": "track", "event": "Product Added", "messageId": "e1",
    "properties": {"product_id": "p1", "price": 2.5}, "timestamp": "2024-06-01T10:00:00.000Z",
    "originalTimestamp": "2024-06-01T10:00:05.000Z",
}  # fmt: skip
PAGE = {**TRACK, "type": "page", "messageId": "e2", "event": None, "properties": {"path": "/"}}

Row = tuple[Any, ...]
"""User, item, seconds after `AT`, event type, session, value, event id."""


def rows_of(*rows: Row) -> list[Row]:
    return [(*row, *[None] * (7 - len(row))) for row in rows]


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CASES: dict[str, tuple[str, list[Row], dict[str, int]]] = {
    "retailrocket": (
        f"timestamp,visitorid,event,itemid,transactionid\n{MS},257597,view,355908,\n"
        f"{MS + 1000},257597,transaction,356475,4000\n",
        rows_of(("257597", "355908", 0, "view"), ("257597", "356475", 1, "transaction")), {},
    ),
    "yoochoose": (
        "1,2024-06-01T10:00:00.000Z,214536502,0\n1,2024-06-01T10:00:02.500Z,214536500,S\n",
        rows_of(("1", "214536502", 0, None, "1"), ("1", "214536500", 2.5, None, "1")), {},
    ),
    "diginetica": (
        "sessionId;userId;itemId;timeframe;eventdate\n1;NA;81766;36000000;2024-06-01\n"
        "1;NA;31331;36004250;2024-06-01\n",
        rows_of(("1", "81766", 0, None, "1"), ("1", "31331", 4.25, None, "1")), {},
    ),
    "rees46": (
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n"
        "2024-06-01 10:00:00 UTC,view,44600062,2103807459595387724,,shiseido,35.79,541312140,72d76fde\n"
        "2024-06-01 10:00:00 UTC,cart,44600062,2103807459595387724,,shiseido,35.79,541312140,72d76fde\n",
        rows_of(("541312140", "44600062", 0, "view", "72d76fde", 35.79),
                ("541312140", "44600062", 0, "cart", "72d76fde", 35.79)), {},
    ),
    "kuairand": (
        f"user_id,video_id,date,hourmin,time_ms,is_click,is_like\n0,7,20240601,1000,{MS},1,0\n"
        f"0,8,20240601,1000,{MS + 5},0,0\n",
        rows_of(("0", "7", 0, None, None, 1.0), ("0", "8", 0.005, None, None, 0.0)), {},
    ),
    "amazon-reviews": (
        jsonl({"rating": 5.0, "title": 'a "', "asin": "B0A", "parent_asin": "B0P", "images": [],
               "user_id": "AE1", "timestamp": MS, "verified_purchase": True}),
        rows_of(("AE1", "B0P", 0, None, None, 5.0)), {},
    ),
    "lastfm-1k": (
        'user_1\t2024-06-01T10:00:00Z\ta1\t"Weird Al\tt1\t"Eat It\n'
        "user_1\t2024-06-01T10:00:03Z\ta2\tSomebody\t\tno id\n"
        'user_1\t2024-06-01T10:00:04Z\ta3\tAnother\tt3\tLast"\n',
        rows_of(("user_1", "t1", 0), ("user_1", "t3", 4)), {"missing_item_id": 1},
    ),
    "movielens": (
        f"userId,movieId,rating,timestamp\n1,296,5.0,{MS // 1000}\n1,306,3.5,{MS // 1000}\n",
        rows_of(("1", "296", 0, None, None, 5.0), ("1", "306", 0, None, None, 3.5)), {},
    ),
    "movielens-1m": (
        f"1::1193::5::{MS // 1000}\n1::661::3::{MS // 1000 + 1}\n",
        rows_of(("1", "1193", 0, None, None, 5.0), ("1", "661", 1, None, None, 3.0)), {},
    ),
    "gowalla": (
        "0\t2024-06-01T10:00:00Z\t30.23\t-97.79\t22847\n0\t2024-06-01T10:00:09Z\t30.2\t-97.7\t420315\n",
        rows_of(("0", "22847", 0), ("0", "420315", 9)), {},
    ),
    "combined": (
        "203.0.113.1 - - " + HIT.format("GET", "/p/1") + "2001:db8::1 - ann " + HIT.format("POST", "/b"),
        rows_of(("203.0.113.1", "/p/1", 0, "GET"), ("2001:db8::1", "/b", 0, "POST")), {},
    ),
    "vhost_combined": (
        "shop.example:443 203.0.113.1 - - " + HIT.format("GET", "/p/1"),
        rows_of(("203.0.113.1", "/p/1", 0, "GET")), {},
    ),
    "iis": (
        "#Software: Microsoft Internet Information Services 10.0\n#Version: 1.0\n"
        "#Fields: date time s-ip cs-method cs-uri-stem cs-uri-query s-port c-ip cs(User-Agent) sc-status\n"
        "2024-06-01 10:00:00 10.0.0.9 GET /p/1 - 443 203.0.113.1 Mozilla/5.0+(X) 200\n"
        "#Fields: date time c-ip cs-method cs-uri-stem\n2024-06-01 10:00:07 203.0.113.2 GET /p/2\n",
        rows_of(("203.0.113.1", "/p/1", 0, "GET"), ("203.0.113.2", "/p/2", 7, "GET")), {},
    ),
    "cloudfront": (
        "#Version: 1.0\n#Fields: date time x-edge-location sc-bytes c-ip cs-method cs(Host) cs-uri-stem "
        "sc-status cs(Referer) cs(User-Agent) cs-uri-query x-edge-request-id\n"
        "2024-06-01\t10:00:00\tFRA2\t7\t203.0.113.1\tGET\td.cloudfront.net\t/p/1\t200\t-\tMozilla%2520X"
        "\t-\te1==\n",
        rows_of(("203.0.113.1", "/p/1", 0, "GET", None, None, "e1==")), {},
    ),
    "nginx-json": (
        jsonl({"time": "2024-06-01T12:00:00+02:00", "remote_addr": "203.0.113.1", "method": "GET",
               "uri": "/p/1", "status": "200", "request_id": "e1"}),
        rows_of(("203.0.113.1", "/p/1", 0, "GET", None, None, "e1")), {},
    ),
    "snowplow": (
        "\t".join(SNOWPLOW.get(place, "") for place in range(131)) + "\n",
        rows_of(("u1", "/p/1", 0, "page_view", "s1", None, "e1")), {},
    ),
    "segment": (jsonl(TRACK, PAGE), rows_of(("u1", "p1", 0, "Product Added", None, None, "e1")),
                {"missing_item_id": 1}),
    "rudderstack": (jsonl(TRACK, PAGE), rows_of(("u1", "p1", 0, "Product Added", None, None, "e1")),
                    {"missing_item_id": 1}),
    "otto": (
        jsonl({"session": 7, "events": [{"aid": 5, "ts": MS, "type": "clicks"},
                                        {"aid": 6, "ts": MS + 1000, "type": "carts"}]}),
        rows_of(("7", "5", 0, "clicks"), ("7", "6", 1, "carts")), {},
    ),
    "ga4": (
        jsonl({"event_timestamp": str(MS * 1000), "event_name": "view_item", "user_id": None,
               "user_pseudo_id": "0.1", "items": [{"item_id": "S1"}, {"item_id": "S2"}],
               "event_params": [{"key": "page", "value": {"string_value": "/"}},
                                {"key": "ga_session_id", "value": {"int_value": "17"}}]},
              {"event_timestamp": str(MS * 1000), "event_name": "page_view", "user_id": "u1",
               "user_pseudo_id": "0.1", "items": [], "event_params": []}),
        rows_of((None, "S1", 0, "view_item", "17"), (None, "S2", 0, "view_item", "17")), {},
    ),
    "mind": (
        "1\tU13740\t6/1/2024 10:00:00 AM\tN55189 N42782\tN55689-1 N35729-0\n"
        "2\tU1\t6/1/2024 10:00:09 AM\t\tN1-2\n",
        rows_of(("U13740", "N55689", 0, "click", "1"), ("U13740", "N35729", 0, "shown", "1")),
        {"unparsable": 1},
    ),
    "matomo": (
        "0F1E\t2024-06-01 10:00:00\t17\tshop.example/p/\\\tx\t901\n"
        "0F1E\t2024-06-01 10:00:02\t17\t\\N\t902\n",
        rows_of(("0F1E", "shop.example/p/\tx", 0, None, "17", None, "901")), {"missing_item_id": 1},
    ),
}  # fmt: skip


def test_each_ready_source_file_is_tried() -> None:
    assert {path.stem for path in FORMATS.glob("*.toml")} == set(CASES)
    page = (FORMATS / "README.md").read_text(encoding="utf-8")
    for name in CASES:
        assert load_source(str(FORMATS / f"{name}.toml")).name == name
        assert f"({name}.toml)" in page


@pytest.mark.parametrize("name", CASES)
def test_a_ready_source_file_reads_its_log(spark: Any, tmp_path: Path, name: str) -> None:
    text, wanted, rejects = CASES[name]
    source = load_source(str(FORMATS / f"{name}.toml"))
    path = tmp_path / "log"
    packed = name in ("cloudfront", "gowalla", "amazon-reviews")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    facts = FileFacts(str(path))
    batches = [
        batch.select(RECORD_SCHEMA.names)
        for batch in read_file(file_format(source), str(path), facts)
    ]
    records = pa.Table.from_batches(batches, RECORD_SCHEMA)
    assert facts.error is None and not facts.swallowed
    rows = typed_events(spark.createDataFrame(records), source).orderBy("line", "element").collect()
    got = [
        (one["user_id"], one["item_id"], one["event_ts"].replace(tzinfo=UTC) - AT, one["event_type"],
         one["source_session_id"], one["value"], one["event_id"] if source.columns.event_id else None)
        for one in rows if one["reason"] is None
    ]  # fmt: skip
    assert got == [(*row[:2], timedelta(seconds=row[2]), *row[3:]) for row in wanted]
    found: dict[str, int] = {}
    for one in rows:
        if one["reason"]:
            found[one["reason"]] = found.get(one["reason"], 0) + 1
    assert found == rejects
    if source.columns.file_order:
        assert [one["tie_break"] for one in rows] == [one["line"] for one in rows]
