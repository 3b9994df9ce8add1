"""Landing files -> `bronze.events`, `bronze.rejects` and the ledger of files.

compute   choose the files that are new or changed, read them once into the candidate, tell new
          events from duplicates, late lines and rejects
audit     the suite of `expectations/events.py` on the candidate (rejects are published even when
          it fails)
publish   rejects, events, then the ledger; each commit alone leaves a state that the next run
          completes
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.audit import arrow_columns, suite
from jobs.bronze import checks, exposures, landing, quality
from jobs.bronze import first_load as bronze_first_load
from jobs.bronze.records import FileFacts
from jobs.core import crash_points
from jobs.core.errors import AuditFailed, Conflict, RejectShareError, SourceError
from jobs.core.lateness import is_late
from jobs.core.plan import Algorithm, IngestFacts, Plan, Publish, earlier, idle, ingest_plan
from jobs.core.tables import EVENTS, FILES, REJECTS, Table
from jobs.lake import filesystem, time_slices
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.data_files import staging
from jobs.lake.delta_errors import retried
from jobs.lake.manifest import Manifest, Staged
from jobs.lake.tasks import run

# -- compute --------------------------------------------------------------------------------------


def judge(lines: DataFrame, stored: DataFrame | None, oldest: Column) -> DataFrame:
    """Tell each usable line's fate: columns `stored`, `too_old`, `late`, and what is stored.

    Args:
        lines: usable typed lines.
        stored: `event_id, stored_ts, stored_hash` of events that the table has, or None: empty.
        oldest: the oldest date that is not late, per line; null: nothing is.
    """
    if stored is None:
        lines = lines.withColumns(
            {"stored_ts": F.lit(None).cast("timestamp"), "stored_hash": F.lit(None).cast("string")}
        )
    else:
        lines = lines.join(stored, "event_id", "left")
    too_old = is_late(F.col("event_date"), oldest)
    return lines.withColumns(
        {"stored": F.col("stored_ts").isNotNull(), "too_old": too_old}
    ).withColumn("late", ~F.col("stored") & F.col("too_old"))


def stored_by_time(
    context: Context, candidate: Candidate, lines: DataFrame, version: int
) -> DataFrame | None:
    """`stored_events` where an id is a hash of its line: the events that have a time of a line."""
    from jobs.bronze.typed_events import HASHED, row_hash

    lake = context.lake
    if lake.rows(EVENTS) == 0:
        return None
    schema = "event_id string, stored_ts timestamp, stored_hash string"
    times = candidate.arrow("lines", ["event_ts", "reason"])
    times = (
        times.filter(pc.is_null(times["reason"]))
        .select(["event_ts"])
        .group_by("event_ts")
        .aggregate([])
    )
    times = times.sort_by("event_ts").combine_chunks()
    if not times.num_rows:
        return context.spark.createDataFrame([], schema)
    filesystem.write_parquet(candidate.path("times.parquet"), times)
    first, last = (time_slices.micros_of(times["event_ts"][at].as_py()) for at in (0, -1))
    old = [one for one in lake.files_of(EVENTS, version) if one.first_us("event_ts") <= last]
    paths = [one.path for one in old if one.last_us("event_ts") >= first]
    look = bronze_first_load.AtTimes(
        candidate.path("times.parquet"), HASHED, candidate.path("stored")
    )
    found = run(lambda: context.spark, look, paths, "path string", "string")
    if not found:
        return context.spark.createDataFrame([], schema)
    ddl = ", ".join(f"{name} {EVENTS.columns[name]}" for name in HASHED)
    rows = context.spark.read.schema(ddl).parquet(*(one["path"] for one in found))
    rows = rows.select(row_hash().alias("event_id"), F.col("event_ts").alias("stored_ts"))
    return F.broadcast(rows.withColumn("stored_hash", F.col("event_id")))


def stored_events(
    context: Context, candidate: Candidate, lines: DataFrame, version: int
) -> DataFrame | None:
    """What `bronze.events` has of the ids in `lines`.

    An id that is a hash of its line has the line's time: only those times are read. A native id
    may stand on any date.
    """
    from jobs.bronze.typed_events import row_hash

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
        digest = row_hash()
    return events.select(
        "event_id", F.col("event_ts").alias("stored_ts"), digest.alias("stored_hash")
    )


def ranked(judged: DataFrame) -> DataFrame:
    """Rank the lines that may become events: new ids, and native ids whose smaller line arrived
    now (`replaces`). Rank 1 of the `usable` lines of an id is the event."""
    smaller = F.struct("event_ts", "row_hash") < F.struct(
        F.col("stored_ts").alias("event_ts"), F.col("stored_hash").alias("row_hash")
    )
    replaces = F.coalesce(F.col("stored") & ~F.col("too_old") & smaller, F.lit(False))
    order = Window.partitionBy("event_id", "usable").orderBy("event_ts", "row_hash", "file", "line")
    fresh = ~F.col("stored") & ~F.col("late")
    marked = judged.withColumn("replaces", replaces)
    marked = marked.withColumn("usable", fresh | F.col("replaces"))
    return marked.withColumn("rank", F.row_number().over(order))


@dataclass
class Counts:
    """Lines read, and what became of them."""

    read: int = 0
    events_new: int = 0
    events_replaced: int = 0
    duplicates: int = 0


@dataclass
class IngestManifest(Manifest):
    """What the steps of `ingest`, and of `replay-rejects`, tell each other."""

    base: dict[str, int]
    """By table: the version that the candidate was computed from."""
    empty: bool
    """Whether there is nothing to publish."""
    counts: Counts = field(default_factory=Counts)
    rejects: dict[str, int] = field(default_factory=dict)
    """By reason, how many lines."""
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    staged: Staged | None = None
    """New events; None: they are the candidate's part `events`, because some replace stored ones."""
    rejects_staged: Staged | None = None
    """Rejects that the table does not have yet."""
    rejects_changed: int = 0
    """How many stored rejects go, or have another reason now."""

    @staticmethod
    def plan_of_old(old: dict[str, Any]) -> Plan:
        if old["empty"]:
            return idle("ingest")
        return earlier("ingest", Publish.MERGE if old.get("staged") is None else Publish.APPEND)


def compute(context: Context) -> Candidate:
    """Steps of this job's compute, restartable at the parsed lines after a conflict."""
    lake = context.lake
    landing.null_ids(context)
    for table in (EVENTS, REJECTS, FILES):
        lake.create(table, upgrade=False)
    candidate, notes = context.candidate(EVENTS), []
    landed = landing.landing_files(context)
    chosen = landing.unread(context, landed)
    if not landed:
        nothing = f"source.landing = {context.source.source.landing!r} matches no file"
        if lake.rows(FILES) == 0:
            where = os.getcwd()
            raise SourceError(f"{nothing} (from {where}): correct it, or put the log there")
        notes.append(f"{nothing} this time: nothing was read")
    facts: list[FileFacts] = []
    if chosen:
        for table in (EVENTS, REJECTS, FILES):
            lake.create(table)
        if not landing.is_parsed(context, candidate, chosen):
            candidate.remove()
            lines = sum(size for _, size, _ in chosen) // landing.LINE_BYTES
            engine = context.thresholds.spark(lines, lake.rows(EVENTS))
            landing.parse(context, candidate, chosen, engine)
        facts = landing.facts_read(candidate)
    manifest = IngestManifest(
        plan=idle("ingest"),
        base={table.full_name: version_of(context, table) for table in (EVENTS, REJECTS, FILES)},
        empty=not facts, counts=Counts(read=sum(one.lines for one in facts)),
        files=[one.file for one in facts], notes=notes,
    )  # fmt: skip
    if facts:
        late = None if context.day is None else landing.oldest_date(context)
        choice = facts_of(context, manifest, late)
        manifest.plan = ingest_plan(choice, context.thresholds)
        context.decide(manifest.plan)
        context.enter(manifest.plan.engine)
        notes += landing.strange_times(context, candidate)
        notes += landing.too_long(facts)
        if passed := sum(one.forgotten for one in facts):
            notes.append(f"{passed} lines of people who were forgotten were passed over")
        notes += exposures.told(context, candidate)
        fill(context, candidate, manifest, choice, late)
        notes += quality.bad_files(candidate, manifest.counts.read, manifest.rejects)
        notes += quality.same_ids(context, candidate)
    context.decide(manifest.plan)
    candidate.save(manifest)
    crash_points.point("ingest.computed")
    return candidate


def version_of(context: Context, table: Table) -> int:
    """The version of a table that is there."""
    version = context.lake.version(table)
    assert version is not None
    return version


def facts_of(context: Context, manifest: IngestManifest, oldest: Column | None) -> IngestFacts:
    """Args: oldest: the oldest date that is not late, per line; None: nothing is."""
    return IngestFacts(
        lines=manifest.counts.read, stored=context.lake.rows(EVENTS),
        native_ids=context.source.columns.event_id is not None, late=oldest is not None,
    )  # fmt: skip


def fill(
    context: Context, candidate: Candidate, manifest: IngestManifest, choice: IngestFacts,
    oldest: Column | None,
) -> None:  # fmt: skip
    """Write the candidate's events and rejects, and count."""
    fill_events(context, candidate, manifest, choice, oldest)
    rejects = unusable(candidate).withColumns(
        {
            "run_day": F.lit(context.day).cast("date"),
            "first_seen_ts": F.lit(context.started),
            "file_columns": columns_of_files(landing.facts_read(candidate)),
        }
    )
    candidate.write("rejects", rejects.select(*REJECTS.columns).coalesce(1))
    count_rejects(candidate, manifest)
    fill_rejects(context, candidate, manifest)


def fill_events(
    context: Context, candidate: Candidate, manifest: IngestManifest, choice: IngestFacts,
    oldest: Column | None,
) -> None:  # fmt: skip
    """Judge the candidate's lines as the manifest's plan says, write its events, and count.

    Args:
        choice: what the plan was made from.
        oldest: the oldest date that is not late, per line; None: nothing is.
    """
    usable = candidate.part("lines").where("reason IS NULL")
    if manifest.plan.path is Algorithm.FIRST_SLICES:
        fill_by_slices(context, candidate, manifest, usable)
        return
    stored = stored_of(context, candidate, manifest, usable)
    oldest = F.lit(None).cast("date") if oldest is None else oldest
    if "row_hash" not in usable.columns:
        usable = usable.withColumn("row_hash", F.col("event_id"))
    judged = candidate.write("judged", ranked(judge(usable, stored, oldest)))
    # Duplicates are counted from the lines themselves, not as what is left over: the audit's
    # balance (read = new + duplicates + rejects) could not fail otherwise.
    first = F.col("usable") & (F.col("rank") == 1)
    again = F.col("stored") | (F.col("usable") & (F.col("rank") > 1))
    counted = judged.agg(
        F.count_if(first & F.col("replaces")).alias("replaced"), F.count_if(again).alias("again")
    ).first()
    assert counted is not None
    choice = replace(choice, replaces=counted["replaced"] > 0)
    manifest.plan = ingest_plan(choice, context.thresholds, manifest.plan.job)
    events = judged.where(first).withColumns(
        {"ingest_file": F.col("file"), "ingest_ts": F.lit(context.started)}
    )
    events = laid_out(events.select(*EVENTS.columns, "replaces", "stored_ts"), context)
    if manifest.plan.publish is Publish.APPEND:
        manifest.staged = context.lake.stage(EVENTS, events, context.run_id)
        new = sum(one["rows"] for one in manifest.staged)
    else:
        new = candidate.write("events", events).where("NOT replaces").count()
    manifest.counts.events_new, manifest.counts.events_replaced = new, counted["replaced"]
    manifest.counts.duplicates = counted["again"]


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
        # An outer join sends all of the larger side about; this one passes over it once.
        ids = F.broadcast(usable.select("event_id"))
        stored = stored.join(ids, "event_id", "left_semi")
    return stored


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
        EVENTS.columns, f"{lake.path(EVENTS)}/{folder}", context.started
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


def unusable(candidate: Candidate) -> DataFrame:
    """The candidate's lines that make no event, late ones among them, with their reasons."""
    lines = candidate.part("lines").where("reason IS NOT NULL")
    if not candidate.has("judged"):
        return lines
    late = candidate.part("judged").where("late").withColumn("reason", F.lit("late"))
    return lines.unionByName(late, allowMissingColumns=True)


def columns_of_files(facts: list[FileFacts]) -> Column:
    """Per line, the columns of its file in order, where that is a CSV."""
    files_with: dict[tuple[str, ...], list[str]] = {}
    for one in facts:
        if one.header:
            files_with.setdefault(tuple(one.header), []).append(one.file)
    # Most often the files of a run agree: one branch, or a few.
    found = F.lit(None).cast("array<string>")
    for header, paths in files_with.items():
        names = F.array(*map(F.lit, header))
        found = F.when(F.col("file").isin(paths), names).otherwise(found)
    return found


def count_rejects(candidate: Candidate, manifest: IngestManifest) -> None:
    counted = candidate.part("rejects").groupBy("reason").count().collect()
    manifest.rejects = {row["reason"]: row["count"] for row in counted}


def fill_rejects(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Find the rejects that the table does not have yet, and what changes among those it has."""
    lake, key = context.lake, list(REJECTS.key)
    base = manifest.base[REJECTS.full_name]
    rejects = candidate.part("rejects").dropDuplicates(key)
    if lake.rows(REJECTS):
        paths = manifest.files
        known = lake.read(REJECTS, base).where(F.col("file").isin(paths))
        changed = changed_rejects(context, candidate, rejects, base, paths)
        candidate.write("rejects-changed", changed)
        manifest.rejects_changed = candidate.row_count("rejects-changed")
        rejects = rejects.join(known.select(*key), key, "left_anti")
    if manifest.rejects:
        manifest.rejects_staged = lake.stage(REJECTS, rejects.coalesce(1), context.run_id)


def changed_rejects(
    context: Context, candidate: Candidate, rejects: DataFrame, base: int, paths: list[str]
) -> DataFrame:
    """Stored rejects of this run's files that go (`gone`) or are told of otherwise.

    Those go that came good: their lines are events or duplicates now. So do those of a reading
    that no run finished (it failed, or was killed), if this reading does not repeat them: under
    another encoding, or other columns of a Parquet file, the same line has another text. Those that
    are repeated take the reason and the columns that hold now.
    """
    lake, key = context.lake, list(REJECTS.key)
    known = lake.read(REJECTS, base).where(F.col("file").isin(paths)).select(*REJECTS.columns)
    good = candidate.part("lines").where("reason IS NULL").select(*key)
    good = good.join(rejects.select(*key), key, "left_anti")
    read = {
        row["file"]: time_slices.micros_of(row["read_ts"])
        for row in lake.small(FILES).select(["file", "read_ts"]).to_pylist()
    }
    rows = [(file, read.get(file)) for file in paths]
    finished = F.broadcast(context.spark.createDataFrame(rows, "file string, read_us bigint"))
    unfinished = known.join(finished, "file").where(
        "read_us IS NULL OR unix_micros(first_seen_ts) > read_us"
    )
    left = unfinished.join(rejects.select(*key), key, "left_anti").select(*known.columns)
    gone = known.join(good, key, "left_semi").unionByName(left).dropDuplicates(key)
    now = rejects.select(
        *key, F.col("reason").alias("now_reason"), F.col("file_columns").alias("now_columns")
    )
    other = known.join(now, key).where(
        "NOT (reason <=> now_reason AND file_columns <=> now_columns)"
    )
    other = other.withColumns({"reason": F.col("now_reason"), "file_columns": F.col("now_columns")})
    return (
        gone.select(*REJECTS.columns)
        .withColumn("gone", F.lit(True))
        .unionByName(other.select(*REJECTS.columns).withColumn("gone", F.lit(False)))
    )


def laid_out(rows: DataFrame, context: Context) -> DataFrame:
    """Rows sorted by time, in few files with narrow time ranges, so that reads prune."""
    count = max(1, context.spark.sparkContext.defaultParallelism)
    return rows.repartitionByRange(count, *EVENTS.order).sortWithinPartitions(*EVENTS.order)


# -- audit ----------------------------------------------------------------------------------------


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored, RejectShareError (by policy). Rejects are published; the
    ledger is not, so the files of a failed run are read again."""
    manifest = candidate.manifest(IngestManifest)
    context.decide(manifest.plan)
    if manifest.empty:
        return
    complaint = quality.complaint(context, candidate, manifest.counts.read, manifest.rejects)
    try:
        audit_events(context, candidate, manifest, complaint)
    except AuditFailed as error:
        publish_rejects(context, candidate, manifest)
        if complaint and context.source.quality.on_exceed == "fail":
            raise RejectShareError(complaint) from error
        raise
    crash_points.point("ingest.audited")


def audit_events(
    context: Context, candidate: Candidate, manifest: IngestManifest, too_many: str = ""
) -> None:
    """Args: too_many: what to say of the lines that cannot be used; empty: they are few enough.

    Raises: AuditFailed, AuditErrored.
    """
    lake, counts, limits = context.lake, manifest.counts, context.thresholds
    rejected = sum(manifest.rejects.values())
    facts = {
        "lines_balance": counts.read == counts.events_new + counts.duplicates + rejected,
        "reject_share_within_bound": not too_many,
    }
    staged = manifest.staged
    severity = {"reject_share_within_bound": context.source.quality.on_exceed}
    words = {"reject_share_within_bound": too_many}
    if staged is not None and context.source.columns.event_id is None:
        paths = [f"{lake.path(EVENTS)}/{one['path']}" for one in staged]
        spark = context.tasks(limits.tasks(counts.read))
        held = run(spark, checks.events_hold, paths, checks.EVENTS_DDL, "string")
        if all(one["holds"] for one in held) and arrow_columns.apart(held):
            number = counts.events_new
            suite.audit_certified(context, EVENTS, number, facts, severity, words)
            return
    engine = limits.spark(counts.read, lake.rows(EVENTS))
    events = candidate.part("events") if staged is None else lake.staged(EVENTS, staged)
    suite.audit_candidate(context, EVENTS, events, facts, engine, severity, words)


# -- publish --------------------------------------------------------------------------------------


def publish(context: Context, candidate: Candidate) -> Result:
    """Rejects, events, rejects that came good, ledger: in this order.

    Raises:
        Conflict: another run changed `bronze.events` since the candidate was computed.
    """
    lake, manifest = context.lake, candidate.manifest(IngestManifest)
    context.decide(manifest.plan)
    result = Result(
        **asdict(manifest.counts), rejects=manifest.rejects, files=manifest.files,
        notes=manifest.notes,
    )  # fmt: skip
    if manifest.empty and context.day is None and (waiting := lake.rows(REJECTS)):
        result.notes.append(
            f"bronze.rejects has {waiting} lines of earlier runs. Files that were read are not read "
            "again: after a correction of the source file, python -m jobs replay-rejects --source "
            f"{context.source.name} gives those lines a second chance"
        )
    if not manifest.empty:
        base = manifest.base[EVENTS.full_name]
        if lake.changed_rows(EVENTS, base):
            raise Conflict(f"bronze.events was changed by another run since version {base}")
        publish_rejects(context, candidate, manifest)
        crash_points.point("ingest.rejects-published")
        publish_events(context, candidate, manifest)
        crash_points.point("ingest.events-published")
        clear_rejects(context, candidate, manifest)
        crash_points.point("ingest.rejects-cleaned")
        publish_ledger(context, candidate)
        crash_points.point("ingest.ledger-published")
    for table in (EVENTS, REJECTS):
        result.tables[table.full_name] = lake.told(table)
    return result


def publish_rejects(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Append the rejects that the table does not have yet."""
    lake = context.lake
    if not manifest.rejects_staged:
        return

    def attempt(_: int) -> None:
        staged = manifest.rejects_staged or []
        if not sum(one["rows"] for one in staged):
            return
        base = manifest.base[REJECTS.full_name]
        guard = lake.guard(REJECTS)
        try:
            lake.commit(REJECTS, staged, base, guard, base + 1, context.run_id)
        except Conflict:
            # Another run's rejects came in between: ours are compared with them once more.
            manifest.base[REJECTS.full_name] = version_of(context, REJECTS)
            context.enter(manifest.plan.engine)
            fill_rejects(context, candidate, manifest)
            raise

    retried(3, attempt)


def publish_events(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Raises: Conflict: another run changed `bronze.events` since the candidate was computed."""
    if not manifest.counts.events_new + manifest.counts.events_replaced:
        return
    lake, base = context.lake, manifest.base[EVENTS.full_name]
    guard, version = lake.guard(EVENTS), base + 1
    if manifest.staged is not None:
        lake.commit(EVENTS, manifest.staged, base, guard, version, context.run_id)
        return
    context.upsert(EVENTS, candidate, "events", base, guard, version, stored="stored_ts")


def clear_rejects(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Lines of this batch that are events or duplicates now leave `bronze.rejects`."""
    if not manifest.rejects_changed:
        return
    change_rejects(context, candidate, "rejects-changed")


def change_rejects(context: Context, candidate: Candidate, part: str) -> None:
    """Put a part of the candidate into `bronze.rejects`; other runs' rejects are left as they are."""

    def attempt(_: int) -> None:
        lake, base = context.lake, version_of(context, REJECTS)
        context.upsert(REJECTS, candidate, part, base, lake.guard(REJECTS), base + 1)

    retried(3, attempt)


def publish_ledger(context: Context, candidate: Candidate) -> None:
    lake = context.lake
    rows = [
        (one.file, one.bytes, one.modified_ms, one.sha256, one.lines, list(one.columns.items()),
         context.started, context.batch)
        for one in landing.facts_read(candidate)
    ]  # fmt: skip
    lake.put_small(FILES, rows)
