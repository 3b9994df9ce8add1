"""The landing: which files are new or have changed, and what is in them.

They are read once, into the candidate; what each of them was decides whether the run goes on
(`file_checks.check_schema`) before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, replace
from datetime import date
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column
from pyspark.sql import functions as F

from jobs.bronze import exposures, file_checks
from jobs.bronze.stored_events import first_days
from jobs.core import crash_points, lateness
from jobs.core.plan import Engine
from jobs.core.source_log import NULL_IDS, TYPED
from jobs.core.tables import EVENTS, FILES, FILTERED, REJECTS
from jobs.lake import features, filesystem
from jobs.lake.context import Candidate, Context
from jobs.lake.landed import landed, refuse_tables
from jobs.lake.tasks import run
from jobs.privacy.pseudonyms import privacy_of
from jobs.reading.readers import reader
from jobs.reading.typed_arrow import Typer, Typing
from jobs.reading.typed_events import typed_events
from jobs.records import ranges
from jobs.records.file_format import file_format
from jobs.records.records import RECORD_DDL, FileFacts, Format
from jobs.sources import tables

BIN_BYTES = 64 * 1024 * 1024
# Small row groups: a slice of time reads those that it needs. Dictionary encoding does not help hash columns.
LINES_AS = {"parquet.block.size": str(8 * 1024 * 1024)} | {
    f"parquet.enable.dictionary#{name}": "false" for name in ("event_id", "row_hash", "raw_hash")
}
DIGEST = "source.txt"
EVERYDAY = "everyday-"  # begins the names of files of lines that tasks typed where they read them
TASKS_FACTS = "facts"  # a folder: of each task, the facts of its files
FACTS = "files.json"  # all of them
NULL_IDS_PROPERTY = "sessionmill.null_ids"
LINE_BYTES = 64  # about: only to guess how many lines a file has
SKIPPED_NAMES = 5


# -- which files ----------------------------------------------------------------------------------


def fetch(context: Context) -> list[str]:
    """Bring what is new of a log that is a table of a database into the landing; what to say of it."""
    if context.source.source.format != "jdbc":
        return []
    from jobs.sources import database  # (needs SQLAlchemy)

    return database.fetch(context)


def landing_files(context: Context, skipped: list[str] | None = None) -> list[tuple[str, int, int]]:
    """Files of the landing: (path, bytes, modified ms).

    Args:
        skipped: gets the files there that are left out (`landed`).
    """
    source = context.source
    if (files_of := tables.FILES_OF.get(source.source.format)) is not None:
        return files_of(source.source.landing)
    found = landed(source.source.landing, context.day, source.sessions.lateness_days, skipped)
    if source.source.format in TYPED:
        refuse_tables(source.source.landing, [path for path, *_ in found])
    return found


def skipped_files(skipped: list[str]) -> list[str]:
    """What to say of files that were left out."""
    if not skipped:
        return []
    paths = sorted(set(skipped))
    names = ", ".join(path.rpartition("/")[2] for path in paths[:SKIPPED_NAMES])
    more = f" and {len(paths) - SKIPPED_NAMES} more" if len(paths) > SKIPPED_NAMES else ""
    return [
        f"skipped {len(paths)} files of the landing that are hidden, still being written, or no logs "
        f"by their names: {names}{more}. A file is read if source.landing names it, or its ending"
    ]


def unread(context: Context, landed: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The files that the ledger does not know as they are now, and those whose last line has
    waited long enough for its end."""
    ledger = context.lake.small(FILES)
    named = [
        one for one in ("file", "size", "modified_ms", "waiting") if one in ledger.column_names
    ]
    known, open_lines = {}, set()
    for row in ledger.select(named).to_pylist():
        known[row["file"]] = (row["size"], row["modified_ms"])
        if row.get("waiting"):
            open_lines.add(row["file"])
    since = partial_since(context)
    return [
        file
        for file in landed
        if known.get(file[0]) != file[1:]
        or (file[0] in open_lines and (since is None or file[2] <= since))
    ]


def partial_since(context: Context) -> int | None:
    """Of a file that was modified after this (ms since 1970), a last line without an end waits;
    None: none waits."""
    hours = context.source.landing.partial_line_hours
    return round((context.started.timestamp() - hours * 3600) * 1000) if hours else None


# -- what they are --------------------------------------------------------------------------------


def reading_format(context: Context) -> Format:
    """How ingestion reads: as the files are written, by the tables' rule for ids, without erased
    users."""
    return replace(
        file_format(context.source),
        null_ids=null_ids(context),
        privacy=privacy_of(context),
        partial_since=partial_since(context),
    )


def null_ids(context: Context) -> frozenset[str]:
    """The texts that mean nothing in `user_id` and `item_id`, beside `null_values`.

    They are stored with `bronze.events` when the source has no data yet. Tables that have data and
    no such rule go on without: an id that was one yesterday is one tomorrow.
    """
    if context.source.source.null_values is not None:
        return frozenset()
    lake = context.lake
    lake.create(EVENTS, {NULL_IDS_PROPERTY: json.dumps(NULL_IDS)}, upgrade=False)
    stored = lake.property(EVENTS, NULL_IDS_PROPERTY)
    if stored is None and not lake.rows(EVENTS) and not lake.rows(FILES):
        stored = json.dumps(NULL_IDS)
        lake.set_property(EVENTS, NULL_IDS_PROPERTY, stored)
    return frozenset(json.loads(stored or "[]"))


def bins(parts: list[tuple[ranges.Range, int]], cores: int) -> list[list[ranges.Range]]:
    """Files, and ranges of them, in groups of about equal bytes, one group a task: the largest first.

    Args:
        parts: with their bytes.
    """
    total = sum(size for _, size in parts)
    count = max(1, min(len(parts), max(cores, total // BIN_BYTES)))
    groups: list[tuple[int, list[ranges.Range]]] = [(0, []) for _ in range(count)]
    for part, size in sorted(parts, key=lambda one: -one[1]):
        lightest = min(range(count), key=lambda at: groups[at][0])
        load, inside = groups[lightest]
        groups[lightest] = (load + size + 100_000, [*inside, part])
    return [inside for _, inside in groups]


def parts_of(
    context: Context, fmt: Format, chosen: list[tuple[str, int, int]], whole: frozenset[str]
) -> list[tuple[ranges.Range, int]]:
    """The files to read, the large ones in ranges, with their bytes.

    Args:
        whole: files that are not cut.
    """
    todo = [
        one
        for path, size, _ in chosen
        if path not in whole
        for one in ranges.asked(fmt, path, size)
    ]
    cut = (
        ranges.ranges(run(lambda: context.spark, ranges.measure, todo, ranges.MEASURED, "string"))
        if todo
        else []
    )
    sizes = {path: size for path, size, _ in chosen}
    known = {one.path for one in cut}
    found = [(ranges.Range(path), size) for path, size in sizes.items() if path not in known]
    for one in cut:
        end = sizes[one.path] if one.end < 0 else one.end
        found.append((one, end - one.begin))
    return found


def parse(
    context: Context, candidate: Candidate, chosen: list[tuple[str, int, int]], engine: Engine,
    reload: bool = False, whole: frozenset[str] = frozenset(),
) -> None:  # fmt: skip
    """Read files once, in Spark: typed lines in the part `lines`, what the files were in `files.json`.

    The facts of files come out of the same pass as their lines, as files that the tasks write, and
    not as rows among the lines: every reader of lines would have to leave those out.

    Args:
        whole: files that are not read in ranges.
    """
    spark = context.enter(engine)
    fmt = replace(reading_format(context), table=tables.schema_of(context.source))
    groups = bins(parts_of(context, fmt, chosen, whole), spark.sparkContext.defaultParallelism)
    rows = [(*astuple(part), group) for group, parts in enumerate(groups) for part in parts]
    frame = spark.createDataFrame(rows, f"{ranges.DDL}, bin int")
    parts = frame.repartitionById(len(groups), "bin").drop("bin")
    filesystem.remove(candidate.path(TASKS_FACTS))  # (of an attempt that was killed)
    # Hashes of good lines find those that were rejects in an earlier reading of their file.
    hashed = reload or rejected_before(context, [path for path, *_ in chosen])
    taker = None if hashed else everyday(context, candidate)
    records = parts.mapInArrow(reader(fmt, candidate.path(TASKS_FACTS), taker), RECORD_DDL)
    oldest = oldest_date(context)
    if reload and (days := first_days(context)) is not None:
        # (Lines that were late on their nights, though no reject says so any more, need their text.)
        records = records.join(F.broadcast(days), "file", "left")
        oldest = lateness.oldest_date(F.col("first_day"), context.source.sessions)
    lines = typed_events(records, context.source, oldest, hashed).drop("first_day")
    lines = exposures.joined(context, candidate, lines, engine)
    candidate.write("lines", lines, LINES_AS)
    facts = facts_of_tasks(context, candidate, chosen)
    if going_on := {one.file for one in facts if one.unfinished}:
        # (A record of several lines lies across the edge of two ranges.)
        parse(context, candidate, chosen, engine, reload, whole | going_on)
        return
    remember(context, candidate, facts)


def remember(context: Context, candidate: Candidate, facts: list[FileFacts]) -> None:
    """Keep what the files were.

    Raises:
        SchemaError: one is not what was promised.
    """
    file_checks.check_schema(context, facts, candidate)
    filesystem.write_text(candidate.path(DIGEST), context.source.digest())
    filesystem.write_text(candidate.path(FACTS), json.dumps([vars(one) for one in facts]))
    crash_points.point("ingest.parsed")


def rejected_before(context: Context, paths: list[str]) -> bool:
    """Whether lines of one of these files were rejected, or left out, in an earlier reading."""
    wanted = pa.array(paths, pa.string())
    for table in (REJECTS, FILTERED):
        found = context.lake.open(table)
        if found is None or not context.lake.rows(table):
            continue
        if features.VECTORS in features.named(found):
            return True  # (only Spark can say)
        for batch in filesystem.rows_of(found).scanner(["file"]).to_batches():
            if pc.any(pc.is_in(batch["file"].cast(pa.string()), wanted)).as_py():
                return True
    return False


def everyday(context: Context, candidate: Candidate) -> Callable[[int], Typer] | None:
    """Makes, for an attempt of a task, what types everyday lines where they are read, and writes
    them among the candidate's lines; None: this source has none."""
    typing = Typing.of(context.source, oldest_day(context))
    if typing is None:
        return None
    folder = candidate.path("lines")
    return lambda attempt: Typer(typing, folder, f"{EVERYDAY}{attempt}")


def is_parsed(context: Context, candidate: Candidate, chosen: list[tuple[str, int, int]]) -> bool:
    """Whether the candidate has these files' lines, as they are now, by the source file as it is:
    a batch may be computed again after either was mended. (Lines that 0.1.0 parsed have facts
    among them, and are parsed again.)"""
    needed = (FACTS, DIGEST, TASKS_FACTS)
    if not all(filesystem.exists(candidate.path(name)) for name in needed):
        return False
    known = [(one.file, one.bytes, one.modified_ms) for one in facts_read(candidate)]
    same = filesystem.read_text(candidate.path(DIGEST)) == context.source.digest()
    return same and sorted(known) == sorted(chosen)


def facts_read(candidate: Candidate) -> list[FileFacts]:
    """What each file of a candidate was, as `parse` found."""
    return [FileFacts.of(one) for one in json.loads(filesystem.read_text(candidate.path(FACTS)))]


def facts_of_tasks(
    context: Context, candidate: Candidate, chosen: list[tuple[str, int, int]]
) -> list[FileFacts]:
    """What each file was, as the tasks that read them wrote, in the order of the files' names."""
    paths = [path for path, *_ in filesystem.glob(f"{candidate.path(TASKS_FACTS)}/*.json")]
    parts: dict[str, dict[int, FileFacts]] = {}
    lines: dict[tuple[str, int], list[str]] = {}
    for path in sorted(paths, key=lambda one: int(PurePosixPath(one).stem)):
        told = json.loads(filesystem.read_text(path))
        for stored in map(FileFacts.of, told["files"]):
            # (A later attempt's word holds. It had the same files.)
            parts.setdefault(stored.file, {})[stored.begin] = stored
            lines[stored.file, stored.begin] = told["lines"]
    found = {
        file: ranges.together([facts for _, facts in sorted(of_file.items())])
        for file, of_file in parts.items()
    }
    cut = [file for file, of_file in parts.items() if len(of_file) > 1]
    for one in (
        run(lambda: context.spark, ranges.hash_of, cut, ranges.HASHED, "string") if cut else ()
    ):
        found[one["path"]].sha256, found[one["path"]].size = one["sha256"], one["size"]
    wanted = {path for written in lines.values() for path in written}
    for path in candidate.files("lines"):
        if PurePosixPath(path).name.startswith(EVERYDAY) and path not in wanted:
            filesystem.remove_file(path)
    for path, size, modified in chosen:
        found[path].bytes, found[path].modified_ms = size, modified
    return [found[path] for path, *_ in sorted(chosen)]


def oldest_day(context: Context) -> date | None:
    """The oldest date that is not late tonight; None: nothing is."""
    if context.day is None:
        return None
    return lateness.days_covered(context.day, context.source.sessions.lateness_days)[0]


def oldest_date(context: Context) -> Column:
    """The oldest date that is not late tonight; null: nothing is."""
    return lateness.oldest_date(F.lit(context.day).cast("date"), context.source.sessions)
