"""JSON over many lines: objects in arrays, or one after another."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from jobs.records import byte_streams
from jobs.records.byte_streams import has_broken_bytes, printable
from jobs.records.records import Batches, FileFacts, Format

BETWEEN = re.compile(r"[\s,\[\]\ufeff\x1e]*")
"""What may be between objects: an array has no meaning of its own here."""
MARK = re.compile(r'["\\{}\[\]]')
IN_STRING = re.compile(r'["\\]')
OTHER = re.compile(r'[^\s,\[\]{}"]+|"(?:[^"\\]|\\.)*"|.', re.DOTALL)
"""What is where an object is expected."""

Values = Callable[[Format, dict[str, Any], FileFacts], dict[str, Any] | None]


class Span:
    """Looks for the end of an object, in a text that comes in parts."""

    def __init__(self) -> None:
        self.depth, self.in_string, self.escaped = 0, False, False

    def end(self, text: str, at: int) -> int | None:
        """Where the object ends; None: not in this text."""
        if self.escaped and at < len(text):
            at, self.escaped = at + 1, False
        while found := (IN_STRING if self.in_string else MARK).search(text, at):
            at, mark = found.end(), found[0]
            if mark == "\\" and self.in_string:
                if at == len(text):
                    self.escaped = True
                at += 1
            elif mark == '"':
                self.in_string = not self.in_string
            elif mark in "{[":
                self.depth += 1
            elif mark in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return at
        return None


class Objects:
    """The objects of a text, one by one.

    A part that is no JSON costs itself only: what follows is found by its brackets.
    """

    def __init__(self, text: io.TextIOBase, longest: int) -> None:
        self.text, self.longest = text, longest
        self.decoder = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False
        self.open: str | None = None
        """The last object of a text that ends inside it."""

    def more(self) -> bool:
        """Read on; whether there was more."""
        part = self.text.read(byte_streams.BLOCK_BYTES)
        self.buffer, self.at = self.buffer[self.at :] + part, 0
        self.ended = not part
        return bool(part)

    def skip(self, end: int) -> None:
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end

    def __iter__(self) -> Iterator[tuple[int, str, Any]]:
        """Yield (first line, text, value) of each object; the value is None where it is none."""
        while True:
            found = BETWEEN.match(self.buffer, self.at)
            assert found is not None
            self.skip(found.end())
            if self.at == len(self.buffer):
                if not self.more():
                    return
                continue
            line = self.line
            if self.buffer[self.at] != "{":
                yield line, self._other(), None
                continue
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
                raw = self.buffer[self.at : end]
                self.skip(end)
            except (ValueError, RecursionError):
                raw, value = self._cut_or_damaged()
                if self.open is not None:
                    return
            yield line, raw, value if len(raw) <= self.longest else None

    def _other(self) -> str:
        """A word or a text in place of an object."""
        found = OTHER.match(self.buffer, self.at)
        assert found is not None
        while found.end() == len(self.buffer) or found[0] == '"':  # it may go on
            if len(self.buffer) - self.at > self.longest or not self.more():
                break
            found = OTHER.match(self.buffer, self.at)
            assert found is not None
        self.skip(found.end())
        return found[0]

    def _cut_or_damaged(self) -> tuple[str, Any]:
        """The object that begins here and could not be decoded: its text, put together where blocks
        have cut it, and its value; None: it is damaged, or too long to know."""
        span, scanned = Span(), self.at
        while (end := span.end(self.buffer, scanned)) is None:
            known = self.buffer[self.at :]
            if len(known) > self.longest:
                return self._too_long(span, known[: self.longest + 1]), None
            if not self.more():
                self.open = known
                return known, None
            scanned = len(known)
        raw = self.buffer[self.at : end]
        self.skip(end)
        try:
            return raw, self.decoder.decode(raw)
        except (ValueError, RecursionError):
            return raw, None

    def _too_long(self, span: Span, head: str) -> str:
        """Skip the rest of an object; `head` is all of it that is ever in memory."""
        while True:
            self.skip(len(self.buffer))
            if not self.more():
                return head
            end = span.end(self.buffer, 0)
            if end is not None:
                self.skip(end)
                return head


def read_json(
    fmt: Format,
    stream: BinaryIO,
    facts: FileFacts,
    values_of: Values,
    waits: Callable[[], bool] | None = None,
) -> Iterator[pa.RecordBatch]:
    """The objects of one file as records; `line` is the one on which an object begins.

    Args:
        values_of: the mapped columns of an object.
        waits: as in `byte_streams.whole_lines`: whether an object without an end is left for a later
            reading.
    """
    batches = Batches(fmt, facts.file, facts)
    objects = Objects(byte_streams.text_of(stream, fmt.encoding), fmt.longest_record)
    for line, raw, value in objects:
        facts.lines += 1
        good = isinstance(value, dict) and not has_broken_bytes(raw)
        batches.add(line, printable(raw), values_of(fmt, value, facts) if good else None)
        if batches.full:
            yield batches.drain()
    if objects.open is not None and not (waits is not None and waits()):
        facts.lines += 1
        batches.add(objects.line, printable(objects.open), None)
    if len(batches):
        yield batches.drain()
