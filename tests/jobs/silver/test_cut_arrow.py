"""A cut by slices of time is the cut of the whole, wherever the edges fall."""

from __future__ import annotations

import itertools
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expectations.session_rule import SessionRule
from jobs.bronze import first_load
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import EVENTS, SESSIONS
from jobs.lake import time_slices
from jobs.silver import cut_arrow
from jobs.silver.cut_arrow import EVENT_FIELDS
from tests.support.oracle import expected_sessions

GAP = 10
HOW = cut_arrow.Cut(
    rule=SessionRule(native=False, gap_us=GAP, max_session_us=60, max_session_events=6),
    fields=EVENT_FIELDS, events=EVENTS.columns, sessions=SESSIONS.columns,
)  # fmt: skip

EVENT_COLUMNS = {name: EVENTS.columns[name] for name in ("user_id", *EVENT_FIELDS)}

EVENT = st.tuples(
    st.sampled_from(["ann", "bob", "zoë", "\U0001f600"]),
    st.integers(-100, 100),  # microseconds
    st.sampled_from([None, -1, 0, 5]),
)


def table(events: list[tuple[str, int, int | None]]) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {
            "event_id": f"e{(number * 7919) % 1000}", "user_id": user, "item_id": f"i{number}",
            "event_ts": at, "tie_break": tie, "feedback": "positive",
            "exposed_with": [f"x{number}"] if number % 2 else None,
        }
        for number, (user, at, tie) in enumerate(events)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=arrow_schema(EVENTS.columns))


def brief(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return sorted(
        (
            row["session_id"],
            row["user_id"],
            row["runaway"],
            row["event_count"],
            tuple(row["events"]),
        )
        for row in rows
    )


def found(*sessions: pa.Table) -> list[tuple[Any, ...]]:
    rows = [row for one in sessions for row in one.to_pylist()]
    for row in rows:
        assert row["start_ts"] == row["events"][0]["event_ts"]
        assert row["end_ts"] == row["events"][-1]["event_ts"]
        assert row["start_date"] == row["start_ts"].date()
        for event in row["events"]:
            number = int(event["item_id"][1:])
            assert event["exposed_with"] == ([f"x{number}"] if number % 2 else None)
    return brief([{**row, "events": [one["event_id"] for one in row["events"]]} for row in rows])


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(EVENT, max_size=25),
    edges=st.lists(st.integers(-100, 100), unique=True, max_size=4).map(sorted),
)
@example(events=[("ann", 0, None), ("ann", GAP, None)], edges=[1])  # exactly gap_s, across an edge
@example(events=[("ann", 0, None), ("ann", 3, None), ("ann", 9, None)], edges=[1, 2, 4])
def test_any_edges_give_the_oracles_sessions(
    events: list[tuple[str, int, int | None]], edges: list[int]
) -> None:
    whole = table(events)
    wanted = brief(
        expected_sessions(whole, native=False, gap_s=GAP / 1e6, max_hours=60 / 3.6e9, max_events=6)
        if events
        else []
    )
    times = [at for _, at, _ in events]
    parts, spares = [], []
    ends = [None, *edges, None]
    for low, high in itertools.pairwise(ends):
        inside = [(low is None or at >= low) and (high is None or at < high) for at in times]
        sessions, spare = cut_arrow.cut(whole.filter(pa.array(inside, pa.bool_())), HOW, low, high)
        assert sessions.schema.equals(arrow_schema(SESSIONS.columns))
        parts.append(sessions)
        spares.append(spare)
    last, nothing = cut_arrow.cut(pa.concat_tables(spares), HOW)
    assert nothing.num_rows == 0
    assert found(*parts, last) == wanted


LINE = st.tuples(
    st.integers(0, 5), st.sampled_from("xyz"), st.sampled_from("ab"), st.sampled_from([None, "c", "d"])
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(LINE, max_size=20))
@example(lines=[(1, "x", "a", None), (1, "y", "a", None), (1, "x", "b", "c"), (2, "z", "a", None)])
def test_of_lines_that_are_one_event_the_first_is_kept(
    lines: list[tuple[int, str, str, str | None]],
) -> None:
    rows: list[dict[str, Any]] = [
        {
            "event_id": f"{event}{at}",
            "event_ts": at,
            "file": file,
            "line": number,
            "anonymous_id": who,
        }
        for number, (at, event, file, who) in enumerate(lines)
    ]
    schema = pa.schema([
        ("event_id", pa.string()), ("event_ts", pa.timestamp("us", "UTC")), ("file", pa.string()),
        ("line", pa.int64()), ("anonymous_id", pa.string()),
    ])  # fmt: skip
    texts = pa.Table.from_pylist(rows, schema=schema)
    events, repeats = first_load.without_repeats(texts)
    at = schema.get_field_index("file")
    coded = texts.set_column(at, "file", texts["file"].combine_chunks().dictionary_encode())
    assert first_load.without_repeats(coded)[0].cast(schema).equals(events)
    first: dict[str, tuple[str, int]] = {}

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["anonymous_id"] or "z", row["file"], row["line"])

    for row in sorted(rows, key=place):
        first.setdefault(str(row["event_id"]), (str(row["file"]), int(str(row["line"]))))
    got = events.to_pylist()
    assert {row["event_id"]: (row["file"], row["line"]) for row in got} == first
    assert (len(got), repeats) == (len(first), len(lines) - len(first))
    assert [row["event_ts"] for row in got] == sorted(row["event_ts"] for row in got)


def test_a_slice_of_files_becomes_one_file_of_events(tmp_path: Path) -> None:
    """Two files of lines of which one is in both; paths are read as dictionaries, and written as texts."""
    layer = first_load.Layer(
        EVENTS.columns, str(tmp_path / "laid"), datetime(2024, 1, 2, tzinfo=UTC)
    )
    schema = arrow_schema(layer.lines)
    paths = []
    for name, ids in (("a", [1, 2, 3]), ("b", [2, 4])):
        rows = [
            {"event_id": f"{at:032x}", "user_id": "u", "item_id": "i", "feedback": "positive",
             "event_ts": datetime(2024, 1, 1, at, tzinfo=UTC), "event_date": date(2024, 1, 1),
             "file": f"{name}.csv", "line": at}
            for at in ids
        ]  # fmt: skip
        paths.append(str(tmp_path / f"{name}.parquet"))
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), paths[-1])
    asked = pa.RecordBatch.from_pylist([{"low": None, "high": None, "paths": paths}])
    [told] = [one.to_pylist()[0] for one in layer.of_files([asked])]
    assert (told["rows"], told["repeats"]) == (4, 1)
    events = pq.read_table(told["path"])
    assert events.schema.names == list(EVENTS.columns)
    assert {events.schema.field(n).type for n in ("ingest_file", "feedback")} == {pa.string()}
    assert events["ingest_file"].to_pylist() == ["a.csv", "a.csv", "a.csv", "b.csv"]
    assert [int(one, 16) for one in events["event_id"].to_pylist()] == [1, 2, 3, 4]
    assert events["feedback"].to_pylist() == ["positive"] * 4
    assert set(events["ingest_ts"].to_pylist()) == {layer.when}


def test_slices_begin_where_row_groups_begin_and_read_what_is_inside(tmp_path: Path) -> None:
    paths = []
    for name, times in (("a", range(0, 100)), ("b", range(50, 60)), ("c", range(100, 200))):
        path = str(tmp_path / f"{name}.parquet")
        pq.write_table(table([("ann", at, None) for at in times]), path, row_group_size=25)
        paths.append(path)
    known = time_slices.extents(paths)
    assert len(known) == 9 and sum(rows for *_, rows in known) == 210
    cut = time_slices.parted(known, 50)
    assert cut is not None and cut == time_slices.slices(known, 50)
    assert [(low, high) for low, high, _ in cut] == [(None, 50), (50, 100), (100, 150), (150, None)]
    assert [[Path(path).stem for path in inside] for *_, inside in cut] == [
        ["a"], ["a", "b"], ["c"], ["c"],
    ]  # fmt: skip
    rows = [time_slices.read(inside, EVENT_COLUMNS, low, high) for low, high, inside in cut]
    assert [one.num_rows for one in rows] == [50, 60, 50, 50]
    assert sorted(row["event_ts"] for one in rows for row in one.to_pylist()) == sorted(
        row["event_ts"] for path in paths for row in pq.read_table(path).to_pylist()
    )


def test_files_that_lie_across_each_other_are_not_read_once_a_slice(tmp_path: Path) -> None:
    paths = []
    for name in "abc":
        paths.append(str(tmp_path / f"{name}.parquet"))
        rows = table([("ann", at, None) for at in range(100)])
        pq.write_table(rows.take(pa.array([*range(0, 100, 2), *range(1, 100, 2)])), paths[-1])
    assert time_slices.parted(time_slices.extents(paths), 100) is None
    assert time_slices.parted(time_slices.extents(paths), 150) == [(None, None, paths)]


def test_row_groups_without_a_time_are_in_no_slice(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    rows = [*([None] * 10), *range(10), None, *range(9)]
    schema = pa.schema([("event_ts", pa.timestamp("us", "UTC"))])
    pq.write_table(
        pa.Table.from_pylist([{"event_ts": at} for at in rows], schema), path, row_group_size=10
    )
    assert time_slices.extents([path]) == [(path, 0, 9, 10), (path, 0, 8, 10)]
