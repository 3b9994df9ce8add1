"""What must hold of `silver.sessions`: the session rule itself, restated from the table's side."""

from __future__ import annotations

from expectations.check import Check

# a comes before b in the total order; nulls last
ORDER = {
    "gap": "struct({x}.event_ts, {x}.tie_break IS NULL, {x}.tie_break, {x}.event_id)",
    "source_session_id": "struct({x}.event_ts, {x}.source_session_id IS NULL, "
                         "{x}.source_session_id, {x}.tie_break IS NULL, {x}.tie_break, "
                         "{x}.event_id)",
}  # fmt: skip


def order_key(rule: str, row: str) -> str:
    """The total order of a user's events, as a struct that compares by it."""
    return ORDER[rule].format(x=row)


def belong(rule: str, gap_us: int, a: str, b: str) -> str:
    """Do two neighbours in the order belong to one session?"""
    near = f"unix_micros({b}.event_ts) - unix_micros({a}.event_ts) <= {gap_us}"
    if rule == "gap":
        return near
    return (
        f"(CASE WHEN {a}.source_session_id IS NULL AND {b}.source_session_id IS NULL THEN {near} "
        f"ELSE coalesce({a}.source_session_id = {b}.source_session_id, false) END)"
    )


def checks(
    rule: str, gap_us: int, max_session_us: int, max_session_events: int
) -> tuple[Check, ...]:
    """The suite for one session rule (`[sessions]` of the source file)."""
    span = "unix_micros(end_ts) - unix_micros(start_ts)"
    flag = (
        f"CASE WHEN {span} > {max_session_us} THEN 'hours' "
        f"WHEN event_count > {max_session_events} THEN 'events' END"
    )
    before = order_key(rule, "{a}") + " < " + order_key(rule, "{b}")
    return (
        Check(
            name="session_id_is_key", says="a session stands in the table once",
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
            array="events", pair=belong(rule, gap_us, "{a}", "{b}"),
        ),
        Check(
            name="neighbours_are_apart",
            says="the last event of a session and the first of the user's next one do not belong "
                 "together by the session rule",
            across=True,
            holds="previous_last IS NULL OR NOT "
                  + belong(rule, gap_us, "previous_last", "get(events, 0)"),
        ),
        Check(
            name="neighbours_in_order",
            says="a user's sessions do not overlap in the total order",
            across=True,
            holds="previous_last IS NULL OR "
                  + order_key(rule, "previous_last") + " < " + order_key(rule, "get(events, 0)"),
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
        Check(
            name="each_event_once",
            says="no event stands in two sessions of the batch",
        ),
        Check(
            name="events_balance",
            says="events in the sessions before + events that came - events that went = events in "
                 "the sessions after",
        ),
    )  # fmt: skip
