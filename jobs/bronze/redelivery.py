"""`[source] redelivery = "replace"`: a file that comes again takes the place of what it was.

A *delivery* is an event in a file. `bronze.events` keeps one row of an event; `bronze.deliveries` has
all deliveries of the events that several files had, or have. So what a file no longer has can be
taken away without losing what others have, and without reading those again. Of an event that
`bronze.deliveries` has, it is the truth, of others the row in `bronze.events` is: the two tables are
written in this order, and a run that is killed between them is completed by the next one.

 * A delivery of a file that is read whole goes if the file does not have it any more. Neither a
   date that is late on the run's day, nor a file whose last line waits, takes anything away.
 * A line whose date is late, and whose event is stored, confirms the event as it is stored.
 * An event is the smallest of its deliveries, as it is the smallest of its lines; without any, it
   goes.
 * What others deleted or changed in `bronze.events` stays as they left it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.bronze import landing
from jobs.bronze.file_order import line_of
from jobs.bronze.manifest import IngestManifest, version_of
from jobs.bronze.stored_events import place_of
from jobs.core import crash_points
from jobs.core.lateness import is_late
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.core.tables import CHANGED_EVENTS, DELIVERIES, EVENTS, FLAGS, Table
from jobs.lake.context import Candidate, Context
from jobs.reading.typed_events import hashed, row_hash

SINCE = "sessionmill.deliveries_since"
"""A property of `bronze.deliveries`: of events that were stored before this (us since 1970) it is not
known which other files had them. 0: it is known of all. `AWAY`: lines were read without it."""
AWAY = "away"
KEY = ["event_id", "file"]
OF_A_ROW = ("ingest_ts", "tie_break")
"""Columns that do not tell two deliveries of an event apart. (Of `tie_break`, the line does.)"""


def replaces(context: Context) -> bool:
    return context.source.source.redelivery == "replace"


def tables(context: Context) -> tuple[Table, ...]:
    """The table of deliveries, where it is asked."""
    there = replaces(context) and context.lake.version(DELIVERIES) is not None
    return (DELIVERIES,) if there else ()


def make_ready(context: Context) -> None:
    """Make the table of deliveries where it is wanted, and note since when it is whole."""
    lake = context.lake
    known = lake.property(DELIVERIES, SINCE) if lake.version(DELIVERIES) is not None else None
    if not replaces(context):
        if known not in (None, AWAY):
            lake.set_property(DELIVERIES, SINCE, AWAY)
        return
    if known is None or known == AWAY:
        now = str(round(context.started.timestamp() * 1e6)) if lake.rows(EVENTS) else "0"
        lake.create(DELIVERIES, {SINCE: now})
        if lake.property(DELIVERIES, SINCE) != now:
            lake.set_property(DELIVERIES, SINCE, now)
    else:
        lake.create(DELIVERIES)


def whole_files(context: Context, candidate: Candidate, manifest: IngestManifest) -> list[str]:
    """The files of this run that take the place of what they were."""
    if not replaces(context) or not manifest.files:
        return []
    return [one.file for one in landing.facts_read(candidate) if not one.waiting]


@dataclass
class Settled:
    """What becomes of the events of a run.

    changed: `EVENTS.columns`, `replaces`, `stored_ts` and `line`: events that are new, or have
        another row now.
    gone: `EVENTS.columns`: stored events that no file has any more.
    """

    changed: DataFrame
    gone: DataFrame


@dataclass(frozen=True)
class Known:
    """What is stored of the events that a run touches.

    events: `EVENTS.columns`. deliveries: `DELIVERIES.columns`, of all files, the same events'.
    stored: those of them that are in `bronze.deliveries`.
    """

    events: DataFrame
    deliveries: DataFrame
    stored: DataFrame


def settle(
    context: Context,
    candidate: Candidate,
    manifest: IngestManifest,
    judged: DataFrame,
    oldest: Column | None,
) -> Settled:
    """What becomes of the events of a run's lines, and of those that its files do not have any more;
    what changes in `bronze.deliveries` is the candidate's part of that name.

    Args:
        judged: usable lines, as `judge` has them.
        oldest: the oldest date that is not late; None: nothing is.
    """
    files = whole_files(context, candidate, manifest)
    judged = not_changed(context, judged)
    known = known_of(context, candidate, manifest, judged, files)
    late = F.col("too_old")
    came = candidate.write("came", of_lines(context, judged.where(~late & ~F.col("late"))))
    confirmed = judged.where(F.col("stored") & late).groupBy(*KEY).agg(F.max("flag").alias("again"))
    confirmed = confirmed.join(came, KEY, "left_anti").withColumn("confirmed", F.lit(True))
    before = known.deliveries.join(confirmed, KEY, "left")
    absent = F.col("file").isin(files) & F.col("confirmed").isNull()
    # (Of a replay it is that of each line's night, and there are no files.)
    out_of_reach = is_late(F.col("event_date"), oldest if files else None)
    if not manifest.reload:
        out_of_reach = out_of_reach | unknown_since(context)
    stays = before.where(absent & out_of_reach).join(came, KEY, "left_anti")
    candidate.write("stays", stays.select(*KEY, "ingest_ts"))
    kept = before.where(~absent | out_of_reach).withColumn("flag", F.coalesce("again", "flag"))
    new = confirmed.join(known.deliveries, KEY, "left_anti").join(known.events, "event_id")
    new = new.withColumnRenamed("again", "flag")
    every = [with_digest(context, one.select(*DELIVERIES.columns)) for one in (kept, new)]
    now = reduce(DataFrame.unionByName, [*every, came])
    now = first_of(now, KEY, [*place_in_files(), F.col("ingest_ts")])
    now = candidate.write("deliveries-now", now)
    fill_deliveries(context, candidate, manifest, now, known)
    fill_flags(context, candidate, manifest, now, known)
    manifest.notes += told_of_kept(context, candidate)
    return settled(context, candidate, now, known)


# -- what is known ---------------------------------------------------------------------------------


def known_of(
    context: Context,
    candidate: Candidate,
    manifest: IngestManifest,
    judged: DataFrame,
    files: list[str],
) -> Known:
    """What is stored of the events of some lines and files."""
    lake = context.lake
    deliveries = not_changed(
        context, lake.read(DELIVERIES, manifest.base[DELIVERIES.full_name])
    ).select(*DELIVERIES.columns)
    events = not_changed(context, lake.read(EVENTS, manifest.base[EVENTS.full_name]))
    events = events.select(*EVENTS.columns)
    of_files = events.where(F.col("ingest_file").isin(files)).select("event_id")
    ids = judged.select("event_id").unionByName(of_files)
    ids = ids.unionByName(deliveries.where(F.col("file").isin(files)).select("event_id"))
    stored = candidate.write(
        "deliveries-before", deliveries.join(ids.distinct(), "event_id", "left_semi")
    )
    ids = judged.where("stored").select("event_id").unionByName(stored.select("event_id"))
    asked = F.broadcast(ids.distinct().withColumn("asked", F.lit(True)))
    if context.source.columns.event_id is None:
        events = events.where(F.col("ingest_file").isin(files) | in_span_of(judged, stored))
    touched = F.col("ingest_file").isin(files) | F.col("asked").isNotNull()
    events = events.join(asked, "event_id", "left").where(touched).select(*EVENTS.columns)
    events = candidate.write("events-before", events)
    # (A row that was written while nobody kept deliveries may be of none that is known.)
    many = stored.select("event_id").distinct().withColumn("many", F.lit(True))
    alone = events.withColumn("file", F.coalesce("ingest_file", F.lit("")))
    alone = alone.join(many, "event_id", "left").where(
        F.col("many").isNull() | unknown_since(context)
    )
    alone = alone.join(stored.select(*KEY), KEY, "left_anti")
    if lake.version(FLAGS) is None:
        alone = alone.withColumn("flag", F.lit(None).cast("string"))
    else:
        alone = alone.join(lake.read(FLAGS).select("event_id", "flag"), "event_id", "left")
    return Known(events, stored.unionByName(alone.select(*DELIVERIES.columns)), stored)


def in_span_of(*rows: DataFrame) -> Column:
    """Whether an event has a time within those of other rows: an id that is a hash of its line has
    the line's time."""
    ends = [F.min(F.unix_micros("event_ts")), F.max(F.unix_micros("event_ts"))]
    found = [one.agg(*ends).first() for one in rows]
    times = [one for span in found if span is not None for one in span if one is not None]
    if not times:
        return F.lit(False)
    first, last = (F.timestamp_micros(F.lit(one)) for one in (min(times), max(times)))
    return F.col("event_ts").between(first, last)


def not_changed(context: Context, rows: DataFrame) -> DataFrame:
    """Rows without the events that others deleted or changed."""
    if not context.lake.rows(CHANGED_EVENTS):
        return rows
    changed = context.lake.read(CHANGED_EVENTS).select("event_id")
    return rows.join(F.broadcast(changed), "event_id", "left_anti")


def unknown_since(context: Context) -> Column:
    """Whether it is not known which other files had an event, by `ingest_ts`."""
    since = context.lake.property(DELIVERIES, SINCE) or "0"
    return F.unix_micros("ingest_ts") < int(since if since != AWAY else 0)


# -- deliveries ------------------------------------------------------------------------------------


def of_lines(context: Context, lines: DataFrame) -> DataFrame:
    """Usable lines as deliveries, with `digest`; of a file's lines of one event the smallest."""
    if "row_hash" not in lines.columns:
        lines = lines.withColumn("row_hash", F.col("event_id"))
    stamps = {"ingest_file": F.col("file"), "ingest_ts": F.lit(context.started)}
    if context.source.columns.file_order:  # (tasks that type lines leave it to the events)
        stamps["tie_break"] = F.col("line")
    rows = lines.withColumns(stamps).withColumnRenamed("row_hash", "digest")
    return first_of(rows, KEY, [F.col("line")]).select(*DELIVERIES.columns, "digest")


def with_digest(context: Context, rows: DataFrame) -> DataFrame:
    native = context.source.columns.event_id is not None
    digest = row_hash(hashed(context.source)) if native else F.col("event_id")
    return rows.withColumn("digest", digest)


def first_of(rows: DataFrame, by: list[str], then: list[Column]) -> DataFrame:
    """Of some deliveries of one event the smallest, as lines are ordered, flagged if one of them is.

    Args:
        by: the columns in which those deliveries agree.
        then: what decides between deliveries that are equal.
    """
    order = [place_of("event_ts", "digest", "anonymous_id", BOUNDARY_VALUES), *then]
    rank = F.row_number().over(Window.partitionBy(*by).orderBy(*order))
    flag = F.max("flag").over(Window.partitionBy(*by))
    return rows.withColumns({"rank": rank, "flag": flag}).where("rank = 1").drop("rank")


def place_in_files() -> list[Column]:
    return [F.col("ingest_file"), line_of(F.col("tie_break"))]


def differs(context: Context, one: str, other: str, columns: list[str]) -> Column:
    """Whether two deliveries, or events, are not the same."""
    found = F.lit(False)
    for name in columns:
        if name not in OF_A_ROW:
            found = found | ~F.col(f"{one}.{name}").eqNullSafe(F.col(f"{other}.{name}"))
    lines = [F.col(f"{side}.tie_break") for side in (one, other)]
    if context.source.columns.file_order:
        lines = [line_of(one) for one in lines]
    return found | ~lines[0].eqNullSafe(lines[1])


def fill_deliveries(
    context: Context, candidate: Candidate, manifest: IngestManifest, now: DataFrame, known: Known
) -> None:
    """What changes in `bronze.deliveries`: it has an event from its second delivery on, and where its
    only delivery confirms a row that another file brought (that file may be gone since)."""
    elsewhere = ~F.col("file").eqNullSafe(F.coalesce("ingest_file", F.lit("")))
    counts = now.groupBy("event_id").agg(
        F.count("*").alias("count"), F.bool_or(elsewhere).alias("elsewhere")
    )
    many = counts.where("count > 1 OR elsewhere").select("event_id")
    many = many.unionByName(known.stored.select("event_id")).distinct()
    wanted = now.join(many, "event_id", "left_semi").select(*DELIVERIES.columns)
    before = known.stored.alias("b")
    both = wanted.alias("n").join(before, KEY, "left")
    other = F.col("b.event_ts").isNull() | differs(context, "n", "b", list(DELIVERIES.columns))
    put = both.where(other).select(
        *(one for one in KEY),
        *(F.col(f"n.{name}").alias(name) for name in DELIVERIES.columns if name not in KEY),
    )
    gone = known.stored.join(now, KEY, "left_anti")
    put = put.withColumn("gone", F.lit(False))
    rows = put.unionByName(gone.withColumn("gone", F.lit(True)))
    candidate.write("deliveries", rows.coalesce(1))
    manifest.deliveries_changed = candidate.row_count("deliveries")


def fill_flags(
    context: Context, candidate: Candidate, manifest: IngestManifest, now: DataFrame, known: Known
) -> None:
    """What changes in `bronze.flags`: an event is flagged if one of its deliveries is."""
    if context.lake.version(FLAGS) is None:
        return
    there = context.lake.read(FLAGS).select(*FLAGS.columns)
    said = now.groupBy("event_id").agg(F.max("flag").alias("said")).where("said IS NOT NULL")
    put = said.join(there, "event_id", "left").where("flag IS NULL OR flag <> said")
    put = put.select(
        "event_id",
        F.col("said").alias("flag"),
        F.lit(context.started).alias("first_seen_ts"),
        F.lit(False).alias("gone"),
    )
    touched = known.deliveries.select("event_id").distinct()
    gone = there.join(touched, "event_id", "left_semi").join(said, "event_id", "left_anti")
    rows = put.unionByName(gone.withColumn("gone", F.lit(True)).select(*put.columns))
    candidate.write("flags", rows.coalesce(1))
    manifest.flags_changed = candidate.row_count("flags")
    manifest.flagged = candidate.part("flags").where("NOT gone").count()


def settled(context: Context, candidate: Candidate, now: DataFrame, known: Known) -> Settled:
    """The events of deliveries: of each the smallest."""
    old = known.events.alias("e")
    rows = now.join(
        known.events.select("event_id", F.col("ingest_file").alias("old_file")), "event_id", "left"
    )
    # (What a run that was killed has left in `bronze.deliveries` waits for its own files.)
    came = candidate.part("came").select("event_id").distinct().withColumn("came", F.lit(True))
    then = [*place_in_files(), F.col("file")]
    if not context.source.columns.file_order:  # (the stored row stays, if another is not smaller)
        then = [~F.col("ingest_file").eqNullSafe(F.col("old_file")), *then]
    best = first_of(rows, ["event_id"], then).select(*EVENTS.columns)
    best = best.join(came, "event_id", "left").alias("n")
    both = best.join(old, "event_id", "left").where("e.event_ts IS NOT NULL OR came")
    stored = F.col("e.event_ts").isNotNull()
    other = ~stored | differs(context, "n", "e", list(EVENTS.columns))
    names = [name for name in EVENTS.columns if name != "event_id"]
    changed = both.where(other).select(
        "event_id",
        *(F.col(f"n.{name}").alias(name) for name in names),
        stored.alias("replaces"),
        F.col("e.event_ts").alias("stored_ts"),
        line_of(F.col("n.tie_break")).alias("line"),
    )
    gone = known.events.join(now, "event_id", "left_anti")
    return Settled(candidate.write("changed", changed), candidate.write("gone", gone))


def fill_first(
    context: Context, candidate: Candidate, manifest: IngestManifest, usable: DataFrame
) -> None:
    """The deliveries of a first load: of the events that several of its files have."""
    if len(manifest.files) < 2:
        return
    files = usable.groupBy("event_id").agg(F.count_distinct("file").alias("files"))
    many = candidate.write("many", files.where("files > 1").select("event_id"))
    rows = of_lines(context, usable.join(many, "event_id", "left_semi")).drop("digest")
    candidate.write("deliveries", rows.withColumn("gone", F.lit(False)).coalesce(1))
    manifest.deliveries_changed = candidate.row_count("deliveries")


def publish(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Before the events: see above.

    Raises:
        Conflict: another run changed `bronze.deliveries` since the candidate was computed.
    """
    if not manifest.deliveries_changed:
        return
    lake, base = context.lake, manifest.base[DELIVERIES.full_name]
    lake.unchanged(DELIVERIES, base)
    base = version_of(context, DELIVERIES)
    context.upsert(DELIVERIES, candidate, "deliveries", base, lake.guard(DELIVERIES), base + 1)
    crash_points.point("ingest.deliveries-published")


def all_read_again(context: Context) -> None:
    """Note that the deliveries of all stored events are known."""
    if replaces(context) and context.lake.property(DELIVERIES, SINCE) not in (None, "0"):
        context.lake.set_property(DELIVERIES, SINCE, "0")


# -- what is said ----------------------------------------------------------------------------------


def told_of_gone(gone: DataFrame, count: int) -> list[str]:
    """What to say of events that no file has any more."""
    first = gone.agg(F.min("ingest_file")).first() if count else None
    if first is None:
        return []
    return [
        f"{count:,} stored events were removed: the file that had them came again without them, and no "
        f"other file has them (source.redelivery = 'replace'). The first such file is {first[0]}"
    ]


def told_of_kept(context: Context, candidate: Candidate) -> list[str]:
    """What to say of events that a file no longer has, and that stay."""
    stays = candidate.part("stays")
    unknown = unknown_since(context)
    counted = stays.agg(F.count_if(unknown), F.count_if(~unknown), F.min("file")).first()
    if counted is None or not counted[0] + counted[1]:
        return []
    notes = []
    if counted[1]:
        notes.append(
            f"{counted[1]:,} events that a file no longer has stay, because they are older than "
            f"sessions.lateness_days = {context.source.sessions.lateness_days} before the run's day; the "
            f"first such file is {counted[2]}. A run without --day that reads the file removes them"
        )
    if counted[0]:
        notes.append(
            f"{counted[0]:,} events that a file no longer has stay, because they were read before "
            "source.redelivery = 'replace', and it is not known which other files have them; the first "
            f"such file is {counted[2]}. python -m jobs run --source {context.source.name} --reload reads "
            "all landing files again, and applies it to everything"
        )
    return notes
