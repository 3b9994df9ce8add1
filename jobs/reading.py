"""Landing files to records: the part of ingestion that runs in Spark's Python workers.

Each task reads whole files, streaming, and yields Arrow batches of *records*: the mapped columns
as text exactly as the log has them (no number ever becomes a float), the raw line, its file and
its first physical line (the header counted; Parquet: the row, from 1). Nothing is judged here but
"is this a record at all"; typing, reasons and hashes are Spark SQL (`ingest.py`).

A last record of `kind = 'file'` tells what the file was: size, content hash, lines, columns, or
the error that makes it unreadable as the source file describes it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from jobs.files import open_binary

BATCH_LINES = 20_000
BLOCK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
MAX_RECORD_LINES = 1_000
"""A quoted field may span lines; more than this many is an unclosed quote."""

SCALARS = (
    "user_id", "item_id", "event_ts", "event_type", "source_session_id", "value", "event_id",
    "tie_break",
)  # fmt: skip
RECORD_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        *((name, pa.string()) for name in SCALARS),
        ("exposed_with", pa.list_(pa.string())),
        ("typed_ts", pa.bool_()),
        ("raw", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
    ]
)
RECORD_DDL = (
    "kind string, " + ", ".join(f"{name} string" for name in SCALARS)
    + ", exposed_with array<string>, typed_ts boolean, raw string, file string, line bigint"
)  # fmt: skip

COMBINED_LOG = re.compile(
    r'^(\S+) \S+ (\S+) \[([^\]]+)\] "(?:([A-Z]+) (.*?)(?: HTTP/[\d.]+)?|[^"]*)" (\d{3}) (\d+|-)'
    r'(?: "((?:[^"\\]|\\.)*)" "((?:[^"\\]|\\.)*)")?\s*$'
)


@dataclass(frozen=True)
class Format:
    """How to read the files of one source; plain values, sent to the workers."""

    format: str
    mapped: dict[str, str]
    """Our column -> the log's column."""
    delimiter: str = ","
    header: bool = True
    null_values: frozenset[str] = frozenset([""])
    encoding: str = "utf-8"
    list_separator: str = "|"
    max_field_chars: int = 16 * 1024 * 1024


@dataclass
class FileFacts:
    """What one file turned out to be."""

    file: str
    lines: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    size: int = 0
    sha256: str = ""


class Unusable(Exception):
    """The file is not what the source file promised."""


class _Hashing(io.RawIOBase):
    """A binary stream that hashes what passes through it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw_stream, self.digest, self.size = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.raw_stream.read(len(buffer))
        buffer[: len(data)] = data
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def decompressed(path: str, raw: BinaryIO) -> BinaryIO:
    """`.gz`, `.bz2` and `.zst` read as what they hold."""
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.endswith(".bz2"):
        return bz2.BZ2File(raw)  # type: ignore[return-value]
    if path.endswith((".zst", ".zstd")):
        unpacked: BinaryIO = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return unpacked
    return raw


def text_lines(stream: BinaryIO, encoding: str) -> Iterator[list[str]]:
    """Batches of physical lines with their ends; bytes that are no text stay as surrogates."""
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    text = io.TextIOWrapper(
        io.BufferedReader(stream, 1 << 20),  # type: ignore[type-var]
        encoding=codec,
        errors="surrogateescape",
        newline="",
    )
    batch: list[str] = []
    for line in text:
        batch.append(line)
        if len(batch) == BATCH_LINES:
            yield batch
            batch = []
    if batch:
        yield batch


class Block:
    """Whole physical lines of a UTF-8 file, as bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @staticmethod
    def of(lines: list[str]) -> Block:
        return Block("".join(lines).encode("utf-8", "surrogateescape"))

    def lines(self) -> list[str]:
        """As `text_lines` would give them."""
        text = self.data.decode("utf-8", "surrogateescape")
        return io.StringIO(text, newline="").readlines()

    @property
    def plain(self) -> bool:
        """UTF-8 without quotes, blank lines, and line ends but newlines: each line a record."""
        data = self.data
        lone = data.count(b"\r") != data.count(b"\r\n")
        blank = data[:1] in b"\r\n" or b"\n\n" in data or b"\n\r\n" in data
        if b'"' in data or lone or blank or data.startswith(BOM):
            return False
        if not data.isascii():
            try:
                data.decode("utf-8")
            except UnicodeError:
                return False
        return True

    def raw(self) -> pa.Array:
        """The lines with their ends, without a copy."""
        ends = np.flatnonzero(np.frombuffer(self.data, np.uint8) == 10) + 1
        if not self.data.endswith(b"\n"):
            ends = np.append(ends, len(self.data))
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self.data)]
        return pa.StringArray.from_buffers(len(ends), buffers[1], buffers[2])

    def fields(self, delimiter: str, count: int, places: Iterable[int]) -> dict[int, pa.Array]:
        """Some of the `count` fields of every line.

        Raises:
            ArrowInvalid: a line has another number of fields, or is no UTF-8.
        """
        names = [str(place) for place in range(count)]
        wanted = [str(place) for place in sorted(set(places))]
        table = pyarrow.csv.read_csv(
            pa.BufferReader(self.data),
            pyarrow.csv.ReadOptions(
                column_names=names, use_threads=False, block_size=len(self.data) + 1
            ),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter, quote_char=False, ignore_empty_lines=False
            ),
            pyarrow.csv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()),
                strings_can_be_null=False,
            ),
        )  # fmt: skip
        return {int(name): table[name].combine_chunks() for name in wanted}


def byte_blocks(stream: BinaryIO) -> Iterator[Block]:
    """A UTF-8 stream cut at line ends, its byte-order mark dropped."""
    left: list[bytes] = []
    first = True
    while data := stream.read(BLOCK_BYTES):
        if first:
            data, first = data.removeprefix(BOM), False
        # (Files whose lines end with a carriage return alone are cut at those.)
        cut = data.rfind(b"\n") + 1 or data.rfind(b"\r", 0, len(data) - 1) + 1
        if cut:
            yield Block(b"".join([*left, data[:cut]]))
            left = [data[cut:]]
        else:
            left.append(data)
    if rest := b"".join(left):
        yield Block(rest)


def has_broken_bytes(line: str) -> bool:
    return not line.isascii() and any("\ud800" <= char <= "\udfff" for char in line)


def printable(line: str) -> str:
    """A line as it may be stored: without its end, undecodable bytes as backslash escapes."""
    line = line.rstrip("\r\n")
    if has_broken_bytes(line):
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return line


Row = list[str] | None
"""The fields of a record, or None: not a record."""


class CsvRecords:
    """Splits physical lines into records, quotes and quoted line breaks understood.

    A record that cannot be read, or has another number of fields than the header, costs its first
    line only: an unclosed quote does not swallow the lines after it.
    """

    def __init__(self, delimiter: str, num_fields: int | None) -> None:
        # The csv module takes one character; a longer delimiter is exchanged for one that no
        # log writes, and back inside quoted fields.
        self.long = delimiter if len(delimiter) > 1 else None
        self.char = "\x1f" if self.long else delimiter
        self.num_fields = num_fields
        self.carry: list[str] = []
        self.next_line = 1

    def columns(self, lines: list[str]) -> list[tuple[str, ...]] | None:
        """The fields of all lines, column by column, where each line is one whole record; else
        None: `feed` finds out which is not. (No Python loop over lines.)"""
        if self.carry or self.num_fields is None:
            return None
        if self.long and any('"' in line for line in lines):
            return None
        try:
            rows = list(self._fields(lines))
        except csv.Error:
            return None
        # A record of two lines would make fewer rows than lines, a blank line one without fields.
        if len(rows) != len(lines) or set(map(len, rows)) != {self.num_fields}:
            return None
        self.next_line += len(lines)
        return list(zip(*rows, strict=True))

    def _fields(self, lines: Iterable[str]) -> Iterator[list[str]]:
        if self.long:
            lines = (line.replace(self.long, self.char) for line in lines)
        return csv.reader(lines, delimiter=self.char, strict=True)

    def _restore(self, row: list[str]) -> list[str]:
        if self.long and any(self.char in text for text in row):
            return [text.replace(self.char, self.long) for text in row]
        return row

    def feed(self, lines: list[str], last: bool) -> Iterator[tuple[int, str, Row]]:
        """Yield (first physical line, raw text, fields) of every complete record.

        Lines of a record that may go on in the next batch are kept back, unless `last`.
        """
        lines = self.carry + lines
        self.carry = []
        if not any('"' in line for line in lines):
            for row, line in zip(self._fields(lines), lines, strict=True):
                yield self.next_line, line, self._checked(row)
                self.next_line += 1
            return
        at = 0
        while at < len(lines):
            if '"' not in lines[at]:
                row = next(self._fields(lines[at : at + 1]), [])
                yield self.next_line, lines[at], self._checked(row)
                at, self.next_line = at + 1, self.next_line + 1
                continue
            taken, fields = self._record(lines[at : at + MAX_RECORD_LINES])
            if fields is None and not last and len(lines) - at < MAX_RECORD_LINES:
                self.carry = lines[at:]
                return
            taken = taken if fields is not None else 1
            yield self.next_line, "".join(lines[at : at + taken]), fields
            at, self.next_line = at + taken, self.next_line + taken

    def _record(self, lines: list[str]) -> tuple[int, Row]:
        """The record at the head of `lines`: how many lines it takes, and its fields."""
        reader = csv.reader(
            (line.replace(self.long, self.char) for line in lines) if self.long else lines,
            delimiter=self.char,
            strict=True,
        )
        try:
            row = next(reader)
        except (csv.Error, StopIteration):
            return 1, None
        return reader.line_num, self._checked(row)

    def _checked(self, row: list[str]) -> Row:
        if self.num_fields is not None and row and len(row) != self.num_fields:
            return None
        return self._restore(row)


class Batches:
    """Collects records of one file and turns them into Arrow batches."""

    def __init__(self, fmt: Format, file: str) -> None:
        self.fmt, self.file = fmt, file
        self.columns: dict[str, list[Any]] = {name: [] for name in RECORD_SCHEMA.names}
        self.listed = fmt.mapped.get("exposed_with")

    def __len__(self) -> int:
        return len(self.columns["line"])

    def add(self, line: int, raw: str, values: dict[str, Any] | None) -> None:
        """One record; `values` is None where the line is none."""
        columns = self.columns
        columns["kind"].append("unparsable" if values is None else "record")
        nulls = self.fmt.null_values
        for name in SCALARS:
            value = values.get(name) if values else None
            columns[name].append(None if value in nulls else value)
        columns["exposed_with"].append(self._list(values.get("exposed_with")) if values else None)
        columns["typed_ts"].append(False)
        columns["raw"].append(raw)
        columns["line"].append(line)

    def _list(self, value: Any) -> list[str] | None:
        if isinstance(value, str):
            value = None if value in self.fmt.null_values else value.split(self.fmt.list_separator)
        if value is None:
            return None
        return [one for one in value if one is not None and one not in self.fmt.null_values]

    def whole(
        self, first: int, lines: list[str], columns: list[tuple[str, ...]], places: dict[str, int]
    ) -> pa.RecordBatch | None:
        """Records that stand one a line, as `add` would make them; None: a line is no text.

        Args:
            first: the first record's line.
            columns: the log's columns; `places` says which of them is which of ours.
        """
        count = len(lines)
        nulls = pa.array(sorted(self.fmt.null_values), pa.string())
        made: dict[str, pa.Array] = {
            "kind": pa.repeat("record", count), "typed_ts": pa.repeat(False, count),
            "file": pa.repeat(self.file, count),
            "line": pa.array(range(first, first + count), pa.int64()),
        }  # fmt: skip
        try:
            made["raw"] = pc.utf8_rtrim(pa.array(lines, pa.string()), "\r\n")
            for ours, place in places.items():
                if ours == "exposed_with":
                    listed = [self._list(text) for text in columns[place]]
                    made[ours] = pa.array(listed, pa.list_(pa.string()))
                else:
                    text = pa.array(columns[place], pa.string())
                    made[ours] = pc.if_else(pc.is_in(text, nulls), None, text)
        except UnicodeError:
            return None
        return pa.RecordBatch.from_arrays(
            [made.get(one.name, pa.nulls(count, one.type)) for one in RECORD_SCHEMA],
            schema=RECORD_SCHEMA,
        )

    def block(
        self, first: int, block: Block, delimiter: str, count: int, places: dict[str, int]
    ) -> pa.RecordBatch | None:
        """A block's records, one a line, as `add` would make them; None: a line is none.

        Args:
            first: the first record's line.
            count: how many fields a line has; `places` says which of them is which of ours.
        """
        if not block.plain:
            return None
        try:
            fields = block.fields(delimiter, count, places.values())
        except pa.ArrowException:
            return None
        raw = pc.utf8_rtrim(block.raw(), "\r\n")
        if any(len(array) != len(raw) for array in fields.values()):
            return None
        nulls = pa.array(sorted(self.fmt.null_values), pa.string())
        made: dict[str, pa.Array] = {
            "kind": pa.repeat("record", len(raw)), "typed_ts": pa.repeat(False, len(raw)),
            "file": pa.repeat(self.file, len(raw)), "raw": raw,
            "line": pa.array(np.arange(first, first + len(raw))),
        }  # fmt: skip
        for ours, place in places.items():
            text = pc.if_else(pc.is_in(fields[place], nulls), None, fields[place])
            if ours == "exposed_with":
                listed = [self._list(one) for one in text.to_pylist()]
                text = pa.array(listed, pa.list_(pa.string()))
            made[ours] = text
        return pa.RecordBatch.from_arrays(
            [made.get(one.name, pa.nulls(len(raw), one.type)) for one in RECORD_SCHEMA],
            schema=RECORD_SCHEMA,
        )

    def drain(self) -> pa.RecordBatch:
        count = len(self)
        self.columns["file"] = [self.file] * count
        batch = pa.RecordBatch.from_arrays(
            [pa.array(self.columns[one.name], one.type) for one in RECORD_SCHEMA],
            schema=RECORD_SCHEMA,
        )
        self.columns = {name: [] for name in RECORD_SCHEMA.names}
        return batch


def positions(fmt: Format, header: list[str], file: str) -> dict[str, int]:
    """Our column -> its place in the log's header."""
    places = {}
    for ours, theirs in fmt.mapped.items():
        if theirs not in header:
            raise Unusable(missing_column(file, ours, theirs, header))
        if header.count(theirs) > 1:
            raise Unusable(f"{file}: the header has the column {theirs!r} twice: rename one")
        places[ours] = header.index(theirs)
    return places


def missing_column(file: str, ours: str, theirs: str, there: Iterable[str]) -> str:
    return (
        f"{file} has no column {theirs!r}, which columns.{ours} names; it has "
        f"{', '.join(map(repr, there)) or 'none'}. Correct columns.{ours} in the source file, or "
        "have the log delivered again with the column"
    )


def pieces(stream: BinaryIO, encoding: str) -> Iterator[Block | list[str]]:
    """A text file in pieces of whole lines: bytes where they can be cut as bytes."""
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        yield from byte_blocks(stream)
    else:
        yield from text_lines(stream, encoding)


def read_csv(fmt: Format, stream: BinaryIO, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    csv.field_size_limit(fmt.max_field_chars)
    batches = Batches(fmt, facts.file)
    records = CsvRecords(fmt.delimiter, None)
    places: dict[str, int] | None = None
    previous: list[str] | None = None

    def take_block(block: Block) -> pa.RecordBatch | None:
        """Most blocks of most logs: nothing is quoted, and no line is looked at."""
        if places is None or records.carry or records.long or records.num_fields is None:
            return None
        if len(block.data) > fmt.max_field_chars:
            return None  # there may be a field that is too long
        batch = batches.block(
            records.next_line, block, records.char, records.num_fields, places
        )  # fmt: skip
        if batch is not None:
            records.next_line += batch.num_rows
            facts.lines += batch.num_rows
        return batch

    def take(lines: list[str], last: bool) -> Iterator[pa.RecordBatch]:
        nonlocal places
        first = records.next_line
        columns = records.columns(lines) if places is not None else None
        if columns is not None and places is not None:
            batch = batches.whole(first, lines, columns, places)
            if batch is not None:
                facts.lines += len(lines)
                if len(batches):
                    yield batches.drain()
                yield batch
                return
            records.next_line = first
        for line, raw, row in records.feed(lines, last):
            if not raw.strip() and (not row or places is None):
                continue  # a blank line is no record; one of tabs is, where they delimit
            if places is None:
                places = start(row, raw)
                if fmt.header:
                    continue
                if row is not None and len(row) != records.num_fields:
                    row = None
            facts.lines += 1
            if row is None or has_broken_bytes(raw):
                batches.add(line, printable(raw), None)
            else:
                values = {ours: row[place] for ours, place in places.items()}
                batches.add(line, printable(raw), values)
        if len(batches) >= BATCH_LINES:
            yield batches.drain()

    def start(row: Row, raw: str) -> dict[str, int]:
        if row is None or has_broken_bytes(raw):
            raise Unusable(
                f"{facts.file}: the first line cannot be read as csv with delimiter "
                f"{fmt.delimiter!r} and encoding {fmt.encoding!r}: {printable(raw)[:120]!r}"
            )
        header = row if fmt.header else [f"_{place}" for place in range(len(row))]
        records.num_fields = len(row)
        found = positions(fmt, header, facts.file)
        facts.columns = dict.fromkeys(header, "text")
        return found

    for part in pieces(stream, fmt.encoding):
        if previous is not None:
            yield from take(previous, last=False)
            previous = None
        if places is None:
            lines = part.lines() if isinstance(part, Block) else part
            # The header alone first: the number of fields is known from it.
            head = 1
            while head < len(lines) and not lines[head - 1].strip():
                head += 1
            yield from take(lines[:head], last=len(lines) == head)
            while records.carry and head < len(lines):
                yield from take(lines[head : head + 1], last=False)
                head += 1
            part = Block.of(lines[head:]) if isinstance(part, Block) else lines[head:]
        if isinstance(part, Block):
            batch = take_block(part)
            if batch is None:
                previous = part.lines()
                continue
            if len(batches):
                yield batches.drain()
            yield batch
        else:
            previous = part
    if previous is not None:
        yield from take(previous, last=True)
    elif records.carry:
        yield from take([], last=True)
    if len(batches):
        yield batches.drain()


def _scalar_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    raise ValueError(f"{type(value).__name__} where one value is expected")


def _reach(record: dict[str, Any], name: str) -> Any:
    """A column of a JSON record; `a.b` reaches into nested objects."""
    if name in record:
        return record[name]
    value: Any = record
    for step in name.split("."):
        if not isinstance(value, dict) or step not in value:
            return None
        value = value[step]
    return value


def json_values(fmt: Format, line: str, facts: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of one JSON line; numbers stay the text they were written as."""
    try:
        record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        if not isinstance(record, dict):
            return None
        values: dict[str, Any] = {}
        for ours, theirs in fmt.mapped.items():
            value = _reach(record, theirs)
            if ours == "exposed_with" and isinstance(value, list):
                values[ours] = [_scalar_text(one) for one in value]
            else:
                values[ours] = _scalar_text(value)
            if value is not None or theirs in record:
                facts.columns.setdefault(theirs, "json")
        for name in record:
            facts.columns.setdefault(name, "json")
        return values
    except (ValueError, RecursionError):
        return None


def log_values(fmt: Format, line: str, _: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of one line of a web server's combined log; '-' means nothing."""
    from jobs.sources import COMBINED_LOG_COLUMNS

    found = COMBINED_LOG.match(line)
    if found is None:
        return None
    parts = dict(zip(COMBINED_LOG_COLUMNS, found.groups(), strict=True))
    return {
        ours: None if parts[theirs] == "-" else parts[theirs]
        for ours, theirs in fmt.mapped.items()
    }  # fmt: skip


def read_lines(
    fmt: Format,
    stream: BinaryIO,
    facts: FileFacts,
    values_of: Callable[[Format, str, FileFacts], dict[str, Any] | None],
) -> Iterator[pa.RecordBatch]:
    batches = Batches(fmt, facts.file)
    number = 0
    for lines in text_lines(stream, fmt.encoding):
        for line in lines:
            number += 1
            stripped = line.strip()
            if not stripped:
                continue
            facts.lines += 1
            broken = has_broken_bytes(line)
            values = None if broken else values_of(fmt, stripped, facts)
            if values and any(
                isinstance(value, str) and not value.isascii() and has_broken_bytes(value)
                for value in values.values()
            ):
                values = None  # a JSON escape such as \\ud800 is no text
            batches.add(number, printable(line), values)
        yield batches.drain()


def _parquet_text(array: pa.Array, ours: str, theirs: str, file: str) -> pa.Array:
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if pa.types.is_floating(kind) and ours not in ("value", "event_ts", "event_type"):
        raise Unusable(
            f"{file}: column {theirs!r} is {kind}, and columns.{ours} is an id: ids never pass "
            "through floating point. Write the column as integers or text"
        )
    if pa.types.is_timestamp(kind):
        us = array.cast(pa.timestamp("us", kind.tz), safe=False)
        form = "%Y-%m-%dT%H:%M:%S" + ("Z" if kind.tz else "")
        if kind.tz:
            us = us.cast(pa.timestamp("us", "UTC"))
        return pc.strftime(us, format=form)
    if pa.types.is_nested(kind):
        raise Unusable(f"{file}: column {theirs!r} is {kind}, columns.{ours} needs one value a row")
    return array.cast(pa.string())


def read_parquet(fmt: Format, path: str, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with open_binary(path) as stream:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        facts.columns = {one.name: str(one.type) for one in schema}
        for ours, theirs in fmt.mapped.items():
            if theirs not in schema.names:
                raise Unusable(missing_column(facts.file, ours, theirs, schema.names))
        nulls = pa.array(sorted(fmt.null_values), pa.string())
        line = 1
        columns = list(dict.fromkeys(fmt.mapped.values()))
        for batch in parquet.iter_batches(BATCH_LINES * 3, columns=columns):
            count = batch.num_rows
            made: dict[str, pa.Array] = {}
            typed = False
            for ours, theirs in fmt.mapped.items():
                array = batch.column(theirs)
                if ours == "exposed_with" and pa.types.is_list(array.type):
                    made[ours] = array.cast(pa.list_(pa.string()))
                    continue
                text = _parquet_text(array, ours, theirs, facts.file)
                text = pc.if_else(pc.is_in(text, nulls), None, text)
                typed = typed or (ours == "event_ts" and pa.types.is_timestamp(array.type))
                if ours == "exposed_with":
                    text = pc.split_pattern(text, fmt.list_separator)
                made[ours] = text
            made["kind"] = pa.array(["record"] * count, pa.string())
            made["typed_ts"] = pa.array([typed] * count, pa.bool_())
            made["file"] = pa.array([facts.file] * count, pa.string())
            made["line"] = pa.array(range(line, line + count), pa.int64())
            line += count
            facts.lines += count
            yield pa.RecordBatch.from_arrays(
                [made.get(one.name, pa.nulls(count, one.type)) for one in RECORD_SCHEMA],
                schema=RECORD_SCHEMA,
            )


def record_of(
    fmt: Format, raw: str, file: str, line: int, columns: dict[str, str]
) -> dict[str, Any]:
    """One stored line as the record that its file would give today.

    Args:
        columns: the file's columns, in order, with their kinds, as the ledger has them.
    """
    values: dict[str, Any] | None = None
    if fmt.format == "csv":
        records = CsvRecords(fmt.delimiter, len(columns))
        found = list(records.feed(raw.splitlines(keepends=True), last=True))
        if len(found) == 1 and found[0][2]:
            row, names = found[0][2], list(columns)
            values = {ours: row[names.index(theirs)] for ours, theirs in fmt.mapped.items()}
    elif fmt.format == "parquet":
        stored = json.loads(raw)
        values = {ours: stored.get(theirs) for ours, theirs in fmt.mapped.items()}
    else:
        values_of = json_values if fmt.format == "jsonl" else log_values
        values = values_of(fmt, raw.strip(), FileFacts(file))
    batch = Batches(fmt, file)
    batch.add(line, raw, values)
    made = {name: column[0] for name, column in batch.columns.items() if column}
    when = columns.get(fmt.mapped["event_ts"], "")
    typed = fmt.format == "parquet" and when.startswith("timestamp")
    return {**made, "file": file, "typed_ts": typed}


def read_file(fmt: Format, path: str) -> Iterator[pa.RecordBatch]:
    """All records of one file, then one `kind = 'file'` row with its facts as JSON in `raw`."""
    facts = FileFacts(path)
    try:
        with open_binary(path) as raw:
            hashing = _Hashing(raw)
            if fmt.format == "parquet":
                yield from read_parquet(fmt, path, facts)
            else:
                stream = decompressed(path, io.BufferedReader(hashing, 1 << 20))  # type: ignore[arg-type]
                if fmt.format == "csv":
                    yield from read_csv(fmt, stream, facts)
                else:
                    values_of = json_values if fmt.format == "jsonl" else log_values
                    yield from read_lines(fmt, stream, facts, values_of)
            while hashing.read(1 << 20):
                pass
            facts.size, facts.sha256 = hashing.size, hashing.digest.hexdigest()
    except Unusable as error:
        facts.error = str(error)
    except (OSError, EOFError, UnicodeError, LookupError, pa.ArrowException) as error:
        facts.error = (
            f"{path} cannot be read as {fmt.format} ({type(error).__name__}: {error}). Deliver it "
            "again whole, or correct [source] format and encoding"
        )
    batches = Batches(fmt, path)
    batches.add(0, json.dumps(facts.__dict__), {})
    batches.columns["kind"] = ["file"]
    yield batches.drain()


def reader(fmt: Format) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """For `mapInArrow` over a frame with one column of paths."""

    def read(paths: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in paths:
            for path in batch.column(0).to_pylist():
                yield from read_file(fmt, path)

    return read
