"""Landing files -> `bronze.events`, `bronze.rejects` and the ledger of files.

compute   choose the files that are new or changed, read them once into the candidate, tell new
          events from duplicates, late lines and rejects
audit     the suite of `expectations/events.py` on the candidate (rejects are published even when
          it fails)
publish   rejects, events, then the ledger; each commit alone leaves a state that the next run
          completes
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs import arrow_checks, crash, files, slices, validate
from jobs.context import Candidate, Context, Result
from jobs.delta import retried, staging
from jobs.errors import AuditFailed, Conflict, RejectShareError, SchemaError, SourceError
from jobs.reading import reader
from jobs.records import RECORD_DDL, Format
from jobs.sources import Source
from jobs.tables import EVENTS, FILES, REJECTS
from jobs.tasks import run
from jobs.typing_rules import typed_events

DAY_FIELD = re.compile(r"\{day(?::([^{}]*))?\}")
BIN_BYTES = 64 * 1024 * 1024
LINES_OF_A_CHANGE = 20  # ours
TYPE_OF = {
    "bad_event_ts": ("event_ts", "a time of the source's unit"),
    "bad_value": ("value", "a number"),
    "bad_tie_break": ("tie_break", "a whole number"),
}
# Small row groups: a slice of time reads those that it needs. A dictionary of hashes is none.
LINES_AS = {"parquet.block.size": str(8 * 1024 * 1024)} | {
    f"parquet.enable.dictionary#{name}": "false" for name in ("event_id", "row_hash", "raw_hash")
}
FEW_LINES = 500_000  # ours: their ids fit every task
FIRST_LOGS = 1985  # ours: a log that ends before this year is told of
LINE_BYTES = 64  # about: only to guess how many lines a file has


# -- which files ----------------------------------------------------------------------------------


def landing_patterns(landing: str, day: date | None, lateness_days: int) -> list[str]:
    """The globs that a landing pattern means.

    With a day, `{day}` covers the days from `day - lateness_days` to `day`, so that a file
    delivered late into an older folder is read; without one it matches every date.
    """
    if not DAY_FIELD.search(landing):
        return [landing]
    if day is None:
        anything = DAY_FIELD.sub(lambda found: _shape(found.group(1) or "%Y-%m-%d"), landing)
        return [anything]
    days = [day - timedelta(days=back) for back in range(lateness_days, -1, -1)]
    return [_on(landing, one) for one in days]


def _on(landing: str, day: date) -> str:
    """A landing pattern with its day filled in."""
    return DAY_FIELD.sub(lambda found: day.strftime(found.group(1) or "%Y-%m-%d"), landing)


def _shape(form: str) -> str:
    """A date format as a glob of digits."""
    sample = date(2000, 10, 20).strftime(form)
    return re.sub(r"\d", "[0-9]", sample)


def landing_files(context: Context) -> list[tuple[str, int, int]]:
    """Files of the landing: (path, bytes, modified ms)."""
    landing = context.source.source.landing
    if "://" not in landing:
        landing = os.path.abspath(landing)
    found: dict[str, tuple[str, int, int]] = {}
    for pattern in landing_patterns(landing, context.day, context.source.sessions.lateness_days):
        for file in files.glob(pattern):
            found[file[0]] = file
    return sorted(found.values())


def unread(context: Context, landed: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The files that the ledger does not know as they are now."""
    ledger = context.lake.small(FILES).select(["file", "size", "modified_ms"]).to_pylist()
    known = {row["file"]: (row["size"], row["modified_ms"]) for row in ledger}
    return [file for file in landed if known.get(file[0]) != file[1:]]


# -- compute --------------------------------------------------------------------------------------


def file_format(source: Source) -> Format:
    return Format(
        format=source.source.format, mapped=source.columns.mapped(),
        delimiter=source.source.delimiter, header=source.source.header,
        null_values=frozenset(source.source.null_values), encoding=source.source.encoding,
        list_separator=source.source.list_separator,
    )  # fmt: skip


def bins(chosen: list[tuple[str, int, int]], cores: int) -> list[list[str]]:
    """Paths in groups of about equal bytes, one group a task: the largest files first."""
    total = sum(size for _, size, _ in chosen)
    count = max(1, min(len(chosen), max(cores, total // BIN_BYTES)))
    groups: list[tuple[int, list[str]]] = [(0, []) for _ in range(count)]
    for path, size, _ in sorted(chosen, key=lambda file: -file[1]):
        lightest = min(range(count), key=lambda at: groups[at][0])
        load, paths = groups[lightest]
        groups[lightest] = (load + size + 100_000, [*paths, path])
    return [paths for _, paths in groups]


def parse(context: Context, candidate: Candidate, chosen: list[tuple[str, int, int]]) -> None:
    """Read files once: typed lines in the part `lines`, what the files were in `files`."""
    spark = context.spark
    groups = bins(chosen, spark.sparkContext.defaultParallelism)
    rows = [(path, group) for group, paths in enumerate(groups) for path in paths]
    frame = spark.createDataFrame(rows, "path string, bin int")
    paths = frame.repartitionById(len(groups), "bin").select("path")
    records = paths.mapInArrow(reader(file_format(context.source)), RECORD_DDL)
    # Hashes of good lines find those that were rejects in an earlier reading of their file.
    hashed = context.lake.rows(REJECTS) > 0
    lines = typed_events(records, context.source, oldest_date(context), hashed).withColumn(
        "facts", F.when(F.col("line") == 0, F.col("raw"))
    )
    lines = lines.withColumn("raw", F.when(F.col("facts").isNull(), F.col("raw")))
    written = candidate.write("lines", lines, LINES_AS)
    facts = facts_of(written)
    stats = {path: (size, modified) for path, size, modified in chosen}
    for one in facts:
        one["bytes"], one["modified_ms"] = stats[one["file"]]
    check_schema(context, facts)
    files.write_text(candidate.path("files.json"), json.dumps(facts))
    crash.point("ingest.parsed")


def facts_of(lines: DataFrame) -> list[dict[str, Any]]:
    """What each file was, as its reader told, and under `bad` which mapped columns could not be
    read: how many lines, and the first of them."""
    bad = {reason: F.col("reason") == reason for reason in TYPE_OF}
    by_file = lines.groupBy("file").agg(
        F.max("facts").alias("facts"),
        *(F.count_if(is_bad).alias(reason) for reason, is_bad in bad.items()),
        *(
            F.min_by("raw", F.when(is_bad, F.col("line"))).alias(f"{reason}_raw")
            for reason, is_bad in bad.items()
        ),
    )
    return [
        json.loads(row["facts"])
        | {"bad": {one: (row[one], row[f"{one}_raw"]) for one in TYPE_OF if row[one]}}
        for row in by_file.collect()
    ]


def changed_types(context: Context, facts: list[dict[str, Any]]) -> Iterator[str]:
    """Files of text in which a column that was readable before is so in no line any more.

    One bad line is a reject; a file of them is a log that changed. Text has no types, so it takes
    some lines to tell the two apart.
    """
    if not context.lake.rows(EVENTS):
        return
    mapped = context.source.columns.mapped()
    for one in facts:
        for reason, (count, raw) in one["bad"].items():
            ours, expected = TYPE_OF[reason]
            if count == one["lines"] >= LINES_OF_A_CHANGE:
                yield (
                    f"{one['file']}: column {mapped[ours]!r} (columns.{ours}) is {expected} in none "
                    f"of its {count} lines, in earlier files it was; the first line: {raw[:200]!r}. "
                    "Have the log delivered again as it was, correct [time], or load it as a new "
                    "source"
                )


def check_schema(context: Context, facts: list[dict[str, Any]]) -> None:
    """Stop before anything is written when a file is not what was promised.

    Raises:
        SchemaError: with every file's complaint: column, file, sample value, remedy.
    """
    complaints = [one["error"] for one in facts if one["error"]]
    complaints += changed_types(context, facts)
    source = context.source
    ledger = context.lake.small(FILES).sort_by([("read_ts", "descending"), ("file", "descending")])
    before = next((one for one in ledger["columns"].to_pylist() if one), None)
    if before is not None and source.source.format in ("jsonl", "parquet", "csv"):
        known = dict(before)
        for one in facts:
            there = one["columns"]
            if not one["lines"] or one["error"]:
                continue
            for ours, theirs in source.columns.mapped().items():
                root = theirs.split(".")[0] if theirs not in known else theirs
                if root in known and theirs not in there and root not in there:
                    complaints.append(
                        f"{one['file']}: column {theirs!r} (columns.{ours}) is in none of its "
                        f"{one['lines']} lines, earlier files had it. Have the log delivered again "
                        "with it, or take it out of [columns]"
                    )
                elif there.get(theirs, known.get(theirs)) != known.get(theirs):
                    complaints.append(
                        f"{one['file']}: column {theirs!r} (columns.{ours}) is {there[theirs]}, in "
                        f"earlier files it was {known[theirs]}. Write it as before, or load the "
                        "log as a new source"
                    )
            new = sorted(set(there) - set(known))
            if new and source.source.on_new_column == "fail":
                complaints.append(
                    f"{one['file']}: new column {new[0]!r}, and source.on_new_column = 'fail'. "
                    "Set it to 'ignore' to read the file without the column"
                )
    if complaints:
        shown = "\n".join(complaints[:10])
        more = f"\n… and {len(complaints) - 10} more files" if len(complaints) > 10 else ""
        raise SchemaError(f"nothing was written:\n{shown}{more}")


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
    too_old = F.coalesce(F.col("event_date") < oldest, F.lit(False))
    return lines.withColumns(
        {"stored": F.col("stored_ts").isNotNull(), "too_old": too_old}
    ).withColumn("late", ~F.col("stored") & F.col("too_old"))


def oldest_date(context: Context) -> Column:
    """The oldest date that is not late tonight; null: nothing is."""
    return F.lit(context.oldest_day).cast("date")


def stored_by_time(
    context: Context, candidate: Candidate, lines: DataFrame, version: int
) -> DataFrame | None:
    """`stored_events` where an id is a hash of its line: the events that have a time of a line."""
    lake = context.lake
    if lake.rows(EVENTS) == 0:
        return None
    schema = "event_id string, stored_ts timestamp, stored_hash string"
    times = candidate.arrow("lines", ["event_ts", "line", "reason"])
    good = pc.and_(pc.greater(times["line"], 0), pc.is_null(times["reason"]))
    times = times.filter(good).select(["event_ts"]).group_by("event_ts").aggregate([])
    times = times.sort_by("event_ts").combine_chunks()
    if not times.num_rows:
        return context.spark.createDataFrame([], schema)
    files.write_parquet(candidate.path("times.parquet"), times)
    first, last = (slices.micros_of(times["event_ts"][at].as_py()) for at in (0, -1))
    old = [one for one in lake.files_of(EVENTS, version) if one.first_us("event_ts") <= last]
    paths = [one.path for one in old if one.last_us("event_ts") >= first]
    look = slices.AtTimes(candidate.path("times.parquet"), candidate.path("stored"))
    found = run(lambda: context.spark, look, paths, "path string", "string")
    if not found:
        return context.spark.createDataFrame([], schema)
    rows = context.spark.read.schema("event_id string, stored_ts timestamp").parquet(
        *(one["path"] for one in found)
    )
    return F.broadcast(rows.withColumn("stored_hash", F.col("event_id")))


def stored_events(
    context: Context, candidate: Candidate, lines: DataFrame, version: int
) -> DataFrame | None:
    """What `bronze.events` has of the ids in `lines`.

    An id that is a hash of its line has the line's time: only those times are read. A native id
    may stand on any date.
    """
    from jobs.typing_rules import row_hash

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


def compute(context: Context) -> Candidate:
    """Steps of this job's compute, restartable at the parsed lines after a conflict."""
    lake = context.lake
    for table in (EVENTS, REJECTS, FILES):
        lake.create(table)
    candidate = context.candidate(EVENTS)
    files_json = candidate.path("files.json")
    if files.exists(files_json):
        facts = json.loads(files.read_text(files_json))
    else:
        landed = landing_files(context)
        chosen = unread(context, landed)
        if not landed and lake.rows(FILES) == 0:
            raise SourceError(
                f"source.landing = {context.source.source.landing!r} matches no file (from "
                f"{os.getcwd()}): correct it, or put the log there"
            )
        facts = []
        if chosen:
            lines = sum(size for _, size, _ in chosen) // LINE_BYTES
            context.expect(lines, lake.rows(EVENTS))
            parse(context, candidate, chosen)
            facts = json.loads(files.read_text(files_json))
    base = {table.full_name: lake.version(table) for table in (EVENTS, REJECTS, FILES)}
    manifest: dict[str, Any] = {
        "batch": context.batch, "day": context.day, "base": base, "empty": not facts,
        "counts": {"read": sum(one["lines"] for one in facts)}, "rejects": {},
        "files": [one["file"] for one in facts],
    }  # fmt: skip
    if facts:
        manifest["notes"] = strange_times(context, candidate)
        fill(context, candidate, manifest)
    candidate.save(manifest)
    crash.point("ingest.computed")
    return candidate


def strange_times(context: Context, candidate: Candidate) -> list[str]:
    """What to say if a log seems to be of another age than logs are: a unit that is too small or
    too large by a thousand makes times that are none of anybody's, and that can be read."""
    parts = [path for path, *_ in files.glob(f"{candidate.path('lines')}/*.parquet")]
    known = slices.extents(parts)
    if not known:
        return []
    first, last = (
        pa.scalar(end, pa.int64()).cast(slices.CLOCK).as_py()
        for end in (min(one[1] for one in known), max(one[2] for one in known))
    )
    if last.year >= FIRST_LOGS and first <= context.started + timedelta(days=366):
        return []
    return [
        f"all times of these lines lie between {first:%Y-%m-%d %H:%M:%S} and "
        f"{last:%Y-%m-%d %H:%M:%S} UTC: is time.unit = {context.source.time.unit!r} right? If it is "
        "not: correct it, and load the log under another source.name; what was read stays as it "
        "was read"
    ]


def fill(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> None:
    """Write the candidate's events and rejects, and count."""
    context.expect(manifest["counts"]["read"], context.lake.rows(EVENTS))
    late = None if context.day is None else oldest_date(context)
    fill_events(context, candidate, manifest, late)
    rejects = unusable(candidate).withColumns(
        {"run_day": F.lit(context.day).cast("date"), "first_seen_ts": F.lit(context.started)}
    )
    candidate.write("rejects", rejects.select(*REJECTS.columns).coalesce(1))
    count_rejects(candidate, manifest)
    fill_rejects(context, candidate, manifest)


def fill_events(
    context: Context, candidate: Candidate, manifest: dict[str, Any], oldest: Column | None
) -> None:
    """Judge the candidate's lines, write its events, and count.

    Args:
        oldest: the oldest date that is not late, per line; None: nothing is.
    """
    usable = candidate.part("lines").where("line > 0 AND reason IS NULL")
    few = context.many and manifest["counts"]["read"] <= FEW_LINES
    find = stored_by_time if few and context.source.columns.event_id is None else stored_events
    stored = find(context, candidate, usable, manifest["base"][EVENTS.full_name])
    first_load = stored is None and oldest is None and context.many
    if first_load and context.source.columns.event_id is None:
        fill_by_slices(context, candidate, manifest, usable)
        return
    if stored is not None and few and find is stored_events:
        # An outer join sends all of the larger side about; this one passes over it once.
        ids = F.broadcast(usable.select("event_id"))
        stored = stored.join(ids, "event_id", "left_semi")
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
    events = judged.where(first).withColumns(
        {"ingest_file": F.col("file"), "ingest_ts": F.lit(context.started)}
    )
    events = laid_out(events.select(*EVENTS.columns, "replaces"), context)
    if counted["replaced"]:
        new = candidate.write("events", events).where("NOT replaces").count()
    else:
        manifest["staged"] = context.lake.stage(EVENTS, events, context.run_id)
        new = sum(one["rows"] for one in manifest["staged"])
    manifest["counts"] |= {
        "events_new": new, "events_replaced": counted["replaced"], "duplicates": counted["again"]
    }  # fmt: skip


def fill_by_slices(
    context: Context, candidate: Candidate, manifest: dict[str, Any], usable: DataFrame
) -> None:
    """Many lines into an empty table, none of them late: each slice of time is sorted, freed of
    repeats and written where it will stay (`jobs/slices.py`).

    Most logs were written in the order of time: their slices are read from the parsed files as they
    lie. Where the files lie across each other, Spark brings the lines together first.
    """
    lake, spark = context.lake, context.spark
    folder = staging(context.run_id)
    layer = slices.Layer(EVENTS.columns, f"{lake.path(EVENTS)}/{folder}", context.started)
    cores = spark.sparkContext.defaultParallelism
    known = slices.extents(
        [path for path, *_ in files.glob(f"{candidate.path('lines')}/*.parquet")]
    )
    size = slices.size_of(manifest["counts"]["read"], cores)
    parts = slices.parted(known, size) if known else []
    if parts is None:
        lines = slices.without_null_lists(usable.select(*layer.lines))
        edges = slices.bounds(lines, "event_ts", max(cores, manifest["counts"]["read"] // size))
        lines = slices.by_time(lines, "event_ts", edges)
        done = lines.mapInArrow(layer.of_lines, slices.LAID_DDL).collect()
    else:
        done = slices.frame(spark, parts).mapInArrow(layer.of_files, slices.LAID_DDL).collect()
    manifest["staged"] = lake.entries(EVENTS, folder, [one["path"] for one in done])
    manifest["counts"] |= {
        "events_new": sum(one["rows"] for one in done), "events_replaced": 0,
        "duplicates": sum(one["repeats"] for one in done),
    }  # fmt: skip


def unusable(candidate: Candidate) -> DataFrame:
    """The candidate's lines that make no event, late ones among them, with their reasons."""
    lines = candidate.part("lines").where("line > 0 AND reason IS NOT NULL")
    if not candidate.has("judged"):
        return lines
    late = candidate.part("judged").where("late").withColumn("reason", F.lit("late"))
    return lines.unionByName(late, allowMissingColumns=True)


def count_rejects(candidate: Candidate, manifest: dict[str, Any]) -> None:
    counted = candidate.part("rejects").groupBy("reason").count().collect()
    manifest["rejects"] = {row["reason"]: row["count"] for row in counted}


def fill_rejects(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> None:
    """Find the rejects that the table does not have yet, and those of its rows that came good:
    lines of these files that are events or duplicates now."""
    lake, key = context.lake, list(REJECTS.key)
    base = manifest["base"][REJECTS.full_name]
    rejects = candidate.part("rejects").dropDuplicates(key)
    if lake.rows(REJECTS):
        known = lake.read(REJECTS, base).where(F.col("file").isin(manifest["files"])).select(*key)
        good = candidate.part("lines").where("line > 0 AND reason IS NULL").select(*key)
        good = good.join(rejects.select(*key), key, "left_anti")
        padded = known.join(good, key, "left_semi").withColumns(
            {n: F.lit(None).cast(t) for n, t in REJECTS.columns.items() if n not in REJECTS.key}
        )
        candidate.write("rejects-cleared", padded.withColumn("gone", F.lit(True)))
        manifest["rejects_cleared"] = candidate.row_count("rejects-cleared")
        rejects = rejects.join(known, key, "left_anti")
    if manifest["rejects"]:
        manifest["rejects_staged"] = lake.stage(REJECTS, rejects.coalesce(1), context.run_id)


def laid_out(rows: DataFrame, context: Context) -> DataFrame:
    """Rows sorted by time, in few files with narrow time ranges, so that reads prune."""
    count = max(1, context.spark.sparkContext.defaultParallelism)
    return rows.repartitionByRange(count, *EVENTS.order).sortWithinPartitions(*EVENTS.order)


# -- audit ----------------------------------------------------------------------------------------


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored, RejectShareError (by policy). Rejects are published."""
    manifest = candidate.manifest()
    if manifest["empty"]:
        return
    read, rejects = manifest["counts"]["read"], manifest["rejects"]
    quality = context.source.quality
    rejected = sum(rejects.values())
    within = rejected <= quality.max_reject_share * read
    told = "" if within else too_many_rejects(context, candidate, manifest)
    try:
        audit_events(context, candidate, manifest, told)
    except AuditFailed as error:
        publish_rejects(context, candidate, manifest)
        if not within and quality.on_exceed == "fail":
            raise RejectShareError(told) from error
        raise
    crash.point("ingest.audited")


def audit_events(
    context: Context, candidate: Candidate, manifest: dict[str, Any], too_many: str = ""
) -> None:
    """Args: too_many: what to say of the share of rejects; empty: it is within its bound.

    Raises: AuditFailed, AuditErrored.
    """
    lake, counts = context.lake, manifest["counts"]
    rejected = sum(manifest["rejects"].values())
    facts = {
        "lines_balance": counts["read"] == counts["events_new"] + counts["duplicates"] + rejected,
        "reject_share_within_bound": not too_many,
    }
    staged = manifest.get("staged")
    severity = {"reject_share_within_bound": context.source.quality.on_exceed}
    words = {"reject_share_within_bound": too_many}
    if staged is not None and context.source.columns.event_id is None:
        paths = [f"{lake.path(EVENTS)}/{one['path']}" for one in staged]
        spark = (lambda: context.spark) if context.is_many(counts["read"]) else None
        held = run(spark, arrow_checks.events_hold, paths, arrow_checks.EVENTS_DDL, "string")
        if all(one["holds"] for one in held) and arrow_checks.apart(held):
            number = counts["events_new"]
            validate.audit_certified(context, EVENTS, number, facts, severity, words)
            return
    context.expect(counts["read"], lake.rows(EVENTS))
    events = candidate.part("events") if staged is None else lake.staged(EVENTS, staged)
    validate.audit_candidate(context, EVENTS, events, facts, severity, words)


def too_many_rejects(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> str:
    """What to say when more lines cannot be used than the source file allows."""
    read, rejects = manifest["counts"]["read"], manifest["rejects"]
    rejected = sum(rejects.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))
    one = candidate.part("rejects").orderBy("file", "line").first()
    assert one is not None
    return (
        f"{rejected} of {read} lines cannot be used ({rejected / read:.1%}; {reasons}): more than "
        f"quality.max_reject_share = {context.source.quality.max_reject_share:g}. The first is line "
        f"{one['line']} of {one['file']}, {one['reason']}: {(one['raw'] or '')[:200]!r}. All of "
        "them are in bronze.rejects; correct the source file and give them a second chance (python "
        f"-m jobs replay-rejects --source {context.source.name}), or correct the log, or raise the "
        "bound"
    )


# -- publish --------------------------------------------------------------------------------------


def publish(context: Context, candidate: Candidate) -> Result:
    """Rejects, events, rejects that came good, ledger: in this order.

    Raises:
        Conflict: another run changed `bronze.events` since the candidate was computed.
    """
    lake, manifest = context.lake, candidate.manifest()
    result = Result(
        **manifest["counts"], rejects=manifest["rejects"], files=manifest["files"],
        notes=manifest.get("notes", []),
    )  # fmt: skip
    if manifest["empty"] and context.day is None and (waiting := lake.rows(REJECTS)):
        result.notes.append(
            f"bronze.rejects has {waiting} lines of earlier runs. Files that were read are not read "
            "again: after a correction of the source file, python -m jobs replay-rejects --source "
            f"{context.source.name} gives those lines a second chance"
        )
    if not manifest["empty"]:
        base = manifest["base"][EVENTS.full_name]
        if lake.changed_rows(EVENTS, base):
            raise Conflict(f"bronze.events was changed by another run since version {base}")
        publish_rejects(context, candidate, manifest)
        crash.point("ingest.rejects-published")
        publish_events(context, candidate, manifest)
        crash.point("ingest.events-published")
        clear_rejects(context, candidate, manifest)
        crash.point("ingest.rejects-cleaned")
        publish_ledger(context, candidate)
        crash.point("ingest.ledger-published")
    for table in (EVENTS, REJECTS):
        result.tables[table.full_name] = lake.told(table)
    return result


def publish_rejects(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> None:
    """Append the rejects that the table does not have yet."""
    lake = context.lake
    if not sum(one["rows"] for one in manifest.get("rejects_staged", [])):
        return

    def attempt(_: int) -> None:
        base = manifest["base"][REJECTS.full_name]
        guard = lake.guard(REJECTS)
        try:
            lake.commit(REJECTS, manifest["rejects_staged"], base, guard, base + 1, context.run_id)
        except Conflict:
            # Another run's rejects came in between: ours are compared with them once more.
            manifest["base"][REJECTS.full_name] = lake.version(REJECTS)
            fill_rejects(context, candidate, manifest)
            raise

    retried(3, attempt)


def publish_events(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> None:
    """Raises: Conflict: another run changed `bronze.events` since the candidate was computed."""
    if not manifest["counts"]["events_new"] + manifest["counts"]["events_replaced"]:
        return
    lake, base = context.lake, manifest["base"][EVENTS.full_name]
    guard, version = lake.guard(EVENTS), base + 1
    if "staged" in manifest:
        lake.commit(EVENTS, manifest["staged"], base, guard, version, context.run_id)
        return
    context.merge(EVENTS, candidate, "events", base, guard, version)


def clear_rejects(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> None:
    """Lines of this batch that are events or duplicates now leave `bronze.rejects`."""
    if not manifest.get("rejects_cleared"):
        return
    change_rejects(context, candidate, "rejects-cleared")


def change_rejects(context: Context, candidate: Candidate, part: str) -> None:
    """Put a part of the candidate into `bronze.rejects`; other runs' rejects are left as they are."""

    def attempt(_: int) -> None:
        base = context.lake.version(REJECTS)
        assert base is not None
        guard = context.lake.guard(REJECTS)
        context.merge(REJECTS, candidate, part, base, guard, base + 1)

    retried(3, attempt)


def publish_ledger(context: Context, candidate: Candidate) -> None:
    lake = context.lake
    facts = json.loads(files.read_text(candidate.path("files.json")))
    rows = [
        (one["file"], one["bytes"], one["modified_ms"], one["sha256"], one["lines"],
         list(one["columns"].items()), context.started, context.batch)
        for one in facts
    ]  # fmt: skip
    lake.put_small(FILES, rows)
