"""The landing: which files are new or have changed, and what is in them.

They are read once, into the candidate; what each of them was decides whether the run goes on
(`check_schema`) before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.bronze import delta_source, exposures
from jobs.bronze.typed_arrow import Typer, Typing
from jobs.bronze.typed_events import typed_events
from jobs.core import crash_points, lateness
from jobs.core.errors import SchemaError
from jobs.core.plan import Engine
from jobs.core.source_events import NUMERIC_UNITS, field_of
from jobs.core.source_file import Source
from jobs.core.source_log import NULL_IDS, TYPED
from jobs.core.tables import EVENTS, FILES, FILTERED, REJECTS
from jobs.lake import features, filesystem, time_slices
from jobs.lake.context import Candidate, Context
from jobs.lake.landed import landed, refuse_tables
from jobs.lake.tasks import run
from jobs.privacy.pseudonyms import privacy_of
from jobs.reading.readers import read_file, reader
from jobs.reading.typed_columns import same_kind
from jobs.records import expressions, paths, ranges
from jobs.records.boundary import with_boundary
from jobs.records.expressions import Names, computing_of, names_of
from jobs.records.records import LONGEST_RECORD, LONGEST_TEXT, RECORD_DDL, FileFacts, Format

BIN_BYTES = 64 * 1024 * 1024
LINES_OF_A_CHANGE = 20  # ours
TYPE_OF = {
    "bad_event_ts": ("event_ts", "a time of the source's unit"),
    "bad_value": ("value", "a number"),
    "bad_tie_break": ("tie_break", "a whole number"),
}
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
MIXED_SHARE = 1 / 20  # of a file's times
SKIPPED_NAMES = 5
WITH_COLUMNS = ("csv", "jsonl", "json", "w3c", *TYPED)
"""Formats whose files say which columns they have."""
FIRST_LOGS = 1985  # ours: a log that ends before this year is reported


# -- which files ----------------------------------------------------------------------------------


def landing_files(context: Context, skipped: list[str] | None = None) -> list[tuple[str, int, int]]:
    """Files of the landing: (path, bytes, modified ms).

    Args:
        skipped: gets the files there that are left out (`landed`).
    """
    source = context.source
    if source.source.format == "delta":
        return delta_source.files_of(source.source.landing)
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


def file_format(source: Source) -> Format:
    """How the files are written; what a source's tables say of it is in `reading_format`."""
    computing = with_boundary(computing_of(source), source)
    wanted, names = source.named(), Names({})
    if computing is not None:
        wanted = wanted | computing.inputs()
        if computing.explode is not None:
            names = names_of(computing.explode, wanted)
    return Format(
        format=source.source.format, mapped=names.line or wanted, computing=computing,
        wanted={} if computing is None else wanted, names=names,
        delimiter=source.source.delimiter, header=source.source.header,
        quote=source.source.quote, escape=source.source.escape, comment=source.source.comment,
        null_values=source.source.nulls(), encoding=source.source.encoding,
        list_separator=source.source.list_separator, unit=source.time.numeric_unit,
    )  # fmt: skip


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
    """Read files once: typed lines in the part `lines`, what the files were in `files.json`.

    The facts of files come out of the same pass as their lines, as files that the tasks write, and
    not as rows among the lines: every reader of lines would have to leave those out.

    Args:
        whole: files that are not read in ranges.
    """
    spark = context.enter(engine)
    fmt = reading_format(context)
    groups = bins(parts_of(context, fmt, chosen, whole), spark.sparkContext.defaultParallelism)
    rows = [(*astuple(part), group) for group, parts in enumerate(groups) for part in parts]
    frame = spark.createDataFrame(rows, f"{ranges.DDL}, bin int")
    parts = frame.repartitionById(len(groups), "bin").drop("bin")
    filesystem.remove(candidate.path(TASKS_FACTS))  # (of an attempt that was killed)
    # Hashes of good lines find those that were rejects in an earlier reading of their file.
    hashed = reload or rejected_before(context, [path for path, *_ in chosen])
    taker = None if hashed else everyday(context, candidate)
    records = parts.mapInArrow(reader(fmt, candidate.path(TASKS_FACTS), taker), RECORD_DDL)
    lines = typed_events(records, context.source, oldest_date(context), hashed)
    lines = exposures.joined(context, candidate, lines, engine)
    written = candidate.write("lines", lines, LINES_AS)
    facts = facts_of_tasks(context, candidate, chosen)
    if going_on := {one.file for one in facts if one.unfinished}:
        # (A record of several lines lies across the edge of two ranges.)
        parse(context, candidate, chosen, engine, reload, whole | going_on)
        return
    check_schema(context, facts, written)
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
    source = context.source
    oldest = None
    if context.day is not None:
        oldest = lateness.days_covered(context.day, source.sessions.lateness_days)[0]
    typing = Typing.of(source, oldest)
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


def unreadable_columns(lines: DataFrame) -> dict[tuple[str, str], tuple[int, str]]:
    """By file and reason, of the reasons in `TYPE_OF`: how many lines, and the first of them."""
    bad = lines.where(F.col("reason").isin(*TYPE_OF)).groupBy("file", "reason")
    rows = bad.agg(F.count("*").alias("lines"), F.min_by("raw", "line").alias("first")).collect()
    return {(row["file"], row["reason"]): (row["lines"], row["first"]) for row in rows}


def changed_types(context: Context, facts: list[FileFacts], lines: DataFrame) -> Iterator[str]:
    """Files of text in which a column that was readable before is so in no line any more.

    One bad line is a reject; a file of them is a log that changed. Text has no types, so it takes
    some lines to tell the two apart.
    """
    if not context.lake.rows(EVENTS):
        return
    mapped, bad = context.source.columns.mapped(), unreadable_columns(lines)
    for one in facts:
        for reason, (ours, expected) in TYPE_OF.items():
            count, raw = bad.get((one.file, reason), (0, ""))
            if count == one.lines >= LINES_OF_A_CHANGE:
                yield (
                    f"{one.file}: column {mapped[ours]!r} ({field_of(ours)}) is {expected} in none "
                    f"of its {count} lines, in earlier files it was; the first line: {raw[:200]!r}. "
                    "Have the log delivered again as it was, correct [time], or load it as a new "
                    "source"
                )


def mixed_units(source: Source, facts: list[FileFacts]) -> Iterator[str]:
    """Files in which a share of the times is a factor of 1,000 or more away from the others', or from
    those of the other files: times of one log are of one unit, and would be decades away."""
    unit = source.time.numeric_unit
    if unit is None or not any(one.units.get(unit) for one in facts):
        return
    for one in facts:
        total = sum(one.units.values())
        for other, count in one.units.items():
            if other != unit and count >= MIXED_SHARE * total:
                both = (
                    f", or set time.unit = [{unit!r}, {other!r}]: the size of a number tells then"
                )
                yield (
                    f"{one.file}: {count} of its {total} times seem to be in {other}, and time.unit = "
                    f"{unit!r}: the first is in line {one.first_of[other]}. Have the log delivered in "
                    f"one unit{both if other in NUMERIC_UNITS else ''}"
                )


def known_columns(files: list[Any]) -> dict[str, str]:
    """The columns of the newest file that has some; the type of one that was all null is that of an
    older file.

    Args:
        files: the columns of each file, the newest first.
    """
    known: dict[str, str] = {}
    for columns in map(dict, filter(None, files)):
        known = known or columns
        lacking = [name for name, kind in known.items() if kind == "null"]
        if not lacking:
            break
        known |= {name: columns[name] for name in lacking if name in columns}
    return known


def without_list(context: Context, facts: list[FileFacts]) -> list[str]:
    """What to say if no JSON line has the list whose elements are the lines."""
    column = context.source.source.explode
    names = {name for one in facts for name in one.columns}
    if column is None or not names or paths.root(column) in names or column in names:
        return []
    near = expressions.nearest(column, names)
    hint = f". Did you mean {near!r}?" if near else f"; they have {', '.join(sorted(names)[:20])}"
    return [f"no line that was read has the column {column!r} (source.explode){hint}"]


def check_schema(context: Context, facts: list[FileFacts], lines: DataFrame) -> None:
    """Stop before anything is written when a file is not what was promised.

    Args:
        lines: the typed lines of these files.

    Raises:
        SchemaError: with every file's complaint: column, file, sample value, remedy.
    """
    complaints = [one.error for one in facts if one.error]
    complaints += mixed_units(context.source, facts)
    complaints += changed_types(context, facts, lines)
    complaints += without_list(context, facts)
    source = context.source
    fmt = file_format(source)
    # (Few lines may have what an expression names, and no line may have an element.)
    few = {ours for ours in fmt.mapped if ":" in ours} if fmt.format == "jsonl" else set()
    few |= set(fmt.names.elements)
    mapped = {ours: theirs for ours, theirs in fmt.mapped.items() if ours not in few}
    ledger = context.lake.small(FILES).sort_by([("read_ts", "descending"), ("file", "descending")])
    known = known_columns(ledger["columns"].to_pylist())
    if known and source.source.format in WITH_COLUMNS:
        for one in facts:
            there = one.columns
            if not one.lines or one.error:
                continue
            for ours, theirs in mapped.items():
                root = paths.root(theirs) if theirs not in known else theirs
                if root in known and theirs not in there and root not in there:
                    complaints.append(
                        f"{one.file}: column {theirs!r} ({field_of(ours)}) is in none of its "
                        f"{one.lines} lines, earlier files had it. Have the log delivered again "
                        "with it, or take it out of the source file"
                    )
                elif theirs in known and not same_kind(known[theirs], there.get(theirs, "null")):
                    complaints.append(
                        f"{one.file}: column {theirs!r} ({field_of(ours)}) is {there[theirs]}, in "
                        f"earlier files it was {known[theirs]}. Write it as before, or load the "
                        "log as a new source"
                    )
            new = sorted(set(there) - set(known) - set(source.mapped().values()))
            if new and source.source.on_new_column == "fail":
                complaints.append(
                    f"{one.file}: new column {new[0]!r}, and source.on_new_column = 'fail'. "
                    "Set it to 'ignore' to read the file without the column"
                )
    if complaints:
        shown = "\n".join(complaints[:10])
        more = f"\n… and {len(complaints) - 10} more files" if len(complaints) > 10 else ""
        raise SchemaError(f"nothing was written:\n{shown}{more}")


def check_expressions(context: Context, chosen: list[tuple[str, int, int]]) -> None:
    """Read the beginning of the first file, before Spark starts, and bind the expressions of the
    source file to its columns.

    Raises:
        SourceError, SchemaError: they do not fit.
    """
    fmt = file_format(context.source)
    if fmt.computing is None:
        return
    path = chosen[0][0]
    facts = FileFacts(path)
    next(iter(read_file(fmt, path, facts)), None)
    if fmt.computing.explode is None and facts.columns:
        known = context.lake.small(FILES)["columns"].to_pylist() if fmt.format == "jsonl" else []
        there = {*facts.columns, *(name for one in known for name, _ in one or ())}
        expressions.check_names(fmt.computing, there, path, certain=fmt.format != "jsonl")
    if facts.error:
        raise SchemaError(f"nothing was written:\n{facts.error}")


def unknown_columns(context: Context, facts: list[FileFacts]) -> list[str]:
    """What to say of columns that expressions name and that no line of JSON had."""
    fmt = file_format(context.source)
    there = {name for one in facts for name in one.columns}
    if fmt.format != "jsonl" or fmt.computing is None or not there:
        return []
    notes = []
    for name, theirs in fmt.computing.inputs().items():
        said = paths.root(theirs.removeprefix(expressions.OF_LINE))
        if not there & {theirs, said} and theirs != expressions.POSITION:
            near = expressions.nearest(theirs, there)
            hint = f"did you mean {near!r}?" if near else "it was null"
            notes.append(
                f"no line that was read has the column {theirs!r}, which {field_of(name)} reads: {hint}"
            )
    return notes


def of_elements(context: Context, facts: list[FileFacts]) -> list[str]:
    """What to say of lines without an element."""
    found = [one for one in facts if one.empty_lines]
    if not found:
        return []
    return [
        f"{sum(one.empty_lines for one in found):,} lines have no element in source.explode = "
        f"{context.source.source.explode!r}: they make no events, and are not among the lines read. "
        f"The first file with such a line is {found[0].file}"
    ]


def told(context: Context, facts: list[FileFacts]) -> list[str]:
    """What to say of what was in the files."""
    notes = [*too_long(facts), *of_elements(context, facts), *unknown_columns(context, facts)]
    notes += [*swallowed(context, facts), *waiting(context, facts)]
    if passed := sum(one.forgotten for one in facts):
        notes.append(f"Skipped {passed} lines of erased users")
    return notes


def too_long(facts: list[FileFacts]) -> list[str]:
    """What to say of records that are too long for the tables."""
    found = [one for one in facts if one.too_long]
    if not found:
        return []
    return [
        f"{sum(one.too_long for one in found)} records are too long and were rejected as "
        f"unparsable: a record has at most {LONGEST_RECORD:,} characters, and a mapped column "
        f"{LONGEST_TEXT:,}. The first is line {found[0].first_too_long} of {found[0].file}. "
        "If the line should count, deliver the file again without the long text"
    ]


def waiting(context: Context, facts: list[FileFacts]) -> list[str]:
    """What to say of last lines that have no end yet."""
    found = [one.file for one in facts if one.waiting]
    if not found:
        return []
    hours = context.source.landing.partial_line_hours
    return [
        f"the last line of {len(found)} files has no line end and waits, because the file may still "
        f"be written: it is read with what follows, or once its file was not modified for {hours:g} "
        f"hours (landing.partial_line_hours). The first is {found[0]}"
    ]


def swallowed(context: Context, facts: list[FileFacts]) -> list[str]:
    """What to say of records in whose quotes lines lie that look like records."""
    found = [one for one in facts if one.swallowed]
    if not found:
        return []
    quote = context.source.source.quote
    return [
        f"{sum(one.swallowed for one in found)} records have line ends between quotes, and lines "
        f"there that look like records of their own: the first is line {found[0].first_swallowed} of "
        f"{found[0].file}. If {quote} encloses nothing in this log, these lines were lost: set "
        'source.quote = "" and load the log under another source.name; what was read stays as it was '
        "read"
    ]


def oldest_date(context: Context) -> Column:
    """The oldest date that is not late tonight; null: nothing is."""
    return lateness.oldest_date(F.lit(context.day).cast("date"), context.source.sessions)


def strange_times(context: Context, candidate: Candidate) -> list[str]:
    """What to say if a log seems to be of another age than logs are: a unit that is too small or
    too large by a thousand makes times that are none of anybody's, and that can be read."""
    parts = [path for path, *_ in filesystem.glob(f"{candidate.path('lines')}/*.parquet")]
    known = time_slices.extents(parts)
    if not known:
        return []
    first, last = (
        pa.scalar(end, pa.int64()).cast(time_slices.CLOCK).as_py()
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
