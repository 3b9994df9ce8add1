"""How the fields of a CSV are distinguished: delimiter, quotes, escapes, comments."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Dialect:
    """The marks of one source's CSV files; empty ones are not used."""

    delimiter: str = ","
    quote: str = '"'
    escape: str = ""
    comment: str = ""

    @cached_property
    def long(self) -> str | None:
        """A delimiter of several characters. The csv module takes one: a longer one is exchanged
        for a character that no log writes, and back inside quoted fields."""
        return self.delimiter if len(self.delimiter) > 1 else None

    @cached_property
    def char(self) -> str:
        return "\x1f" if self.long else self.delimiter

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """A line without any of these is its fields with delimiters between them."""
        return tuple(dict.fromkeys(mark for mark in (self.quote, self.escape) if mark))

    def is_plain(self, line: str) -> bool:
        return not any(mark in line for mark in self.marks)

    def is_comment(self, line: str) -> bool:
        return bool(self.comment) and line.startswith(self.comment)

    @cached_property
    def _options(self) -> dict[str, Any]:
        # (Where a quote escapes itself, that is what doubling it means anyway.)
        escape = self.escape if self.escape != self.quote else ""
        quoting = csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE
        return {
            "delimiter": self.char,
            "quotechar": self.quote or None,
            "quoting": quoting,
            "escapechar": escape or None,
            "strict": True,
        }

    @cached_property
    def _null(self) -> re.Pattern[str]:
        mark = re.escape(self.char)
        return re.compile(rf"(^|{mark})\\N(?={mark}|[\r\n]|$)")

    def _prepared(self, lines: Iterable[str]) -> Iterable[str]:
        if self.long:
            lines = (line.replace(self.long, self.char) for line in lines)
        if self.escape == "\\":  # `\N` as a whole field is a null, and no N
            lines = (self._null.sub(r"\1\\\\N", line) if "\\N" in line else line for line in lines)
        return lines

    def reader(self, lines: Iterable[str]) -> Any:
        """The csv module's reader of lines; `restored` gives the fields of its rows."""
        return csv.reader(self._prepared(lines), **self._options)

    def restored(self, row: list[str]) -> list[str]:
        if self.long and any(self.char in text for text in row):
            return [text.replace(self.char, self.long) for text in row]
        return row

    def rows(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """Raises: csv.Error: a line is not what the marks allow."""
        return iter(self.reader(lines))
