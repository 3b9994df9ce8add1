"""An independent sessionizer: DuckDB, written from the rule in ARCHITECTURE.md, not from the jobs.

It takes event ids from `bronze.events` (they order events of equal time) and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa


@dataclass(frozen=True)
class More:
    """What else of `[sessions]` parts events.

    parted: SQL over the columns of an event, and of the one before it as `before_<column>`: true
        where a session begins.
    """

    native_gap: bool = False
    midnight: str | None = None
    split: bool = False
    parted: str = "false"


NOTHING_MORE = More()


def expected_sessions(
    events: pa.Table, *, native: bool, gap_s: float, max_hours: float, max_events: int,
    more: More = NOTHING_MORE,
) -> list[dict[str, Any]]:  # fmt: skip
    """Sessions of a set of events: id, user, start, end, count, runaway, ordered event ids."""
    order = "event_ts, tie_break NULLS LAST, event_id"
    near = f"epoch_us(event_ts) - epoch_us(before_ts) <= {round(gap_s * 1e6)}"
    if native:
        order = "event_ts, source_session_id NULLS LAST, tie_break NULLS LAST, event_id"
        belongs = (
            "CASE WHEN source_session_id IS NULL AND before_id IS NULL THEN " + near
            + " WHEN source_session_id IS NULL OR before_id IS NULL THEN false"
            + " ELSE source_session_id = before_id"
            + (f" AND {near}" if more.native_gap else "") + " END"
        )  # fmt: skip
    else:
        belongs = near
    days = ["true"]
    if more.midnight is not None:
        days = [
            f"strftime(timezone('{more.midnight}', {one}), '%x')"
            for one in ("event_ts", "before_ts")
        ]
    belongs = f"({belongs}) AND {' = '.join(days)} AND NOT coalesce({more.parted}, false)"
    max_us = round(max_hours * 3.6e9)
    # Of a session that is split, events belong to the piece that ends first, not before them.
    piece = f"greatest(ceil((epoch_us(event_ts) - since) / {max_us}), 1)"
    piece = piece if more.split else "number"
    names = [f"lag({name}) OVER w AS before_{name}" for name in events.column_names]
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("events", events)
        found = db.sql(f"""
            WITH placed AS (
                SELECT *, row_number() OVER w AS place,
                       lag(event_ts) OVER w AS before_ts,
                       lag(source_session_id) OVER w AS before_id, {", ".join(names)}
                FROM events WINDOW w AS (PARTITION BY user_id ORDER BY {order})
            ), marked AS (
                SELECT *, place = 1 OR NOT ({belongs}) AS opens FROM placed
            ), numbered AS (
                SELECT *, count(*) FILTER (opens) OVER (
                    PARTITION BY user_id ORDER BY place ROWS UNBOUNDED PRECEDING) AS number
                FROM marked
            ), cut AS (
                SELECT *, {piece} AS piece FROM (
                    SELECT *, epoch_us(min(event_ts) OVER (PARTITION BY user_id, number)) AS since
                    FROM numbered)
            ), sessions AS (
                SELECT user_id, number, piece, list(event_id ORDER BY place) AS events,
                       list(item_id ORDER BY place) AS items,
                       epoch_us(min(event_ts)) AS start_us, epoch_us(max(event_ts)) AS end_us,
                       count(*) AS event_count
                FROM cut GROUP BY user_id, number, piece
            )
            SELECT left(sha256(length(user_id) || ':' || user_id || '/' || events[1]), 32)
                       AS session_id,
                   user_id, start_us, end_us, event_count,
                   CASE WHEN end_us - start_us > {max_us} THEN 'hours'
                        WHEN event_count > {max_events} THEN 'events' END AS runaway,
                   events, items
            FROM sessions ORDER BY user_id, number, piece
        """)
        rows: list[dict[str, Any]] = found.to_arrow_table().to_pylist()
        return rows


def with_persons(events: pa.Table, link: str, max_days: float | None) -> pa.Table:
    """Events of the log with their person as `user_id`."""
    bound = "true" if max_days is None else f"first_us - us <= {round(max_days * 86_400_000_000)}"
    latest = "coalesce(before, later)" if link == "last" else "first_user"
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("events", events)
        found = db.sql(f"""
            WITH logins AS (
                SELECT anonymous_id, epoch_us(event_ts) AS us, max(user_id) AS user_id FROM events
                WHERE user_id IS NOT NULL AND anonymous_id IS NOT NULL GROUP BY ALL
            ), asked AS (
                SELECT DISTINCT anonymous_id, epoch_us(event_ts) AS us FROM events
                WHERE user_id IS NULL
            ), told AS (
                SELECT a.anonymous_id, a.us, min(l.us) AS first_us,
                       arg_max(l.user_id, l.us) FILTER (l.us <= a.us) AS before,
                       arg_min(l.user_id, l.us) FILTER (l.us > a.us) AS later,
                       arg_min(l.user_id, l.us) AS first_user
                FROM asked a JOIN logins l ON a.anonymous_id = l.anonymous_id GROUP BY ALL
            ), named AS (
                SELECT e.* EXCLUDE (user_id),
                       coalesce(e.user_id, CASE WHEN {bound} THEN {latest} END) AS person
                FROM events e LEFT JOIN told t
                    ON e.user_id IS NULL AND e.anonymous_id = t.anonymous_id
                    AND epoch_us(e.event_ts) = t.us
            )
            SELECT * EXCLUDE (person),
                   CASE WHEN person IS NULL THEN 'anonymous:' || anonymous_id
                        WHEN regexp_matches(person, '^~*anonymous:') THEN '~' || person
                        ELSE person END AS user_id
            FROM named
        """)
        return found.to_arrow_table()


def expected_sequences(
    sessions: list[dict[str, Any]],
) -> dict[str, list[tuple[str, int]]]:
    """Per user, (item, session ordinal) of every position, runaway sessions left out."""
    users: dict[str, list[tuple[str, int]]] = {}
    ordinals: dict[str, int] = {}
    for session in sessions:  # ordered by user and place
        if session["runaway"]:
            continue
        user = session["user_id"]
        ordinals[user] = ordinals.get(user, 0) + 1
        users.setdefault(user, []).extend((item, ordinals[user]) for item in session["items"])
    return users


def behaviour_of(
    db: duckdb.DuckDBPyConnection, times: Any, count: Any, rule: dict[str, Any]
) -> list[str | None]:
    """The flag of each session by its events: `rate`, `no_pause`, or None.

    Args:
        times: microseconds, of the events of one session after another.
        count: how many each session has.
        rule: `events_per_minute` and `events_without_pause` (None: not asked), `pause_us`.
    """
    owner = [at for at, size in enumerate(count) for _ in range(size)]
    db.register("e", pa.table({"owner": pa.array(owner, pa.int64()), "us": times}))
    rate, steady = rule["events_per_minute"], rule["events_without_pause"]
    found = db.sql(f"""
        WITH windows AS (
            SELECT owner, us,
                count(*) OVER (PARTITION BY owner ORDER BY us
                    RANGE BETWEEN CURRENT ROW AND 59999999 FOLLOWING) AS many,
                us - lag(us) OVER (PARTITION BY owner ORDER BY us) > {rule["pause_us"]} AS pause
            FROM e
        ), runs AS (
            SELECT *, count(*) FILTER (pause) OVER (PARTITION BY owner ORDER BY us
                RANGE UNBOUNDED PRECEDING) AS run FROM windows
        ), sized AS (SELECT owner, max(many) AS many, count(*) AS size FROM runs GROUP BY owner, run)
        SELECT CASE WHEN max(many) > {rate or 2**60} THEN 'rate'
                    WHEN max(size) > {steady or 2**60} THEN 'no_pause' END
        FROM sized GROUP BY owner ORDER BY owner
    """).fetchall()
    return [flag for (flag,) in found]


def with_behaviour(
    sessions: list[dict[str, Any]], events: pa.Table, rule: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Sessions as `expected_sessions` has them, those of programs flagged that no bound flags.

    Args:
        rule: as `behaviour_of` takes it; None: nothing is flagged.
    """
    if rule is None or not sessions:
        return sessions
    us = dict(
        zip(
            events["event_id"].to_pylist(),
            events["event_ts"].cast(pa.int64()).to_pylist(),
            strict=True,
        )
    )
    times = pa.array([us[one] for row in sessions for one in row["events"]], pa.int64())
    with duckdb.connect() as db:
        flags = behaviour_of(db, times, [len(row["events"]) for row in sessions], rule)
    return [
        {**row, "runaway": row["runaway"] or flag}
        for row, flag in zip(sessions, flags, strict=True)
    ]
