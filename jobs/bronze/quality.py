"""Whether a run's lines were good enough, and what would mend those that were not.

A run of which no line is usable (a new event, a duplicate, or late), or of which more lines are
unusable than `quality.max_reject_share`, fails or warns, by `quality.on_exceed`. What is said names
the reasons, three lines, and for each reason the keys of the source file that would mend it, with
what the lines have: of JSON its paths, else the columns. One bad file among good ones is a note.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs.bronze import landing
from jobs.core.source_log import TYPED
from jobs.lake.context import Candidate, Context
from jobs.privacy.pseudonyms import privacy_of
from jobs.reading.stored import record_of
from jobs.reading.web_logs import looks_like_vhost
from jobs.records.file_format import file_format
from jobs.records.records import CUT, LONGEST_RECORD, LONGEST_TEXT, FileFacts, Format

SHOWN_LINES, SHOWN_CHARS = 3, 200
SHOWN_NAMES = 20
"""So many columns or paths are named."""
SHOWN_FILES = 3
SAMPLED = 20
"""So many lines of a reason are looked at for the paths that they have."""
FEW_ELEMENTS, DEEPEST = 5, 8
COLUMN_OF = {
    "missing_user_id": "user_id", "missing_item_id": "item_id", "bad_event_ts": "event_ts",
    "bad_value": "value", "bad_tie_break": "tie_break", "missing_event_id": "event_id",
}  # fmt: skip
POINTED = re.compile(r"-?[0-9]+\.0")
ESCAPED_BYTE = re.compile(r"\\x[0-9a-f]{2}")
UNITS = (
    (r"\d{10}(\.\d*)?", "s"),
    (r"\d{13}(\.\d*)?", "ms"),
    (r"\d{16}", "us"),
    (r"\d{4}-\d\d-\d\d([T ].*)?", "iso8601"),
)
"""How times of this century look by unit."""


def unusable_lines(rejects: dict[str, int]) -> int:
    """Late lines are good lines that came too late."""
    return sum(count for reason, count in rejects.items() if reason != "late")


def complaint(context: Context, candidate: Candidate, read: int, rejects: dict[str, int]) -> str:
    """What to say of a run whose lines are not good enough; empty where they are.

    Args:
        read: lines; rejects: how many of them are rejected, by reason.
    """
    quality = context.source.quality
    bad = unusable_lines(rejects)
    if not read or (bad < read and bad <= quality.max_reject_share * read):
        return ""
    ordered = Counter({reason: rejects[reason] for reason in rejects if reason != "late"})
    reasons = ", ".join(f"{count} {reason}" for reason, count in ordered.most_common())
    bound = (
        "none is usable"
        if bad == read
        else (f"more than quality.max_reject_share = {quality.max_reject_share:g}")
    )
    samples = {reason: sampled(candidate, reason) for reason, _ in ordered.most_common()}
    facts = {one.file: one for one in landing.facts_read(candidate)}
    return "\n".join(
        [
            f"{bad} of {read} lines cannot be used ({bad / read:.1%}; {reasons}): {bound}",
            *(f"  {in_words(row)}" for row in three_of(samples)),
            *remedies(context, samples, facts),
            after(context),
        ]
    )


def after(context: Context) -> str:
    """What to do once the source file is right."""
    name = context.source.name
    if context.source.quality.on_exceed == "fail":
        return (
            "No event was published; the lines are in bronze.rejects. Correct the source file, or "
            f"have the log delivered again, and run it again (python -m jobs run --source {name}): "
            "the files are read again. If the lines are bad and the others are wanted: raise "
            "quality.max_reject_share, or set quality.on_exceed = 'warn'"
        )
    return (
        "All of them are in bronze.rejects; correct the source file and read them again "
        f"(python -m jobs replay-rejects --source {name}), or correct the log, or raise the bound"
    )


def sampled(candidate: Candidate, reason: str) -> list[dict[str, Any]]:
    """The first rejects of a reason, by file and line."""
    names = ["file", "line", "element", "reason", "raw", "file_columns"]
    rows = candidate.arrow("rejects", names, ds.field("reason") == reason)
    order = [(name, "ascending") for name in names[:3]]
    found: list[dict[str, Any]] = rows.sort_by(order).slice(0, SAMPLED).to_pylist()
    return found


def three_of(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line of each reason, the most frequent reasons first; then more of the first ones."""
    turns = [rows[at] for at in range(SHOWN_LINES) for rows in samples.values() if at < len(rows)]
    return turns[:SHOWN_LINES]


def in_words(row: dict[str, Any]) -> str:
    raw = (row["raw"] or "")[:SHOWN_CHARS]
    return f"line {row['line']} of {row['file']}, {row['reason']}: {raw!r}"


# -- what would mend them -------------------------------------------------------------------------


def remedies(
    context: Context, samples: dict[str, list[dict[str, Any]]], facts: dict[str, FileFacts]
) -> Iterator[str]:
    """For each reason, the keys of the source file that would mend it."""
    fmt = replace(file_format(context.source), privacy=privacy_of(context))
    for reason, rows in samples.items():
        if not rows:
            continue
        columns = facts[rows[0]["file"]].columns
        names = [one for row in rows for one in named(fmt, row, columns)]
        there = shown(list(dict.fromkeys(names)))
        if reason == "unparsable":
            yield f"{reason}: {of_unparsable(fmt, rows)}"
            continue
        if reason == "bad_expression":
            yield f"{reason}: {of_expressions(context, there)}"
            continue
        ours = COLUMN_OF[reason]
        values = [value_of(fmt, row, columns, ours) for row in rows]
        value = next((one for one in values if one not in (None, "")), values[0])
        yield f"{reason}: {of_column(context, ours, value, there)}"


def value_of(fmt: Format, row: dict[str, Any], columns: dict[str, str], ours: str) -> str | None:
    """The text that a rejected line has in a column of ours, whatever it means."""
    literal = replace(fmt, null_values=frozenset(), null_ids=frozenset())
    header = row["file_columns"]
    line = record_of(
        literal, row["raw"] or "", row["file"], row["line"], columns, header, row["element"]
    )
    text: str | None = line.get(ours)
    if ours == "event_ts" and text and line.get("event_ts_2"):
        return f"{text} {line['event_ts_2']}"
    return text


def of_column(context: Context, ours: str, value: str | None, there: str) -> str:
    """What to do where a column of ours is not as it must be.

    Args:
        value: what a line has in it.
        there: the columns that the lines have.
    """
    source = context.source
    theirs, key = source.mapped()[ours], f"columns.{ours}"
    if ours in source.columns.expressions():
        key += ".sql"
        if value is None:
            return (
                f"{key} = {theirs!r} fails, or gives null, in these lines. They have: {there}. Correct "
                "the expression (TRY_CAST gives null where CAST fails)"
            )
    has = {None: "is null or not there", "": "is empty"}.get(value, f"is {(value or '')[:60]!r}")
    this = f"{key} = {theirs!r} {has}"
    if value is None:
        listed = re.search(r"(?:^|, )([^,\[]+)\[\]", there)
        explode = source.source.explode is None and listed is not None
        hint = (
            f". A path with [] is a list: with source.explode = {listed[1]!r} each of its elements is a "
            "line of its own"
            if explode and listed
            else ""
        )
        return f"{this} in these lines. They have: {there}. Correct {key}{hint}"
    if ours in ("user_id", "item_id", "event_id"):
        return f"{this}, which means nothing (source.null_values). Name another column of: {there}"
    if ours == "event_ts":
        looks = next((unit for form, unit in UNITS if re.fullmatch(form, value.strip())), None)
        looks = None if looks in source.time.units else looks
        hint = f"it looks like time.unit = {looks!r}" if looks else "correct time.unit"
        return (
            f"{this}, which is not a time of time.unit = {source.time.unit!r} (zone "
            f"{source.time.zone!r}): {hint}; or name another column of: {there}"
        )
    kind = "number" if ours == "value" else "whole number of 64 bits"
    return f"{this}, which is not a {kind}: name another column of: {there}; or leave {key} out"


def of_expressions(context: Context, there: str) -> str:
    """What to do where an expression fails whose column may be null."""
    names = ("event_type", "source_session_id", "exposed_with")
    said = context.source.columns.expressions()
    listed = ", ".join(f"columns.{one}.sql = {said[one]!r}" for one in names if one in said)
    return (
        f"{listed}: an expression fails in these lines. They have: {there}. Correct it (TRY_CAST gives "
        "null where CAST fails)"
    )


def of_unparsable(fmt: Format, rows: list[dict[str, Any]]) -> str:
    """What to do where lines are no records."""
    raws = [row["raw"] or "" for row in rows]
    if all(len(raw) > LONGEST_TEXT and raw.startswith(CUT, LONGEST_TEXT) for raw in raws):
        return (
            f"the lines are too long: a mapped column has at most {LONGEST_TEXT:,} characters, a "
            f"record {LONGEST_RECORD:,}. Deliver the file again without the long texts"
        )
    if fmt.format not in TYPED and any(ESCAPED_BYTE.search(raw) for raw in raws):
        return (
            f"the lines have bytes that are not source.encoding = {fmt.encoding!r}: set the log's "
            "own, such as 'latin-1' or 'cp1252'"
        )
    if fmt.format == "csv":
        count = len(rows[0]["file_columns"] or ())
        return (
            f"the lines are not records of {count} fields, as the first line is, with "
            f"source.delimiter = {fmt.delimiter!r} and source.quote = {fmt.quote!r}: correct "
            "source.delimiter, source.quote or source.format"
        )
    if fmt.format in ("jsonl", "json"):
        nested = [
            f"columns.{ours} = {theirs!r}"
            for ours, theirs in fmt.mapped.items()
            if any(
                path.startswith((f"{theirs}.", f"{theirs}[]"))
                for raw in raws
                for path in paths_of(raw)
            )
        ]
        if nested:
            there = shown(list(dict.fromkeys(path for raw in raws for path in paths_of(raw))))
            return (
                f"{', '.join(nested)} is a list or an object in these lines, and must be one value. "
                f"They have: {there}"
            )
        if fmt.format == "jsonl" and any(raw.strip() in ("[", "{", "[{") for raw in raws):
            return (
                "the lines are parts of JSON that goes over many lines: set source.format = 'json'"
            )
        return "the lines are not JSON objects, one a line: correct source.format"
    if fmt.format == "combined_log" and any(map(looks_like_vhost, raws)):
        return (
            "the lines begin with the server's name, before the client: they look like "
            "source.format = 'vhost_combined'"
        )
    return f"the lines are not lines of a {fmt.format}: correct source.format"


def named(fmt: Format, row: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """The log's columns that a rejected line has: of JSON its paths."""
    if fmt.format in ("jsonl", "json") and not (fmt.privacy is not None and fmt.privacy.hashes):
        return paths_of(row["raw"] or "")
    return list(row["file_columns"] or columns)


def paths_of(raw: str) -> list[str]:
    """The paths at which a JSON line has a value that is not null; `[]` stands for any element of a
    list."""
    try:
        return list(dict.fromkeys(_paths(json.loads(raw), "")))
    except (ValueError, RecursionError):
        return []


def _paths(value: Any, path: str, depth: int = 0) -> Iterator[str]:
    if isinstance(value, dict) and depth < DEEPEST:
        for name, inner in value.items():
            yield from _paths(inner, f"{path}.{name}" if path else name, depth + 1)
    elif isinstance(value, list) and depth < DEEPEST:
        for inner in value[:FEW_ELEMENTS]:
            yield from _paths(inner, f"{path}[]", depth + 1)
    elif value is not None and path:
        yield path


def shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(one[:80] for one in names[:SHOWN_NAMES]) + more or "none"


# -- notes ----------------------------------------------------------------------------------------


def bad_files(candidate: Candidate, read: int, rejected: dict[str, int]) -> list[str]:
    """Files of which no line is usable, where others are; see `complaint`."""
    if unusable_lines(rejected) in (0, read):
        return []
    counted: defaultdict[str, dict[str, int]] = defaultdict(dict)
    names = ["file", "reason", "line", "raw"]
    rejects = candidate.arrow("rejects", names, ds.field("reason") != "late").sort_by("line")
    of_reason = rejects.group_by(["file", "reason"]).aggregate([("line", "count")])
    for row in of_reason.to_pylist():
        counted[row["file"]][row["reason"]] = row["line_count"]
    lines = {one.file: one.lines for one in landing.facts_read(candidate)}
    bad = sorted(file for file, found in counted.items() if sum(found.values()) == lines[file])
    notes = []
    for file in bad[:SHOWN_FILES]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counted[file].items()))
        first = rejects.filter(ds.field("file") == file).slice(0, 1).to_pylist()[0]
        notes.append(
            f"{file}: none of its {lines[file]} lines can be used ({reasons}), such as line "
            f"{first['line']}: {(first['raw'] or '')[:SHOWN_CHARS]!r}. They are in bronze.rejects"
        )
    if len(bad) > SHOWN_FILES:
        notes.append(f"and {len(bad) - SHOWN_FILES} more files of which no line can be used")
    return notes


def same_ids(context: Context, candidate: Candidate) -> list[str]:
    """Ids that are there as whole numbers and, a second time, with `.0`."""
    ending = {name for one in landing.facts_read(candidate) for name in one.point_zero}
    notes = []
    for ours in sorted(ending):
        lines = candidate.arrow("lines", [ours], ds.field("reason").is_null())
        count, example = _with_and_without(pc.unique(lines[ours]).to_pylist())
        if count:
            theirs = context.source.mapped()[ours]
            notes.append(
                f"column {theirs!r} (columns.{ours}) has {count} ids with and without '.0', such "
                f"as {example!r} and '{example}.0': they count as two. If they are one, the log "
                "was written through floating point: have it delivered with whole numbers, and "
                "load it under another source.name; what was read stays as it was read"
            )
    return notes


def _with_and_without(ids: list[str | None]) -> tuple[int, str]:
    """How many of the distinct texts are there with and without `.0`, and the first of them."""
    known = set(ids)
    pointed = (one.removesuffix(".0") for one in ids if one and POINTED.fullmatch(one))
    both = sorted(one for one in pointed if one in known)
    return len(both), both[0] if both else ""
