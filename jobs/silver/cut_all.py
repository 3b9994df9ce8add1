"""All sessions anew, from all events, staged where they will stay.

By slices of time where silence alone parts sessions; native sessions are local in no time: they go by
slices of users, as do sessions that something else parts, too (what is put aside at two edges of a
slice may then be neighbours within the gap, and have others between them).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.audit import balance, fingerprint_table
from jobs.core.plan import Algorithm, Publish, SessionizeFacts, idle, sessionize_plan
from jobs.core.tables import SESSIONS
from jobs.lake import time_slices
from jobs.lake.context import Context
from jobs.lake.data_files import staging
from jobs.lake.tasks import run
from jobs.silver import cut_arrow, cut_users
from jobs.silver.cut_arrow import cut_for
from jobs.silver.manifest import Counts, SessionizeManifest


def cut_all(
    context: Context, manifest: SessionizeManifest, facts: SessionizeFacts, rebuild: bool
) -> None:
    """Make all sessions anew."""
    manifest.whole, manifest.plan = True, sessionize_plan(facts, context.thresholds)
    context.decide(manifest.plan)
    context.enter(manifest.plan.engine)
    whole = cut_by_slices if manifest.plan.path is Algorithm.CUT_SLICES else cut_by_users
    manifest.staged = whole(context, manifest.upto)
    count_whole(context, manifest)
    if manifest.counts.rows == 0 and not rebuild:
        manifest.empty, manifest.plan = True, idle("sessionize")


def cut_by_users(context: Context, upto: int) -> list[dict[str, Any]]:
    """Stage all sessions anew, under any rule: see `jobs/silver/cut_users.py`."""
    lake, how = context.lake, cut_for(context.source)
    cores = context.spark.sparkContext.defaultParallelism
    stored = lake.file_uris(lake.session_events(), upto)
    known = time_slices.extents(stored)
    events = sum(rows for *_, rows in known)
    size = context.thresholds.slice_size(events, cores)
    parts = context.thresholds.slices(events, cores)
    edges = tuple(low for low, *_ in time_slices.slices(known, size) if low is not None)
    folder = staging(context.run_id)
    aside = f"{context.candidate(SESSIONS).folder}/{cut_arrow.SPARE}"
    spark = context.tasks(context.thresholds.tasks(events))

    def paths(task: Any, todo: list[Any], kind: str) -> tuple[str, ...]:
        done = run(spark, task, todo, cut_users.PATH_DDL, kind)
        return tuple(one["path"] for one in done)

    by_user = paths(cut_users.ByUser(how, parts, f"{aside}/users"), stored, "string")
    task = cut_users.CutUsers(how, by_user, edges, f"{aside}/times")
    by_time = paths(task, list(range(parts)), "int")
    layout = cut_users.LayOut(by_time, f"{lake.path(SESSIONS)}/{folder}")
    made = paths(layout, list(range(len(edges) + 1)), "int")
    return lake.entries(SESSIONS, folder, list(made))


def cut_by_slices(context: Context, upto: int) -> list[dict[str, Any]]:
    """Stage all sessions anew, where silence alone parts them: see `jobs/lake/time_slices.py`."""
    lake, spark = context.lake, context.spark
    known = time_slices.extents(lake.file_uris(lake.session_events(), upto))
    size = context.thresholds.slice_size(
        sum(rows for *_, rows in known), spark.sparkContext.defaultParallelism
    )
    how = cut_for(context.source)
    folder = staging(context.run_id)
    aside = f"{context.candidate(SESSIONS).folder}/{cut_arrow.SPARE}"
    work = cut_arrow.worker(how, f"{lake.path(SESSIONS)}/{folder}", aside)

    def cut_slices(todo: list[tuple[int | None, int | None, list[str]]]) -> list[Any]:
        return time_slices.frame(spark, todo).mapInArrow(work, cut_arrow.REPORT_DDL).collect()

    done = cut_slices(time_slices.slices(known, size)) if known else []
    spare = [one["spare"] for one in done if one["spare"]]
    done += cut_slices([(None, None, spare)]) if spare else []
    return lake.entries(SESSIONS, folder, [one["path"] for one in done])


def count_whole(context: Context, manifest: SessionizeManifest) -> None:
    """Count all sessions, staged where they will stay, and what differs from the table."""
    lake, staged = context.lake, manifest.staged or []
    new = lake.staged(SESSIONS, staged)
    counted = new.agg(F.coalesce(F.sum("event_count"), F.lit(0)), F.count("runaway")).first()
    assert counted is not None
    number = sum(one["rows"] for one in staged)
    counts = Counts(rows=number, new=number, runaways=counted[1], events_after=counted[0])
    if manifest.plan.publish is Publish.REPLACE:
        if balance.files_gone(context, fingerprint_table.snapshot(lake, SESSIONS, manifest.base)):
            manifest.notes.append(
                "data files of silver.sessions are missing or damaged: all sessions are counted as new"
            )
        else:
            counts = replace(counts, **compared(lake.read(SESSIONS, manifest.base), new))
    manifest.counts = counts


def compared(old: DataFrame, new: DataFrame) -> dict[str, int]:
    """How many sessions are `new`, `changed`, `retired`; and `runaways` among new and changed."""
    digest = F.xxhash64("start_ts", "end_ts", "runaway", "events").alias("digest")
    before = old.select("session_id", digest.alias("old_digest"))
    both = new.select("session_id", "runaway", digest).join(before, "session_id", "full_outer")
    is_new, is_gone = F.col("old_digest").isNull(), F.col("digest").isNull()
    differs = ~is_new & ~is_gone & (F.col("digest") != F.col("old_digest"))
    counted = both.agg(
        F.count_if(is_new).alias("new"),
        F.count_if(is_gone).alias("retired"),
        F.count_if(differs).alias("changed"),
        F.count_if((is_new | differs) & F.col("runaway").isNotNull()).alias("runaways"),
    ).first()
    assert counted is not None
    return counted.asDict()
