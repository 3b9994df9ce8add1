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
from jobs.core.tables import SESSIONS
from jobs.lake import filesystem
from jobs.lake.change_feed import CHANGES, PUT, TYPE, VERSION
from jobs.lake.context import Candidate, Context
from jobs.lake.data_files import DataFile, staging
from jobs.lake.delta_errors import feed_gone
from jobs.lake.manifest import Staged
from jobs.lake.tasks import run
from jobs.silver import cut_nightly
from jobs.silver.cut_arrow import cut_for
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
    how = cut_for(context.source)
    plan = sessionize_plan(facts, context.thresholds)
    if plan.path is Algorithm.RECUT_ARROW:
        feed = lake.changes_few(
            lake.session_events(), after, upto, ["user_id", *how.reads, TYPE, VERSION]
        )
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
    moved = pa.concat_tables([gone, came])
    # Where silence parts sessions, each event for itself: between two of a user's may lie weeks.
    keys = (cut_nightly.spans_of if rule.silence_parts else cut_nightly.keys_of)(
        moved["user_id"], moved["event_ts"], moved["event_ts"]
    )
    schema = arrow_schema(SESSIONS.columns)
    near = stored_near(context, candidate, "old", manifest.base, keys)
    found = [cut_nightly.as_sessions(rows) for rows in near]
    old = pa.concat_tables([schema.empty_table(), *found])
    changed = cut_nightly.recut(old, gone, came, cut_for(context.source))
    manifest.counts = Counts(**cut_nightly.counted(changed))
    manifest.moved = Moved(came.num_rows, gone.num_rows)
    filesystem.write_parquet(candidate.path("sessions") + "/part-0.parquet", changed)
    candidate.adopt("sessions", cut_nightly.CHANGE_DDL)
    return changed


def stored_near(
    context: Context, candidate: Candidate, part: str, base: int, keys: pa.Table, **wanted: Any
) -> list[pa.Table]:
    """The stored sessions near changes or sessions: all that no silence parts from them, or where
    silence does not part sessions, those between the last one before them and the first one after
    (all of a user where sessions are split: who knows where a whole one begins).

    Args:
        part: the candidate's folder for what is found.
        keys: `user_id, lo, hi`, as `cut_nightly.near` takes them; a user once, where silence does not
            part sessions.
        wanted: `columns` and `fields` of `cut_nightly.Near`.
    """
    rule, limits = context.source.sessions.session_rule, context.thresholds
    stored, path = context.lake.files_of(SESSIONS, base), candidate.path(f"{part}.keys.parquet")
    if not keys.num_rows:
        return []

    def read(task: Any, files: list[DataFile]) -> list[pa.Table]:
        filesystem.write_parquet(path, keys)
        spark = context.tasks(limits.tasks(keys.num_rows, sum(one.rows for one in files)))
        done = run(spark, task, [one.path for one in files], cut_nightly.NEAR_DDL, "string")
        return [filesystem.read_parquet(one["path"]) for one in done]

    around = candidate.path(f"{part}.edges")
    keys = cut_nightly.reached(keys, rule, path, around, lambda task: read(task, stored))
    first, last = rule.arrays.reach(pc.min(keys["lo"]).as_py(), pc.max(keys["hi"]).as_py())
    near = [one for one in stored if one.first_us("start_ts") <= last]
    near = [one for one in near if one.last_us("end_ts") >= first]
    return read(cut_nightly.Near(path, rule, candidate.path(part), **wanted), near)


def cut_in_spark(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, after: int
) -> DataFrame | None:
    """`cut_changes` by slices of users: the rows that change, counted; None if no event did.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    lake, rule, upto = context.lake, context.source.sessions.session_rule, manifest.upto
    spark, of = context.enter(manifest.plan.engine), lake.session_events()
    how = cut_for(context.source)
    with feed_gone(of, after, upto):
        changes = candidate.write("changes", net_changes(lake.changes(of, after, upto), how))
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
    rows = recut(old, changes, how, parts)
    return fill(candidate, manifest, rows.repartition(1))


def fill(candidate: Candidate, manifest: SessionizeManifest, rows: DataFrame) -> DataFrame:
    """Write the rows that change, each partition laid out by start, and count them."""
    written = candidate.write("sessions", rows.sortWithinPartitions(*SESSIONS.order))
    put = F.expr(PUT)
    counted = written.agg(
        F.count("*").alias("rows"),
        *(F.count_if(F.col("change") == one).alias(one) for one in CHANGES),
        F.count_if(put & F.col("merged")).alias("merged"),
        F.count_if("relinked").alias("relinked"),
        F.count_if(put & F.col("runaway").isNotNull()).alias("runaways"),
        F.coalesce(F.sum(F.when(put, F.col("event_count"))), F.lit(0)).alias("events_after"),
        F.coalesce(F.sum("old_event_count"), F.lit(0)).alias("events_before"),
        F.min(F.unix_micros(F.least("start_ts", "_start_ts"))).alias("lo_us"),
        F.max(F.unix_micros(F.greatest("start_ts", "_start_ts"))).alias("hi_us"),
    ).first()
    assert counted is not None
    manifest.counts = Counts(**counted.asDict())
    return written
