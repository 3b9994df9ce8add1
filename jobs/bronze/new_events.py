"""Which of a candidate's lines are new events, and the rows of `bronze.events` that they become."""

from __future__ import annotations

from dataclasses import replace

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.bronze import file_order, filters, redelivery
from jobs.bronze import first_load as bronze_first_load
from jobs.bronze.manifest import IngestManifest
from jobs.bronze.stored_events import (
    judge,
    late_before,
    ranked,
    stored_by_time,
    stored_events,
    with_changed,
)
from jobs.core.plan import Algorithm, IngestFacts, Publish, ingest_plan
from jobs.core.tables import EVENTS
from jobs.lake import filesystem, time_slices
from jobs.lake.context import Candidate, Context
from jobs.lake.data_files import staging


def fill_events(
    context: Context,
    candidate: Candidate,
    manifest: IngestManifest,
    choice: IngestFacts,
    oldest: Column | None,
) -> None:
    """Judge the candidate's lines as the manifest's plan says, write its events, and count.

    Args:
        choice: what the plan was made from.
        oldest: the oldest date that is not late, per line; None: nothing is.
    """
    usable = candidate.part("lines").where("reason IS NULL")
    if manifest.plan.path is Algorithm.FIRST_SLICES:
        fill_by_slices(context, candidate, manifest, usable)
        if redelivery.replaces(context):
            redelivery.fill_first(context, candidate, manifest, usable)
        return
    judged = judged_lines(context, candidate, manifest, usable, oldest)
    # Duplicates are counted from the lines themselves, not as what is left over: the audit's
    # balance (read = new + duplicates + rejects) could not fail otherwise.
    first = F.col("usable") & (F.col("rank") == 1)
    early = F.col("too_old") & ~F.col("late")  # (of a reload: a duplicate when it was read first)
    again = F.col("stored") | (F.col("usable") & (F.col("rank") > 1)) | early
    counted = judged.agg(
        F.count_if(first & F.col("replaces")).alias("replaced"), F.count_if(again).alias("again")
    ).first()
    assert counted is not None
    manifest.counts.events_replaced = counted["replaced"]
    manifest.counts.duplicates = counted["again"]
    removed: DataFrame | None
    if redelivery.replaces(context):
        events, removed = settled_events(context, candidate, manifest, judged, oldest)
    else:
        events, removed = first_lines(context, candidate, manifest, judged.where(first), usable)
    replaces = manifest.counts.events_replaced + manifest.counts.events_removed > 0
    if context.source.columns.file_order:
        events = events.select(*EVENTS.columns, "replaces", "stored_ts", "line")
        base = manifest.base[EVENTS.full_name]
        placed = file_order.regrouped(context, events, base, removed)
        events = candidate.write("placed", placed)
        replaces = replaces or bool(events.where("replaces").head(1))
    choice = replace(choice, replaces=replaces)
    manifest.plan = ingest_plan(choice, context.thresholds, manifest.plan.job)
    events = laid_out(events.select(*EVENTS.columns, "replaces", "stored_ts"), context)
    manifest.counts.events_new = write_events(context, candidate, manifest, events, removed)


def first_lines(
    context: Context,
    candidate: Candidate,
    manifest: IngestManifest,
    first: DataFrame,
    usable: DataFrame,
) -> tuple[DataFrame, DataFrame | None]:
    """The events of some lines, and the stored ones that a reload removes.

    Args:
        first: of each event that is new, or replaces a stored one, the line.
    """
    removed = None
    if manifest.reload and context.source.leaves_out and context.lake.rows(EVENTS):
        unwanted = filters.unwanted(context, candidate, manifest, usable)
        removed = candidate.write("unwanted", unwanted)
        manifest.counts.events_removed = candidate.row_count("unwanted")
    stamps = {"ingest_file": F.col("file"), "ingest_ts": F.lit(context.started)}
    return first.withColumns(stamps), removed


def settled_events(
    context: Context,
    candidate: Candidate,
    manifest: IngestManifest,
    judged: DataFrame,
    oldest: Column | None,
) -> tuple[DataFrame, DataFrame]:
    """The events that are new or changed, and those that go, by the deliveries of all files."""
    found = redelivery.settle(context, candidate, manifest, judged, oldest)
    counts = manifest.counts
    counts.events_replaced = found.changed.where("replaces").count()
    counts.events_removed = candidate.row_count("gone")
    manifest.settled = True
    manifest.notes += redelivery.told_of_gone(found.gone, counts.events_removed)
    return found.changed, found.gone


def judged_lines(
    context: Context,
    candidate: Candidate,
    manifest: IngestManifest,
    usable: DataFrame,
    oldest: Column | None,
) -> DataFrame:
    """The usable lines, each with its fate."""
    source = context.source
    stored = with_changed(context, stored_of(context, candidate, manifest, usable))
    oldest = F.lit(None).cast("date") if oldest is None else oldest
    if "row_hash" not in usable.columns:
        usable = usable.withColumn("row_hash", F.col("event_id"))
    rows = judge(usable, stored, oldest)
    if manifest.reload:
        rows = late_before(context, rows)
    return candidate.write(
        "judged", ranked(rows, source.columns.file_order, source.boundary_reads_log)
    )


def stored_of(
    context: Context, candidate: Candidate, manifest: IngestManifest, usable: DataFrame
) -> DataFrame | None:
    """What `bronze.events` has of the usable lines, found as the plan says."""
    path, base = manifest.plan.path, manifest.base[EVENTS.full_name]
    if path is Algorithm.FIRST_LINES:
        return None
    if path is Algorithm.STORED_TIMES:
        return stored_by_time(context, candidate, usable, base)
    stored = stored_events(context, candidate, usable, base)
    if stored is not None and path is Algorithm.STORED_IDS:
        # An outer join sends all of the larger side about; this one reads it once.
        ids = F.broadcast(usable.select("event_id"))
        stored = stored.join(ids, "event_id", "left_semi")
    return stored


def write_events(
    context: Context,
    candidate: Candidate,
    manifest: IngestManifest,
    events: DataFrame,
    removed: DataFrame | None,
) -> int:
    """Write events as the manifest's plan publishes them; how many are new.

    Args:
        events: with `replaces` and `stored_ts`; removed: stored events that go, if any do.
    """
    if manifest.plan.publish is Publish.APPEND:
        manifest.staged = context.lake.stage(EVENTS, events, context.run_id)
        return sum(one["rows"] for one in manifest.staged)
    events = events.withColumn("gone", F.lit(False))
    if manifest.counts.events_removed and removed is not None:
        marks = {"replaces": F.lit(True), "stored_ts": F.col("event_ts"), "gone": F.lit(True)}
        events = events.unionByName(removed.withColumns(marks).select(*events.columns))
    return candidate.write("events", events).where("NOT replaces").count()


def fill_by_slices(
    context: Context, candidate: Candidate, manifest: IngestManifest, usable: DataFrame
) -> None:
    """Many lines into an empty table, none of them late: each slice of time is sorted, freed of
    repeats and written where it will stay (`jobs/lake/time_slices.py`).

    Most logs were written in the order of time: their slices are read from the parsed files as they
    lie. Where the files lie across each other, Spark brings the lines together first.
    """
    lake, spark, read = context.lake, context.spark, manifest.counts.read
    folder = staging(context.run_id)
    layer = bronze_first_load.Layer(
        EVENTS.columns,
        f"{lake.path(EVENTS)}/{folder}",
        context.started,
        context.source.columns.file_order,
    )
    cores = spark.sparkContext.defaultParallelism
    known = time_slices.extents(
        [path for path, *_ in filesystem.glob(f"{candidate.path('lines')}/*.parquet")]
    )
    size = context.thresholds.slice_size(read, cores)
    parts = time_slices.parted(known, size) if known else []
    if parts is None:
        lines = bronze_first_load.without_null_lists(usable.select(*layer.lines))
        edges = time_slices.bounds(lines, "event_ts", max(cores, read // size))
        lines = time_slices.by_time(lines, "event_ts", edges)
        done = lines.mapInArrow(layer.of_lines, bronze_first_load.LAID_DDL).collect()
    else:
        done = (
            time_slices.frame(spark, parts)
            .mapInArrow(layer.of_files, bronze_first_load.LAID_DDL)
            .collect()
        )
    manifest.staged = lake.entries(EVENTS, folder, [one["path"] for one in done])
    manifest.counts.events_new = sum(one["rows"] for one in done)
    manifest.counts.duplicates = sum(one["repeats"] for one in done)


def laid_out(rows: DataFrame, context: Context) -> DataFrame:
    """Rows sorted by time, in few files with narrow time ranges, so that reads prune."""
    count = max(1, context.spark.sparkContext.defaultParallelism)
    return rows.repartitionByRange(count, *EVENTS.order).sortWithinPartitions(*EVENTS.order)
