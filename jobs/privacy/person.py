"""A person's id in every spelling that a file may have: plain, JSON, HTML, CSV, SQL."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.core import person_ids

ESCAPED = re.compile(r"""\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))""")


MEANT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def writings(text: str) -> Iterator[str]:
    """A text, and what it may mean: read as JSON's strings (twice: answers quote lines), as HTML, and
    with the doubled quotes of CSV and SQL."""
    yield text
    inner = text
    for _ in range(2):
        if "\\" in inner:
            inner = ESCAPED.sub(_meant, inner)
            inner = inner.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield inner
    if "&" in text:
        yield html.unescape(text)
    for quote in ('"', "'"):
        if quote * 2 in text:
            yield text.replace(quote * 2, quote)


def _meant(found: re.Match[str]) -> str:
    code, sign = found.groups()
    return chr(int(code, 16)) if code else MEANT.get(sign, sign)


@dataclass(frozen=True)
class Person:
    """Who is meant: as the log has it, and as the tables do; and their anonymous ids, as the tables have
    these."""

    said: str
    stored: str
    anonymous: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """All ids by which a column of the tables may name them."""
        of_nobody = (person_ids.ANONYMOUS + one for one in self.anonymous)
        return sorted({self.stored, *self.anonymous, *of_nobody})

    def stands_in(self, text: str) -> bool:
        """Whether a text has one of the ids, not as a part of a longer word; as it is, or as JSON,
        HTML, CSV or SQL write it."""
        return any(self.pattern.search(one) for one in writings(text))

    def taken_out(self, text: str) -> str:
        """A text that has one of the ids, without it."""
        left = self.pattern.sub("(forgotten)", text)
        return "(forgotten)" if self.stands_in(left) else left

    @property
    def pattern(self) -> re.Pattern[str]:
        every = sorted({self.said, self.stored, *self.anonymous})
        names = "|".join(re.escape(one) for one in every)
        return re.compile(rf"(?<![\w-])(?:{names})(?![\w-])")
