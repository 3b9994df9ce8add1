"""CSV: quotes, line breaks inside them, and lines that are no records."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa

from jobs.bronze import byte_streams
from jobs.bronze.byte_streams import Block, has_broken_bytes, printable
from jobs.bronze.records import LONGEST_RECORD, Batches, FileFacts, Format, Unusable, positions

MAX_RECORD_LINES = 1_000
"""A quoted field may span lines; more than this many is an unclosed quote."""

Row = list[str] | None
"""The fields of a record, or None: not a record."""


class CsvRecords:
    """Splits physical lines into records, quotes and quoted line breaks understood.

    A record that cannot be read, or has another number of fields than the header, costs its first
    line only: an unclosed quote does not swallow the lines after it.
    """

    def __init__(
        self, delimiter: str, num_fields: int | None, longest: int = LONGEST_RECORD
    ) -> None:
        self.longest = longest
        """Characters: a longer record is none."""
        csv.field_size_limit(longest)
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
        short = max(map(len, lines), default=0) <= self.longest
        if short and not any('"' in line for line in lines):
            for row, line in zip(self._fields(lines), lines, strict=True):
                yield self.next_line, line, self._checked(row)
                self.next_line += 1
            return
        at = 0
        while at < len(lines):
            if '"' not in lines[at]:
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
        reader = csv.reader(
            (line.replace(self.long, self.char) for line in lines) if self.long else lines,
            delimiter=self.char,
            strict=True,
        )
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
        return self._restore(row)


def read_csv(fmt: Format, stream: BinaryIO, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    batches = Batches(fmt, facts.file, facts)
    records = CsvRecords(fmt.delimiter, None, fmt.longest_record)
    places: dict[str, int] | None = None
    previous: list[str] | None = None

    def take_block(block: Block) -> pa.RecordBatch | None:
        """Most blocks of most logs: nothing is quoted, and no line is looked at."""
        if places is None or records.carry or records.long or records.num_fields is None:
            return None
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
            if batches.full:
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
        facts.columns, facts.header = dict.fromkeys(header, "text"), header
        return found

    for part in byte_streams.pieces(stream, fmt.encoding, fmt.longest_record):
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
