"""Sessions around large changes, cut in Spark by slices of users.

Spark brings the events of a slice's users together. They are cut in Arrow, as all others are
(`jobs/silver/cut_nightly.py`).
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from expectations.session_rule import SessionRule
from jobs.core.arrow_types import arrow_schema
from jobs.lake.change_feed import CAME, GONE, TYPE, VERSION
from jobs.silver import cut_nightly
from jobs.silver.cut_arrow import Cut


def slice_of(parts: int) -> Column:
    """The number of a user's slice, of so many."""
    return F.pmod(F.xxhash64("user_id"), F.lit(parts)).cast("int")


def net_changes(feed: DataFrame, how: Cut) -> DataFrame:
    """`cut_nightly.net` of feeds of any size.

    Returns:
        `event_id`, `gone` and `came` (structs of the event with its user; null: none). An event
        that is what it was is left out.
    """
    whole = F.struct("user_id", *how.reads)
    version = F.col(VERSION)
    kind = F.col(TYPE)
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
    ).where(~F.col("gone").eqNullSafe(F.col("came")))


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

    Gap rule: those within `gap_s` of a user's changes. Where more parts sessions than silence: all
    that no silence parts from these. Where silence does not: those from the last session that ends
    before the first change to the first that starts after the last; all, if sessions are split.
    """
    if rule.by_silence:
        ends = changed.agg(F.min(F.unix_micros("lo")), F.max(F.unix_micros("hi"))).first()
        if ends is None or ends[0] is None:
            return sessions.where("false")
        first, last = rule.arrays.reach(*ends)
        sessions = sessions.where(  # literals: file statistics prune by them
            (F.col("end_ts") >= F.timestamp_micros(F.lit(first)))
            & (F.col("start_ts") <= F.timestamp_micros(F.lit(last)))
        )
        return sessions.join(F.broadcast(changed), "user_id").where(_near(rule)).drop("lo", "hi")
    if rule.silence_parts:
        return stretch(sessions.join(F.broadcast(changed), "user_id"), rule)
    if rule.split:
        return sessions.join(F.broadcast(changed), "user_id").drop("lo", "hi")
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


def _near(rule: SessionRule, start: str = "start_ts", end: str = "end_ts") -> Column:
    near: Column = rule.arrays.near(*(F.unix_micros(name) for name in (start, end, "lo", "hi")))
    return near


def stretch(sessions: DataFrame, rule: SessionRule) -> DataFrame:
    """The sessions (with the `lo` and `hi` of their users' changes) that no silence parts from the
    changes."""
    by_start = Window.partitionBy("user_id").orderBy("start_ts", "end_ts")
    before = by_start.rowsBetween(Window.unboundedPreceding, -1)
    latest = F.unix_micros(F.max("end_ts").over(before))
    opens = F.coalesce(rule.arrays.silent(latest, F.unix_micros("start_ts")), F.lit(True))
    so_far = by_start.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    numbered = sessions.withColumn("_opens", opens.cast("int"))
    numbered = numbered.withColumn("_stretch", F.sum("_opens").over(so_far))
    all_of = Window.partitionBy("user_id", "_stretch")
    ends = {"_from": F.min("start_ts").over(all_of), "_to": F.max("end_ts").over(all_of)}
    near = numbered.withColumns(ends).where(_near(rule, "_from", "_to"))
    return near.drop("lo", "hi", "_opens", "_stretch", "_from", "_to")


def recut(old: DataFrame, changes: DataFrame, how: Cut, parts: int) -> DataFrame:
    """What becomes of the sessions near some changes: `jobs.silver.cut_nightly.recut` by slices.

    Args:
        old: rows of `silver.sessions`.
        changes: as `net_changes` has them.
    """
    # (Both users of an event that moved may be of different slices.)
    elsewhere = F.coalesce(F.col("gone.user_id") != F.col("came.user_id"), F.lit(False))
    schema = arrow_schema({name: how.events[name] for name in ("user_id", *how.reads)})
    stored = arrow_schema(how.sessions)
    gone, came = (
        changes.where(F.col(side).isNotNull()).select(
            f"{side}.*", F.lit(side == "came").alias("_came"), elsewhere.alias("_moved")
        )
        for side in ("gone", "came")
    )

    def work(sessions: pa.Table, moved: pa.Table) -> pa.Table:
        events = moved.select(schema.names).cast(schema)
        is_came = moved["_came"]
        return cut_nightly.recut(
            sessions.select(stored.names).cast(stored).combine_chunks(),
            events.filter(pc.invert(is_came)),
            events.filter(is_came),
            how,
            events.filter(moved["_moved"])["event_id"].combine_chunks(),
        )

    slices = slice_of(parts)
    both = old.groupBy(slices).cogroup(gone.unionByName(came).groupBy(slices))
    return both.applyInArrow(work, cut_nightly.CHANGE_DDL)
