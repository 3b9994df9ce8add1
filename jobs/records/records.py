"""Records: what a line of a log is before anything is typed, and batches of them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.source_events import LINKS, field_of
from jobs.core.source_log import NULL_VALUES
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.records import byte_streams
from jobs.records.byte_streams import Block
from jobs.records.csv_dialect import Dialect
from jobs.records.expressions import FIELD, Computing, Names, nearest

if TYPE_CHECKING:
    from jobs.privacy.pseudonyms import Privacy

SCALARS = (
    "user_id", "item_id", "event_ts", "event_ts_2", "event_type", "source_session_id", "value",
    "event_id", "tie_break", "anonymous_id", BOUNDARY_VALUES, *LINKS,
)  # fmt: skip
IDS = ("user_id", "item_id", "anonymous_id")
RECORD_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        *((name, pa.string()) for name in SCALARS),
        ("exposed_with", pa.list_(pa.string())),
        ("clock", pa.string()),
        ("raw", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("element", pa.int64()),
        ("filtered", pa.string()),
        ("flag", pa.string()),
    ]
)
# kind: record, unparsable, or the reason for which an expression makes the line a reject.
# element: the place of an exploded element in its line, from 1. filtered: why it is left out.
# flag: what is to be said of its event.
# clock: null where `event_ts` is the log's own text; where the log has typed times it is their
# microseconds since 1970, on the clock of `utc`, or of the source file's zone (`local`).
RECORD_DDL = (
    "kind string, "
    + ", ".join(f"{name} string" for name in SCALARS)
    + ", exposed_with array<string>, clock string, raw string, file string, line bigint"
    + ", element bigint, filtered string, flag string"
)


LONGEST_RECORD = 16 * 1024 * 1024
"""Characters. A longer record is `unparsable`, and what follows is never in memory: a file without
line ends would be one record otherwise. So long a record takes 64 MiB as Python's text, and few
hundred MiB on its way through a core's 3 GB."""
LONGEST_TEXT = 1024 * 1024
"""Characters of the text of a mapped column, and of a rejected line as it is stored. parquet-java
looks at how much it holds after each 100 rows: at this length that is 100 to 400 MiB. No id is so
long: a record with a longer text in a mapped column is `unparsable`."""
DIGITS = {"s": (9, 10), "ms": (12, 13), "us": (15, 16), "ns": (18, 19)}
"""How many digits a time of 1973 to 2286 has, by its unit."""
CUT = " … [cut: "
"""Is in a stored line after its first `LONGEST_TEXT` characters, before how long it was."""


@dataclass(frozen=True)
class Format:
    """How to read the files of one source; plain values, sent to the workers."""

    format: str
    mapped: dict[str, str]
    """Our column -> the log's column."""
    delimiter: str = ","
    header: bool = True
    quote: str = '"'
    escape: str = ""
    comment: str = ""
    null_values: frozenset[str] = frozenset(NULL_VALUES)
    null_ids: frozenset[str] = frozenset()
    """More texts that mean nothing in `IDS`."""
    encoding: str = "utf-8"
    list_separator: str = "|"
    longest_record: int = LONGEST_RECORD
    longest_text: int = LONGEST_TEXT
    privacy: Privacy | None = None
    """Whose lines are skipped, and whether ids are hashed."""
    unit: str | None = None
    """The unit of times that are numbers, where there is one."""
    partial_since: int | None = None
    """Of a file that was modified after this (ms since 1970), a last line without an end waits;
    None: it is read as it is."""
    computing: Computing | None = None
    """What happens to the log's columns before they are ours; `mapped` then also has the columns that
    are read for it, as `field:column`."""
    wanted: dict[str, str] = field(default_factory=dict)
    """Where something is computed: our column, or `field:column` -> the log's column, as the source
    file says it; `mapped` has those that a line has."""
    names: Names = field(default_factory=lambda: Names({}))
    """Where lines are exploded: which of them are where."""

    table: pa.Schema | None = None
    """The columns of the table that the files are of: those that a file lacks are null in it."""
    empty_lines: bool = False
    """Where lines are exploded: whether one without an element is a record (for `forget`)."""

    @cached_property
    def dialect(self) -> Dialect:
        """Of CSV files."""
        return Dialect(self.delimiter, self.quote, self.escape, self.comment)

    @property
    def has_types(self) -> bool:
        """Whether Arrow reads the files, in columns that have types."""
        return self.format in ("parquet", "orc")

    @property
    def hashes(self) -> bool:
        """Whether user ids become pseudonyms."""
        return self.privacy is not None and self.privacy.hashes

    @cached_property
    def inputs(self) -> list[str]:
        """Columns that are read and are not ours."""
        names = [*self.mapped, *self.names.elements, *self.names.positions]
        return [name for name in dict.fromkeys(names) if name not in RECORD_SCHEMA.names]

    @cached_property
    def schema(self) -> pa.Schema:
        """What a reader of text yields: records, and beside them the inputs."""
        more = [(name, pa.string()) for name in self.inputs]
        return pa.schema([*RECORD_SCHEMA, *more]) if more else RECORD_SCHEMA

    def nulls_of(self, ours: str) -> frozenset[str]:
        """The texts that mean nothing in a column of ours."""
        return self.null_values | self.null_ids if ours in IDS else self.null_values


@dataclass
class FileFacts:
    """What one file turned out to be; filled while its records are read."""

    file: str
    lines: int = 0
    """Read lines, without those of erased users."""
    columns: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    size: int = 0
    sha256: str = ""
    too_long: int = 0
    """Records that are longer than the format's bounds allow."""
    first_too_long: int | None = None
    """The line of the first of them."""
    header: list[str] | None = None
    """The columns of a CSV, in order; `columns` has a name once."""
    point_zero: list[str] = field(default_factory=list)
    """Those of `IDS` in which an id ends in `.0`."""
    forgotten: int = 0
    """Lines of erased users, which were skipped."""
    units: dict[str, int] = field(default_factory=dict)
    """How many times are numbers that are of this century in a unit."""
    first_of: dict[str, int] = field(default_factory=dict)
    """The line of the first of each unit."""
    time_of: dict[str, str] = field(default_factory=dict)
    """The text of the time in that line."""
    waiting: int = 0
    """Last lines that have no end yet, and were not read."""
    swallowed: int = 0
    """Records in whose quotes lines lie that look like records."""
    first_swallowed: int | None = None
    """The line of the first of them."""
    empty_lines: int = 0
    """Lines without an element, where lines are exploded; they are not read lines."""
    unjudged: int = 0
    """Lines of which `source.keep` could not be computed."""
    first_unjudged: int | None = None
    begin: int = 0
    """Where a range of a large file begins (bytes)."""
    unfinished: bool = False
    """Whether a range ended inside a record."""
    bytes: int = 0
    """As the landing was listed, before the file was read; so is `modified_ms`."""
    modified_ms: int = 0

    @classmethod
    def of(cls, stored: dict[str, Any]) -> FileFacts:
        """Facts that were stored as JSON, also by another version of this code."""
        return cls(**{one.name: stored[one.name] for one in fields(cls) if one.name in stored})

    def skip_forgotten(self, lines: int) -> None:
        self.lines -= lines
        self.forgotten += lines

    def add_too_long(self, line: int, count: int = 1) -> None:
        self.too_long += count
        if self.first_too_long is None:
            self.first_too_long = line

    def add_swallowed(self, line: int) -> None:
        self.swallowed += 1
        if self.first_swallowed is None:
            self.first_swallowed = line

    def count_units(self, batch: pa.RecordBatch) -> None:
        """Take note of the units that numbers since 1970 seem to be of, by their digits."""
        if batch["clock"].null_count < batch.num_rows:
            return
        texts = batch["event_ts"]
        digits = pc.binary_length(texts)
        # (Whole numbers, nearly always: the others cost several times as much.)
        if not pc.all(pc.ascii_is_decimal(texts), min_count=0).as_py():
            trimmed = pc.utf8_trim_whitespace(texts)
            point = pc.find_substring(trimmed, ".")
            whole = pc.if_else(pc.less(point, 0), pc.binary_length(trimmed), point)
            number = pc.match_substring_regex(trimmed, r"^\d+(\.\d*)?$")
            digits = pc.if_else(number, whole, 0)
        known = pc.fill_null(digits, 0).to_numpy(zero_copy_only=False)
        counts = np.bincount(known, minlength=DIGITS["ns"][1] + 1)
        for unit, lengths in DIGITS.items():
            if count := int(counts[list(lengths)].sum()):
                self.units[unit] = self.units.get(unit, 0) + count
                if unit not in self.first_of:
                    first = int(np.flatnonzero(np.isin(known, lengths))[0])
                    self.first_of[unit] = batch["line"][first].as_py()
                    self.time_of[unit] = texts[first].as_py().strip()

    def look_at(self, batch: pa.RecordBatch) -> None:
        """Take note of ids that may be numbers which went through floating point."""
        for name in IDS:
            if name not in self.point_zero and pc.any(pc.ends_with(batch[name], ".0")).as_py():
                self.point_zero.append(name)


class Unusable(Exception):
    """The file is not what the source file promised."""


class Batches:
    """Collects records of one file and turns them into Arrow batches."""

    def __init__(self, fmt: Format, file: str, facts: FileFacts | None = None) -> None:
        self.fmt, self.file = fmt, file
        self.facts = FileFacts(file) if facts is None else facts
        self.columns: dict[str, list[Any]] = {name: [] for name in fmt.schema.names}
        self.chars = 0
        self.texts = (*SCALARS, *fmt.inputs)
        self.listed = fmt.mapped.get("exposed_with")
        self.nulls = {name: fmt.nulls_of(name) for name in (*self.texts, "exposed_with")}

    def __len__(self) -> int:
        return len(self.columns["line"])

    @property
    def full(self) -> bool:
        """Whether it is time to drain: many records, or long ones."""
        return len(self) >= byte_streams.BATCH_LINES or self.chars > self.fmt.longest_record

    def add(
        self, line: int, raw: str, values: dict[str, Any] | None, clock: str | None = None
    ) -> None:
        """One record; `values` is None where the line is none."""
        columns = self.columns
        self.chars += len(raw)
        # (No text of a record is longer than the record; what has types has no text of its own.)
        if len(raw) > self.fmt.longest_text or not raw:
            if too_long(self.fmt, raw, values):
                self.facts.add_too_long(line)
                values = None
            raw = cut_text(raw, self.fmt)
        columns["kind"].append("unparsable" if values is None else "record")
        for name in self.texts:
            value = values.get(name) if values else None
            columns[name].append(None if value in self.nulls[name] else value)
        columns["exposed_with"].append(self.list_of(values.get("exposed_with")) if values else None)
        columns["clock"].append(clock)
        for name in ("element", "filtered", "flag"):
            columns[name].append(None)
        columns["raw"].append(raw)
        columns["line"].append(line)

    @cached_property
    def null_arrays(self) -> dict[str, pa.Array]:
        return {name: pa.array(sorted(texts), pa.string()) for name, texts in self.nulls.items()}

    def without_nulls(self, ours: str, text: pa.Array) -> pa.Array:
        """A column's texts, null where they mean nothing."""
        return pc.if_else(pc.is_in(text, self.null_arrays[ours]), None, text)

    def list_of(self, value: Any) -> list[str] | None:
        """The items of `exposed_with`: of a list, or of a text with separators; without nulls."""
        nulls = self.nulls["exposed_with"]
        if isinstance(value, str):
            value = None if value in nulls else value.split(self.fmt.list_separator)
        if value is None:
            return None
        return [one for one in value if one is not None and one not in nulls]

    def whole(
        self, first: int, lines: list[str], columns: list[tuple[str, ...]], places: dict[str, int]
    ) -> pa.RecordBatch | None:
        """Records that are one a line, as `add` would make them; None: a line is not text, or long.

        Args:
            first: the first record's line.
            columns: the log's columns; `places` says which of them is which of ours.
        """
        if max(map(len, lines)) > self.fmt.longest_text:
            return None
        count = len(lines)
        made: dict[str, pa.Array] = {
            "kind": pa.repeat("record", count),
            "file": pa.repeat(self.file, count),
            "line": pa.array(range(first, first + count), pa.int64()),
        }
        try:
            made["raw"] = pc.utf8_rtrim(pa.array(lines, pa.string()), "\r\n")
            for ours, place in places.items():
                if ours == "exposed_with":
                    listed = [self.list_of(text) for text in columns[place]]
                    made[ours] = pa.array(listed, pa.list_(pa.string()))
                else:
                    made[ours] = self.without_nulls(ours, pa.array(columns[place], pa.string()))
        except UnicodeError:
            return None
        return pa.RecordBatch.from_arrays(
            [made.get(one.name, pa.nulls(count, one.type)) for one in self.fmt.schema],
            schema=self.fmt.schema,
        )

    def block(
        self, first: int, block: Block, count: int, places: dict[str, int]
    ) -> pa.RecordBatch | None:
        """A block's records, one a line, as `add` would make them; None: a line is not one record.

        Args:
            first: the first record's line.
            count: how many fields a record has; `places` says which of them is which of ours.
        """
        if not block.plain:
            return None
        lines = block.raw()
        if pc.max(pc.binary_length(lines)).as_py() > self.fmt.longest_text:
            return None
        try:
            fields, good = fields_of_lines(lines, self.fmt.dialect, count, places.values())
        except (pa.ArrowException, csv.Error):
            return None
        made: dict[str, pa.Array] = {
            "kind": pc.if_else(pa.array(good), "record", "unparsable"),
            "file": pa.repeat(self.file, len(lines)),
            "raw": pc.utf8_rtrim(lines, "\r\n"),
            "line": pa.array(np.arange(first, first + len(lines))),
        }
        for ours, place in places.items():
            if ours == "exposed_with":
                listed = [self.list_of(one) for one in fields[place].to_pylist()]
                made[ours] = pa.array(listed, pa.list_(pa.string()))
            else:
                made[ours] = self.without_nulls(ours, fields[place])
        return pa.RecordBatch.from_arrays(
            [made.get(one.name, pa.nulls(len(lines), one.type)) for one in self.fmt.schema],
            schema=self.fmt.schema,
        )

    def drain(self) -> pa.RecordBatch:
        count = len(self)
        self.columns["file"] = [self.file] * count
        batch = pa.RecordBatch.from_arrays(
            [pa.array(self.columns[one.name], one.type) for one in self.fmt.schema],
            schema=self.fmt.schema,
        )
        self.clear()
        return batch

    def clear(self) -> None:
        self.columns = {name: [] for name in self.fmt.schema.names}
        self.chars = 0


def too_long(fmt: Format, raw: str, values: dict[str, Any] | None) -> bool:
    """Whether a record, or one of its mapped columns, is longer than a table takes."""
    if len(raw) > fmt.longest_record:
        return True
    for name, value in (values or {}).items():
        if name.startswith(FIELD):
            continue  # (a list is as long as its line)
        texts = value if isinstance(value, list) else [value]
        if sum(len(one or "") for one in texts) > fmt.longest_text:
            return True
    return False


def cut_text(text: str, fmt: Format, longest: int | None = None) -> str:
    """A text as it may be stored: whole, or its beginning, and how long it was.

    Args:
        longest: how much of it, where that is not the format's.
    """
    longest = fmt.longest_text if longest is None else longest
    if len(text) <= longest:
        return text
    more = "more than " * (len(text) > fmt.longest_record)
    length = min(len(text), fmt.longest_record)
    return f"{text[:longest]}{CUT}{more}{length} characters]"


def cut_texts(texts: pa.Array, fmt: Format) -> pa.Array:
    """`cut_text`, of many."""
    long = pc.fill_null(pc.greater(pc.utf8_length(texts), fmt.longest_text), False)
    if not pc.any(long).as_py():
        return texts
    put = [cut_text(one, fmt) for one in texts.filter(long).to_pylist()]
    return pc.replace_with_mask(texts, long, pa.array(put, texts.type))


def fields_of_lines(
    lines: pa.Array, dialect: Dialect, count: int, places: Iterable[int]
) -> tuple[dict[int, pa.Array], np.ndarray]:
    """Some of the `count` fields of every line; null where a line has another number of them.

    Most lines of most logs have no quotes, and no Python object is made of them.

    Args:
        lines: physical lines with their ends, none of them blank.

    Returns:
        The fields by their place, and which lines have `count`.

    Raises:
        csv.Error: a line is not one record.
        ArrowInvalid: a field is not text.
    """
    has_quote = np.zeros(len(lines), bool)
    for mark in dialect.marks:
        has_quote |= pc.match_substring(lines, mark).to_numpy(zero_copy_only=False)
    at_plain, at_quoted = np.flatnonzero(~has_quote), np.flatnonzero(has_quote)
    plain = lines.filter(pa.array(~has_quote)) if len(at_quoted) else lines
    found, whole = byte_streams.fields(plain, dialect.char, count, places)
    if whole.all() and not len(at_quoted):
        return found, whole
    quoted = lines.take(pa.array(at_quoted)).to_pylist()
    rows = list(dialect.rows(quoted))
    if len(rows) != len(quoted):
        raise csv.Error("a quoted record has more lines than one")
    fit = np.array([len(row) == count for row in rows], bool)
    good = np.zeros(len(lines), bool)
    good[at_plain], good[at_quoted] = whole, fit
    if not all(map(str.strip, lines.filter(pa.array(~good)).to_pylist())):
        raise csv.Error("a line of blanks is no record")
    source = np.zeros(len(lines), np.int64)
    source[at_plain[whole]] = np.arange(whole.sum())
    source[at_quoted[fit]] = whole.sum() + np.arange(fit.sum())
    order = pa.array(source, mask=~good)
    rows = [row for row in rows if len(row) == count]
    for place, array in found.items():
        more = pa.array([row[place] for row in rows], pa.string())
        found[place] = pa.concat_arrays([array, more]).take(order)
    return found, good


def positions(fmt: Format, header: list[str], file: str) -> dict[str, int]:
    """Our column -> its place in the log's header."""
    places = {}
    for ours, theirs in fmt.mapped.items():
        if theirs not in header:
            if ours in fmt.names.either:
                continue  # (it is the elements')
            if fmt.header and looks_like_data(fmt, header):
                raise Unusable(no_header(file, header))
            raise Unusable(missing_column(file, ours, theirs, header))
        if header.count(theirs) > 1:
            raise Unusable(f"{file}: the header has the column {theirs!r} twice: rename one")
        places[ours] = header.index(theirs)
    return places


def looks_like_data(fmt: Format, header: list[str]) -> bool:
    """Whether a first line has none of the columns' names, and numbers or times in their place."""
    if set(fmt.mapped.values()) & set(header):
        return False
    return any(re.fullmatch(r"\s*([+-]?\d+([.,]\d+)?|\d{4}-\d\d-\d\d.*)", one) for one in header)


def no_header(file: str, first: list[str]) -> str:
    shown = ", ".join(repr(one[:40]) for one in first[:8])
    return (
        f"{file} has no header: its first line looks like data ({shown}). Have the file delivered "
        "again with the names of its columns; if no file of the log has them, set source.header = "
        "false, and name columns by their places: _0, _1, …"
    )


def missing_column(file: str, ours: str, theirs: str, there: Iterable[str]) -> str:
    names = list(there)
    others = re.findall(r"[,;\t|]", names[0]) if len(names) == 1 else []
    if others:
        return (
            f"{file}: its header is one column, {names[0]!r}. Set source.delimiter = "
            f"{max(others, key=others.count)!r} if that is what separates its columns"
        )
    near = nearest(theirs, names)
    return (
        f"{file} has no column {theirs!r}, which {field_of(ours)} names; it has "
        f"{', '.join(map(repr, names)) or 'none'}"
        f"{f'. Did you mean {near!r}?' if near else '.'} Correct {field_of(ours)} in the source file, or "
        "have the log delivered again with the column"
    )
