"""JSON lines many at a time, by DuckDB, where each line says what it says in the plainest way.

`readers.json_values` is the rule for every line. What is plain here gives the same texts: an object
whose mapped columns are texts, whole numbers, booleans or null, without repeated names. Other
lines (numbers with a point in a column of ids, nested values, faults) are left to the rule.
`tests/jobs/reading/test_json_blocks.py` compares the one with the other.
"""

from __future__ import annotations

from functools import cached_property

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.records.byte_streams import Block, is_utf8
from jobs.records.records import RECORD_SCHEMA, Batches, FileFacts, Format

PLAIN = ("VARCHAR", "UBIGINT", "BIGINT", "BOOLEAN")
ODD = r",\s*[\]}]|-0\s*[,}\]]"
"""A comma before an end, which JSON forbids; a zero with a sign, which DuckDB writes without."""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _path(*steps: str) -> str:
    """A JSON path of DuckDB."""
    return "$" + "".join('."' + step.replace('"', '\\"') + '"' for step in steps)


class JsonBlocks:
    """Reads the plain lines of a JSON lines file, block by block."""

    def __init__(self, fmt: Format, facts: FileFacts, batches: Batches) -> None:
        self.fmt, self.facts, self.batches = fmt, facts, batches
        self.db = duckdb.connect(config={"threads": 1})

    @staticmethod
    def can(fmt: Format) -> bool:
        """Whether lines of this source can be plain."""
        odd = any(set(name) & set('"\\*[]') for name in fmt.mapped.values())
        return is_utf8(fmt.encoding) and not odd and fmt.computing is None

    @cached_property
    def query(self) -> str:
        """DuckDB's SQL: the lines `l` -> a list of texts in the order of `mapped`, the kinds of the
        object and of these values as one text, the names of the object's columns (and of each
        object on the way to a mapped column) as lists and as texts, and whether a line may have
        what JSON forbids and DuckDB does not, or a number that it writes otherwise."""
        paths = [_quoted(_path(*name.split("."))) for name in self.fmt.mapped.values()]
        names = ", ".join(
            f"json_keys(j, {_quoted(_path(*steps))}) AS names_{at}, "
            f"CAST(names_{at} AS VARCHAR) AS shown_{at}"
            for at, steps in enumerate(self.objects)
        )
        return (
            f"SELECT json_extract_string(j, [{', '.join(paths)}]) AS texts, "
            f"CAST(json_type(j, ['$', {', '.join(paths)}]) AS VARCHAR) AS kinds, {names}, "
            f"regexp_matches(l, '{ODD}') OR contains(l, '\\u0000') AS odd "
            f"FROM (SELECT CASE WHEN json_valid(l) THEN l END AS j, l FROM block)"
        )

    @cached_property
    def objects(self) -> list[tuple[str, ...]]:
        """The steps to the objects whose names matter: the line's own, and those on a way."""
        ways = [name.split(".") for name in self.fmt.mapped.values()]
        inner = {tuple(way[:depth]) for way in ways for depth in range(1, len(way))}
        return [(), *sorted(inner)]

    def read(self, first: int, block: Block) -> tuple[pa.RecordBatch, np.ndarray, pa.Array] | None:
        """The records of plain lines; the places (int64) of the others, and all lines with their
        ends. None: the block must be read line by line.

        Args:
            first: the number of the block's first line.
        """
        if not block.plain:
            return None
        lines = block.raw()
        if pc.max(pc.binary_length(lines)).as_py() > self.fmt.longest_text:
            return None
        raw = pc.utf8_rtrim(lines, "\r\n")
        self.db.register("block", pa.table({"l": raw}))
        made = self.db.sql(self.query).to_arrow_table().combine_chunks()
        self.db.unregister("block")
        plain = ~made["odd"].to_numpy() & self.of_kinds(made["kinds"].combine_chunks())
        for number in range(len(self.objects)):
            names, shown = (made[f"{one}_{number}"].combine_chunks() for one in ("names", "shown"))
            plain &= self.of_names(names, shown, outer=number == 0)
        at, mask = np.flatnonzero(plain), pa.array(plain)
        texts = made["texts"].combine_chunks()
        if len(at) < len(raw):
            raw, texts = raw.filter(mask), texts.filter(mask)
        return self.records(texts, raw, first + at), np.flatnonzero(~plain), lines

    def of_kinds(self, shown: pa.Array) -> np.ndarray:
        """bool[N]: whether the values of a line are of kinds that are plain."""
        kinds = shown.dictionary_encode()
        good = []
        for text in kinds.dictionary.to_pylist():
            whole, *values = text[1:-1].split(", ")
            good.append(
                whole == "OBJECT"
                and all(
                    kind == "NULL"
                    or (ours != "exposed_with" and kind in PLAIN)
                    or (ours == "value" and kind == "DOUBLE")
                    for ours, kind in zip(self.fmt.mapped, values, strict=True)
                )
            )
        return _by_code(good, kinds.indices)

    def of_names(self, names: pa.ListArray, shown: pa.Array, outer: bool) -> np.ndarray:
        """bool[N]: whether an object has each name once, and none that is also a path of ours."""
        known = shown.dictionary_encode()
        codes = pc.fill_null(known.indices, -1).to_numpy(zero_copy_only=False)
        good = [True] * len(known.dictionary)
        paths = {name for name in self.fmt.mapped.values() if "." in name}
        for code, place in zip(*np.unique(codes, return_index=True), strict=True):
            if code < 0:
                continue
            found = names[int(place)].as_py()
            good[code] = len(found) == len(set(found)) and not (outer and paths & set(found))
            if outer and good[code]:
                self.note(found)
        return _by_code(good, known.indices, null=not outer)

    def note(self, names: list[str]) -> None:
        """Take note of the columns that a line has, as `readers.json_values` does."""
        for name in self.fmt.mapped.values():
            if name in names:
                self.facts.columns.setdefault(name, "json")
        for name in names:
            self.facts.columns.setdefault(name, "json")

    def records(self, texts: pa.ListArray, raw: pa.Array, numbers: np.ndarray) -> pa.RecordBatch:
        count, width = len(raw), len(self.fmt.mapped)
        flat = texts.flatten()
        made: dict[str, pa.Array] = {
            "kind": pa.repeat("record", count),
            "raw": raw,
            "line": pa.array(numbers),
            "file": pa.repeat(self.facts.file, count),
        }
        for at, (ours, theirs) in enumerate(self.fmt.mapped.items()):
            if ours == "exposed_with":
                continue
            column = flat.take(pa.array(np.arange(at, count * width, width)))
            if "." in theirs and column.null_count < count:
                self.facts.columns.setdefault(theirs, "json")
            made[ours] = self.batches.without_nulls(ours, column)
        return pa.RecordBatch.from_arrays(
            [made.get(one.name, pa.nulls(count, one.type)) for one in RECORD_SCHEMA],
            schema=RECORD_SCHEMA,
        )


def _by_code(good: list[bool], codes: pa.Array, null: bool = False) -> np.ndarray:
    """bool[N]: what is said of each code; `null`: of none."""
    places = pc.fill_null(codes, len(good)).to_numpy(zero_copy_only=False)
    return np.asarray(np.array([*good, null], bool)[places])
