"""Sessions cut by Spark SQL: any rule, any change. Pure transforms of DataFrames.

Under the gap rule all sessions are cut by `jobs/lake/time_slices.py` and a night's by `jobs/silver/cut_nightly.py`;
native session ids, replaced events and large changes are cut here.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from expectations.session_rule import SessionRule
from jobs.core.tables import EVENT_STRUCT, SESSIONS
from jobs.lake.change_feed import CAME, GONE

EVENT_FIELDS = (
    "event_id", "event_ts", "item_id", "event_type", "value", "feedback", "tie_break",
    "source_session_id", "exposed_with",
)  # fmt: skip


def total_order(rule: SessionRule) -> list[Column]:
    """The order of a user's events, as sort columns."""
    return [F.asc_nulls_last(name) for name in rule.sql.order_columns]


def cut(events: DataFrame, rule: SessionRule) -> DataFrame:
    """Cut events into sessions.

    Args:
        events: `user_id`, the fields of an event, and `old_session_id` (null: in none yet).

    Returns:
        The columns of `silver.sessions`, and `merged`: holds events of two or more old sessions.
    """
    by_user = Window.partitionBy("user_id").orderBy(*total_order(rule))
    here = F.struct("event_ts", "source_session_id")
    previous = F.lag(here).over(by_user)
    marked = events.withColumns({"_here": here, "_previous": previous})
    together = F.expr(rule.sql.belong("_previous", "_here"))
    opens = F.when(F.col("_previous").isNotNull() & together, 0).otherwise(1)
    numbered = marked.withColumn("_opens", opens).withColumn(
        "_number", F.sum("_opens").over(by_user.rowsBetween(Window.unboundedPreceding, 0))
    )
    # collect_list promises no order (at millions of events its partial lists are merged in
    # another one), so the key travels along and the list is sorted.
    keyed = F.struct(F.expr(rule.sql.order_key("_e")).alias("_k"), F.col("_e"))
    collected = (
        numbered.withColumn("_e", F.struct(*EVENT_FIELDS))
        .groupBy("user_id", "_number")
        .agg(
            F.sort_array(F.collect_list(keyed)).alias("_list"),
            F.min("old_session_id").alias("_old_min"),
            F.max("old_session_id").alias("_old_max"),
        )
    )
    events_array = F.col("_list").getField("_e").cast(f"array<{EVENT_STRUCT}>")
    sessions = collected.withColumn("events", events_array)
    first, last = F.col("events")[0], F.element_at("events", -1)
    sessions = sessions.withColumns(
        {"start_ts": first.event_ts, "end_ts": last.event_ts, "event_count": F.size("events")}
    )
    flag = rule.sql.runaway("unix_micros(end_ts) - unix_micros(start_ts)", "event_count")
    return sessions.select(
        F.expr(rule.sql.session_id("user_id", "events[0].event_id")).alias("session_id"), "user_id", "start_ts",
        "end_ts", F.to_date("start_ts").alias("start_date"), "event_count",
        F.expr(flag).alias("runaway"), "events", F.coalesce(F.col("_old_min") < F.col("_old_max"), F.lit(False)).alias("merged"),
    )  # fmt: skip


def net_changes(feed: DataFrame) -> DataFrame:
    """The change per event over several commits: the first pre-image and the last post-image.

    Returns:
        `event_id`, `gone` and `came` (structs of the event with its user; null: none).
    """
    whole = F.struct("user_id", *EVENT_FIELDS)
    version = F.col("_commit_version")
    kind = F.col("_change_type")
    is_gone = kind.isin(*GONE)
    first = F.min(F.when(is_gone, version)).alias("_first_gone")
    came_first = F.min(F.when(kind.isin(*CAME), version)).alias("_first_came")
    gone = F.min_by(whole, F.when(is_gone, version)).alias("gone")
    came = F.max_by(whole, F.when(kind.isin(*CAME), version)).alias("came")
    last = F.max_by(kind, F.struct(version, kind.isin(*CAME))).alias("_last")
    per_event = feed.groupBy("event_id").agg(first, came_first, gone, came, last)
    return per_event.select(
        "event_id",
        # It was there before only if its first change took something away.
        F.when(
            F.col("_first_gone").isNotNull()
            & (F.col("_first_came").isNull() | (F.col("_first_gone") <= F.col("_first_came"))),
            F.col("gone"),
        ).alias("gone"),
        F.when(F.col("_last").isin(*CAME), F.col("came")).alias("came"),
    )


def spans(changes: DataFrame) -> DataFrame:
    """Per user, the first and last time at which something changed: `user_id, lo, hi`."""
    places = changes.select(F.explode(F.array("gone", "came")).alias("place")).where(
        "place IS NOT NULL"
    )
    return places.groupBy(F.col("place.user_id").alias("user_id")).agg(
        F.min("place.event_ts").alias("lo"), F.max("place.event_ts").alias("hi")
    )


def touched(sessions: DataFrame, changed: DataFrame, rule: SessionRule) -> DataFrame:
    """The sessions that the changes may alter; no other session's row depends on them.

    Gap rule: those within `gap_s` of a user's changes. Native rule: those from the last session
    that ends before the first change to the first that starts after the last.
    """
    if not rule.native:
        ends = changed.agg(F.min(F.unix_micros("lo")), F.max(F.unix_micros("hi"))).first()
        if ends is None or ends[0] is None:
            return sessions.where("false")
        first, last = rule.arrays.reach(*ends)
        sessions = sessions.where(  # literals: file statistics prune by them
            (F.col("end_ts") >= F.timestamp_micros(F.lit(first)))
            & (F.col("start_ts") <= F.timestamp_micros(F.lit(last)))
        )
        near = rule.arrays.near(*(F.unix_micros(n) for n in ("start_ts", "end_ts", "lo", "hi")))
        return sessions.join(F.broadcast(changed), "user_id").where(near).drop("lo", "hi")
    bounds = (
        sessions.select("user_id", "start_ts", "end_ts")
        .join(F.broadcast(changed), "user_id")
        .groupBy("user_id")
        .agg(
            F.max(F.when(F.col("end_ts") < F.col("lo"), F.col("end_ts"))).alias("_from"),
            F.min(F.when(F.col("start_ts") > F.col("hi"), F.col("start_ts"))).alias("_to"),
        )
    )
    near = (F.col("_from").isNull() | (F.col("end_ts") >= F.col("_from"))) & (
        F.col("_to").isNull() | (F.col("start_ts") <= F.col("_to"))
    )
    return sessions.join(F.broadcast(bounds), "user_id").where(near).drop("_from", "_to")


def recut(old: DataFrame, changes: DataFrame, rule: SessionRule) -> DataFrame:
    """Cut the touched sessions again, without the events that went and with those that came."""
    exploded = old.select(
        F.col("session_id").alias("old_session_id"), "user_id", F.explode("events").alias("e")
    ).select("old_session_id", "user_id", "e.*")
    kept = exploded.join(changes.select("event_id"), "event_id", "left_anti")
    came = changes.where("came IS NOT NULL").select("came.*")
    came = came.withColumn("old_session_id", F.lit(None).cast("string"))
    return cut(kept.unionByName(came), rule)


def difference(old: DataFrame, new: DataFrame) -> DataFrame:
    """What the commit must do: rows of `silver.sessions` with `change` new, changed or retired."""
    before = old.select(
        "session_id", *(F.col(n).alias(f"_{n}") for n in SESSIONS.columns if n != "session_id")
    )
    both = new.join(before, "session_id", "full_outer")
    same = F.lit(True)
    for name in ("start_ts", "end_ts", "runaway", "events"):
        same = same & F.col(name).eqNullSafe(F.col(f"_{name}"))
    change = (
        F.when(F.col("_user_id").isNull(), "new")
        .when(F.col("user_id").isNull(), "retired")
        .when(~same, "changed")
        .otherwise("same")
    )
    # A retired row carries what it was: MERGE prunes files by it, and the audit counts by it.
    filled = {
        name: F.coalesce(name, f"_{name}") for name in SESSIONS.columns if name != "session_id"
    }
    filled["runaway"] = F.when(F.col("user_id").isNull(), F.col("_runaway")).otherwise(
        F.col("runaway")
    )
    return both.withColumn("change", change).select(
        "session_id",
        *(filled[name].alias(name) for name in SESSIONS.columns if name != "session_id"),
        "change", F.coalesce("merged", F.lit(False)).alias("merged"),
        F.coalesce(F.col("_event_count"), F.lit(0)).alias("old_event_count"),
        "_start_ts", "_end_ts",
    )  # fmt: skip
