"""A boundary by an expression on two neighbours: what it reads, what is refused, what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import SourceError
from jobs.core.source_file import Source, load_source
from jobs.core.tables import EVENTS
from jobs.records.boundary import VALUES, Boundary, boundary_of
from jobs.records.file_format import file_format

BASE = """
[source]
name = "log"
landing = "*.csv"
format = "csv"
types = { amount = "bigint", when = "timestamp" }
[columns]
user_id = "u"
item_id = "i"
event_ts = "t"
event_type = "kind"
[sessions]
boundary = '''BOUNDARY'''
"""


def source(folder: Path, boundary: str, more: str = "") -> Source:
    file = folder / "log.toml"
    file.write_text(BASE.replace("BOUNDARY", boundary) + more)
    return load_source(str(file))


def boundary(folder: Path, sql: str) -> Boundary:
    found = boundary_of(source(folder, sql))
    assert found is not None
    return found


def events(*rows: dict[str, Any]) -> pa.Table:
    """Events; columns of the log go into their boundary values."""
    made = []
    for row in rows:
        log = {name: one for name, one in row.items() if name not in EVENTS.columns}
        made.append(row | {VALUES: json.dumps(log) if log else None})
    return pa.Table.from_pylist(made, schema=arrow_schema(EVENTS.columns))


def opens(found: Boundary, *rows: dict[str, Any]) -> list[bool]:
    table = events(*rows).combine_chunks()
    columns = {name: table[name].combine_chunks() for name in found.columns}
    before = {name: one.slice(0, len(rows) - 1) for name, one in columns.items()}
    after = {name: one.slice(1) for name, one in columns.items()}
    return list(found.opens(before, after).tolist())


def test_columns_of_ours_are_typed_and_others_are_the_logs(tmp_path: Path) -> None:
    found = boundary(tmp_path, "prev.event_type = 'logout' OR next.campaign <> prev.campaign")
    assert (found.ours, found.log) == (("event_type",), (("campaign", ""),))
    rows = [
        {"event_type": "view", "campaign": "a"}, {"event_type": "logout", "campaign": "a"},
        {"event_type": "view", "campaign": "a"}, {"event_type": "view", "campaign": "b"},
        {"event_type": None, "campaign": None}, {"event_type": "view", "campaign": "b"},
    ]  # fmt: skip
    assert opens(found, *rows) == [False, True, True, False, False]  # null does not open
    # A column that is not mapped is the log's, whatever its name is.
    assert boundary(tmp_path, "next.value > '3'").log == (("value", ""),)
    found = boundary(
        tmp_path, "date_trunc('hour', next.event_ts) > date_trunc('hour', prev.event_ts)"
    )
    assert found.columns == ("event_ts",)
    assert opens(found, *({"event_ts": s * 10**6} for s in (0, 3599, 3600))) == [False, True]


def test_values_of_the_log_have_their_declared_types(tmp_path: Path) -> None:
    found = boundary(tmp_path, "next.amount > prev.amount")
    rows = [{"amount": one} for one in ("9", "10", "-1", "x", "5")]
    assert opens(found, *rows) == [True, False, False, False]
    found = boundary(tmp_path, "next.when - prev.when > INTERVAL 1 HOUR")
    rows = [{"when": f"2024-01-01 {one}"} for one in ("00:00:00", "01:00:00", "02:00:01")]
    assert opens(found, *rows) == [False, True]
    assert opens(boundary(tmp_path, "next.amount // prev.amount = 1"), *[{"amount": "0"}] * 2) == [
        False
    ]
    odd = boundary(tmp_path, """next."a/b~'c.d" <> prev."a/b~'c.d" """)
    assert opens(odd, *({"a/b~'c.d": one} for one in "xxy")) == [False, True]


def test_lines_bring_what_the_boundary_reads_of_the_log(tmp_path: Path) -> None:
    found = source(tmp_path, "prev.utm.campaign <> next.utm.campaign AND next.amount > 1")
    assert found.boundary_reads_log and found.computes
    computing = file_format(found).computing
    assert computing is not None
    assert computing.inputs() == {
        "sessions.boundary:utm.campaign": "utm.campaign", "sessions.boundary:amount": "amount",
    }  # fmt: skip
    alone = source(tmp_path, "prev.event_type = 'logout'")
    assert not alone.boundary_reads_log and not alone.computes


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("campaign <> 'a'", ["'campaign' is not a column of the events", "prev.campaign"]),
        ("previous.a <> next.a", ["'previous.a'", "did you mean prev.a?"]),
        ("1 = 1", ["no column of prev or next"]),
        ("prev.event_type", ["gives VARCHAR", "must be a condition"]),
        ("prev.amount = next.campaign", ["a text is compared with a number"]),
        ("prev.event_ts < now()", ["the function now"]),
        ("prev.event_ts < next.event_ts AND random() < 0.5", ["the function random"]),
        ("lag(prev.a) OVER () = next.a", ["window"]),
        ("prev.a <> next.A", ["'a' and 'A'", "upper and lower case"]),
        ("prev.event_type = ", ["syntax error"]),
        ("(SELECT true)", ["subquery"]),
        ("next.event_ts - prev.event_ts", ["gives INTERVAL"]),
        ("sqrt(next.event_type) > 1", ["sessions.boundary", "sqrt"]),
    ],
)
def test_what_is_no_boundary_is_refused(tmp_path: Path, sql: str, says: list[str]) -> None:
    with pytest.raises(SourceError) as refused:
        file_format(source(tmp_path, sql))
    for one in ["sessions.boundary = ", *says]:
        assert one in str(refused.value)


def test_ids_that_are_hashed_are_not_stored_as_they_are(tmp_path: Path) -> None:
    hashed = "[privacy]\nhash_user_id = true\n"
    with pytest.raises(SourceError, match=r"'u' says who the user is"):
        boundary_of(source(tmp_path, "prev.u <> next.u", hashed))
    assert boundary_of(source(tmp_path, "prev.x <> next.x", hashed)) is not None


def test_the_stored_rule_has_the_expression_and_the_types_that_it_reads(tmp_path: Path) -> None:
    rule = json.loads(source(tmp_path, "next.amount > 1").session_rule_text())
    assert rule["boundary"] == "next.amount > 1"
    assert rule["boundary_types"] == {"amount": "bigint"}
    plain = load_source(str(tmp_path / "log.toml")).model_copy()
    assert json.loads(plain.sessions.rule_text()).keys() < rule.keys()
