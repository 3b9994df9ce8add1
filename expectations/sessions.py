"""What must hold of `silver.sessions`: the session rule, asked from the table's side."""

from __future__ import annotations

from expectations.check import Check
from expectations.session_rule import SessionRule


def checks(rule: SessionRule) -> tuple[Check, ...]:
    """The suite for one session rule (`[sessions]` of the source file).

    Conditions across rows read `previous_last`, the last event of the user's session before, and
    where sessions are split `whole_start`, when the first piece of the whole session starts. Where
    the rule has a boundary, conditions read `boundary_inside` and `boundary_before`: whether it is
    true of two neighbours inside a session, and of the session's first event and the one before it.
    """
    order_key, belong = rule.sql.order_key, rule.sql.belong
    flag, apart = _flag(rule), _apart(rule)
    before = order_key("{a}") + " < " + order_key("{b}")
    return (
        Check(
            name="session_id_is_key", says="a session is in the table once",
            unique=("session_id",),
        ),
        Check(
            name="events_in_order",
            says="inside a session, every event comes after the one before it in the total order",
            array="events", pair=before,
        ),
        Check(
            name="no_boundary_inside",
            says="inside a session, every two neighbours belong together by the session rule",
            array="events", pair=belong("{a}", "{b}"),
        ),
        Check(
            name="neighbours_are_apart",
            says="the last event of a session and the first of the user's next one do not belong "
                 "together by the session rule" + ", or to one piece" * rule.split,
            across=True, holds=apart,
        ),
        *(pieces(rule) if rule.split else ()),
        *(BOUNDARY if rule.boundary else ()),
        Check(
            name="neighbours_in_order",
            says="a user's sessions do not overlap in the total order",
            across=True,
            holds="previous_last IS NULL OR "
                  + order_key("previous_last") + " < " + order_key("get(events, 0)"),
        ),
        Check(
            name="bounds_are_the_events",
            says="start, end, date and count are those of the events",
            holds="coalesce(event_count >= 1 AND size(events) = event_count "
                  "AND start_ts = get(events, 0).event_ts "
                  "AND end_ts = try_element_at(events, -1).event_ts "
                  "AND start_date = to_date(start_ts), false)",
        ),
        Check(
            name="runaways_are_flagged", says="runaway says which bound is exceeded, or is null",
            holds=f"coalesce(runaway, '') = coalesce({flag}, '')",
        ),
        *BALANCED,
    )  # fmt: skip


def _flag(rule: SessionRule) -> str:
    """What `runaway` has to say of a session."""
    flag = rule.sql.runaway("unix_micros(end_ts) - unix_micros(start_ts)", "event_count")
    if rule.behaviour is None:
        return flag
    return f"coalesce({flag}, {rule.behaviour.sql('events')})"


def _apart(rule: SessionRule) -> str:
    """Whether a session and the user's session before it are two."""
    apart = "previous_last IS NULL OR NOT " + rule.sql.belong("previous_last", "get(events, 0)")
    if rule.split:
        first, last = (
            rule.sql.piece("whole_start", time)
            for time in ("get(events, 0).event_ts", "previous_last.event_ts")
        )
        apart += f" OR {last} < {first}"
    return apart + " OR boundary_before" if rule.boundary else apart


def pieces(rule: SessionRule) -> tuple[Check, ...]:
    """Of sessions that are split."""
    first, last = (
        rule.sql.piece("whole_start", f"{event}.event_ts")
        for event in ("get(events, 0)", "try_element_at(events, -1)")
    )
    return (
        Check(
            name="pieces_are_cut",
            says="a session that is longer than max_session_hours is cut at multiples of them from "
            "its first event",
            across=True,
            holds=f"{first} = {last}",
        ),
    )


BOUNDARY = (
    Check(
        name="no_boundary_of_the_source_inside",
        says="sessions.boundary is true of no two neighbours inside a session",
        holds="NOT boundary_inside",
    ),
    Check(
        name="boundary_values_are_the_events",
        says="there are as many boundary values as events, or none",
        holds="boundary_values IS NULL OR size(boundary_values) = size(events)",
    ),
)
"""Of sessions whose source has a boundary."""

BALANCED = (
    Check(name="each_event_once", says="no event is in two sessions of the batch"),
    Check(
        name="events_balance",
        says="events in the sessions before + events that came - events that went = events in "
        "the sessions after",
    ),
)
"""What is computed from counts."""
