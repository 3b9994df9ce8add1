"""Single elements of the list in a JSON line: where they are in its text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]

from jobs.records.paths import steps

BLANK = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def without_elements(line: str, column: str, places: Collection[int]) -> str:
    """A line of JSON with `null` in place of some elements of a list; all else stays as it is written,
    and the other elements keep their places.

    Args:
        column: the list, as `source.explode` names it; places: from 1.

    Raises:
        ValueError: there is no such list.
    """
    start = _list_at(line, column)
    for place, (first, end) in reversed(list(enumerate(_elements(line, start), 1))):
        if place in places:
            line = f"{line[:first]}null{line[end:]}"
    return line


def _list_at(line: str, column: str) -> int:
    """Where the list begins."""
    at = _blank(line, 0)
    members = dict(_members(line, at))
    if column in members:
        return members[column]
    for name, _ in steps(column):
        found = dict(_members(line, at)).get(
            name
        )  # (of a name that is there twice, the last counts)
        if found is None:
            raise ValueError(f"no column {column!r}")
        at = found
    return at


def _members(text: str, at: int) -> Iterator[tuple[str, int]]:
    """The names of an object, each with the place at which its value begins."""
    if text[at : at + 1] != "{":
        return
    at = _blank(text, at + 1)
    while text[at : at + 1] == '"':
        name, at = scanstring(text, at + 1)
        at = _blank(text, _blank(text, at) + 1)
        yield name, at
        at = _blank(text, DECODER.raw_decode(text, at)[1])
        at = _blank(text, at + 1)


def _elements(text: str, at: int) -> Iterator[tuple[int, int]]:
    """Where each element of a list begins and ends."""
    if text[at : at + 1] != "[":
        raise ValueError("no list")
    at = _blank(text, at + 1)
    while text[at : at + 1] != "]":
        end = DECODER.raw_decode(text, at)[1]
        yield at, end
        at = _blank(text, end)
        if text[at : at + 1] == ",":
            at = _blank(text, at + 1)


def _blank(text: str, at: int) -> int:
    found = BLANK.match(text, at)
    assert found is not None
    return found.end()
