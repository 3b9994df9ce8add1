"""Formats beside CSV and JSON lines: JSON over many lines, W3C logs, Avro, ORC, Parquet's types."""

from __future__ import annotations

import io
import json
import sys
import time
import uuid
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.forget import landing_files
from jobs.privacy.person import Person
from jobs.reading import json_texts
from jobs.reading.readers import object_values, read_file
from jobs.reading.stored import record_of
from jobs.reading.typed_columns import same_kind
from jobs.records import byte_streams
from jobs.records.records import CUT, FileFacts, Format

MAPPED = {"user_id": "u", "item_id": "i", "event_ts": "t"}


def read(fmt: Format, path: Path | str) -> tuple[list[dict[str, Any]], FileFacts]:
    facts = FileFacts(str(path))
    rows = [row for batch in read_file(fmt, str(path), facts) for row in batch.to_pylist()]
    return rows, facts


def fields(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["line"], row["user_id"], row["item_id"], row["event_ts"]) for row in rows]


def write(tmp_path: Path, text: str | bytes, name: str = "log") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- JSON over many lines -------------------------------------------------------------------------

JSON = Format("json", MAPPED)
OBJECTS = [
    {"u": "a", "i": 12345678901234567890, "t": 1.5}, {"u": 'b"}{[', "i": "\\", "t": 2},
    {"u": "ü", "i": "x\ny", "t": 3, "more": [{"deep": ["}"]}]},
]  # fmt: skip
EXPECTED = [("a", "12345678901234567890", "1.5"), ('b"}{[', "\\", "2"), ("ü", "x\ny", "3")]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(OBJECTS), json.dumps(OBJECTS, indent=2), json.dumps(OBJECTS, ensure_ascii=False),
        "\n".join(json.dumps(one, indent=1) for one in OBJECTS),
        "[" + ",\n".join(map(json.dumps, OBJECTS)) + ",]", "\ufeff" + json.dumps(OBJECTS) + "\n\n",
        "\n".join(json.dumps([one]) for one in OBJECTS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [1, 3, 50, 1 << 20])
def test_objects_in_arrays_or_one_after_another(
    tmp_path: Path, text: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", block)
    rows, facts = read(JSON, write(tmp_path, text))
    assert [one[1:] for one in fields(rows)] == EXPECTED and facts.lines == 3
    for row in rows:
        assert text.split("\n")[row["line"] - 1].find("{") >= 0
        again = record_of(JSON, row["raw"], "f", row["line"], {})
        assert (again["user_id"], again["item_id"]) == (row["user_id"], row["item_id"])


def test_what_is_no_object_costs_itself_only(tmp_path: Path) -> None:
    good = json.dumps(OBJECTS[0])
    text = f'[{good}, 7, "a, {{b", null, {{"u": "x" "i"}}, {{"u": ["p"], "i": 1}}, {good}]'
    rows, facts = read(JSON, write(tmp_path, text))
    assert [row["kind"] for row in rows] == ["record", *["unparsable"] * 5, "record"]
    assert [row["raw"] for row in rows[1:5]] == ["7", '"a, {b"', "null", '{"u": "x" "i"}']
    assert facts.lines == 7


def test_an_object_without_an_end_waits_or_is_unparsable(tmp_path: Path) -> None:
    good = json.dumps(OBJECTS[0])
    path = write(tmp_path, f'[{good},\n{{"u": "b", "i": "cut')
    rows, facts = read(JSON, path)
    assert [row["kind"] for row in rows] == ["record", "unparsable"]
    assert (rows[1]["raw"], rows[1]["line"]) == ('{"u": "b", "i": "cut', 2)
    young = replace(JSON, partial_since=round(time.time() * 1000) - 60_000)
    rows, facts = read(young, path)
    assert (len(rows), facts.lines, facts.waiting) == (1, 1, 1)
    for whole in (f"[{good}]", f"[{good},\n", good):
        rows, facts = read(young, write(tmp_path, whole))
        assert (len(rows), facts.waiting) == (1, 0)


def test_a_long_object_is_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 16)
    fmt = replace(JSON, longest_record=80, longest_text=40)
    good = json.dumps(OBJECTS[0])
    long = json.dumps({"u": "b", "i": '"}\\' * 50, "t": 1})
    held: list[int] = []
    more = json_texts.Objects.more

    def watching(self: json_texts.Objects) -> bool:
        found = more(self)
        held.append(len(self.buffer))
        return found

    monkeypatch.setattr(json_texts.Objects, "more", watching)
    rows, facts = read(fmt, write(tmp_path, f"[{good},{long},\n{good}]"))
    assert [row["kind"] for row in rows] == ["record", "unparsable", "record"]
    assert CUT in rows[1]["raw"] and (facts.too_long, facts.first_too_long) == (1, 1)
    assert rows[2]["line"] == 2 and max(held) <= 80 + 2 * 16


@given(
    st.lists(st.sampled_from(["{", "}", "[", "]", '"', "\\", ",", "a", "1", "\n", '{"u":"1"}']), max_size=25),
    st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=300, deadline=None, derandomize=True)
def test_blocks_cut_nothing(pieces: list[str], block: int) -> None:
    text = "".join(pieces)

    def found() -> list[Any]:
        facts = FileFacts("f")
        stream = io.BytesIO(text.encode())
        batches = json_texts.read_json(JSON, stream, facts, object_values)
        good = [row for batch in batches for row in batch.to_pylist()]
        return [row for row in good if row["raw"].startswith("{")]

    whole = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_streams, "BLOCK_BYTES", block)
        assert found() == whole


def test_a_long_line_may_have_nulls_among_its_shown_items(tmp_path: Path) -> None:
    line = json.dumps({"u": "a", "i": "b", "t": 1, "e": ["x", None], "more": "m" * 50})
    mapped = {**MAPPED, "exposed_with": "e"}
    fmt = Format("jsonl", mapped, longest_record=200, longest_text=20)
    [row], facts = read(fmt, write(tmp_path, line + "\n"))
    assert (row["kind"], row["exposed_with"], facts.too_long) == ("record", ["x"], 0)


# -- W3C ------------------------------------------------------------------------------------------

IIS = """#Software: Microsoft Internet Information Services 10.0
#Version: 1.0
#Date: 2024-06-01 00:00:00
#Fields: date time cs-method cs-uri-stem c-ip cs(User-Agent) sc-status
2024-06-01 00:00:05 GET /p/1 203.0.113.1 Mozilla/5.0+(X) 200
2024-06-01 00:00:06 GET - 203.0.113.2 "a ""b"" c" 404
2024-06-01 00:00:07 GET
#Date: 2024-06-02 00:00:00
#Fields: time c-ip cs-uri-stem

00:00:08 2001:db8::1 /p/2
"""
W3C = Format(
    "w3c",
    {"user_id": "c-ip", "item_id": "cs-uri-stem", "event_ts": "date", "event_ts_2": "time"},
)
CLOUDFRONT = (
    "#Version: 1.0\n#Fields: date time x-edge-location c-ip cs-uri-stem cs(User-Agent)\n"
    "2024-06-01\t01:02:03\tFRA2\t192.0.2.7\t/p/9\tMozilla%2F5.0%20(X)\n"
)


def test_columns_are_those_of_the_fields_line_before(tmp_path: Path) -> None:
    rows, facts = read(W3C, write(tmp_path, IIS))
    assert [(r["line"], r["user_id"], r["item_id"], r["event_ts"], r["event_ts_2"]) for r in rows] == [
        (5, "203.0.113.1", "/p/1", "2024-06-01", "00:00:05"),
        (6, "203.0.113.2", None, "2024-06-01", "00:00:06"), (7, None, None, None, None),
        (11, "2001:db8::1", "/p/2", "2024-06-02", "00:00:08"),
    ]  # fmt: skip
    assert rows[2]["kind"] == "unparsable" and facts.lines == 4 and facts.header is None
    # Nobody knows which columns a stored line had: none is read by the others'.
    for row in rows:
        again = record_of(W3C, row["raw"], "f", row["line"], facts.columns)
        assert again["kind"] == "unparsable"
    rows, facts = read(replace(W3C, mapped={**W3C.mapped, "event_type": "cs(User-Agent)"}),
                       write(tmp_path, CLOUDFRONT))  # fmt: skip
    assert rows[0]["event_type"] == "Mozilla%2F5.0%20(X)" and rows[0]["user_id"] == "192.0.2.7"
    assert facts.header == [
        "date",
        "time",
        "x-edge-location",
        "c-ip",
        "cs-uri-stem",
        "cs(User-Agent)",
    ]
    again = record_of(W3C, rows[0]["raw"], "f", 3, {}, facts.header)
    assert (again["user_id"], again["event_ts_2"]) == ("192.0.2.7", "01:02:03")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.2.3.4 /p/1\n", "has no line of #Fields before its first record"),
        ("#Fields: date time c-ip\n", "has no column 'cs-uri-stem'"),
        (
            "#Fields: date time c-ip c-ip cs-uri-stem\n",
            "#Fields has the column 'c-ip' twice: rename one",
        ),
    ],
)
def test_a_log_without_its_columns_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    assert said in (read(W3C, write(tmp_path, text))[1].error or "")


# -- Avro and ORC ---------------------------------------------------------------------------------

MOMENT = datetime(2024, 6, 1, 10, 0, 0, 250_000, tzinfo=UTC)
US = "1717236000250000"


def avro(
    tmp_path: Path, schema: list[dict[str, Any]], rows: list[dict[str, Any]], codec: str = "null"
) -> Path:
    path = tmp_path / "log.avro"
    parsed = fastavro.parse_schema({"type": "record", "name": "e", "fields": schema})
    with path.open("wb") as out:
        fastavro.writer(out, parsed, rows, codec=codec)
    return path


@pytest.mark.parametrize("codec", ["null", "deflate", "snappy"])
def test_avro(tmp_path: Path, codec: str) -> None:
    inner = {"type": "record", "name": "p", "fields": [{"name": "id", "type": "string"}]}
    schema: list[dict[str, Any]] = [
        {"name": "u", "type": ["null", "long"]}, {"name": "item", "type": ["null", inner]},
        {"name": "t", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "x", "type": {"type": "array", "items": ["null", "int"]}},
        {"name": "k", "type": {"type": "map", "values": "string"}},
        {"name": "v", "type": "double"}, {"name": "id", "type": {"type": "string", "logicalType": "uuid"}},
    ]  # fmt: skip
    one = uuid.UUID(int=7)
    rows = [
        {"u": 2**60 + 1, "item": {"id": "a"}, "t": MOMENT, "x": [1, None, 2], "k": {"s": "q"}, "v": 1.5, "id": one},
        {"u": None, "item": None, "t": MOMENT, "x": [], "k": {}, "v": -0.5, "id": one},
    ]  # fmt: skip
    mapped = {"user_id": "u", "item_id": "item.id", "event_ts": "t", "exposed_with": "x",
              "source_session_id": "k.s", "value": "v", "event_id": "id", "event_type": "day"}  # fmt: skip
    path = avro(tmp_path, schema, rows, codec)
    folder = tmp_path / "day=2024-06-01"
    folder.mkdir()
    path = path.rename(folder / "log.avro")
    found, facts = read(Format("avro", mapped), path)
    assert facts.error is None and facts.lines == 2
    assert fields(found) == [(1, str(2**60 + 1), "a", US), (2, None, None, US)]
    assert found[0]["exposed_with"] == ["1", "2"] and found[1]["exposed_with"] == []
    assert [row["source_session_id"] for row in found] == ["q", None]
    assert [row["value"] for row in found] == ["1.5", "-0.5"] and found[0]["event_id"] == str(one)
    assert {row["event_type"] for row in found} == {"2024-06-01"}
    assert {row["clock"] for row in found} == {"utc"}
    assert facts.columns["t"] == "timestamp[us, tz=UTC]" and facts.columns["item.id"] == "string"


def test_avro_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    fmt = Format("avro", MAPPED)
    plain = [{"name": n, "type": "string"} for n in "uit"]
    path = avro(tmp_path, plain, [{"u": "a" * 50, "i": "b", "t": "1"}] * 100)
    path.write_bytes(path.read_bytes()[:-30])
    assert "cannot be read as avro (EOFError: after" in (read(fmt, path)[1].error or "")
    assert "correct source.format" in (read(fmt, write(tmp_path, "u,i,t\n"))[1].error or "")
    path = avro(tmp_path, plain[:2], [{"u": "a", "i": "b"}])
    assert "has no column 't'" in (read(fmt, path)[1].error or "")
    path = avro(
        tmp_path, [{"name": "u", "type": "double"}, *plain[1:]], [{"u": 1.0, "i": "b", "t": "1"}]
    )
    assert "floating point" in (read(fmt, path)[1].error or "")


def test_orc(tmp_path: Path) -> None:
    table = pa.table({
        "u": pa.array([1, None], pa.int64()), "p": pa.array([{"i": "a", "n": 1}, None]),
        "t": pa.array([MOMENT, None], pa.timestamp("us")), "x": [["p", None], None],
    })  # fmt: skip
    path = tmp_path / "log.orc"
    orc.write_table(table, path, stripe_size=64)
    fmt = Format("orc", {"user_id": "u", "item_id": "p.i", "event_ts": "t", "exposed_with": "x"})
    rows, facts = read(fmt, path)
    assert facts.error is None
    assert fields(rows) == [(1, "1", "a", US), (2, None, None, None)]
    assert {row["clock"] for row in rows} == {"local"} and rows[0]["exposed_with"] == ["p"]
    assert "cannot be read as orc" in (read(fmt, write(tmp_path, "u,i,t\n"))[1].error or "")


# -- Parquet --------------------------------------------------------------------------------------

PARQUET = Format("parquet", MAPPED)


def parquet(tmp_path: Path, columns: dict[str, Any], name: str = "log.parquet") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array(["a", None], pa.large_string()), ["a", None]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([b"a", None], pa.binary()), ["a", None]),
        (pa.array([uuid.UUID(int=5).bytes, None], pa.uuid()), [str(uuid.UUID(int=5)), None]),
        (pa.array([7, None], pa.uint16()), ["7", None]),
        (pa.array([7.0, None], pa.float64()), ["7", None]),
        (pa.array([float(2**53), float("nan")], pa.float64()), [str(2**53), None]),
        (pa.array([None, None], pa.null()), [None, None]),
        (pa.array([Decimal("12"), None], pa.decimal128(38, 0)), ["12", None]),
        (pa.array([date(2024, 6, 1), None]), ["2024-06-01", None]),
        (pa.array([True, None]), ["true", None]),
    ],
)
def test_types_of_which_nothing_is_lost(tmp_path: Path, column: pa.Array, texts: list[Any]) -> None:
    path = parquet(tmp_path, {"u": ["x", "y"], "i": column, "t": [1, 2]})
    rows, facts = read(PARQUET, path)
    assert facts.error is None and [row["item_id"] for row in rows] == texts


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([7.5, None]), "'i' is double"), (pa.array([float(2**60), None]), "'i' is double"),
        (pa.array([7.0, 8.0]), "'i' is double"), (pa.array([b"\xff\xfe", None]), "not text in UTF-8"),
        (pa.array([["a"], None]), "needs one value a row"), (pa.array([{"a": 1}, None]), "one value"),
    ],
)  # fmt: skip
def test_types_of_which_something_is_lost(tmp_path: Path, column: pa.Array, said: str) -> None:
    path = parquet(tmp_path, {"u": ["x", "y"], "i": column, "t": [1, 2]})
    assert said in (read(PARQUET, path)[1].error or "")


def test_fields_of_structs_maps_and_the_path(tmp_path: Path) -> None:
    columns = {
        "who": pa.array([{"id": {"n": 1}, "junk": "j" * 9}, {"id": None, "junk": ""}, None]),
        "tags": pa.array([[("k", "a"), ("l", "b")], [], None], pa.map_(pa.string(), pa.string())),
        "a.b": ["p", "q", "r"], "t": pa.array([1, 2, 3], pa.timestamp("ns")),
    }  # fmt: skip
    fmt = Format("parquet", {"user_id": "who.id.n", "item_id": "tags.l", "event_ts": "t",
                             "event_type": "a.b", "source_session_id": "day", "value": "hour"})  # fmt: skip
    path = parquet(
        tmp_path, columns, "day=2024-06-01%20x/hour=__HIVE_DEFAULT_PARTITION__/log.parquet"
    )
    rows, facts = read(fmt, path)
    assert facts.error is None
    assert fields(rows) == [(1, "1", "b", "0"), (2, None, None, "0"), (3, None, None, "0")]
    assert [row["event_type"] for row in rows] == ["p", "q", "r"]
    assert {(row["source_session_id"], row["value"]) for row in rows} == {("2024-06-01 x", None)}
    assert facts.columns["who.id.n"] == "int64" and facts.columns["day"] == "string"
    only = Format("parquet", dict.fromkeys(MAPPED, "day"))
    assert len(read(only, path)[0]) == 3
    for name in ("who.nobody", "who.junk.n", "month"):
        fmt = replace(fmt, mapped={**MAPPED, "user_id": name, "item_id": "a.b", "event_ts": "t"})
        assert f"has no column {name!r}" in (read(fmt, path)[1].error or "")


def test_two_columns_of_a_name_are_refused_by_name(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"], ["c"], [1]], names=["u", "i", "i", "t"])
    pq.write_table(table, tmp_path / "log.parquet")
    assert "the column 'i' twice" in (read(PARQUET, tmp_path / "log.parquet")[1].error or "")
    # One that nobody maps may be there twice.
    table = pa.table([["a"], ["b"], ["c"], [1], [2]], names=["u", "i", "x", "t", "x"])
    pq.write_table(table, tmp_path / "log.parquet")
    assert fields(read(PARQUET, tmp_path / "log.parquet")[0]) == [(1, "a", "b", "1")]


def test_what_a_changed_writer_changes() -> None:
    for before, now in (
        ("string", "large_string"), ("string", "dictionary<values=string, indices=int32, ordered=0>"),
        ("timestamp[us]", "timestamp[ns]"), ("timestamp[us, tz=UTC]", "timestamp[ms, tz=Europe/Paris]"),
        ("int64", "double"), ("int64", "null"), ("null", "string"), ("int32", "uint64"),
    ):  # fmt: skip
        assert same_kind(before, now) and same_kind(now, before)
    for before, now in (
        ("string", "int64"), ("timestamp[us]", "timestamp[us, tz=UTC]"), ("int64", "timestamp[us]"),
        ("date32[day]", "string"), ("text", "json"),
    ):  # fmt: skip
        assert not same_kind(before, now)


# -- what forget leaves ---------------------------------------------------------------------------


def without(fmt: Format, path: Path, user: str) -> bytes:
    person = Person(user, user)
    everything = replace(fmt, longest_record=sys.maxsize, longest_text=sys.maxsize)
    return landing_files.without_person(everything, str(path), person)[0]


def test_a_persons_lines_go_and_what_a_log_says_of_itself_stays(tmp_path: Path) -> None:
    left = without(W3C, write(tmp_path, IIS), "203.0.113.2").decode()
    assert left == "".join(line for line in IIS.splitlines(True) if "203.0.113.2" not in line)
    assert fields(read(W3C, write(tmp_path, left))[0])[-1][1] == "2001:db8::1"
    text = json.dumps(OBJECTS, indent=2)
    left = without(JSON, write(tmp_path, text), "a").decode()
    assert [one[1:] for one in fields(read(JSON, write(tmp_path, left))[0])] == EXPECTED[1:]
    fmt = Format("csv", MAPPED, comment="#")
    path = write(tmp_path, '#head\nu,i,t\na,"1\n2",3\n#c\nb,4,5\n')
    assert without(fmt, path, "a").decode() == "#head\nu,i,t\nb,4,5\n"
