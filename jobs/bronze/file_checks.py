"""Whether files are what the source file says, and what to say of what was in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from jobs.core.errors import SchemaError, counted
from jobs.core.source_events import NUMERIC_UNITS, field_of
from jobs.core.source_file import Source
from jobs.core.source_log import TYPED
from jobs.core.tables import EVENTS, FILES
from jobs.lake import filesystem, time_slices
from jobs.lake.context import Candidate, Context
from jobs.reading import guess
from jobs.reading.readers import read_file
from jobs.reading.typed_columns import same_kind
from jobs.records import expressions, paths
from jobs.records.file_format import file_format
from jobs.records.records import LONGEST_RECORD, LONGEST_TEXT, FileFacts
from jobs.sources import tables

LINES_OF_A_CHANGE = 20  # ours
TYPE_OF = {
    "bad_event_ts": ("event_ts", "a time of the source's unit"),
    "bad_value": ("value", "a number"),
    "bad_tie_break": ("tie_break", "a whole number"),
}
MIXED_SHARE = 1 / 20  # of a file's times
WITH_COLUMNS = ("csv", "jsonl", "json", "w3c", *TYPED)
"""Formats whose files say which columns they have."""
FIRST_LOGS = 1985  # ours: a log that ends before this year is reported
DAYS_OF_MONTHS = 59  # times further apart are in three months, at least
MONTHS, LEAST_MONTHS = 12, 3
DAY_AND_MONTH = re.compile(r"(?<![dM])(?:(dd?)([^A-Za-z]*)(MM?)(?!M)|(MM?)([^A-Za-z]*)(dd?)(?!d))")
"""In a pattern of `[time] unit`: day and month beside each other, as numbers."""
ANOTHER_NAME = (
    "correct it, and load the log again, under another source.name or after removing this source's "
    "folder of the lake; what was read stays as it was read"
)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def check_beginning(context: Context, chosen: list[tuple[str, int, int]]) -> None:
    """Read the beginning of the first file of a new log, before Spark starts: what is wrong there is said
    at once. Expressions of the source file are bound to its columns, every night.

    Raises:
        SourceError, SchemaError: the source file does not fit.
    """
    new = not context.lake.rows(FILES)
    fmt = replace(file_format(context.source), table=tables.schema_of(context.source))
    if fmt.computing is None and not new:
        return
    path = chosen[0][0]
    facts = FileFacts(path)
    next(iter(read_file(fmt, path, facts)), None)
    if fmt.computing is not None and fmt.computing.explode is None and facts.columns:
        known = context.lake.small(FILES)["columns"].to_pylist() if fmt.format == "jsonl" else []
        there = {*facts.columns, *(name for one in known for name, _ in one or ())}
        expressions.check_names(fmt.computing, there, path, certain=fmt.format != "jsonl")
    # (Of several files all are read first, so that one run reports what is wrong with each.)
    complaints = [facts.error] if facts.error and (fmt.computing or len(chosen) == 1) else []
    if new:
        complaints += wrong_unit(context, [facts])
    if complaints:
        shown = "\n".join(complaints)
        raise SchemaError(f"nothing was written:\n{shown}")


def check_schema(context: Context, facts: list[FileFacts], candidate: Candidate) -> None:
    """Stop before anything is written when a file is not what was promised.

    Args:
        candidate: has the typed lines of these files.

    Raises:
        SchemaError: with every file's complaint: column, file, sample value, remedy.
    """
    complaints = [one.error for one in facts if one.error]
    complaints += [*mixed_units(context.source, facts), *wrong_unit(context, facts)]
    complaints += changed_types(context, facts, candidate)
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
        good = sum(not one.error for one in facts)
        if len(facts) > good > 0:
            more += (
                f"\nFiles of this run that can be read: {good}. If the others are not of this log, "
                f"narrow source.landing = {source.source.landing!r}"
            )
        raise SchemaError(f"nothing was written:\n{shown}{more}")


def mixed_units(source: Source, facts: list[FileFacts]) -> Iterator[str]:
    """Files in which a share of the times is a factor of 1,000 or more away from the others', or from
    those of the other files: times of one log are of one unit, and would be decades away."""
    unit = source.time.numeric_unit
    if unit is None or source.time.any_year or not any(one.units.get(unit) for one in facts):
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


def wrong_unit(context: Context, facts: list[FileFacts]) -> Iterator[str]:
    """Files whose times are all a factor of 1,000 or more away from the years of logs, and would be
    right in another unit, where no file has a time of the source's unit.

    A log whose stored events are of such years is left alone: it was meant.
    """
    time = context.source.time
    unit = time.numeric_unit
    if unit is None or time.any_year or any(one.units.get(unit) for one in facts):
        return
    wrong = [one for one in facts if sum(one.units.values()) > one.lines / 2]
    if not wrong or of_early_years(context):
        return
    for one in wrong:
        other = max(one.units, key=lambda name: one.units[name])
        text = one.time_of[other]
        remedy = (
            f"set time.unit = {other!r}"
            if other in NUMERIC_UNITS
            else "nanoseconds are not read: have the log delivered in us"
        )
        yield (
            f"{one.file}: time.unit = {unit!r}, and its times seem to be in {other}: {text} in line "
            f"{one.first_of[other]} is {moment_of(text, unit)} in {unit}, and {moment_of(text, other)} in "
            f"{other}. Correct the source file: {remedy}. If {unit} is right, set time.any_year = true"
        )


MICROS = {unit: Decimal(us) for unit, us in NUMERIC_UNITS.items()} | {"ns": Decimal("0.001")}
YEAR_US = 31_556_952_000_000


def moment_of(text: str, unit: str) -> str:
    """The time that a number of a unit since 1970 is; beyond the calendar its year alone."""
    micros = int(Decimal(text) * MICROS[unit])
    try:
        return f"{EPOCH + timedelta(microseconds=micros):%Y-%m-%d %H:%M:%S}"
    except OverflowError:
        return f"in the year {1970 + micros // YEAR_US:,}"


def of_early_years(context: Context) -> bool:
    """Whether there are stored events, all of them before the years of logs."""
    version = context.lake.version(EVENTS)
    if version is None or not context.lake.rows(EVENTS):
        return False
    files = context.lake.files_of(EVENTS, version)
    first_logs = (datetime(FIRST_LOGS, 1, 1, tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)
    return all(one.last_us("event_ts") < first_logs for one in files)


def changed_types(context: Context, facts: list[FileFacts], candidate: Candidate) -> Iterator[str]:
    """Files of text in which a column that was readable before is so in no line any more.

    One bad line is a reject; a file of them is a log that changed. Text has no types, so it takes
    some lines to tell the two apart.
    """
    if not context.lake.rows(EVENTS):
        return
    mapped, bad = context.source.columns.mapped(), unreadable_columns(candidate)
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


def unreadable_columns(candidate: Candidate) -> dict[tuple[str, str], tuple[int, str]]:
    """By file and reason, of the reasons in `TYPE_OF`: how many lines, and the first of them."""
    bad = ds.field("reason").isin(list(TYPE_OF))
    rows = candidate.arrow("lines", ["file", "reason", "raw", "line"], bad).sort_by("line")
    found = rows.group_by(["file", "reason"], use_threads=False)
    counted = found.aggregate([("line", "count"), ("raw", "first")]).to_pylist()
    return {
        (row["file"], row["reason"]): (row["line_count"], row["raw_first"] or "") for row in counted
    }


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


def told(context: Context, facts: list[FileFacts]) -> list[str]:
    """What to say of what was in the files."""
    notes = [*too_long(facts), *of_elements(context, facts), *unknown_columns(context, facts)]
    notes += [*swallowed(context, facts), *waiting(context, facts)]
    if passed := sum(one.forgotten for one in facts):
        notes.append(f"Skipped {counted(passed, 'line')} of erased users")
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


def strange_times(context: Context, candidate: Candidate) -> list[str]:
    """What to say if a log seems to be of another age than logs are: a unit, or a pattern, that is not
    the log's makes times that can be read, and are none of anybody's."""
    parts = [path for path, *_ in filesystem.glob(f"{candidate.path('lines')}/*.parquet")]
    known = time_slices.extents(parts)
    if not known:
        return []
    first, last = (
        pa.scalar(end, pa.int64()).cast(time_slices.CLOCK).as_py()
        for end in (min(one[1] for one in known), max(one[2] for one in known))
    )
    right = f"is time.unit = {context.source.time.unit!r} right? If it is not: {ANOTHER_NAME}"
    if last.year < FIRST_LOGS or first > context.started + timedelta(days=366):
        return [
            f"all times of these lines lie between {first:%Y-%m-%d %H:%M:%S} and "
            f"{last:%Y-%m-%d %H:%M:%S} UTC: {right}"
        ]
    notes = []
    if last > context.started + timedelta(days=1):
        notes.append(
            f"the newest time of these lines is in the future ({last:%Y-%m-%d %H:%M:%S} UTC), and the "
            f"oldest is {first:%Y-%m-%d %H:%M:%S} UTC: {right}"
        )
    if last - first > timedelta(days=DAYS_OF_MONTHS):
        notes += swapped_days(context.source, candidate)
    return notes


def swapped_days(source: Source, candidate: Candidate) -> list[str]:
    """What to say if day and month seem to be in each other's place."""
    patterns = [unit for unit in source.time.units if DAY_AND_MONTH.search(unit)]
    if not patterns:
        return []
    usable = candidate.part("lines").where("reason IS NULL")
    rows = usable.select("event_date").distinct().collect()
    return read_as_months(patterns[0], sorted(row["event_date"] for row in rows))


def read_as_months(pattern: str, dates: list[date]) -> list[str]:
    """Of a log of the first days of a month, read with day and month swapped, all days have the number
    of its month, in as many months as it has days.

    Args:
        dates: those of the events, the first one first.
    """
    days, months = {one.day for one in dates}, {(one.year, one.month) for one in dates}
    if not days or max(days) > MONTHS or len(months) < LEAST_MONTHS or len(days) >= len(months):
        return []
    other = DAY_AND_MONTH.sub(
        lambda found: "".join(reversed([one for one in found.groups() if one])), pattern
    )
    return [
        f"these lines are of {len(dates)} days from {dates[0]} to {dates[-1]}, and none is after day "
        f"{max(days)} of a month. If day and month are swapped in time.unit = {pattern!r}, it is "
        f"{other!r}: {ANOTHER_NAME}"
    ]


def swapped_columns(source: Source) -> list[str]:
    """What to say if the columns of user and item, by their names, are in each other's place."""
    named = source.named()
    user, item = named.get("user_id"), named.get("item_id")
    if user is None or item is None or not guess.swapped(user, item):
        return []
    return [
        f"columns.user_id = {user!r} and columns.item_id = {item!r} look swapped by their names. If they "
        f"are: {ANOTHER_NAME}"
    ]
