"""One line, many records: lists of JSON, of texts with separators, and of Parquet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.reading.readers import read_file
from jobs.reading.stored import Stored, record_of, records_of
from jobs.records import explode
from jobs.records.elements import without_elements
from jobs.records.records import FileFacts
from tests.jobs.records.test_expressions import SECRET, fmt_of, read

EVENTS = 'user_id = "session"\nitem_id = "aid"\nevent_ts = "ts"\nevent_type = "type"\ntie_break = "_position"'
LINES = [
    {"session": 1, "events": [{"aid": 36, "ts": 5, "type": "clicks"}, None, {"aid": 7, "ts": 6}]},
    {"session": 2, "events": []},
    {"session": 3, "events": "no list"},
    {"session": 4},
    {"session": 5, "events": [{"aid": {"x": 1}, "ts": 5}, {"aid": 8, "ts": 9, "type": "carts"}]},
]
FOUND = [
    (1, 1, "record", "1", "36", "5", "clicks", "1"), (1, 3, "record", "1", "7", "6", None, "3"),
    (3, None, "unparsable", "3", None, None, None, None),
    (5, 1, "unparsable", "5", None, None, None, "1"), (5, 2, "record", "5", "8", "9", "carts", "2"),
]  # fmt: skip
SHOWN = ("line", "element", "kind", "user_id", "item_id", "event_ts", "event_type", "tie_break")


def text(lines: list[Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def shown(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in SHOWN) for row in rows]


def test_each_element_of_a_json_list_is_a_record(tmp_path: Path) -> None:
    fmt = fmt_of(EVENTS, 'explode = "events"', "jsonl")
    rows, facts = read(fmt, tmp_path / "a.jsonl", text(LINES))
    assert shown(rows) == FOUND
    assert (facts.lines, facts.empty_lines, facts.error) == (5, 2, None)
    assert {row["raw"] for row in rows if row["line"] == 1} == {json.dumps(LINES[0])}
    assert {"aid", "ts", "type", "session", "events"} == set(facts.columns)
    for row in rows:
        again = record_of(
            fmt, row["raw"], row["file"], row["line"], facts.columns, None, row["element"]
        )
        assert again == row


def test_a_json_list_in_a_field_of_csv_is_one_too(tmp_path: Path) -> None:
    fmt = fmt_of(EVENTS, 'explode = "events"')
    quoted = ["session,events"] + [
        f'{line["session"]},"{json.dumps(line.get("events", "")).replace(chr(34), chr(34) * 2)}"'
        for line in LINES[:3] + LINES[4:]
    ]
    rows, facts = read(fmt, tmp_path / "a.csv", "\n".join(quoted))
    lines = {2: 1, 4: 3, 5: 5}
    assert [(lines[row[0]], *row[1:]) for row in shown(rows)] == FOUND
    assert facts.columns == {"session": "text", "events": "text"}
    for row in rows:
        again = record_of(
            fmt, row["raw"], row["file"], row["line"], facts.columns, facts.header, row["element"]
        )
        assert again == row


def test_elements_of_a_text_are_cut_by_separator_and_pattern(tmp_path: Path) -> None:
    columns = 'user_id = "_0"\nitem_id = "item"\nevent_ts = "_1"\nvalue = { sql = "CAST(clicked AS INTEGER)" }\nevent_type = "_2"'
    source = 'header = false\ndelimiter = "\\t"\nexplode = "_2"\nexplode_separator = " "\nexplode_pattern = "(?P<item>.+)-(?P<clicked>[01])"'
    fmt = fmt_of(columns, source)
    rows, facts = read(fmt, tmp_path / "a.tsv", "u1\t5\tN1-1 N-2-0  odd\nu2\t5\t\n")
    names = ("element", "kind", "item_id", "value", "event_type")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (1, "record", "N1", "1", "N1-1"), (2, "record", "N-2", "0", "N-2-0"),
        (4, "unparsable", None, None, None),
    ]  # fmt: skip
    assert (facts.lines, facts.empty_lines) == (3, 1)


def test_single_values_are_the_column_itself(tmp_path: Path) -> None:
    fmt = fmt_of(
        'user_id = "u"\nitem_id = "a.items"\nevent_ts = "t"', 'explode = "a.items"', "jsonl"
    )
    rows, _ = read(
        fmt, tmp_path / "a.jsonl", text([{"u": 1, "t": 2, "a": {"items": ["x", 7, True]}}])
    )
    assert [row["item_id"] for row in rows] == ["x", "7", "true"]


def test_a_name_of_line_and_elements_must_say_which_it_is(tmp_path: Path) -> None:
    lines = text([{"id": 1, "t": 5, "events": [{"id": 9}]}])
    columns = 'user_id = "{}"\nitem_id = "{}"\nevent_ts = "t"'
    fmt = fmt_of(columns.format("id", "events.id"), 'explode = "events"', "jsonl")
    rows, facts = read(fmt, tmp_path / "a.jsonl", lines)
    assert rows == [] and facts.error is not None
    assert "have a column 'id': write 'events.id' for the elements' and '_line.id'" in facts.error
    fmt = fmt_of(columns.format("_line.id", "events.id"), 'explode = "events"', "jsonl")
    rows, facts = read(fmt, tmp_path / "a.jsonl", lines)
    assert [(row["user_id"], row["item_id"]) for row in rows] == [("1", "9")] and not facts.error


GA4 = """
user_id = { sql = "coalesce(user_id, user_pseudo_id)" }
item_id = "item_id"
event_ts = "event_timestamp"
source_session_id = { key = "ga_session_id" }
event_type = { key = "color", of = "items.item_params" }
exposed_with = "shown"
"""
EVENT = {
    "event_timestamp": "1717200000000000", "user_id": None, "user_pseudo_id": "0.1",
    "event_params": [{"key": "x", "value": {"string_value": "y"}},
                     {"key": "ga_session_id", "value": {"string_value": None, "int_value": 17}}],
    "items": [{"item_id": "S1", "item_params": [{"key": "color", "value": {"string_value": "red"}}], "shown": ["a", "", "b"]},
              {"item_id": "S2", "item_params": [], "shown": None}],
}  # fmt: skip
AS_GA4 = [("0.1", "S1", "17", "red", ["a", "b"]), ("0.1", "S2", "17", None, None)]
OF_GA4 = ("user_id", "item_id", "source_session_id", "event_type", "exposed_with")


def ga4_table() -> pa.Table:
    value = pa.struct([("string_value", pa.string()), ("int_value", pa.int64())])
    pairs = pa.list_(pa.struct([("key", pa.string()), ("value", value)]))
    item = pa.struct(
        [("item_id", pa.string()), ("item_params", pairs), ("shown", pa.list_(pa.string()))]
    )
    schema = pa.schema(
        [
            ("event_timestamp", pa.string()), ("user_id", pa.string()), ("user_pseudo_id", pa.string()),
            ("event_params", pairs), ("items", pa.list_(item)),
        ]
    )  # fmt: skip
    return pa.Table.from_pylist([EVENT, EVENT | {"items": []}, EVENT | {"items": None}], schema)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("hashed", [False, True])
def test_keys_and_values_of_line_and_element(tmp_path: Path, form: str, hashed: bool) -> None:
    fmt = fmt_of(GA4, 'explode = "items"', form)
    fmt = replace(fmt, privacy=SECRET) if hashed else fmt
    data: Any = ga4_table() if form == "parquet" else text([EVENT, EVENT | {"items": None}])
    rows, facts = read(fmt, tmp_path / "log", data)
    assert [tuple(row[name] for name in OF_GA4) for row in rows] == AS_GA4, facts.error
    assert facts.empty_lines == (2 if form == "parquet" else 1) and facts.lines == 2
    for row, wanted in zip(rows, AS_GA4, strict=True):
        raw = row["raw"]
        if hashed:
            assert "0.1" not in raw
            raw = json.dumps({"user_id": "0.1", "line": raw})
        again = record_of(fmt, raw, row["file"], 1, facts.columns, None, row["element"])
        assert tuple(again[name] for name in OF_GA4) == wanted
        assert (again["kind"], again["element"]) == ("record", row["element"])


def test_a_line_that_was_stored_whole_has_all_its_elements(tmp_path: Path) -> None:
    fmt = fmt_of(EVENTS, 'explode = "events"', "jsonl")
    [found] = records_of(fmt, [Stored(json.dumps(LINES[0]), "f", 3, {})])
    assert [(row["line"], row["element"], row["item_id"]) for row in found] == [
        (3, 1, "36"),
        (3, 3, "7"),
    ]
    [[lost]] = records_of(fmt, [Stored(json.dumps(LINES[0]), "f", 3, {}, None, 9)])
    assert (lost["kind"], lost["line"]) == ("unparsable", 3)
    plain = fmt_of('user_id = "session"\nitem_id = "session"\nevent_ts = "session"', "", "jsonl")
    [[line]] = records_of(plain, [Stored(json.dumps(LINES[0]), "f", 3, {}, None, 2)])
    assert (line["kind"], line["item_id"]) == ("record", "1")


def test_columns_of_parquet_lists_are_told_apart_by_the_schema(tmp_path: Path) -> None:
    lists = pa.array([[{"id": 1}]], pa.list_(pa.struct([("id", pa.int64())])))
    table = pa.table({"id": [1], "t": [5], "events": lists})
    fmt = fmt_of(
        'user_id = "id"\nitem_id = "events.id"\nevent_ts = "t"', 'explode = "events"', "parquet"
    )
    _, facts = read(fmt, tmp_path / "a.parquet", table)
    assert "write 'events.id' for the elements' and '_line.id'" in (facts.error or "")
    fmt = fmt_of(
        'user_id = "events.x"\nitem_id = "events.id"\nevent_ts = "t"',
        'explode = "events"',
        "parquet",
    )
    _, facts = read(fmt, tmp_path / "a.parquet", table)
    assert "has no column 'events.x', which columns.user_id names" in (facts.error or "")
    fmt = fmt_of('user_id = "id"\nitem_id = "id"\nevent_ts = "t"', 'explode = "t"', "parquet")
    _, facts = read(fmt, tmp_path / "a.parquet", table)
    assert "source.explode = 't' is int64, and must be a list" in (facts.error or "")


def test_the_line_of_very_many_elements_keeps_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explode, "RAW_CHARS", 20_000)
    fmt = fmt_of(EVENTS, 'explode = "events"', "jsonl")
    many = {"session": 1, "events": [{"aid": n, "ts": n} for n in range(500)]}
    few = {"session": 2, "events": [{"aid": n, "ts": n} for n in range(20)]}
    rows, facts = read(fmt, tmp_path / "a.jsonl", text([few, many, few]))
    assert [row["item_id"] for row in rows] == [
        str(n) for size in (20, 500, 20) for n in range(size)
    ]
    assert rows[0]["raw"] == rows[-1]["raw"] == json.dumps(few)
    assert rows[30]["raw"].startswith(json.dumps(many)[:200]) and "cut: " in rows[30]["raw"]
    sizes = [batch.num_rows for batch in read_file(fmt, str(tmp_path / "a.jsonl"), FileFacts("f"))]
    assert sum(sizes) == 540 and len(sizes) > 5 and facts.lines == 540


def test_single_elements_are_taken_out_of_a_line_as_it_is_written() -> None:
    line = '{ "x":"[,", "a" : {"e":[{"u": 1.50 , "n":[1,2]},  "é\\u00e9", null,7 ] , "z":{}}}\n'
    assert without_elements(line, "a.e", [1, 4]) == line.replace(
        '{"u": 1.50 , "n":[1,2]}', "null"
    ).replace(",7 ", ",null ")
    assert without_elements('{"a.e": [1, 2]}', "a.e", [2]) == '{"a.e": [1, null]}'
    assert without_elements('{"e": [0], "e": [1, 2]}', "e", [1]) == '{"e": [0], "e": [null, 2]}'
    with pytest.raises(ValueError, match="no list"):
        without_elements('{"e": 1}', "e", [1])
