"""Whether a suite holds of many rows, asked in the way that costs Spark least.

The conditions are those of `expectations/`, word for word. Asked row by row they look into arrays
with lambdas, which Spark interprets, and drag whole arrays through a sort to find the row before.
Here arrays are laid out, so that generated code looks at neighbours, and only the ends of sessions
are sorted. The answer is that all holds, or nothing: then the slow way finds what does not, and
where.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from expectations.check import Check
from expectations.session_rule import SessionRule

PRIME = 16_777_213  # sums of hashes below it fit 64 bits for 2^39 rows


def all_hold(rows: DataFrame, checks: Iterable[Check], rule: SessionRule | None = None) -> bool:
    """Whether every row check holds; `rule` is the session rule where rows are sessions."""
    checks = [check for check in checks if check.condition]
    alone = [check for check in checks if not check.across]
    across = [check for check in checks if check.across]
    bounded = any(check.name == "bounds_are_the_events" for check in alone)
    if across and rule is not None and not (bounded and times_are_apart(rows, rule)):
        ends = with_previous(ends_only(rows, rule), rule)
        if not _none(ends.agg(*(F.count_if(_broken(c.condition)) for c in across))):
            return False
    arrays = [check for check in alone if check.of_array]
    if not arrays:
        return _none(rows.agg(*(F.count_if(_broken(check.condition)) for check in alone)))
    laid = rows.select("*", F.posexplode_outer(arrays[0].array).alias("at", "_element"))
    first, later = F.expr("coalesce(at, 0) = 0"), F.expr("at > 0")
    # An array longer than the one that is laid out is another check's business (they are parallel).
    return _none(
        laid.agg(
            *(
                F.count_if(
                    (later if check.pair else F.col("at").isNotNull()) & _broken(check.at("at"))
                )
                if check.of_array
                else F.count_if(first & _broken(check.condition))
                for check in alone
            )
        )
    )


def times_are_apart(sessions: DataFrame, rule: SessionRule) -> bool:
    """Whether a user's sessions are further apart than the gap by their `start_ts` and `end_ts`.

    If they are, and if these are the times of their first and last events, then neighbours are
    apart where silence alone parts them, and in order: no event needs to be looked at.
    """
    if not rule.by_silence:
        return False
    by_user = Window.partitionBy("user_id").orderBy("start_ts", "end_ts")
    last, first = F.lag("end_ts").over(by_user), F.col("start_ts")
    ends = sessions.select(
        F.struct(last.alias("event_ts")).alias("last"),
        F.struct(first.alias("event_ts")).alias("first"),
    )
    return _none(ends.agg(F.count_if(F.expr(rule.sql.belong("last", "first")))))


def _broken(condition: str) -> Column:
    return F.expr(f"NOT ({condition})")


def _none(counts: DataFrame) -> bool:
    found = counts.first()
    assert found is not None
    return not any(found)


def ends_only(sessions: DataFrame, rule: SessionRule) -> DataFrame:
    """Sessions with the first and the last of their events, and of those what orders them."""

    def end(event: Column) -> Column:
        return F.struct(*(event.getField(name).alias(name) for name in names))

    names = rule.sql.order_columns
    # (Structs of fields of `get(events, 0)` are Java that does not compile.)
    ends = (end(F.try_element_at("events", F.lit(place))) for place in (1, -1))
    said = ["boundary_before"] if rule.boundary else []
    return sessions.select("user_id", *said, F.array(*ends).alias("events"))


def with_previous(sessions: DataFrame, rule: SessionRule) -> DataFrame:
    """Add `previous_last`: the last event of the user's session before this one; and where sessions
    are split, `whole_start`: when the first piece of the whole session starts."""
    key = F.expr(rule.sql.order_key("get(events, 0)"))
    by_user = Window.partitionBy("user_id").orderBy(key)
    found = sessions.withColumn(
        "previous_last", F.lag(F.try_element_at("events", F.lit(-1))).over(by_user)
    )
    if not rule.split:
        return found
    together = F.expr(rule.sql.belong("previous_last", "get(events, 0)"))
    opens = F.col("previous_last").isNull() | ~together
    if rule.boundary:
        opens = opens | F.col("boundary_before")
    start = F.when(opens, F.expr("get(events, 0).event_ts"))
    so_far = by_user.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    return found.withColumn("whole_start", F.last(start, ignorenulls=True).over(so_far))


def same_events(sessions: DataFrame, events: DataFrame) -> tuple[int, int, bool]:
    """How many events are in the sessions and in the table, and whether they are the same ones
    of the same users. False is certain; True may be wrong with the probability of a 64-bit hash
    collision."""
    inside = sessions.select("user_id", F.explode("events.event_id").alias("event_id"))
    one, other = (_print(frame) for frame in (inside, events))
    return one[0], other[0], one == other


def balance_of_all(sessions: DataFrame, events: DataFrame) -> dict[str, bool]:
    """`events_balance` and `each_event_once` of all sessions together, against the events that they
    were cut from: `user_id`, `event_id`."""
    _, _, same = same_events(sessions, events)
    # (An event of the table is there once: the same ones are, too.)
    return {"events_balance": same, "each_event_once": same or events_are_distinct(sessions)}


def events_are_distinct(sessions: DataFrame) -> bool:
    """Whether no event is in the sessions twice."""
    ids = sessions.select(F.explode("events.event_id").alias("event_id"))
    return ids.groupBy("event_id").count().where("count > 1").isEmpty()


def _print(events: DataFrame) -> tuple[int, int, int]:
    digest = F.xxhash64("user_id", "event_id")
    found = events.agg(
        F.count("*"),
        F.coalesce(F.bit_xor(digest), F.lit(0)),
        F.coalesce(F.sum(F.pmod(digest, F.lit(PRIME))), F.lit(0)),
    ).first()
    assert found is not None
    return found[0], found[1], found[2]
