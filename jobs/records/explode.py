"""One line, many records: the elements of a list that is a column of the log.

A list is a text (a JSON array, or elements with a separator between them) or, in Parquet, a list. A
field of the elements is a column by its name, or as `<list>.<field>`; a name that the line has, too,
must be written so, or as `_line.<name>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.records import paths
from jobs.records.expressions import FIELD, OF_LINE
from jobs.records.records import Batches, FileFacts, Format, Unusable, cut_text

RAW_CHARS = 32 * 1024 * 1024
"""Characters: a line is beside each of its elements, so a batch has at most about so many of
them, and a line with many elements keeps its beginning only."""


def ambiguous(file: str, theirs: str, column: str) -> Unusable:
    return Unusable(
        f"{file}: both the line and the elements of source.explode = {column!r} have a column "
        f"{theirs!r}: write {column + '.' + theirs!r} for the elements' and {OF_LINE + theirs!r} for "
        "the line's"
    )


class Exploding:
    """The records of one text file, its lists exploded."""

    def __init__(self, fmt: Format, facts: FileFacts) -> None:
        assert fmt.computing is not None and fmt.computing.explode is not None
        self.fmt, self.facts, self.explode = fmt, facts, fmt.computing.explode
        self.batches = Batches(fmt, facts.file, facts)
        self.pattern = re.compile(self.explode.pattern) if self.explode.pattern else None

    def __call__(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        texts = batch.column(f"{FIELD}{self.explode.column}").to_pylist()
        rows = Rows({name: [] for name in self.fmt.names.elements})
        for at, (kind, text) in enumerate(zip(batch["kind"].to_pylist(), texts, strict=True)):
            if kind != "unparsable":
                self.add(rows, at, text)
            else:
                rows.add(at, None, None)
        self.facts.lines += len(rows.parents) - batch.num_rows
        yield from self.made(batch, rows)

    def add(self, rows: Rows, at: int, text: str | None) -> None:
        """The elements of one line."""
        elements = self.elements(text)
        if elements is None:
            rows.add(at, None, None)
            return
        before = len(rows.parents)
        for place, element in enumerate(elements, 1):
            if element is not None:
                rows.add(at, place, self.values(element))
        if len(rows.parents) == before:
            self.facts.empty_lines += 1
            if self.fmt.empty_lines:
                rows.add(at, None, {})

    def elements(self, text: str | None) -> list[Any] | None:
        """The elements of a text, in order; None: it is no list."""
        if text is None or not text.strip():
            return []
        if self.explode.separator is not None:
            return [one or None for one in text.strip().split(self.explode.separator)]
        try:
            found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, list) else None

    def values(self, element: Any) -> dict[str, Any] | None:
        """The columns of one element, those that it has; None: it is none."""
        if self.pattern is not None:
            found = self.pattern.fullmatch(element)
            if found is None:
                return None
            element = {"": element} | found.groupdict()
        elif not isinstance(element, dict):
            element = {"": element}
        values: dict[str, Any] = {}
        try:
            for name, path in self.fmt.names.elements.items():
                if not (path in element or (path and paths.is_there(element, path))):
                    continue
                value = paths.reach(element, path) if path else element[""]
                if name == "exposed_with" and isinstance(value, list):
                    values[name] = [paths.scalar_text(one) for one in value]
                else:
                    values[name] = (
                        paths.any_text(value) if ":" in name else paths.scalar_text(value)
                    )
                if self.fmt.format == "jsonl":
                    self.facts.columns.setdefault(self.said(name, path), "json")
        except ValueError:
            return None
        texts = (
            one if isinstance(one, str) else "".join(map(str, one or ())) for one in values.values()
        )
        return values if all(len(one) <= self.fmt.longest_text for one in texts) else None

    def said(self, name: str, path: str) -> str:
        """A column of elements as the source file says it."""
        if name in self.fmt.names.either or path in self.explode.groups:
            return path
        return f"{self.explode.column}.{path}" if path else self.explode.column

    def made(self, batch: pa.RecordBatch, rows: Rows) -> Iterator[pa.RecordBatch]:
        parents = np.array(rows.parents, np.int64)
        raws, sizes = cut_raws(
            self.fmt, batch["raw"], np.bincount(parents, minlength=batch.num_rows)
        )
        batch = batch.set_column(batch.schema.get_field_index("raw"), "raw", raws)
        for first, end in pieces(sizes[parents]):
            part = batch.take(pa.array(parents[first:end]))
            yield self.put(part, rows, first, end)

    def put(self, part: pa.RecordBatch, rows: Rows, first: int, end: int) -> pa.RecordBatch:
        """Some of the lines, each beside one element, with the element's columns."""
        columns = dict(zip(part.schema.names, part.columns, strict=True))
        bad = pa.array(rows.bad[first:end])
        columns["kind"] = pc.if_else(bad, "unparsable", columns["kind"])
        columns["element"] = pa.array(rows.places[first:end], pa.int64())
        for name in self.fmt.names.positions:
            columns[name] = columns["element"].cast(pa.string())
        for name in self.fmt.names.elements:
            values = rows.values[name][first:end]
            there = [one is not MISSING for one in values]
            values = [None if one is MISSING else one for one in values]
            if name == "exposed_with":
                listed = [self.batches.list_of(one) for one in values]
                made = pa.array(listed, pa.list_(pa.string()))
            else:
                made = self.batches.without_nulls(name, pa.array(values, pa.string()))
            if name in self.fmt.names.either:
                has = pa.array(there)
                if pc.any(pc.and_(has, columns[name].is_valid())).as_py():
                    theirs = self.fmt.names.elements[name]
                    raise ambiguous(self.facts.file, theirs, self.explode.column)
                made = pc.if_else(has, made, columns[name])
            columns[name] = made
        return pa.RecordBatch.from_arrays(
            [columns[one.name] for one in part.schema], schema=part.schema
        )


MISSING = object()
"""What an element does not have, not even as null."""


@dataclass
class Rows:
    """The elements of a batch of lines."""

    values: dict[str, list[Any]]
    parents: list[int] = field(default_factory=list)
    places: list[int | None] = field(default_factory=list)
    bad: list[bool] = field(default_factory=list)
    """Whether it is no element."""

    def add(self, at: int, place: int | None, values: dict[str, Any] | None) -> None:
        self.parents.append(at)
        self.places.append(place)
        self.bad.append(values is None)
        for name, column in self.values.items():
            column.append(MISSING if values is None else values.get(name, MISSING))


def cut_raws(fmt: Format, raws: pa.Array, counts: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Lines as they are beside each of their elements, and their lengths: those with very many
    elements keep their beginning.

    Args:
        counts: how many elements each line has.
    """
    sizes = pc.fill_null(pc.utf8_length(raws), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    much = np.flatnonzero(sizes * counts > RAW_CHARS)
    if not len(much):
        return raws, sizes
    texts = raws.to_pylist()
    for at in much:
        texts[at] = cut_text(texts[at], fmt, max(200, RAW_CHARS // int(counts[at])))
        sizes[at] = len(texts[at])
    return pa.array(texts, pa.string()), sizes


def pieces(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Parts of rows, each of at most about `RAW_CHARS`."""
    if not len(sizes):
        return
    part = (np.cumsum(sizes) - sizes) // RAW_CHARS
    starts = np.flatnonzero(np.append(True, part[1:] != part[:-1]))
    yield from zip(starts.tolist(), [*starts[1:].tolist(), len(sizes)], strict=True)


# -- of Parquet -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetNames:
    """Which column of a Parquet file each name is: name -> path, in the line or in the element."""

    line: dict[str, str]
    elements: dict[str, str]
    positions: tuple[str, ...]
    column: str | None

    @property
    def roots(self) -> list[str]:
        """The columns that must be read."""
        found = [*self.line.values(), *([self.column] if self.column else [])]
        return list(dict.fromkeys(found))


def exploded_rows(
    names: ParquetNames, batch: pa.RecordBatch, facts: FileFacts, empty_lines: bool = False
) -> tuple[dict[str, pa.Array], np.ndarray, pa.Array | None]:
    """Columns by name, the row of each record, and the place of its element.

    Raises:
        Unusable: the column is no list.
    """
    if names.column is None:
        found = {name: paths.column_at(batch, path) for name, path in names.line.items()}
        return found, np.arange(batch.num_rows), None
    lists = paths.column_at(batch, names.column)
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise Unusable(
            f"{facts.file}: source.explode = {names.column!r} is {lists.type}, and must be a list: name "
            "the column that has one"
        )
    elements, parents = paths.elements_of(lists), paths.parents_of(lists)
    starts = np.searchsorted(parents, np.arange(batch.num_rows))
    places = np.arange(len(parents)) - starts[parents] + 1
    valid = np.flatnonzero(elements.is_valid().to_numpy(zero_copy_only=False))
    elements, parents, places = elements.take(pa.array(valid)), parents[valid], places[valid]
    empty = np.setdiff1d(np.arange(batch.num_rows), parents)
    facts.empty_lines += len(empty)
    place = pa.array(places, pa.int64())
    if empty_lines:
        elements = pa.concat_arrays([elements, pa.nulls(len(empty), elements.type)])
        place = pa.concat_arrays([place, pa.nulls(len(empty), place.type)])
        parents = np.concatenate([parents, empty])
    rows = pa.array(parents)
    found = {name: paths.column_at(batch, path).take(rows) for name, path in names.line.items()}
    for name, path in names.elements.items():
        found[name] = paths.column_at(elements, path) if path else elements
    found |= dict.fromkeys(names.positions, place)
    return found, parents, place
