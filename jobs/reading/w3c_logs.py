"""W3C extended logs (IIS, CloudFront and others): columns are in lines of `#Fields`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from jobs.records import byte_streams
from jobs.records.byte_streams import has_broken_bytes, printable
from jobs.records.records import Batches, FileFacts, Format, Unusable, missing_column

FIELDS, DATE = "#fields:", "#date:"
CHANGED = "#Fields changed"
"""Is among a file's columns where they are not the same throughout: which of its lines has which
is not kept, so none is read again by the columns of others."""


def parts_of(line: str) -> list[str]:
    """The values of a line: separated by tabs, or by blanks; some are quoted."""
    line = line.rstrip("\r\n")
    separator = "\t" if "\t" in line else " "
    if '"' in line:
        try:
            [row] = csv.reader([line], delimiter=separator, strict=True, skipinitialspace=True)
            return row
        except (csv.Error, ValueError):
            pass  # (a quote inside a value means nothing)
    return line.split("\t") if separator == "\t" else line.split()


def w3c_values(
    fmt: Format, names: list[str], line: str, day: str | None = None
) -> dict[str, Any] | None:
    """The mapped columns of one line; '-' means nothing.

    Args:
        names: the columns, as the line of `#Fields` before it has them.
        day: what `date` is where it is none of them.
    """
    parts = parts_of(line)
    if len(parts) != len(names):
        return None
    values: dict[str, Any] = {}
    for ours, theirs in fmt.mapped.items():
        value = parts[names.index(theirs)] if theirs in names else day
        values[ours] = None if value == "-" else value
    return values


class _Head:
    """What the lines that begin with # have declared up to here."""

    def __init__(self, fmt: Format, facts: FileFacts) -> None:
        self.fmt, self.facts = fmt, facts
        self.names: list[str] | None = None
        self.day: str | None = None

    def read(self, line: str) -> None:
        """Raises: Unusable: a column that the source file names is not there, or there twice."""
        begins = line.lower()
        if begins.startswith(DATE):
            self.day = line[len(DATE) :].strip()[:10]
        if not begins.startswith(FIELDS):
            return
        names = line[len(FIELDS) :].split()
        for ours, theirs in self.fmt.mapped.items():
            if theirs not in names and not (theirs == "date" and self.day):
                raise Unusable(missing_column(self.facts.file, ours, theirs, names))
            if names.count(theirs) > 1:
                raise Unusable(
                    f"{self.facts.file}: #Fields has the column {theirs!r} twice: rename one of them"
                )
        facts, changed = self.facts, self.names is not None and names != self.names
        self.names = names
        for name in names:
            facts.columns.setdefault(name, "text")
        if changed:
            facts.columns[CHANGED] = "text"
        facts.header = None if CHANGED in facts.columns else names


def read_w3c(
    fmt: Format,
    stream: BinaryIO,
    facts: FileFacts,
    waits: Callable[[], bool] | None = None,
) -> Iterator[pa.RecordBatch]:
    """The records of one extended log.

    Args:
        waits: as in `byte_streams.whole_lines`.

    Raises:
        Unusable: there is no line of `#Fields` before the first record, or it lacks a column.
    """
    batches, head, number = Batches(fmt, facts.file, facts), _Head(fmt, facts), 0
    for lines in byte_streams.text_lines(stream, fmt.encoding, fmt.longest_record, waits):
        for line in lines:
            number += 1
            if line.startswith("#"):
                head.read(line)
                continue
            if not line.strip():
                continue
            if head.names is None:
                raise Unusable(
                    f"{facts.file} has no line of #Fields before its first record, so its columns "
                    f"have no names: {printable(line)[:120]!r}. Have it delivered again with it, or "
                    "set source.format = 'csv' with header = false"
                )
            facts.lines += 1
            broken = len(line) > fmt.longest_record or has_broken_bytes(line)
            values = None if broken else w3c_values(fmt, head.names, line, head.day)
            batches.add(number, printable(line), values)
            if batches.full:
                yield batches.drain()
        if len(batches):
            yield batches.drain()
