"""The renderings of the session rule against another engine, and against each other. No Spark."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expectations.session_rule import SessionRule, local_clock
from tests.support.oracle import More, expected_sessions

GAP_US, MOST_US, MOST = 10, 25, 4
GAP, NATIVE = (
    SessionRule(native=native, gap_us=GAP_US, max_session_us=MOST_US, max_session_events=MOST)
    for native in (False, True)
)
ZONE = "America/St_Johns"  # whose clocks once went back over midnight
NIGHT_US = 1_162_092_660_000_000  # when they did: at a minute past, on the 29th of October 2006
RULES = {
    "gap": GAP, "native": NATIVE, "native with a gap": replace(NATIVE, native_gap=True),
    "split": replace(GAP, split=True), "native split": replace(NATIVE, split=True),
    "midnight": replace(GAP, midnight=ZONE), "native midnight": replace(NATIVE, midnight=ZONE),
    "all": replace(NATIVE, native_gap=True, split=True, midnight=ZONE),
}  # fmt: skip
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
EVENT = st.tuples(
    st.sampled_from(["ann", "bob", "zoë", "\U0001f600", *"123456"]),
    # microseconds, many of them equal
    st.one_of(
        st.integers(0, 3),
        st.integers(-30, 60),
        st.integers(-30, 60).map(NIGHT_US.__add__),
        st.integers(-30, 60).map((NIGHT_US + 3_540_000_000).__add__),
    ),
    st.sampled_from([None, -1, 0, 5]),
    st.sampled_from([None, None, "a", "b", "é"]),
)
Event = tuple[str, int, int | None, str | None]
EDGES: list[Event] = [
    ("exactly the gap", 0, None, None), ("exactly the gap", GAP_US, None, None),
    ("more", 0, None, None), ("more", GAP_US + 1, None, None),
    ("an id lasts", 0, 0, "a"), ("an id lasts", 60, 0, "a"), ("an id lasts", 60, 0, None),
    ("ids first", 0, None, "b"), ("ids first", 0, 5, None), ("ids first", 0, 5, "b"),
    ("ids first", 0, 0, "a"),
    ("nulls last", 0, 0, None), ("nulls last", 0, None, None), ("nulls last", 0, -1, None),
]  # fmt: skip


def table(events: list[Event]) -> pa.Table:
    rows = [
        {
            "user_id": user, "event_ts": at, "tie_break": tie, "source_session_id": native,
            "event_id": f"e{(number * 7919) % 1000:03d}", "item_id": f"i{number}",
        }
        for number, (user, at, tie, native) in enumerate(events)
    ]  # fmt: skip
    schema = pa.schema([
        ("user_id", pa.string()), ("event_ts", pa.timestamp("us", "UTC")),
        ("tie_break", pa.int64()), ("source_session_id", pa.string()), ("event_id", pa.string()),
        ("item_id", pa.string()),
    ])  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def codes(texts: list[str | None]) -> np.ndarray:
    known = sorted({one for one in texts if one is not None})
    return np.array([-1 if one is None else known.index(one) for one in texts])


class InOrder:
    """Events as the arrays' rendering orders them; ties are Arrow arrays or lists."""

    def __init__(self, events: pa.Table, rule: SessionRule, arrow: bool = True) -> None:
        asked: list[np.ndarray] = []

        def ties(places: np.ndarray) -> dict[str, Any]:
            asked.append(places)
            rows = events.take(pa.array(places))
            return {name: rows[name] if arrow else rows[name].to_pylist() for name in rule.ties}

        users, times = codes(events["user_id"].to_pylist()), events["event_ts"].cast(pa.int64())
        self.places = rule.arrays.order(users, times.to_numpy(), ties)
        self.asked = sorted(place for many in asked for place in many.tolist())
        self.rows = events.take(pa.array(self.places)).combine_chunks()
        self.users, self.times = users[self.places], times.to_numpy()[self.places]
        self.native = codes(self.rows["source_session_id"].to_pylist())


def by_arrays(events: pa.Table, rule: SessionRule) -> list[tuple[Any, ...]]:
    """Sessions: id, user, start, end, flag, ids of events."""
    done = InOrder(events, rule)
    first = np.flatnonzero(rule.arrays.opens(done.users, done.times, done.native))
    last = np.append(first[1:], events.num_rows) - 1
    ids, users = done.rows["event_id"].to_pylist(), done.rows["user_id"].to_pylist()
    names = rule.arrays.session_ids([users[at] for at in first], [ids[at] for at in first])
    flags = rule.arrays.runaway(done.times[last] - done.times[first], last - first + 1)
    return sorted(
        (name, users[a], int(done.times[a]), int(done.times[b]), flag, tuple(ids[a : b + 1]))
        for name, flag, a, b in zip(names, flags, first, last, strict=True)
    )


@pytest.fixture(scope="module")
def db() -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB that knows the functions of Spark SQL that the rule's texts call."""
    with duckdb.connect() as made:
        made.execute("SET TimeZone = 'UTC'")
        made.execute("CREATE MACRO unix_micros(moment) AS epoch_us(moment)")
        made.execute("CREATE MACRO sha2(words, bits) AS sha256(words)")
        made.execute("CREATE MACRO from_utc_timestamp(moment, zone) AS timezone(zone, moment)")
        made.execute("CREATE MACRO to_date(moment) AS CAST(moment AS DATE)")
        yield made


def more(rule: SessionRule) -> More:
    return More(native_gap=rule.native_gap, midnight=rule.midnight, split=rule.split)


def by_sql(
    db: duckdb.DuckDBPyConnection, events: pa.Table, rule: SessionRule, keyed: bool
) -> list[tuple[Any, ...]]:
    """As `by_arrays`; ordered by the columns, or by the key."""
    order = ", ".join(f"{name} NULLS LAST" for name in rule.sql.order_columns)
    if keyed:
        order = rule.sql.order_key("e").replace("struct(", "row(")
    piece = rule.sql.piece("since", "event_ts") if rule.split else "number"
    db.register("events", events)
    return sorted(
        db.sql(f"""
            WITH placed AS (
                SELECT *, row_number() OVER w AS place,
                    lag({{'event_ts': event_ts, 'source_session_id': source_session_id}}) OVER w AS a,
                    {{'event_ts': event_ts, 'source_session_id': source_session_id}} AS b
                FROM events e WINDOW w AS (PARTITION BY user_id ORDER BY {order})
            ), numbered AS (
                SELECT *, count(*) FILTER (place = 1 OR NOT {rule.sql.belong("a", "b")}) OVER (
                    PARTITION BY user_id ORDER BY place ROWS UNBOUNDED PRECEDING) AS number
                FROM placed
            ), cut AS (
                SELECT *, min(event_ts) OVER (PARTITION BY user_id, number) AS since FROM numbered
            ), sessions AS (
                SELECT user_id, list(event_id ORDER BY place) AS ids, epoch_us(min(event_ts)) AS lo,
                    epoch_us(max(event_ts)) AS hi, count(*) AS event_count
                FROM cut GROUP BY user_id, number, {piece}
            )
            SELECT {rule.sql.session_id("user_id", "ids[1]")}, user_id, lo, hi,
                {rule.sql.runaway("hi - lo", "event_count")}, ids
            FROM sessions
        """).fetchall(),
        key=lambda row: row[0],
    )  # fmt: skip


@each_rule
@settings(max_examples=5, deadline=None)  # a query costs more than many rows
@given(events=st.lists(EVENT, min_size=1, max_size=150))
@example(events=EDGES)
def test_both_renderings_are_the_oracles(
    db: duckdb.DuckDBPyConnection, rule: SessionRule, events: list[Event]
) -> None:
    log = table(events)
    wanted = sorted(
        (row["session_id"], row["user_id"], row["start_us"], row["end_us"], row["runaway"],
         tuple(row["events"]))
        for row in expected_sessions(log, native=rule.native, gap_s=GAP_US / 1e6,
                                     max_hours=MOST_US / 3.6e9, max_events=MOST, more=more(rule))
    )  # fmt: skip
    assert by_arrays(log, rule) == wanted
    for keyed in (False, True):
        found = by_sql(db, log, rule, keyed)
        assert [(*row[:5], tuple(row[5])) for row in found] == wanted


@each_rule
@settings(max_examples=50, deadline=None)
@given(events=st.lists(EVENT, max_size=25))
def test_order_asks_for_ties_alone_and_rise_agrees(rule: SessionRule, events: list[Event]) -> None:
    log = table(events)
    done, other = InOrder(log, rule), InOrder(log, rule, arrow=False)
    assert done.places.tolist() == other.places.tolist()
    moments = [(user, at) for user, at, *_ in events]
    assert done.asked == [n for n, one in enumerate(moments) if moments.count(one) > 1]
    tied = np.flatnonzero((np.diff(done.users) == 0) & (np.diff(done.times) == 0))
    before, after = (
        {name: done.rows[name].take(pa.array(at)) for name in rule.ties} for at in (tied, tied + 1)
    )
    assert rule.arrays.rise(before, after).all()
    assert not rule.arrays.rise(after, before).any()
    assert not rule.arrays.rise(before, before).any()  # an event does not come after itself


@each_rule
@settings(max_examples=50, deadline=None)
@given(events=st.lists(EVENT, min_size=1, max_size=25))
@example(events=EDGES)
def test_neighbours_belong_together_where_no_session_opens(
    rule: SessionRule, events: list[Event]
) -> None:
    """What audits compare says the same as what cuts."""
    done = InOrder(table(events), rule)
    before, after = done.times[:-1], done.times[1:]
    near = rule.arrays.near(before, before, after, after)
    ids = done.rows["source_session_id"].combine_chunks()
    belong = rule.arrays.belong(near, ids[:-1], ids[1:]) & rule.arrays.same_day(before, after)
    same = done.users[1:] == done.users[:-1]
    whole = replace(rule, split=False).arrays.opens(done.users, done.times, done.native)
    assert (same & belong).tolist() == (~whole[1:]).tolist()
    if not rule.split:
        return
    opens = rule.arrays.opens(done.users, done.times, done.native)
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(opens)) - 1
    start, end = done.times[first], done.times[last]
    assert rule.arrays.in_pieces(whole[first], start, end).all()
    # One piece more, or one less, is found wherever it is not the whole session's only one.
    for at in np.flatnonzero(~whole[first]):
        keep = np.delete(np.arange(len(first)), at)
        ends = np.where(keep == at - 1, end[at], end[keep])
        assert not rule.arrays.in_pieces(whole[first][keep], start[keep], ends).all()


@settings(max_examples=50, deadline=None)
@given(events=st.lists(EVENT, min_size=1, max_size=25))
def test_sessions_are_not_near_and_their_events_are(events: list[Event]) -> None:
    """What audits look at says the same as what cuts: under the gap rule."""
    near = GAP.arrays.near
    users: dict[str, list[tuple[Any, ...]]] = {}
    times = {row["event_id"]: row["event_ts"] for row in table(events).cast(pa.schema([
        ("user_id", pa.string()), ("event_ts", pa.int64()), ("tie_break", pa.int64()),
        ("source_session_id", pa.string()), ("event_id", pa.string()), ("item_id", pa.string()),
    ])).to_pylist()}  # fmt: skip
    for row in by_arrays(table(events), GAP):
        users.setdefault(row[1], []).append(row)
        at = np.array([times[one] for one in row[5]])
        assert near(at[:-1], at[:-1], at[1:], at[1:]).all()
    for rows in users.values():
        start, end = np.array(sorted((row[2], row[3]) for row in rows)).T
        assert not near(start[:-1], end[:-1], start[1:], end[1:]).any()
        first, last = GAP.arrays.reach(start, end)
        assert not GAP.arrays.silent(end, last).any() and GAP.arrays.silent(end, last + 1).all()
        assert not GAP.arrays.silent(first, start).any()


def test_each_flag_is_right_for_its_bounds_alone() -> None:
    span, count = (np.array(one).ravel() for one in np.meshgrid(
        [0, MOST_US, MOST_US + 1], [1, MOST, MOST + 1]
    ))  # fmt: skip
    right = GAP.arrays.runaway(span, count)
    assert right.tolist() == [None, None, "hours"] * 2 + ["events", "events", "hours"]
    for flag in (None, "hours", "events", "other"):
        told = np.full(len(span), flag, object)
        assert GAP.arrays.flagged(told, span, count).tolist() == (right == told).tolist()


@pytest.mark.parametrize("zone", [ZONE, "Asia/Beirut", "Pacific/Apia", "Africa/Monrovia", "UTC"])
def test_clocks_of_a_zone_are_pythons(zone: str) -> None:
    drawn = random.Random(zone)
    seconds = [drawn.randrange(-2_000_000_000, 4_000_000_000) for _ in range(300)]
    seconds += [NIGHT_US // 10**6 + n for n in (-3601, -3600, -1, 0, 1)]
    seconds += [-62_135_596_800, 253_402_300_799]  # the first second that is a time, and the last
    found = local_clock(np.array(seconds) * 1_000_000, zone)
    for second, there in list(zip(seconds, found.tolist(), strict=True))[:-2]:
        clock = datetime.fromtimestamp(second, ZoneInfo(zone)).replace(tzinfo=UTC)
        assert there == clock.timestamp() * 1_000_000
