"""CSV: quotes, line breaks inside them, and lines that are no records."""

from __future__ import annotations

import csv
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa

from jobs.lake.filesystem import open_binary
from jobs.records import byte_streams
from jobs.records.byte_streams import Block, has_broken_bytes, printable
from jobs.records.csv_dialect import Dialect
from jobs.records.ranges import Range
from jobs.records.records import LONGEST_RECORD, Batches, FileFacts, Format, Unusable, positions

MAX_RECORD_LINES = 1_000
"""A quoted field may span lines; more than this many is an unclosed quote."""

Row = list[str] | None
"""The fields of a record, or None: not a record."""


class CsvRecords:
    """Splits physical lines into records, quotes and quoted line breaks understood.

    A record that cannot be read, or has another number of fields than the header, costs its first
    line only: an unclosed quote does not swallow the lines after it. Comments are no records.
    """

    def __init__(
        self, dialect: Dialect, num_fields: int | None, longest: int = LONGEST_RECORD
    ) -> None:
        self.longest = longest
        """Characters: a longer record is none."""
        csv.field_size_limit(longest)
        self.dialect = dialect
        self.num_fields = num_fields
        self.carry: list[str] = []
        self.next_line = 1

    def columns(self, lines: list[str]) -> list[tuple[str, ...]] | None:
        """The fields of all lines, column by column, where each line is one whole record; else
        None: `feed` finds out which is not. (No Python loop over lines.)"""
        dialect = self.dialect
        if self.carry or self.num_fields is None:
            return None
        if dialect.comment and any(map(dialect.is_comment, lines)):
            return None
        if dialect.long and not all(map(dialect.is_plain, lines)):
            return None
        try:
            rows = list(dialect.rows(lines))
        except csv.Error:
            return None
        # A record of two lines would make fewer rows than lines, a blank line one without fields.
        if len(rows) != len(lines) or set(map(len, rows)) != {self.num_fields}:
            return None
        self.next_line += len(lines)
        return list(zip(*rows, strict=True))

    def feed(self, lines: list[str], last: bool) -> Iterator[tuple[int, str, Row]]:
        """Yield (first physical line, raw text, fields) of every complete record.

        Lines of a record that may go on in the next batch are kept back, unless `last`.
        """
        dialect = self.dialect
        lines = self.carry + lines
        self.carry = []
        short = max(map(len, lines), default=0) <= self.longest
        if short and not dialect.comment and all(map(dialect.is_plain, lines)):
            for row, line in zip(dialect.rows(lines), lines, strict=True):
                yield self.next_line, line, self._checked(row)
                self.next_line += 1
            return
        at = 0
        while at < len(lines):
            if dialect.is_comment(lines[at]):
                at, self.next_line = at + 1, self.next_line + 1
                continue
            if dialect.is_plain(lines[at]):
                yield self.next_line, lines[at], self._record(lines[at : at + 1])[1]
                at, self.next_line = at + 1, self.next_line + 1
                continue
            taken, fields = self._record(lines[at : at + MAX_RECORD_LINES])
            if fields is None and not last and self._may_go_on(lines[at:]):
                self.carry = lines[at:]
                return
            taken = taken if fields is not None else 1
            yield self.next_line, "".join(lines[at : at + taken]), fields
            at, self.next_line = at + taken, self.next_line + taken

    def _may_go_on(self, lines: list[str]) -> bool:
        """Whether a record of so many lines may have more of them."""
        return len(lines) < MAX_RECORD_LINES and sum(map(len, lines)) <= self.longest

    def _record(self, lines: list[str]) -> tuple[int, Row]:
        """The record at the head of `lines`: how many lines it takes, and its fields."""
        if len(lines[0]) > self.longest:
            return 1, None
        reader = self.dialect.reader(lines)
        try:
            row = next(reader)
        except (csv.Error, StopIteration):
            return 1, None
        if sum(map(len, lines[: reader.line_num])) > self.longest:
            return 1, None
        return reader.line_num, self._checked(row)

    def _checked(self, row: list[str]) -> Row:
        if self.num_fields is not None and row and len(row) != self.num_fields:
            return None
        return self.dialect.restored(row)

    def swallows(self, raw: str) -> bool:
        """Whether a record of several lines has some that would be records by themselves: its
        quotes may enclose nothing."""
        lines = raw.splitlines()[1:]
        return any(line.count(self.dialect.delimiter) + 1 == self.num_fields for line in lines)


def read_csv(
    fmt: Format,
    stream: BinaryIO,
    facts: FileFacts,
    waits: Callable[[], bool] | None = None,
    part: Range | None = None,
) -> Iterator[pa.RecordBatch]:
    """The records of one CSV, or of a range of it.

    Args:
        stream: of the range, if it is one.
        waits: as in `byte_streams.whole_lines`.

    Raises:
        Unusable: the header cannot be read, or has not the columns that the source file names.
    """
    file, longest = _CsvFile(fmt, facts), fmt.longest_record
    if part is not None and part.begin:
        with open_binary(part.path) as head:
            file.begin_at(byte_streams.pieces(head, fmt.encoding, longest), part.line)
    pieces = byte_streams.pieces(stream, fmt.encoding, longest, waits)
    return file.read(pieces, ends=part is None or part.last)


class _CsvFile:
    """One CSV while it is read: the header first, then what follows by the quickest way that
    gives the same records.

    A block in which each line is one record is cut by Arrow (`block`), lines that are one record
    each by the csv module (`whole`), and others one by one (`add`).
    """

    def __init__(self, fmt: Format, facts: FileFacts) -> None:
        self.fmt, self.facts = fmt, facts
        self.batches = Batches(fmt, facts.file, facts)
        self.dialect = fmt.dialect
        self.records = CsvRecords(self.dialect, None, fmt.longest_record)
        self.places: dict[str, int] | None = None
        """Our columns' places; None: the header was not read yet."""

    def begin_at(self, head: Iterable[Block | list[str]], line: int) -> None:
        """Learn the columns from the file's beginning, to read a range of it that begins after so
        many lines."""
        for piece in head:
            for _ in self.after_header(piece):
                pass
            if self.places is not None:
                break
        self.batches.clear()
        self.facts.lines, self.records.carry, self.records.next_line = 0, [], line + 1

    def read(
        self, pieces: Iterable[Block | list[str]], ends: bool = True
    ) -> Iterator[pa.RecordBatch]:
        """Args: ends: whether the file ends with the pieces; else a record that is not whole at their
        end makes the range `unfinished`."""
        held: list[str] | None = None  # until it is known whether they are the last
        for piece in pieces:
            if held is not None:
                yield from self.lines(held, last=False)
                held = None
            if self.places is None:
                piece = yield from self.after_header(piece)
            batch = self.block(piece) if isinstance(piece, Block) else None
            if batch is not None:
                yield from self.drained()
                yield batch
            else:
                held = piece.lines() if isinstance(piece, Block) else piece
        # (A line that waits may be the end of a record of several lines: then all of them wait.)
        waits = bool(self.facts.waiting) or not ends
        if held is not None or (self.records.carry and not waits):
            yield from self.lines(held or [], last=not waits)
        self.facts.unfinished = not ends and bool(self.records.carry)
        yield from self.drained()

    def after_header(
        self, piece: Block | list[str]
    ) -> Generator[pa.RecordBatch, None, Block | list[str]]:
        """Read the header alone, because the number of fields is known from it.

        Returns:
            What of the piece follows.
        """
        lines = piece.lines() if isinstance(piece, Block) else piece
        head = 1
        while head < len(lines) and self.is_nothing(lines[head - 1]):
            head += 1
        yield from self.lines(lines[:head], last=len(lines) == head)
        while self.records.carry and head < len(lines):
            yield from self.lines(lines[head : head + 1], last=False)
            head += 1
        return Block.of(lines[head:]) if isinstance(piece, Block) else lines[head:]

    def is_nothing(self, line: str) -> bool:
        return not line.strip() or self.dialect.is_comment(line)

    def drained(self) -> Iterator[pa.RecordBatch]:
        """The records that were added one by one, if there are any."""
        if len(self.batches):
            yield self.batches.drain()

    def block(self, block: Block) -> pa.RecordBatch | None:
        """A block's records without a look at its lines; None: it has others than one a line."""
        records, dialect = self.records, self.dialect
        if self.places is None or records.carry or dialect.long or records.num_fields is None:
            return None
        if dialect.comment and block.has_line(dialect.comment):
            return None
        batch = self.batches.block(records.next_line, block, records.num_fields, self.places)
        if batch is not None:
            records.next_line += batch.num_rows
            self.facts.lines += batch.num_rows
        return batch

    def whole(self, lines: list[str]) -> pa.RecordBatch | None:
        """The records of lines, column by column; None: a line is not one whole record."""
        if self.places is None:
            return None
        first = self.records.next_line
        columns = self.records.columns(lines)
        if columns is None:
            return None
        batch = self.batches.whole(first, lines, columns, self.places)
        if batch is None:
            self.records.next_line = first
            return None
        self.facts.lines += len(lines)
        return batch

    def lines(self, lines: list[str], last: bool) -> Iterator[pa.RecordBatch]:
        """Records of lines. Those of a record that may go on are kept back, unless `last`."""
        batch = self.whole(lines)
        if batch is not None:
            yield from self.drained()
            yield batch
            return
        for line, raw, row in self.records.feed(lines, last):
            self.add(line, raw, row)
            if self.batches.full:
                yield self.batches.drain()

    def add(self, line: int, raw: str, row: Row) -> None:
        """One record, or the header.

        Args:
            line: its first physical line.
        """
        if not raw.strip() and (not row or self.places is None):
            return  # a blank line is no record; one of tabs is, where they delimit
        if self.places is None:
            self.places = self.start(row, raw)
            if self.fmt.header:
                return
        self.facts.lines += 1
        values = None
        if row is not None and "\n" in raw[:-1] and self.records.swallows(raw):
            self.facts.add_swallowed(line)
        if row is not None and not has_broken_bytes(raw):
            values = {ours: row[place] for ours, place in self.places.items()}
        self.batches.add(line, printable(raw), values)

    def start(self, row: Row, raw: str) -> dict[str, int]:
        """What the file's first record tells: how many fields there are, and which are ours."""
        facts, fmt = self.facts, self.fmt
        if row is None or has_broken_bytes(raw):
            raise Unusable(
                f"{facts.file}: the first line cannot be read as csv with delimiter "
                f"{fmt.delimiter!r} and encoding {fmt.encoding!r}: {printable(raw)[:120]!r}"
            )
        header = row if fmt.header else [f"_{place}" for place in range(len(row))]
        self.records.num_fields = len(row)
        facts.columns, facts.header = dict.fromkeys(header, "text"), header
        return positions(fmt, header, facts.file)
