"""`bronze.rejects` -> `bronze.events`, after a fix of the source file: lines get a second chance.

Each rejected line is read again, from its stored text, by the source file as it is now. What is
usable lands as if it had been good the first time (`late` is judged by the night on which it was
read, `ingest_file` is its own) and leaves `bronze.rejects`, after the events' commit; what is not
stays, under the reason that holds now. `replay-filtered` does the same with `bronze.filtered`, after
a change of `source.keep` or `[bots]`: a line that cannot be used then goes to `bronze.rejects`, as a
reject that is left out now goes to `bronze.filtered`, where such lines are kept.

Not replayed: lines whose bytes were no text (their stored text is escaped; correct
`source.encoding` and deliver the file again), lines of which the table has only the beginning (a
note names the first), lines of files that the ledger does not know (the next ingest reads those
anyway), and lines of CSVs of which it is not known in which order their file's columns were
(`jobs/reading/reject_columns.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.bronze import exposures, filters, ingest, landing, new_events, redelivery, rejects
from jobs.bronze.manifest import IngestManifest, version_of
from jobs.bronze.rejects import LEFT_OUT, REJECTED, Aside
from jobs.bronze.stored_events import learn_changed
from jobs.core import lateness
from jobs.core.errors import SchemaError
from jobs.core.plan import idle, ingest_plan
from jobs.core.source_log import TYPED
from jobs.core.tables import DELIVERIES, EVENTS, FILES, FILTERED, REJECTS, Table
from jobs.lake import foreign
from jobs.lake.context import Candidate, Context, Result
from jobs.reading.reject_columns import Ledger
from jobs.reading.stored import Stored, records_of
from jobs.reading.typed_events import typed_events
from jobs.records import paths
from jobs.records.file_format import file_format
from jobs.records.records import (
    CUT,
    LONGEST_TEXT,
    RECORD_DDL,
    RECORD_SCHEMA,
    Format,
    missing_column,
)

KEPT = {"raw": "kept_raw", "raw_hash": "kept_hash", "reason": "kept_reason"}
"""What of a reject's own row travels along: typing makes `raw`, `raw_hash` and `reason` anew."""
ALONG = {
    "run_day": "date",
    "first_seen_ts": "timestamp",
    "file_columns": "array<string>",
    "from_ledger": "boolean",
}
"""And what typing leaves alone. `from_ledger`: `file_columns` is the ledger's, whose columns have a
name once."""
SHOWN_FILES = 3
JOBS = {REJECTED: "replay-rejects", LEFT_OUT: "replay-filtered"}
WORDS = {REJECTS: "rejected", FILTERED: "filtered"}


def parser(
    fmt: Format, columns: dict[str, dict[str, str]]
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """For `mapInArrow` over rejects: each stored line as a record, beside what is kept of its row.

    Args:
        columns: per file, the names (and kinds) of its columns, as the ledger has them.
    """

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            names = ("raw", "file", "line", "file_columns", "element")
            rows = zip(*(batch[name].to_pylist() for name in names), strict=True)
            found = records_of(
                fmt,
                [
                    Stored(raw, file, line, columns[file], header, element)
                    for raw, file, line, header, element in rows
                ],
            )
            made = pa.RecordBatch.from_pylist(
                [record for records in found for record in records], schema=RECORD_SCHEMA
            )
            kept = [*KEPT, *ALONG]
            # (A line that was stored before lines were exploded has many records now.)
            again = pa.array([at for at, records in enumerate(found) for _ in records], pa.int64())
            yield pa.RecordBatch.from_arrays(
                [*made.columns, *(batch[name].take(again) for name in kept)],
                names=[*made.schema.names, *(KEPT.get(name, name) for name in kept)],
            )

    return read


def is_cut() -> Column:
    """Whether the table has only the beginning of a rejected line."""
    mark = F.substring("raw", LONGEST_TEXT + 1, len(CUT))
    long = (F.length("raw") > LONGEST_TEXT) & (mark == CUT)
    # (Of a line with very many elements less is kept.)
    of_many = F.col("element").isNotNull() & F.col("raw").rlike(f"{re.escape(CUT)}.*characters]$")
    return F.coalesce(long | of_many, F.lit(False))


def cut_lines(context: Context, base: int, table: Table) -> list[str]:
    """What to say of lines that cannot be read again."""
    cut = context.lake.read(table, base).where(is_cut())
    found = cut.agg(
        F.count("*").alias("lines"), F.min(F.struct("file", "line")).alias("first")
    ).first()
    if found is None or not found["lines"]:
        return []
    first = found["first"]
    return [
        f"{found['lines']} {WORDS[table]} lines were not read again: they are longer than "
        f"{LONGEST_TEXT:,} characters, and {table.full_name} has only their beginning. The first is "
        f"line {first['line']} of {first['file']}. To read them again, touch the file (its "
        f"modification time tells that it changed): python -m jobs run --source "
        f"{context.source.name} then reads it whole; lines that are known are duplicates"
    ]


@dataclass
class Left:
    """Rejects that are not replayed."""

    unknown: Counter[str] = field(default_factory=Counter)
    """How many of each file, because its columns are not known."""
    unread: int = 0
    """How many of files that the ledger does not know."""


def by_order(fmt: Format) -> bool:
    """Whether a stored line is known by the order of its file's columns. (Where ids are hashed, it
    is kept as named columns.)"""
    return fmt.format in ("csv", "w3c") and not (fmt.privacy is not None and fmt.privacy.hashes)


def with_columns(context: Context, rejects: DataFrame, ledger: Ledger) -> DataFrame:
    """Rejects with `file_columns` also where the ledger knows them, and `from_ledger`."""
    old = rejects.where("file_columns IS NULL")
    pairs = old.select("file", F.unix_micros("first_seen_ts").alias("us")).distinct().collect()
    named = [(file, us, ledger.columns_then(file, us)) for file, us in pairs]
    known = [one for one in named if one[2] is not None]
    frame = context.spark.createDataFrame(known, "file string, us bigint, names array<string>")
    rejects = rejects.withColumn("us", F.unix_micros("first_seen_ts"))
    rejects = rejects.join(F.broadcast(frame), ["file", "us"], "left")
    return rejects.withColumns(
        {
            "from_ledger": F.col("file_columns").isNull(),
            "file_columns": F.coalesce("file_columns", "names"),
        }
    )


def check_columns(fmt: Format, names: Iterable[str], file: str) -> None:
    """Raises: SchemaError: the source file names a column that is not there, or there twice."""
    names = list(names)
    for ours, theirs in fmt.mapped.items():
        if ours in fmt.names.either:
            continue
        if theirs not in names and (fmt.format == "csv" or paths.root(theirs) not in names):
            raise SchemaError(missing_column(file, ours, theirs, names))
        if names.count(theirs) > 1:
            raise SchemaError(f"{file}: the header has the column {theirs!r} twice: rename one")


def readable(fmt: Format, rejects: DataFrame, ledger: Ledger, left: Left) -> DataFrame:
    """The rejects that can be read by the columns that their file had then.

    Args:
        left: which rejects are left out; added to.

    Raises:
        SchemaError: the source file names a column that a rejected line's file does not have.
    """
    if fmt.format not in ("csv", "w3c", *TYPED):
        return rejects
    for row in rejects.select("file").distinct().collect():
        check_columns(fmt, ledger.columns[row["file"]], row["file"])
    if not by_order(fmt):
        return rejects
    keep = F.col("file_columns").isNotNull()
    needed = {theirs for ours, theirs in fmt.mapped.items() if ours not in fmt.names.either}
    for file, names, count in rejects.groupBy("file", "file_columns").count().collect():
        if names is None:
            left.unknown[file] += count
        elif not needed <= set(names):
            left.unknown[file] += (
                count  # the file as it is now has the column, as it was then it had not
            )
            then = F.array(*map(F.lit, names))
            keep = keep & ~((F.col("file") == file) & (F.col("file_columns") == then))
        else:
            check_columns(fmt, names, file)
    return rejects.where(keep)


def stored_lines(context: Context, base: int, left: Left, table: Table) -> DataFrame:
    """The lines of a table as typed lines, with `run_day`, `first_seen_ts`, `file_columns` and the `kept_…`
    columns.

    Args:
        left: which rejects are left out; added to.

    Raises:
        SchemaError: the source file names a column that a rejected line's file does not have.
    """
    lake, source, ledger = context.lake, context.source, Ledger(context.lake)
    stored, is_read = lake.read(table, base), F.col("file").isin(list(ledger.columns))
    left.unread = stored.where(~is_read).count()
    rejects = stored.where(is_read & ~is_cut())
    fmt = landing.reading_format(context)
    if by_order(fmt):
        rejects = with_columns(context, rejects, ledger)
    else:
        rejects = rejects.withColumn("from_ledger", F.lit(False))
    rejects = readable(fmt, rejects, ledger, left)
    kept = "".join(f", {name} string" for name in KEPT.values())
    along = "".join(f", {name} {kind}" for name, kind in ALONG.items())
    records = rejects.select(*REJECTS.columns, "from_ledger").mapInArrow(
        parser(fmt, ledger.columns), RECORD_DDL + kept + along
    )
    lines = typed_events(records, source)
    lines = lines.withColumns({"raw": F.col("kept_raw"), "raw_hash": F.col("kept_hash")})
    if by_order(fmt):
        # What was a record then is one by the same columns: the ledger's are not all of them.
        lost = F.col("from_ledger") & (F.col("reason") == "unparsable")
        lost = F.coalesce(lost & (F.col("kept_reason") != "unparsable"), F.lit(False))
        for file, count in lines.where(lost).groupBy("file").count().collect():
            left.unknown[file] += count
        lines = lines.where(~lost)
    return lines


def left_notes(context: Context, left: Left, table: Table) -> list[str]:
    """What to say of the lines that were not replayed."""
    word = WORDS[table]
    run = f"python -m jobs run --source {context.source.name}"
    notes, unknown = [], left.unknown
    if unknown:
        files = ", ".join(f"{count} of {file}" for file, count in unknown.most_common(SHOWN_FILES))
        more = f" and {len(unknown) - SHOWN_FILES} more files" if len(unknown) > SHOWN_FILES else ""
        notes.append(
            f"{unknown.total()} {word} lines were not replayed ({files}{more}), because it is not "
            "known which columns these files had, in which order, when the lines were read. They "
            f"stay in {table.full_name}. Deliver these files again, or touch them, and {run}"
        )
    if left.unread:
        notes.append(
            f"{left.unread} {word} lines are of files that no run has read to its end: {run} reads "
            "them again"
        )
    return notes


def oldest_date(context: Context) -> Column:
    """Per line: the oldest date that was not late on the night that read it; null: none was."""
    return lateness.oldest_date(F.col("run_day"), context.source.sessions)


def compute(context: Context) -> Candidate:
    return computed(context, REJECTED)


def computed(context: Context, aside: Aside) -> Candidate:
    """The candidate of a replay of rejected lines, or of those that were left out."""
    lake, candidate, table = context.lake, context.candidate(EVENTS), aside.table
    file_format(context.source)  # (mistakes in expressions are said before all else)
    foreign.make_ready(context, EVENTS, REJECTS, FILTERED, DELIVERIES)
    landing.null_ids(context)
    for one in dict.fromkeys((EVENTS, REJECTS, FILES, table)):
        lake.create(one)
    filters.make_ready(context)
    redelivery.make_ready(context)
    beside = redelivery.tables(context)
    foreign.refuse_loss(context, EVENTS, REJECTS, *beside)
    notes = learn_changed(context)
    based = dict.fromkeys((EVENTS, table, *beside))
    base = {one.full_name: version_of(context, one) for one in based}
    job = JOBS[aside]
    manifest = IngestManifest(plan=idle(job), base=base, empty=lake.rows(table) == 0, notes=notes)
    if manifest.empty and aside is LEFT_OUT and not context.source.source.keep_filtered:
        notes.append(
            f"{table.full_name} has no lines: they are stored where source.keep_filtered = true"
        )
    if not manifest.empty:
        engine = context.thresholds.spark(lake.rows(table), lake.rows(EVENTS))
        context.enter(engine)
        left, version = Left(), base[table.full_name]
        lines = stored_lines(context, version, left, table)
        lines = exposures.joined(context, candidate, lines, engine)
        lines = candidate.write("lines", lines)
        manifest.counts.read = candidate.row_count("lines")
        manifest.notes += left_notes(context, left, table)
        manifest.notes += exposures.told(context, candidate) + cut_lines(context, version, table)
        oldest = oldest_date(context)
        choice = ingest.facts_of(context, manifest, late=True)
        manifest.plan = ingest_plan(choice, context.thresholds, job)
        context.decide(manifest.plan)
        context.enter(manifest.plan.engine)
        new_events.fill_events(context, candidate, manifest, choice, oldest)
        fill_changes(context, candidate, manifest, aside, lines)
        filters.fill_flags(context, candidate, manifest)
    context.decide(manifest.plan)
    candidate.save(manifest)
    return candidate


def fill_changes(
    context: Context, candidate: Candidate, manifest: IngestManifest, aside: Aside, lines: DataFrame
) -> None:
    """What changes in the tables of lines that make no event, and how many there are."""
    key = list(REJECTS.key)
    rows = {REJECTED: rejects.unusable(candidate), LEFT_OUT: rejects.filtered(candidate)}
    for one, found in rows.items():
        still = candidate.write(one.part, found.select(*REJECTS.columns, "kept_reason"))
        rejects.count_lines(candidate, manifest, one)
        still = still.dropDuplicates(key)
        if one is aside:
            good = lines.select(*REJECTS.columns).dropDuplicates(key)
            good = good.join(still.select(*key), key, "left_anti").select(*REJECTS.columns)
            put = still.where("reason <> kept_reason").select(*REJECTS.columns)
            change = good.withColumn("gone", F.lit(True)).unionByName(
                put.withColumn("gone", F.lit(False))
            )
        elif one is LEFT_OUT and not context.source.source.keep_filtered:
            continue
        else:
            change = still.select(*REJECTS.columns).withColumn("gone", F.lit(False))
        candidate.write(f"{one.part}-changed", change)
        setattr(manifest, f"{one.part}_changed", candidate.row_count(f"{one.part}-changed"))


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored. The share of rejects is no question here."""
    manifest = candidate.manifest(IngestManifest)
    if not manifest.empty:
        ingest.audit_events(context, candidate, manifest)


def publish(context: Context, candidate: Candidate) -> Result:
    """Events, then the rejects that came good or have another reason now.

    Raises:
        Conflict: another run changed `bronze.events` since the candidate was computed.
    """
    lake, manifest = context.lake, candidate.manifest(IngestManifest)
    context.decide(manifest.plan)
    result = Result(
        **asdict(manifest.counts),
        rejects=manifest.rejects,
        filtered=manifest.filtered,
        notes=manifest.notes,
    )
    if not manifest.empty:
        ingest.publish_all_events(context, candidate, manifest)
        for aside in (REJECTED, LEFT_OUT):
            rejects.clear_aside(context, candidate, manifest, aside)
        if result.events_new or result.events_replaced:
            result.notes.append(
                f"{EVENTS.full_name} has grown: python -m jobs run --source "
                f"{context.source.name} updates sessions; so will the next scheduled run"
            )
    for table in (EVENTS, REJECTS):
        result.tables[table.full_name] = lake.told(table)
    return result
