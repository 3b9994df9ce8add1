"""Which lines are events that the table has already, and what becomes of each.

Decision 2 in docs/design/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.bronze import first_load as bronze_first_load
from jobs.bronze.file_order import line_of
from jobs.core.lateness import is_late, oldest_date
from jobs.core.source_file import Source
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.core.tables import CHANGED_EVENTS, EVENTS, REJECTS, RUNS
from jobs.lake import filesystem, foreign, time_slices
from jobs.lake.change_feed import GONE, TYPE
from jobs.lake.context import Candidate, Context
from jobs.lake.delta_errors import FeedGone
from jobs.lake.tasks import run
from jobs.reading.typed_events import HASHED, hashed, row_hash
from jobs.records.boundary import boundary_of

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

STORED = {
    "event_id": "string",
    "stored_ts": "timestamp",
    "stored_hash": "string",
    "stored_anonymous": "string",
}
"""What is looked up of stored events; `stored_hash` is the id where an id is a hash of its line."""
PLACE = {"stored_file": "string", "stored_tie": "bigint"}
"""And this, where events are in the order of their files."""


VALUES = {"stored_values": "string"}
"""And this, where sessions.boundary reads columns of the log."""


def looked_up_of(source: Source) -> dict[str, str]:
    found = STORED | PLACE if source.columns.file_order else STORED
    return found | VALUES if source.boundary_reads_log else found


def judge(lines: DataFrame, stored: DataFrame | None, oldest: Column) -> DataFrame:
    """Classify each valid line: columns `stored`, `too_old`, `late`, and what is stored.

    Args:
        lines: usable typed lines.
        stored: `STORED` of events that the table has, or None: empty.
        oldest: the oldest date that is not late, per line; null: nothing is.
    """
    if stored is None:
        nothing = (STORED | PLACE | VALUES).items()
        lines = lines.withColumns(
            {name: F.lit(None).cast(kind) for name, kind in nothing if name != "event_id"}
        )
    else:
        lines = lines.join(stored, "event_id", "left")
    too_old = is_late(F.col("event_date"), oldest)
    return lines.withColumns(
        {"stored": F.col("stored_ts").isNotNull(), "too_old": too_old}
    ).withColumn("late", ~F.col("stored") & F.col("too_old"))


def learn_changed(context: Context) -> list[str]:
    """Note the events that others deleted or changed since our last commit in `ops.changed_events`.
    Returns what to say of it."""
    lake, notes = context.lake, []
    known = foreign.last_known(lake, EVENTS)
    if known is None:
        return []
    learnt = lake.small(CHANGED_EVENTS)["version"].to_pylist()
    for one in foreign.moved(lake, EVENTS, known):
        if foreign.is_loss(one) or one.version <= max(learnt, default=-1):
            continue
        try:
            columns = [*EVENTS.columns, TYPE]
            feed = lake.changes_few(EVENTS, one.version - 1, one.version, columns)
        except FeedGone:
            notes.append(
                f"bronze.events was changed by another writer: {one.in_words()}. The change feed does "
                "not have this version, so deleted events return if their files are read again"
            )
            continue
        gone = changed_ids(feed)
        if gone:
            notes.append(
                f"bronze.events was changed by another writer: {one.in_words()}, {len(gone):,} events "
                "deleted or updated. This is kept, and the other tables follow"
            )
            lake.create(CHANGED_EVENTS)
            rows = [(id_, one.version, one.operation, one.who, context.started) for id_ in gone]
            lake.put_small(CHANGED_EVENTS, rows)
    return notes


def changed_ids(feed: pa.Table) -> list[str]:
    """The events of a change feed that are gone or differ (others may only have filled a column of
    theirs)."""
    is_gone = pc.is_in(feed[TYPE], pa.array(GONE))
    parts = (feed.filter(is_gone), feed.filter(pc.invert(is_gone)))
    gone, came = (
        {row["event_id"]: row for row in part.drop_columns([TYPE]).to_pylist()} for part in parts
    )
    return [name for name, row in gone.items() if came.get(name) != row]


def changed_by_others(context: Context) -> DataFrame | None:
    """`stored_events` of those that others deleted or changed: no line replaces them. None: there
    are none."""
    if not context.lake.rows(CHANGED_EVENTS):
        return None
    first, nothing = F.lit("0001-01-01 00:00:00").cast("timestamp"), F.lit("")
    rows = context.lake.read(CHANGED_EVENTS).select("event_id")
    more = {
        name: F.lit(None).cast(kind)
        for name, kind in looked_up_of(context.source).items()
        if name not in STORED
    }
    unknown = {"stored_hash": nothing, "stored_anonymous": nothing}
    return rows.withColumns({"stored_ts": first} | unknown | more)


def with_changed(context: Context, stored: DataFrame | None) -> DataFrame | None:
    """Stored events, and those that others deleted or changed."""
    changed = changed_by_others(context)
    if stored is None or changed is None:
        return changed if stored is None else stored
    ids = F.broadcast(changed.select("event_id"))
    return stored.join(ids, "event_id", "left_anti").unionByName(changed)


def late_before(context: Context, judged: DataFrame) -> DataFrame:
    """`judge`'s lines, as the nights judged them that read them first.

    A reload has no day. What was late is known from `bronze.rejects`, as it is and as it was before
    others changed it. A line that is too old by the day of the run that read its file first, and was
    not rejected, was a duplicate then: it is `too_old`, and replaces no event. It is late only where
    its event has no other line.
    """
    lake, key = context.lake, list(REJECTS.key)
    known = lake.read(REJECTS).where("reason = 'late'").select(*key)
    good = foreign.last_known(lake, REJECTS)
    if good is not None and foreign.rows_at(lake, REJECTS, good) is not None:
        before = lake.read(REJECTS, good).where("reason = 'late'").select(*key)
        known = known.unionByName(before)
    known = known.distinct().withColumn("known_late", F.lit(True))
    found = judged.join(F.broadcast(known), key, "left")
    found = found.withColumn("known_late", F.coalesce("known_late", F.lit(False)))
    days = first_days(context)
    if days is not None:
        oldest = oldest_date(F.col("first_day"), context.source.sessions)
        found = found.join(F.broadcast(days), "file", "left")
        found = found.withColumn("too_old", is_late(F.col("event_date"), oldest)).drop("first_day")
    in_time = F.col("stored") | ~(F.col("too_old") | F.col("known_late"))
    alone = ~F.max(in_time).over(Window.partitionBy("event_id"))
    late = ~F.col("stored") & (F.col("known_late") | (F.col("too_old") & alone))
    return found.withColumn("late", late).drop("known_late")


def first_days(context: Context) -> DataFrame | None:
    """`file, first_day`: the day of the first run that read a file; files that a run without a day
    read first are left out. None: there are no others."""
    found = context.lake.open(RUNS)
    if found is None:
        return None
    columns = ["started_ts", "outcome", "day", "files"]
    first: dict[str, date | None] = {}
    rows = filesystem.rows_of(found).to_table(columns=columns).sort_by("started_ts")
    for one in rows.filter(pc.equal(rows["outcome"], "ok")).to_pylist():
        for file in one["files"] or ():
            first.setdefault(file, one["day"])
    known = [(file, day) for file, day in first.items() if day is not None]
    return context.spark.createDataFrame(known, "file string, first_day date") if known else None


def stored_by_time(
    context: Context, candidate: Candidate, lines: DataFrame, version: int
) -> DataFrame | None:
    """`stored_events` where an id is a hash of its line: the events that have a time of a line."""
    if context.lake.rows(EVENTS) == 0:
        return None
    schema = ", ".join(f"{name} {kind}" for name, kind in looked_up_of(context.source).items())
    times = candidate.arrow("lines", ["event_ts", "reason"])
    times = times.filter(pc.is_null(times["reason"]))["event_ts"]
    columns: tuple[str, ...] = (
        (*HASHED, "ingest_file") if context.source.columns.file_order else HASHED
    )
    columns += (BOUNDARY_VALUES,) if context.source.boundary_reads_log else ()
    found = files_at_times(context, candidate, times, version, columns, lambda: context.spark)
    if not found:
        return context.spark.createDataFrame([], schema)
    ddl = ", ".join(f"{name} {EVENTS.columns[name]}" for name in columns)
    rows = context.spark.read.schema(ddl).parquet(*found)
    rows = rows.withColumn("event_id", row_hash(hashed(context.source)))
    return F.broadcast(looked_up(rows, F.col("event_id"), context.source))


def files_at_times(
    context: Context,
    candidate: Candidate,
    times: pa.ChunkedArray,
    version: int,
    columns: tuple[str, ...] = HASHED,
    spark: Callable[[], SparkSession] | None = None,
) -> list[str]:
    """Files with the events of a version that have one of some times.

    Args:
        columns: of the events, that the files have.
        spark: gives the session; None: threads of this process look.
    """
    lake = context.lake
    if not len(times) or not lake.rows(EVENTS):
        return []
    wanted = pa.table({"event_ts": pc.unique(times)}).sort_by("event_ts").combine_chunks()
    filesystem.write_parquet(candidate.path("times.parquet"), wanted)
    first, last = (time_slices.micros_of(wanted["event_ts"][at].as_py()) for at in (0, -1))
    old = [one for one in lake.files_of(EVENTS, version) if one.first_us("event_ts") <= last]
    paths = [one.path for one in old if one.last_us("event_ts") >= first]
    look = bronze_first_load.AtTimes(
        candidate.path("times.parquet"), columns, candidate.path("stored")
    )
    if spark is None:
        with ThreadPoolExecutor() as pool:  # (Arrow lets others run while it decodes)
            return [one["path"] for rows in pool.map(look, paths) for one in rows]
    return [one["path"] for one in run(spark, look, paths, "path string", "string")]


def looked_up(events: DataFrame, digest: Column, source: Source) -> DataFrame:
    """What `looked_up_of` names, of events of the table."""
    found = {"event_id": F.col("event_id"), "stored_ts": F.col("event_ts"), "stored_hash": digest,
             "stored_anonymous": F.col("anonymous_id")}  # fmt: skip
    if source.columns.file_order:
        found |= {"stored_file": F.col("ingest_file"), "stored_tie": F.col("tie_break")}
    if source.boundary_reads_log:
        found |= {"stored_values": as_named_now(F.col(BOUNDARY_VALUES), source)}
    return events.select(*(column.alias(name) for name, column in found.items()))


def as_named_now(values: Column, source: Source) -> Column:
    """Boundary values as they are stored, null if they are of other columns than the source file
    names now: a line that comes again has them all."""
    boundary = boundary_of(source)
    names = sorted(name for name, _ in boundary.log) if boundary is not None else []
    keys = F.array_sort(F.json_object_keys(values))
    return F.when(keys == F.array(*map(F.lit, names)).cast("array<string>"), values)


def stored_events(
    context: Context, candidate: Candidate, lines: DataFrame, version: int
) -> DataFrame | None:
    """What `bronze.events` has of the ids in `lines`.

    An id that is a hash of its line has the line's time: only those times are read. A native id
    may be on any date.
    """
    if context.lake.rows(EVENTS) == 0:
        return None
    events = context.lake.read(EVENTS, version)
    if context.source.columns.event_id is None:
        span = lines.agg(F.min(F.unix_micros("event_ts")), F.max(F.unix_micros("event_ts"))).first()
        if span is None or span[0] is None:
            return None
        first, last = (F.timestamp_micros(F.lit(one)) for one in span)
        events = events.where(F.col("event_ts").between(first, last))
        digest: Column = F.col("event_id")
    else:
        digest = row_hash(hashed(context.source))
    return looked_up(events, digest, context.source)


def ranked(judged: DataFrame, file_order: bool = False, values: bool = False) -> DataFrame:
    """Rank the lines that may become events: new ids, and ids whose smaller line arrived now
    (`replaces`): by time and hash where ids are the log's own, then by anonymous id, which an id that
    is a hash does not have where there is a user, and by boundary values. Rank 1 of the `usable` lines
    of an id is the event.

    Args:
        file_order: whether of equal lines the first by file and line is the smallest.
        values: whether lines have boundary values.
    """
    ours = ("event_ts", "row_hash", "anonymous_id", *((BOUNDARY_VALUES,) if values else ()))
    mine = place_of(*ours)
    theirs = place_of(
        "stored_ts", "stored_hash", "stored_anonymous", *(tuple(VALUES) if values else ())
    )
    smaller = mine < theirs
    if file_order:
        place = F.struct("file", "line")
        before = F.struct(
            F.col("stored_file").alias("file"), line_of(F.col("stored_tie")).alias("line")
        )
        # (The line of an event that was stored under another rule is not known.)
        earlier = F.col("stored_tie").isNull() | (place < before)
        smaller = smaller | (mine.eqNullSafe(theirs) & earlier)
    replaces = F.coalesce(F.col("stored") & ~F.col("too_old") & smaller, F.lit(False))
    order = Window.partitionBy("event_id", "usable").orderBy(place_of(*ours), "file", "line")
    fresh = ~F.col("stored") & ~F.col("late") & ~F.col("too_old")
    marked = judged.withColumn("replaces", replaces)
    marked = marked.withColumn("usable", fresh | F.col("replaces"))
    return marked.withColumn("rank", F.row_number().over(order))


def place_of(time: str, digest: str, anonymous: str, values: str | None = None) -> Column:
    """What orders lines of one event, no anonymous id last, nor boundary values."""
    told = (
        []
        if values is None
        else [F.col(values).isNull().alias("valueless"), F.col(values).alias("values")]
    )
    return F.struct(
        F.col(time).alias("time"),
        F.col(digest).alias("digest"),
        F.col(anonymous).isNull().alias("nameless"),
        F.col(anonymous).alias("anonymous"),
        *told,
    )
