"""One large file of text read by many tasks: ranges of bytes that begin and end with lines.

A range is read as if it were a file whose first record begins with it. That holds if the range
before it ended with a whole record, which is known once it was read: a record that goes on (between
quotes) makes the file be read whole. Numbers of lines come from a count of line ends before.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, BinaryIO

from jobs.lake.filesystem import open_seekable
from jobs.records.byte_streams import is_utf8
from jobs.records.compression import PEEKED, codec_of
from jobs.records.records import FileFacts, Format

RANGE_BYTES = 128 * 1024 * 1024
"""A file is cut into ranges of at least so many bytes."""
CHUNK = 1 << 22
FORMATS = ("csv", "jsonl")
SUM = ("lines", "too_long", "forgotten", "waiting", "swallowed", "empty_lines", "unjudged")
FIRST = ("first_too_long", "first_swallowed", "first_unjudged")


@dataclass(frozen=True)
class Range:
    """Some bytes of a file; `WHOLE` of them: the file."""

    path: str
    begin: int = 0
    end: int = -1
    """-1: to the end of the file, whatever it is."""
    line: int = 0
    """How many physical lines are before."""
    last: bool = True

    @property
    def whole(self) -> bool:
        return self.begin == 0 and self.end == -1


DDL = "path string, begin long, end long, line long, last boolean"
MEASURED = "path string, begin bigint, end bigint, lines bigint, fit boolean"


def asked(fmt: Format, path: str, size: int) -> list[str]:
    """The ranges of a file that are to be measured, as texts for `measure`; none: it is read whole."""
    count = size // RANGE_BYTES
    if count < 2 or fmt.format not in FORMATS or not is_utf8(fmt.encoding):
        return []
    edges = [size * at // count for at in range(count + 1)]
    return [f"{a} {b} {path}" for a, b in itertools.pairwise(edges)]


def measure(text: str) -> list[dict[str, Any]]:
    """A task: where a range begins and ends when lines are left whole, and how many it has.

    `fit` is false where lines end otherwise than with newlines, or the file is compressed.
    """
    begin_text, end_text, path = text.split(" ", 2)
    with open_seekable(path) as stream:
        codec = codec_of(path, stream.read(PEEKED))
        begin = _line_start(stream, int(begin_text))
        end = _line_start(stream, int(end_text))
        stream.seek(begin)
        lines, returned, pairs, left, before = 0, 0, 0, end - begin, b""
        while left > 0 and (data := stream.read(min(CHUNK, left))):
            left -= len(data)
            lines += data.count(b"\n")
            returned += data.count(b"\r")
            pairs += data.count(b"\r\n") + (before == b"\r" and data[:1] == b"\n")
            before = data[-1:]
    fit = codec is None and returned == pairs
    return [{"path": path, "begin": begin, "end": end, "lines": lines, "fit": fit}]


def _line_start(stream: BinaryIO, at: int) -> int:
    """Where the first line begins that begins at `at` or after; the end of the file: none does."""
    if at == 0:
        return 0
    stream.seek(at - 1)
    place = at - 1
    while data := stream.read(CHUNK):
        found = data.find(b"\n")
        if found >= 0:
            return place + found + 1
        place += len(data)
    return place


def ranges(measured: Iterable[dict[str, Any]]) -> list[Range]:
    """The ranges of files, with the lines before them; a file that cannot be cut is whole."""
    by_path: dict[str, list[dict[str, Any]]] = {}
    for one in measured:
        by_path.setdefault(one["path"], []).append(one)
    found = []
    for path, parts in by_path.items():
        parts = sorted(parts, key=lambda one: one["begin"])
        if not all(one["fit"] for one in parts):
            found.append(Range(path))
            continue
        parts = [one for one in parts if one["end"] > one["begin"]]
        line = 0
        for at, one in enumerate(parts):
            last = at == len(parts) - 1
            found.append(Range(path, one["begin"], -1 if last else one["end"], line, last))
            line += one["lines"]
    return found


class Limited(io.RawIOBase):
    """Some bytes of a file as a stream."""

    def __init__(self, stream: BinaryIO, begin: int, end: int) -> None:
        self.stream, self.left = stream, None if end < 0 else end - begin
        stream.seek(begin)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(buffer) if self.left is None else min(len(buffer), self.left)
        data = self.stream.read(size) if size else b""
        buffer[: len(data)] = data
        if self.left is not None:
            self.left -= len(data)
        return len(data)


def hash_of(path: str) -> list[dict[str, Any]]:
    """A task: the content hash of a file that was read by ranges."""
    digest, size = hashlib.sha256(), 0
    with open_seekable(path) as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
            size += len(data)
    return [{"path": path, "sha256": digest.hexdigest(), "size": size}]


HASHED = "path string, sha256 string, size bigint"


def together(parts: list[FileFacts]) -> FileFacts:
    """The facts of a file from those of its ranges, in their order."""
    whole = FileFacts.of(vars(parts[0]))
    for one in parts[1:]:
        for name in SUM:
            setattr(whole, name, getattr(whole, name) + getattr(one, name))
        for name in FIRST:
            if getattr(whole, name) is None:
                setattr(whole, name, getattr(one, name))
        whole.columns = whole.columns | one.columns
        whole.point_zero = sorted({*whole.point_zero, *one.point_zero})
        whole.error = whole.error or one.error
        whole.unfinished = whole.unfinished or one.unfinished
        for unit, count in one.units.items():
            whole.units[unit] = whole.units.get(unit, 0) + count
            whole.first_of.setdefault(unit, one.first_of[unit])
            whole.time_of.setdefault(unit, one.time_of[unit])
    known = {*SUM, *FIRST, "file", "columns", "point_zero", "error", "unfinished", "units",
             "first_of", "time_of", "size", "sha256", "header", "begin", "bytes", "modified_ms"}  # fmt: skip
    assert {one.name for one in fields(FileFacts)} == known, "a fact of ranges has no rule"
    return whole
