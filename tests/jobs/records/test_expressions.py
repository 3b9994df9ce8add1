"""Expressions of a source file: parsed, refused, bound, evaluated line by line."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.core.errors import SourceError
from jobs.core.source_file import Source
from jobs.privacy.pseudonyms import Privacy
from jobs.reading.readers import read_file
from jobs.reading.stored import arrow_type, record_of
from jobs.records import evaluate, expressions
from jobs.records.file_format import file_format
from jobs.records.records import FileFacts, Format

COLUMNS = 'user_id = "u"\nitem_id = "i"\nevent_ts = "t"\n'


def fmt_of(columns: str = COLUMNS, source: str = "", form: str = "csv", more: str = "") -> Format:
    text = f'[source]\nname = "x"\nlanding = "x"\nformat = "{form}"\n{source}\n[columns]\n{columns}\n{more}'
    return file_format(Source.model_validate(tomllib.loads(text)))


def read(fmt: Format, path: Path, data: str | pa.Table) -> tuple[list[dict[str, Any]], FileFacts]:
    if isinstance(data, str):
        path.write_text(data)
    else:
        pq.write_table(data, path)
    facts = FileFacts(str(path))
    rows = [row for batch in read_file(fmt, str(path), facts) for row in batch.to_pylist()]
    return rows, facts


def sql(ours: str, text: str) -> str:
    """The columns, one of them by an expression."""
    kept = [line for line in COLUMNS.splitlines() if not line.startswith(ours)]
    return "\n".join([*kept, f'{ours} = {{ sql = """{text}""" }}'])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("u || now()", r"columns\.item_id\.sql = .*character 6 .*the function now gives another result"),
        ("random()", "function random gives"), ("uuid()", "function uuid gives"),
        ("current_date", "current_date gives another result in another run"),
        ("age(CAST(t AS TIMESTAMP))", "function age gives"), ("version()", "function version"),
        ("current_setting('threads')", "function current_setting"),
        ("(SELECT 1)", "a subquery"), ("(SELECT content FROM read_text('/etc/passwd'))", "a subquery"),
        ("row_number() OVER ()", "a window function"), ("max(u)", "the function max makes one value"),
        ("unnest([1, 2])", "the function unnest"), ("*", "name the columns"), ("$1", "a parameter"),
        ("u, i", "write one expression"), ("", "at least 1 character"), (" ", "write one expression"),
        ("1) FROM (SELECT 2", "write one expression"), ("1 AS x", "syntax error"),
        ("u ||", "it ends before it is complete"), ("u; DROP TABLE x", "character 2 .*syntax error"),
    ],
)  # fmt: skip
def test_what_an_expression_may_not_be(text: str, says: str) -> None:
    with pytest.raises((SourceError, ValueError), match=says):
        fmt_of(sql("item_id", text))


def test_columns_are_found_and_names_that_lambdas_bind_are_none() -> None:
    found = expressions.parsed(
        "f", "list_transform(string_split(a.b, 'é'), lambda x: x || \"My Column\")[1] -- a comment"
    )
    assert found.columns == ("a.b", "My Column")
    assert '"a.b"' in found.bound and '"My Column"' in found.bound


def test_columns_that_differ_in_case_only_cannot_both_be_named() -> None:
    with pytest.raises(SourceError, match="'A' and 'a', which differ in upper and lower case"):
        fmt_of(sql("item_id", "A || a"))


def test_mistakes_in_a_mapping_say_what_can_be_written() -> None:
    for text, says in (
        ('{ sqll = "u" }', "sqll"), ("{}", "write a column's name"),
        ('{ sql = "u", key = "k" }', "write a column's name"), ('{ sql = "u", of = "k" }', "`of` goes with `key`"),
        ("7", "valid string"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            fmt_of(COLUMNS.replace('"i"', text))


@pytest.mark.parametrize(
    ("form", "source", "columns", "says"),
    [
        ("combined_log", 'keep = "statuss = 200"', 'user_id = "host"\nitem_id = "path"\nevent_ts = "time"',
         "source.keep = .*character 1 .*no column 'statuss': did you mean 'status'"),
        ("combined_log", 'keep = "status"', 'user_id = "host"\nitem_id = "path"\nevent_ts = "time"',
         "source.keep .*it gives BIGINT, and must be a condition"),
        ("combined_log", 'keep = "path > 5"', 'user_id = "host"\nitem_id = "path"\nevent_ts = "time"',
         r"source.keep .*Cannot compare values.*types = \{ path = \"bigint\" \}"),
    ],
)  # fmt: skip
def test_known_columns_are_checked_with_the_source_file(
    form: str, source: str, columns: str, says: str
) -> None:
    with pytest.raises(SourceError, match=says):
        fmt_of(columns, source, form)


@pytest.mark.parametrize(
    ("columns", "source", "says"),
    [
        (sql("item_id", "upper(x)"), "", "has no column 'x', which columns.item_id.sql names"),
        (
            sql("item_id", "CAST(i AS DOUBLE)"),
            "",
            "columns.item_id.sql .*it gives DOUBLE.*floating point",
        ),
        (sql("event_ts", "t = 'x'"), "", "columns.event_ts.sql .*it gives BOOLEAN, and a time is"),
        (
            sql("event_ts", "CAST(i AS BIGINT)"),
            "",
            "it gives BIGINT, and time.unit = 'iso8601' is one of texts",
        ),
        (
            sql("value", "[i]"),
            "",
            r"columns.value.sql .*it gives VARCHAR\[\], and value is a number",
        ),
        (sql("tie_break", "CAST(i AS DOUBLE)"), "", "tie_break is a whole number"),
        (COLUMNS, 'keep = "i IN (1, 2)"', r"source.keep.*a text is compared with a number \(i\)"),
        (COLUMNS, 'keep = "abs(i) > 2"', r"source.keep.*character 1 .*abs\(VARCHAR\).*types = "),
    ],
)
def test_other_columns_are_checked_at_the_file(
    tmp_path: Path, columns: str, source: str, says: str
) -> None:
    rows, facts = read(fmt_of(columns, source), tmp_path / "a.csv", "u,i,t\na,1,2024-01-01\n")
    assert rows == [] and re.search(says, facts.error or ""), facts.error


@pytest.mark.parametrize(
    ("ours", "text", "value", "clock"),
    [
        ("item_id", "i || '-' || u", "7-ann", None), ("item_id", "CAST(i AS BIGINT) + 1", "8", None),
        ("item_id", "regexp_extract(u, '[0-9]+')", None, None), ("item_id", "nullif(i, '7')", None, None),
        ("item_id", "json_extract('{\"a\": \"x\"}', '$.a')", "x", None),
        ("item_id", "CAST('10000000000000000000000' AS HUGEINT)", "10000000000000000000000", None),
        ("event_type", "i = '7'", "true", None), ("value", "i = '7'", "1", None),
        ("value", "CAST(i AS DECIMAL(9, 2)) / 2", "3.5", None), ("value", "n * 2", "5.0", None),
        ("tie_break", "CAST(i AS INTEGER)", "7", None),
        ("event_ts", "CAST(t AS TIMESTAMP)", "1704103200000000", "local"),
        ("event_ts", "CAST(t || '+02' AS TIMESTAMPTZ)", "1704096000000000", "utc"),
        ("event_ts", "CAST(t AS DATE)", "1704067200000000", "local"), ("event_ts", "t", "2024-01-01 10:00:00", None),
        ("exposed_with", "string_split(l, '|')", ["a", "b"], None), ("exposed_with", "l", ["a", "b"], None),
        ("exposed_with", "[CAST(i AS INTEGER), NULL]", ["7"], None),
    ],
)  # fmt: skip
def test_results_are_what_typing_reads(
    tmp_path: Path, ours: str, text: str, value: Any, clock: str | None
) -> None:
    fmt = fmt_of(sql(ours, text), 'types = { n = "double" }')
    [row], _ = read(fmt, tmp_path / "a.csv", "u,i,t,l,n\nann,7,2024-01-01 10:00:00,a|b,2.5\n")
    assert row[ours] == value and row["clock"] == clock and row["kind"] == "record"


@pytest.mark.parametrize(
    ("text", "kind"),
    [("p > 2", "bigint"), ("p > 1.5", "double"), ("d > DATE '2024-01-01'", "date"), ("p + 1 > 2", "bigint")],
)  # fmt: skip
def test_numbers_of_json_need_a_type_and_the_message_has_it(
    tmp_path: Path, text: str, kind: str
) -> None:
    line = '{"u": 1, "i": 2, "t": 5, "p": 10, "d": "2024-02-01"}'
    rows, facts = read(fmt_of(source=f'keep = "{text}"', form="jsonl"), tmp_path / "a", line)
    assert rows == [] and facts.error is not None
    declared = re.search(r'types = \{ (\w) = "(\w+)" \}', facts.error)
    assert declared is not None and declared[2] == kind
    source = f'keep = "{text}"\ntypes = {{ {declared[1]} = "{kind}" }}'
    rows, _ = read(fmt_of(source=source, form="jsonl"), tmp_path / "a", line)
    assert [row["filtered"] for row in rows] == [None]


def test_declared_numbers_are_not_rounded_and_nothing_is_null(tmp_path: Path) -> None:
    fmt = fmt_of(sql("value", "coalesce(n, 0)"), 'types = { n = "bigint" }')
    rows, _ = read(fmt, tmp_path / "a.csv", "u,i,t,n\na,1,t,10.5\na,2,t, 10 \na,3,t,\na,4,t,9e3\n")
    assert [(row["kind"], row["value"]) for row in rows] == [
        ("bad_value", None), ("record", "10"), ("record", "0"), ("bad_value", None),
    ]  # fmt: skip


def test_texts_for_nothing_are_null_inside_expressions(tmp_path: Path) -> None:
    columns = sql("user_id", "coalesce(u, v)") + '\nevent_type = { sql = "coalesce(u, v)" }'
    fmt = replace(fmt_of(columns), null_ids=frozenset(["NULL", "it's"]))
    rows, _ = read(
        fmt, tmp_path / "a.csv", "u,v,i,t\n,x,1,t\nNULL,x,1,t\nit's,x,1,t\nNULL,NULL,1,t\n"
    )
    assert [(row["user_id"], row["event_type"]) for row in rows] == [
        ("x", "x"), ("x", "NULL"), ("x", "it's"), (None, "NULL"),
    ]  # fmt: skip


def test_keep_is_null_safe_and_says_of_what_it_knows_nothing(tmp_path: Path) -> None:
    fmt = fmt_of(source="keep = \"n > 2 AND CAST(i AS INTEGER) > 0\"\ntypes = { n = 'double' }")
    text = 'u,i,t,n\na,1,t,3\na,1,t,1\na,1,t,\na,x,t,3\na,1,t,many\na,0,t,\n"a\n'
    rows, facts = read(fmt, tmp_path / "a.csv", text)
    assert [(row["kind"], row["filtered"]) for row in rows] == [
        ("record", None), ("record", "keep"), ("record", None), ("record", None), ("record", None),
        ("record", "keep"), ("unparsable", None),
    ]  # fmt: skip
    assert (facts.unjudged, facts.first_unjudged) == (2, 5)


def test_json_values_are_text_and_what_is_nested_is_json(tmp_path: Path) -> None:
    columns = sql("item_id", "products ->> '$[0].id'") + '\nvalue = { sql = "price" }'
    fmt = fmt_of(columns, 'keep = "flag AND geo.city = \'Oslo\'"\ntypes = { price = "double", flag = "boolean" }', "jsonl")  # fmt: skip
    lines = [
        '{"u": 1, "t": 5, "products": [{"id": 12345678901234567890}], "price": 1.50, "flag": true, "geo": {"city": "Oslo"}}',
        '{"u": 1, "t": 5, "products": [], "price": 2, "flag": false}',
    ]
    rows, _ = read(fmt, tmp_path / "a.jsonl", "\n".join(lines))
    assert [(row["item_id"], row["value"], row["filtered"]) for row in rows] == [
        ("12345678901234567890", "1.5", None), (None, "2.0", "keep"),
    ]  # fmt: skip


WHEN = datetime(2024, 1, 1, 12, tzinfo=UTC)
TABLE = pa.table(
    {
        "u": pa.array(["ann", "bob", None]).dictionary_encode(), "n": pa.array([1, None, 3], pa.int32()),
        "t": pa.array([WHEN, None, WHEN], pa.timestamp("ms", "UTC")), "p": [1.5, 2.5, None],
        "geo": pa.array([{"city": "Oslo"}, None, {"city": None}], pa.struct([("city", pa.string())])),
        "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
        "extra": pa.array([[{"key": "s", "value": {"string_value": None, "int_value": 7}}], [], None],
            pa.list_(pa.struct([("key", pa.string()), ("value", pa.struct([("string_value", pa.string()), ("int_value", pa.int64())]))]))),
    }
)  # fmt: skip
TYPED = """
user_id = "u"
item_id = { sql = "n + 1" }
event_ts = "t"
event_type = { sql = "geo.city || tags[1]" }
value = { sql = "p * 2" }
source_session_id = { key = "s", of = "extra" }
"""


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def test_parquet_columns_have_their_own_types_and_rows_come_back(tmp_path: Path) -> None:
    fmt = fmt_of(TYPED, 'keep = "p < 2.4"', "parquet")
    path = tmp_path / "a.parquet"
    rows, facts = read(fmt, path, TABLE)
    assert facts.error is None
    shown = ("user_id", "item_id", "event_type", "value", "source_session_id", "filtered")
    assert [tuple(row[name] for name in shown) for row in rows] == [
        ("ann", "2", "Oslox", "3.0", "7", None), ("bob", None, None, "5.0", None, "keep"),
        (None, "4", None, None, None, None),
    ]  # fmt: skip
    assert rows[0]["event_ts"] == "1704110400000000" and rows[0]["clock"] == "utc"
    for row in rows:
        again = record_of(fmt, row["raw"], str(path), row["line"], facts.columns)
        assert again == row


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["", "b", None]), pa.array(["", "b", None], pa.large_string()),
        pa.array(["", "b", None]).dictionary_encode(), pa.nulls(3),
    ],
    ids=["string", "large_string", "dictionary", "null"],
)  # fmt: skip
def test_texts_of_parquet_are_texts(tmp_path: Path, texts: pa.Array) -> None:
    table = pa.table({"u": texts, "i": ["x", "y", "z"], "t": ["1", "2", "3"]})
    fmt = fmt_of(sql("user_id", "upper(coalesce(u, i))"), "keep = \"u <> 'c'\"", "parquet")
    rows, facts = read(fmt, tmp_path / "a.parquet", table)
    assert facts.error is None
    wanted = ["X", "Y" if pa.types.is_null(texts.type) else "B", "Z"]
    assert [row["user_id"] for row in rows] == wanted
    for row in rows:
        assert record_of(fmt, row["raw"], row["file"], row["line"], facts.columns) == row


@pytest.mark.parametrize("form", ["csv", "jsonl", "combined_log"])
def test_a_stored_line_is_the_record_that_it_was(tmp_path: Path, form: str) -> None:
    columns, source, text = COLUMNS, "keep = \"v <> '9'\"", "u,i,t,v\na,1,5,8\n,2,5,9\n"
    columns = columns.replace('"i"', '{ sql = "i || v" }')
    if form == "jsonl":
        text = '{"u": "a", "i": 1, "t": 5, "v": 8}\n{"u": "a", "v": 9}\n{"u": \n'
    if form == "combined_log":
        columns = 'user_id = "host"\nitem_id = { sql = "path || method" }\nevent_ts = "time"'
        source, text = 'keep = "status < 300"', '1.1.1.1 - - [x] "GET /a HTTP/1.1" 404 5\nx\n'
    fmt = fmt_of(columns, source, form)
    rows, facts = read(fmt, tmp_path / "log", text)
    for row in rows:
        again = record_of(fmt, row["raw"], row["file"], row["line"], facts.columns, facts.header)
        assert again == row
    assert any(row["filtered"] for row in rows)


SECRET = Privacy(b"k" * 40, "x", hashes=True, forgotten=frozenset())


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_of_people_who_are_hashed_no_column_of_the_user_is_kept(tmp_path: Path, form: str) -> None:
    columns = 'user_id = { sql = "lower(u)" }\nitem_id = { sql = "n + 1" }\nevent_ts = "t"'
    types = 'types = { n = "bigint" }' if form != "parquet" else ""
    fmt = replace(fmt_of(columns, types, form), privacy=SECRET)
    data: Any = TABLE
    if form == "csv":
        data = "u,n,t\nAnn,1,2024-01-01\nBob,x,2024-01-01\n"
    if form == "jsonl":
        data = '{"u": "Ann", "n": 1, "t": "2024-01-01"}\n{"u": "Bob", "n": "x"}\n'
    rows, facts = read(fmt, tmp_path / "log", data)
    for row in rows:
        assert "nn" not in row["raw"] and "ob" not in row["raw"]
        stored = f'{{"user_id": "u-1", "line": {json.dumps(row["raw"])}}}'
        again = record_of(fmt, stored, row["file"], row["line"], facts.columns, facts.header)
        assert without(again, "raw", "user_id") == without(row, "raw", "user_id")
        assert again["user_id"] == "u-1"


def test_lines_of_forgotten_people_are_found_by_what_is_computed(tmp_path: Path) -> None:
    gone = frozenset([SECRET.pseudonym("ann")])
    fmt = fmt_of(sql("user_id", "lower(u)"))
    text = "u,i,t\nANN,1,5\nBob,1,5\nann,no line\nbob,no line\n"
    for hashes in (True, False):
        guard = replace(SECRET, hashes=hashes, forgotten=gone)
        path = tmp_path / "a.csv"
        path.write_text(text)
        records = read_file(replace(fmt, privacy=guard), str(path), FileFacts("a.csv"))
        rows = [row for batch in guard.guarded(records) for row in batch.to_pylist()]
        assert [(row["line"], row["kind"]) for row in rows] == [(3, "record"), (5, "unparsable")]


@pytest.mark.parametrize(
    "kind",
    [
        *map(pa.type_for_alias, ("int8", "uint64", "string", "large_string", "bool", "date32", "double")),
        pa.timestamp("ns", "Europe/Paris"), pa.timestamp("s"), pa.decimal128(10, 2), pa.float32(),
        pa.list_(pa.struct([("a", pa.int64()), ("b c", pa.list_(pa.string()))])),
        pa.struct([("x", pa.struct([("y", pa.decimal128(5, 1))])), ("z", pa.string())]),
    ],
    ids=str,
)  # fmt: skip
def test_types_are_read_as_the_ledger_has_them(kind: pa.DataType) -> None:
    assert arrow_type(str(kind)) == kind


def test_bots_are_those_of_the_list_and_of_own_patterns() -> None:
    bots = evaluate.bots_of(["^curl/"])
    assert bots("Mozilla/5.0 (compatible; bingbot/2.0)") and bots("curl/8.0")
    assert not bots("Mozilla/5.0 (X11; Linux x86_64) Firefox/130.0") and not bots(None)
    assert evaluate.bot_list().startswith("crawler-user-agents ")


def test_the_documentations_source_files_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "computed-columns.md").read_text()
    found = re.findall(r"^```toml\n(.*?)^```$", page, re.M | re.S)
    whole = [text for text in found if text.startswith("[source]")]
    assert len(whole) == 5 and len(found) == 6  # (one box has [bots] alone)
    for text in whole:
        assert file_format(Source.model_validate(tomllib.loads(text))).computing is not None
