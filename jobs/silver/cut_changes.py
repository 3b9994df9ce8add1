"""The sessions around what changed, cut again: in this process, or by slices of users in Spark."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.core.arrow_types import arrow_schema
from jobs.core.plan import Algorithm, Publish, SessionizeFacts, idle, sessionize_plan
from jobs.core.tables import EVENTS, SESSIONS
from jobs.lake import filesystem
from jobs.lake.change_feed import CHANGES, PUT, TYPE, VERSION
from jobs.lake.context import Candidate, Context
from jobs.lake.data_files import staging
from jobs.lake.delta_errors import feed_gone
from jobs.lake.manifest import Staged
from jobs.lake.tasks import run
from jobs.silver import cut_nightly
from jobs.silver.cut_arrow import EVENT_FIELDS, cut_of
from jobs.silver.cut_spark import net_changes, recut, spans, touched
from jobs.silver.manifest import Counts, Moved, SessionizeManifest


def cut_changes(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, facts: SessionizeFacts,
    after: int,
) -> None:  # fmt: skip
    """Cut around what changed: in this process where few events did, else in Spark.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    lake, upto, feed = context.lake, manifest.upto, None
    plan = sessionize_plan(facts, context.thresholds)
    if plan.path is Algorithm.RECUT_ARROW:
        feed = lake.changes_few(EVENTS, after, upto, ["user_id", *EVENT_FIELDS, TYPE, VERSION])
        facts = replace(facts, moved=feed.num_rows)
        plan = sessionize_plan(facts, context.thresholds)
    manifest.plan = plan
    context.decide(plan)
    rows: pa.Table | DataFrame | None
    if feed is not None and plan.path is Algorithm.RECUT_ARROW:
        rows = cut_in_arrow(context, candidate, manifest, feed)
    else:
        rows = cut_in_spark(context, candidate, manifest, after)
    if rows is None:
        manifest.empty, manifest.plan = True, idle("sessionize")
        return
    opens = manifest.counts.rows == manifest.counts.new
    manifest.plan = sessionize_plan(replace(facts, only_opens=opens), context.thresholds)
    if manifest.plan.publish is Publish.APPEND:
        manifest.staged = stage_sessions(context, rows)


def stage_sessions(context: Context, rows: pa.Table | DataFrame) -> Staged:
    """Put the candidate's sessions, which are all new, where they will stay."""
    lake = context.lake
    if isinstance(rows, DataFrame):
        return lake.stage(SESSIONS, rows, context.run_id)
    folder = staging(context.run_id)
    rows = rows.select(list(SESSIONS.columns))
    filesystem.write_parquet(f"{lake.path(SESSIONS)}/{folder}/part-0.parquet", rows)
    return lake.entries(SESSIONS, folder)


def cut_in_arrow(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, feed: pa.Table
) -> pa.Table | None:
    """`cut_changes` in this process: the rows that change, counted; None if no event did.

    Args:
        feed: the changes of events, as `cut_nightly.net` takes them.
    """
    rule = context.source.sessions.session_rule
    gone, came = cut_nightly.net(feed)
    if not gone.num_rows + came.num_rows:
        return None
    keys = keys_around(context, candidate, manifest.base, pa.concat_tables([gone, came]))
    filesystem.write_parquet(candidate.path("near-changes.parquet"), keys)
    near = cut_nightly.Near(candidate.path("near-changes.parquet"), rule, candidate.path("old"))
    found = run_near(context, near, manifest.base, keys, cut_nightly.NEAR_DDL)
    nothing = arrow_schema(SESSIONS.columns).empty_table()
    old = pa.concat_tables([nothing, *(filesystem.read_parquet(one["path"]) for one in found)])
    changed = cut_nightly.recut(old, gone, came, cut_of(rule))
    manifest.counts = Counts(**cut_nightly.counted(changed))
    manifest.moved = Moved(came.num_rows, gone.num_rows)
    filesystem.write_parquet(candidate.path("sessions") + "/part-0.parquet", changed)
    candidate.adopt("sessions", cut_nightly.CHANGE_DDL)
    return changed


def keys_around(context: Context, candidate: Candidate, base: int, moved: pa.Table) -> pa.Table:
    """`user_id, lo, hi`, as `cut_nightly.near` takes them: near which sessions may change.

    Args:
        moved: `user_id` and `event_ts` of events that came or went.
    """
    places = moved["user_id"], moved["event_ts"], moved["event_ts"]
    if not context.source.sessions.session_rule.native:
        # Each event for itself: between two of one user's events may lie weeks of sessions.
        return cut_nightly.spans_of(*places)
    keys = cut_nightly.keys_of(*places)
    filesystem.write_parquet(candidate.path("changes.parquet"), keys)
    task = cut_nightly.Edges(candidate.path("changes.parquet"), candidate.path("edges"))
    stored = context.lake.files_of(SESSIONS, base)
    spark = context.tasks(context.thresholds.tasks(0, sum(one.rows for one in stored)))
    done = run(spark, task, [one.path for one in stored], cut_nightly.NEAR_DDL, "string")
    return cut_nightly.widened(keys, [filesystem.read_parquet(one["path"]) for one in done])


def run_near(
    context: Context, task: Any, base: int, keys: pa.Table, ddl: str
) -> list[dict[str, Any]]:
    """A task over the files of `silver.sessions` whose times come near those of `keys`."""
    rule = context.source.sessions.session_rule
    if not keys.num_rows:
        return []
    first, last = rule.arrays.reach(pc.min(keys["lo"]).as_py(), pc.max(keys["hi"]).as_py())
    stored = context.lake.files_of(SESSIONS, base)
    near = [one for one in stored if one.first_us("start_ts") <= last]
    near = [one for one in near if one.last_us("end_ts") >= first]
    spark = context.tasks(context.thresholds.tasks(sum(one.rows for one in near)))
    return run(spark, task, [one.path for one in near], ddl, "string")


def cut_in_spark(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, after: int
) -> DataFrame | None:
    """`cut_changes` by slices of users: the rows that change, counted; None if no event did.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    lake, rule, upto = context.lake, context.source.sessions.session_rule, manifest.upto
    spark = context.enter(manifest.plan.engine)
    with feed_gone(EVENTS, after, upto):
        changes = candidate.write("changes", net_changes(lake.changes(EVENTS, after, upto)))
    if changes.isEmpty():
        return None
    moved = changes.agg(F.count("came").alias("came"), F.count("gone").alias("gone")).first()
    assert moved is not None
    manifest.moved = Moved(moved["came"], moved["gone"])
    changed = candidate.write("spans", spans(changes))
    old = touched(lake.read(SESSIONS, manifest.base), changed, rule)
    old = candidate.write("old", old.select(*SESSIONS.columns))
    held = old.agg(F.sum("event_count")).first()
    assert held is not None
    events = (held[0] or 0) + moved["came"] + moved["gone"]
    parts = context.thresholds.slices(events, spark.sparkContext.defaultParallelism)
    rows = recut(old, changes, cut_of(rule), parts)
    return fill(candidate, manifest, rows.repartition(1))


def fill(candidate: Candidate, manifest: SessionizeManifest, rows: DataFrame) -> DataFrame:
    """Write the rows that change, each partition laid out by start, and count them."""
    written = candidate.write("sessions", rows.sortWithinPartitions(*SESSIONS.order))
    put = F.expr(PUT)
    counted = written.agg(
        F.count("*").alias("rows"),
        *(F.count_if(F.col("change") == one).alias(one) for one in CHANGES),
        F.count_if(put & F.col("merged")).alias("merged"),
        F.count_if(put & F.col("runaway").isNotNull()).alias("runaways"),
        F.coalesce(F.sum(F.when(put, F.col("event_count"))), F.lit(0)).alias("events_after"),
        F.coalesce(F.sum("old_event_count"), F.lit(0)).alias("events_before"),
        F.min(F.unix_micros(F.least("start_ts", "_start_ts"))).alias("lo_us"),
        F.max(F.unix_micros(F.greatest("start_ts", "_start_ts"))).alias("hi_us"),
    ).first()
    assert counted is not None
    manifest.counts = Counts(**counted.asDict())
    return written
