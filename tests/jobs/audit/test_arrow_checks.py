"""Certificates by file: whole tables have them, tables broken in any way do not. No Spark."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expectations import events as events_suite
from expectations import recommendations as recommendations_suite
from expectations import sequences as sequences_suite
from expectations.check import Check
from expectations.session_rule import SessionRule
from jobs.audit import arrow_columns, fingerprints
from jobs.bronze import checks as bronze_checks
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import EVENTS, RECOMMENDATIONS, SEQUENCES, SESSIONS
from jobs.gold import checks as gold_checks
from jobs.lake import filesystem
from jobs.recommend import checks as recommend_checks
from jobs.silver import checks as silver_checks
from jobs.silver import cut_arrow
from jobs.silver.cut_arrow import EVENT_FIELDS

T = 1_700_000_000_000_000
GAP_US = 1_800_000_000
HOURS_US = 3_600_000_000
GAP, NATIVE = (
    cut_arrow.cut_of(
        SessionRule(
            native=native, gap_us=GAP_US, max_session_us=3 * HOURS_US, max_session_events=12
        )
    )
    for native in (False, True)
)


def events(count: int = 400) -> pa.Table:
    """Events of users with ids of several lengths, some of equal time; of most hours the log has a
    session of each user, and a second one goes on beside every other."""
    drawn = random.Random(7)
    users = ["u1", "u2", "x" * 32, "ü" * 16]
    rows = []
    for number in range(count):
        at = T + drawn.randrange(200) * 400_000_000
        hour = (at - T) // (4 * HOURS_US)
        native = None if hour % 4 == 3 else drawn.choice([f"{hour}"] * 4 + [f"{hour // 2} ü"])
        rows.append(
            {"event_id": f"{number:032x}", "user_id": drawn.choice(users), "item_id": "i",
             "event_ts": at, "feedback": "positive", "tie_break": drawn.choice([None, 1, 2]),
             "source_session_id": native}
        )  # fmt: skip
    schema = arrow_schema({name: EVENTS.columns[name] for name in ("user_id", *EVENT_FIELDS)})
    return pa.Table.from_pylist(rows, schema=schema)


Rows = list[dict[str, Any]]


@pytest.fixture(params=[GAP, NATIVE], ids=["gap", "native"])
def how(request: pytest.FixtureRequest) -> cut_arrow.Cut:
    return request.param


def sessions(how: cut_arrow.Cut) -> Rows:
    rows: Rows = cut_arrow.cut(events(), how)[0].to_pylist()
    assert len(rows) > 20 and any(row["runaway"] for row in rows)
    return rows


def held(folder: Path, rows: Rows, how: cut_arrow.Cut) -> tuple[bool, bool]:
    """Whether each session holds alone, and whether all are apart."""
    path = f"{folder}/sessions.parquet"
    filesystem.write_parquet(
        path, pa.Table.from_pylist(rows, schema=arrow_schema(SESSIONS.columns))
    )
    [found] = silver_checks.SessionsHold(how.rule, f"{folder}/bounds")(path)
    if not found["bounds"]:
        return found["holds"], False
    return found["holds"], silver_checks.sessions_apart([found["bounds"]], how.rule)


def longest(rows: Rows) -> dict[str, Any]:
    return max(rows, key=lambda row: row["event_count"])


def tied(rows: Rows) -> tuple[dict[str, Any], int]:
    """A session with two neighbours of equal time, neither its first nor last, and their place."""
    return next(
        (row, at)
        for row in rows
        for at in range(1, row["event_count"] - 2)
        if row["events"][at]["event_ts"] == row["events"][at + 1]["event_ts"]
    )


def swap_ties(rows: Rows) -> None:
    row, at = tied(rows)
    one = row["events"]
    one[at], one[at + 1] = one[at + 1], one[at]


def split(rows: Rows) -> None:
    """A session in two: each holds alone, together they are too near."""
    row = longest(rows)
    parts = row["events"][:3], row["events"][3:]
    rows.remove(row)
    for number, part in enumerate(parts):
        rows.append(
            row | {"session_id": f"half {number}", "events": part, "event_count": len(part),
                   "start_ts": part[0]["event_ts"], "end_ts": part[-1]["event_ts"],
                   "runaway": None}
        )  # fmt: skip


BREAKS: dict[str, Callable[[Rows], Any]] = {
    "events turned round": lambda rows: longest(rows)["events"].reverse(),
    "ties out of order": swap_ties,
    "an event too many": lambda rows: longest(rows)["events"].append(longest(rows)["events"][-1]),
    "no event": lambda rows: longest(rows).update(events=[]),
    "another count": lambda rows: longest(rows).update(event_count=1),
    "another start": lambda rows: longest(rows).update(start_ts=rows[0]["end_ts"]),
    "another date": lambda rows: rows[0].update(start_date=None),
    "a flag too many": lambda rows: min(rows, key=lambda row: row["event_count"]).update(runaway="hours"),
    "a flag too few": lambda rows: next(row for row in rows if row["runaway"]).update(runaway=None),
    "no user": lambda rows: rows[0].update(user_id=None),
    "an event without id": lambda rows: rows[0]["events"][0].update(event_id=None),
    "a silence inside": lambda rows: rows[0].update(
        events=[rows[0]["events"][0], longest(rows)["events"][-1]], event_count=2,
        start_ts=rows[0]["events"][0]["event_ts"], end_ts=longest(rows)["events"][-1]["event_ts"]),
    "the same session twice": lambda rows: rows.append(rows[3]),
    "one id for two": lambda rows: rows[0].update(session_id=rows[1]["session_id"]),
    "two that belong together": split,
}  # fmt: skip


def with_ids(rows: Rows, some: bool) -> dict[str, Any]:
    """The longest session with an id of the log, or without one."""
    return longest([row for row in rows if (row["events"][0]["source_session_id"] is None) != some])


def relabel(row: dict[str, Any], native: str | None) -> None:
    for event in row["events"]:
        event["source_session_id"] = native


def neighbours(rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two of a user's sessions, both with an id, the second one long after the first."""
    ordered = sorted(rows, key=lambda row: (row["user_id"], row["start_ts"]))
    return next(
        (one, other)
        for one, other in itertools.pairwise(ordered)
        if one["user_id"] == other["user_id"]
        and (other["start_ts"] - one["end_ts"]).total_seconds() * 1e6 > 2 * GAP_US
        and one["events"][0]["source_session_id"] and other["events"][0]["source_session_id"]
    )  # fmt: skip


def moved(row: dict[str, Any], by: timedelta) -> None:
    for event in row["events"]:
        event["event_ts"] += by
    start, end = row["events"][0]["event_ts"], row["events"][-1]["event_ts"]
    row.update(start_ts=start, end_ts=end, start_date=start.date())


def late(rows: Rows) -> None:
    """The last event of a session without an id comes after a silence."""
    row = next(
        row for row in rows
        if row["event_count"] == 2 and row["events"][0]["source_session_id"] is None
    )  # fmt: skip
    row["events"][1]["event_ts"] = row["start_ts"] + timedelta(microseconds=GAP_US + 1)
    row["end_ts"] = row["events"][1]["event_ts"]


def overlapping(rows: Rows) -> None:
    one, other = neighbours(rows)
    moved(other, one["end_ts"] - other["start_ts"] - timedelta(seconds=1))


def going_on(rows: Rows) -> None:
    one, other = neighbours(rows)
    relabel(other, one["events"][0]["source_session_id"])


NATIVE_BREAKS: dict[str, Callable[[Rows], Any]] = {
    "another id inside": lambda rows: with_ids(rows, True)["events"][1].update(source_session_id="x"),
    "no id inside": lambda rows: with_ids(rows, True)["events"][1].update(source_session_id=None),
    "an id at last": lambda rows: with_ids(rows, False)["events"][-1].update(source_session_id="x"),
    "a silence without an id": late,
    "one that overlaps another": overlapping,
    "an id that goes on": going_on,
}  # fmt: skip


def test_whole_sessions_hold(tmp_path: Path, how: cut_arrow.Cut) -> None:
    assert held(tmp_path, sessions(how), how) == (True, True)


@pytest.mark.parametrize("name", BREAKS)
def test_broken_sessions_do_not(tmp_path: Path, how: cut_arrow.Cut, name: str) -> None:
    rows = sessions(how)
    BREAKS[name](rows)
    assert held(tmp_path, rows, how) != (True, True)


@pytest.mark.parametrize("name", NATIVE_BREAKS)
def test_broken_native_sessions_do_not(tmp_path: Path, name: str) -> None:
    """What the gap rule does not look at, or allows."""
    rows = sessions(NATIVE)
    NATIVE_BREAKS[name](rows)
    assert held(tmp_path, rows, NATIVE) != (True, True)


@pytest.mark.parametrize(
    ("ids", "apart"),
    [
        (["a", "b", "c", None], True), (["a", "c", "b", None], True), (["a", "b", "c", "d"], True),
        (["bb", "b", "c", None], False), (["a", "b", "c", "bb"], False), (["a", "b", "b", None], False),
        (["a", None, "c", "d"], False), (["a", "b", None, None], False), ([None, "b", "c", "d"], False),
        (["a", "a", "c", None], False),
    ],
)  # fmt: skip
def test_ids_order_native_sessions_of_one_time(
    tmp_path: Path, ids: list[str | None], apart: bool
) -> None:
    """The first one ends when two of no length stand and the last one begins."""
    rows = [
        {"event_id": f"{session}{at}", "user_id": "ann", "item_id": "i", "event_ts": T + at,
         "feedback": "positive", "source_session_id": "abcd"[session]}
        for session, at in ((0, 0), (0, 5), (1, 5), (2, 5), (3, 5), (3, 9))
    ]  # fmt: skip
    schema = arrow_schema({name: EVENTS.columns[name] for name in ("user_id", *EVENT_FIELDS)})
    made: Rows = cut_arrow.cut(pa.Table.from_pylist(rows, schema=schema), NATIVE)[0].to_pylist()
    for row in made:
        relabel(row, ids["abcd".index(row["events"][0]["source_session_id"])])
    assert len(made) == 4 and held(tmp_path, made, NATIVE) == (True, apart)


def test_the_print_is_of_events_and_their_users(tmp_path: Path, how: cut_arrow.Cut) -> None:
    """The same in sessions and in the table, whatever the files; another if one event moves."""
    log = events()
    made, _ = cut_arrow.cut(log, how)
    check = silver_checks.SessionsHold(how.rule, f"{tmp_path}/bounds")

    def of_table(table: pa.Table) -> tuple[int, int, int]:
        found = []
        for number, low in enumerate((0, 150)):  # two files, cut elsewhere than the sessions
            part = table.slice(low, 150 if number == 0 else None)
            filesystem.write_parquet(f"{tmp_path}/{number}.parquet", part)
            found += fingerprints.print_of_events(f"{tmp_path}/{number}.parquet")
        return arrow_columns.joined(found)

    parts = []
    for number, part in enumerate((made.slice(0, 10), made.slice(10))):
        filesystem.write_parquet(f"{tmp_path}/s{number}.parquet", part)
        parts += check(f"{tmp_path}/s{number}.parquet")
    inside = arrow_columns.joined(parts)
    assert inside[0] == log.num_rows and inside == of_table(log)
    users = log["user_id"].to_pylist()
    other = next(at for at, user in enumerate(users) if user != users[0])
    users[0], users[other] = users[other], users[0]
    moved = log.set_column(log.column_names.index("user_id"), "user_id", pa.array(users))
    assert of_table(moved) != inside
    assert of_table(pa.concat_tables([log.slice(1), log.slice(1, 1)])) != inside


@given(
    st.lists(st.one_of(st.text(max_size=12), st.text("0123456789abcdef", min_size=32, max_size=32)))
)
def test_a_text_has_one_hash_wherever_it_stands(texts: list[str]) -> None:
    together = arrow_columns.words_of(pa.array(["before", *texts], pa.string())[1:])
    alone = [arrow_columns.words_of(pa.array([text], pa.string()))[0] for text in texts]
    assert together.tolist() == [int(one) for one in alone]
    assert len(set(together.tolist())) == len(set(texts))


EVENT = {
    "event_id": "a" * 32, "user_id": "ann", "item_id": "i", "event_ts": T,
    "event_date": date(2023, 11, 14), "feedback": "positive", "value": 1.5, "exposed_with": ["j"],
}  # fmt: skip
EVENT_BREAKS: dict[str, dict[str, Any]] = {
    "the same id": {"event_id": "b" * 32}, "no id": {"event_id": None}, "empty id": {"event_id": ""},
    "no user": {"user_id": None}, "no item": {"item_id": None}, "no time": {"event_ts": None},
    "year 0": {"event_ts": -62_135_596_800_000_001, "event_date": date(1, 1, 1)},
    "the day after": {"event_date": date(2023, 11, 15)}, "unknown feedback": {"feedback": "loved"},
    "not a number": {"value": float("nan")}, "endless": {"value": float("inf")},
    "shown without id": {"exposed_with": ["j", ""]}, "shown null": {"exposed_with": [None]},
}  # fmt: skip


def test_events_hold_or_do_not(tmp_path: Path) -> None:
    schema = arrow_schema(EVENTS.columns)
    other = EVENT | {"event_id": "b" * 32, "value": None, "exposed_with": None}

    def broken(*rows: dict[str, Any]) -> list[str]:
        filesystem.write_parquet(
            f"{tmp_path}/e.parquet", pa.Table.from_pylist(list(rows), schema=schema)
        )
        [found] = bronze_checks.events_hold(f"{tmp_path}/e.parquet")
        assert found["holds"] == (not found["broken"])
        return list(found["broken"])

    assert broken(EVENT, other) == broken() == []
    named = {}
    for what, change in EVENT_BREAKS.items():
        named[what] = broken(EVENT | change, other)
    assert named == EVENT_NAMED
    assert set().union(*EVENT_NAMED.values()) == of_rows(events_suite.checks())


EVENT_NAMED = {
    "the same id": ["event_id_is_key"], "no id": ["event_id_is_key", "ids_are_there"],
    "empty id": ["ids_are_there"], "no user": ["ids_are_there"], "no item": ["ids_are_there"],
    "no time": ["time_is_plausible", "date_is_the_utc_date"],
    "year 0": ["time_is_plausible", "date_is_the_utc_date"],
    "the day after": ["date_is_the_utc_date"], "unknown feedback": ["feedback_is_known"],
    "not a number": ["value_is_finite"], "endless": ["value_is_finite"],
    "shown without id": ["shown_items_have_ids"], "shown null": ["shown_items_have_ids"],
}  # fmt: skip


def of_rows(suite: tuple[Check, ...]) -> set[str]:
    """The checks of rows: those that a certificate speaks of."""
    return {check.name for check in suite if check.condition or check.unique}


def test_certificates_have_the_names_of_their_suites() -> None:
    for module, table, suite in (
        (bronze_checks, EVENTS, events_suite.checks()),
        (gold_checks, SEQUENCES, sequences_suite.checks()),
        (recommend_checks, RECOMMENDATIONS, recommendations_suite.checks()),
    ):
        nothing = arrow_schema(table.columns).empty_table()
        assert module.checks_of(nothing).keys() == of_rows(suite), table.full_name


SEQUENCE = {
    "user_id": "ann", "item_index": [1, 2, 3], "event_ts": [T, T, T + 9],
    "session_ordinal": [1, 1, 2], "feedback": ["positive", "neutral", "exposed"],
    "exposed_items": [[], [4], [1, 2]],
}  # fmt: skip
SEQUENCE_BREAKS: dict[str, dict[str, Any]] = {
    "an item below 1": {"item_index": [1, 0, 3]}, "no item": {"item_index": [1, None, 3]},
    "time runs back": {"event_ts": [T, T - 1, T + 9]}, "a hole": {"session_ordinal": [1, 1, 3]},
    "numbers run back": {"session_ordinal": [1, 2, 1]}, "begins with 2": {"session_ordinal": [2, 2, 3]},
    "unknown feedback": {"feedback": ["positive", "loved", "exposed"]},
    "a list too short": {"feedback": ["positive", "neutral"]},
    "shown below 1": {"exposed_items": [[], [0], [1, 2]]}, "shown null": {"exposed_items": [[], None, [1]]},
    "no list": {"feedback": None}, "no user": {"user_id": None},
    "no position": {name: [] for name in SEQUENCE if name != "user_id"},
    "the same user twice": {"user_id": "bob"},
}  # fmt: skip


def test_sequences_hold_or_do_not(tmp_path: Path) -> None:
    schema = arrow_schema(SEQUENCES.columns)
    bob = SEQUENCE | {"user_id": "bob"}

    def broken(*rows: dict[str, Any]) -> list[str]:
        filesystem.write_parquet(
            f"{tmp_path}/q.parquet", pa.Table.from_pylist(list(rows), schema=schema)
        )
        [found] = gold_checks.sequences_hold(f"{tmp_path}/q.parquet")
        assert found["holds"] == (not found["broken"])
        return list(found["broken"])

    assert broken(SEQUENCE, bob) == broken() == []
    named = {}
    for what, change in SEQUENCE_BREAKS.items():
        named[what] = broken(SEQUENCE | change, bob)
    assert named == SEQUENCE_NAMED
    assert set().union(*SEQUENCE_NAMED.values()) == of_rows(sequences_suite.checks())
    assert broken(bob, SEQUENCE) == ["user_id_is_key"]  # `apart` relies on the order


SEQUENCE_NAMED = {
    "an item below 1": ["items_are_known"], "no item": ["items_are_known"],
    "time runs back": ["oldest_first"], "a hole": ["ordinals_are_dense"],
    "numbers run back": ["ordinals_are_dense"], "begins with 2": ["ordinals_begin_with_one"],
    "unknown feedback": ["feedback_is_known"], "a list too short": ["arrays_are_parallel"],
    "shown below 1": ["exposed_items_are_known"], "shown null": ["exposed_items_are_known"],
    "no list": ["arrays_are_parallel"], "no user": ["user_id_is_key"],
    "no position": ["arrays_are_parallel", "ordinals_begin_with_one"],
    "the same user twice": ["user_id_is_key"],
}  # fmt: skip


def test_files_are_apart_if_no_user_is_in_two() -> None:
    one, other = {"first": "a", "last": "c"}, {"first": "d", "last": "f"}
    empty = {"first": None, "last": None}
    assert arrow_columns.apart([other, empty, one])
    assert not arrow_columns.apart([one, {"first": "c", "last": "f"}])
    assert not arrow_columns.apart([one, {"first": "b", "last": "b"}])


def test_hashes_are_spread() -> None:
    numbers = arrow_columns.words_of(pa.array([f"{n:032x}" for n in range(1000)]))
    ones = np.unpackbits(numbers.view(np.uint8)).reshape(1000, 64).mean(axis=0)
    assert (abs(ones - 0.5) < 0.1).all()  # every bit of every second one
