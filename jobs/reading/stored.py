"""Stored lines (`bronze.rejects`, `bronze.filtered`) as the records that their files would give today."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.core.source_log import LOG_COLUMNS, TYPED
from jobs.reading.csv_reader import CsvRecords
from jobs.reading.readers import json_values
from jobs.reading.typed_rows import parquet_batch, parquet_names, parquet_records
from jobs.reading.w3c_logs import w3c_values
from jobs.reading.web_logs import log_values
from jobs.records import expressions, paths
from jobs.records.evaluate import evaluated
from jobs.records.explode import exploded_rows
from jobs.records.records import (
    RECORD_SCHEMA,
    Batches,
    FileFacts,
    Format,
    Unusable,
)

LINE = "line"
"""Where ids are hashed: the log's columns without those of the user, as JSON."""


@dataclass(frozen=True)
class Stored:
    """A line as a table has it.

    Args:
        columns: its file's columns with their kinds, as the ledger has them.
        header: of a CSV, its columns in order when the line was read; None: those of `columns`.
        element: the place of an element in the line; None: the line has none, or it is not known.
    """

    raw: str
    file: str
    line: int
    columns: dict[str, str]
    header: list[str] | None = None
    element: int | None = None


def record_of(
    fmt: Format, raw: str, file: str, line: int, columns: dict[str, str],
    header: list[str] | None = None, element: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One stored line as the record that its file would give today; see `Stored`. Of a line with
    many elements, where it is not known which is meant, the first."""
    return records_of(fmt, [Stored(raw, file, line, columns, header, element)])[0][0]


def records_of(fmt: Format, lines: list[Stored]) -> list[list[dict[str, Any]]]:
    """The records of each stored line: one, or, where lines are exploded now and were not when the
    line was stored, one an element.

    Raises:
        ValueError: what is stored is no line of such a source.
    """
    if fmt.computing is None:
        return [[_plain(fmt, one)] for one in lines]
    found: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    groups: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for at, one in enumerate(lines):
        groups[one.file, *(one.header or ())].append(at)
    for places in groups.values():
        try:
            rows = list(_computed(fmt, [lines[at] for at in places]))
        except Unusable as error:
            raise ValueError(str(error)) from error
        for row in rows:
            found[places[row["line"]]].append(row)
    return [_wanted(one, found[at]) for at, one in enumerate(lines)]


def _wanted(one: Stored, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a line, or that of its element; a line that has it no more is no record."""
    there = [row for row in rows if one.element in (None, row["element"])]
    # (Where lines are exploded no more, the line itself.)
    there = there or [row for row in rows if row["element"] is None]
    if not there:
        nothing = dict.fromkeys(RECORD_SCHEMA.names)
        there = [nothing | {"kind": "unparsable", "raw": one.raw}]
    return [row | {"file": one.file, "line": one.line} for row in there]


# -- without expressions --------------------------------------------------------------------------


def _plain(fmt: Format, one: Stored) -> dict[str, Any]:
    values: dict[str, Any] | None
    if fmt.privacy is not None and fmt.privacy.hashes:
        stored = json.loads(one.raw or "{}")  # (what was no record is not kept)
        # (A source that computed before has its columns one level deeper.)
        stored = _columns_of(stored, fmt) if LINE in stored else stored
        found = {ours: stored.get(theirs) for ours, theirs in fmt.mapped.items()}
        values = found if stored else None
    elif fmt.format in TYPED:
        stored = json.loads(one.raw)
        values = {ours: stored.get(theirs) for ours, theirs in fmt.mapped.items()}
    else:
        values = _values(fmt, one)
    batch = Batches(fmt, one.file)
    batch.add(one.line, one.raw, values)
    made = {name: column[0] for name, column in batch.columns.items() if column}
    kind = one.columns.get(fmt.mapped["event_ts"], "")
    if fmt.format in TYPED and kind.startswith("timestamp") and "event_ts_2" not in fmt.mapped:
        made["clock"] = "utc" if "tz=" in kind else "local"
        made["event_ts"] = _microseconds(made["event_ts"])
    return {**made, "file": one.file}


def _columns_of(stored: dict[str, Any], fmt: Format) -> dict[str, Any]:
    columns: dict[str, Any] = json.loads(stored[LINE])
    return columns | {fmt.mapped["user_id"]: stored.get("user_id")}


def _values(fmt: Format, one: Stored) -> dict[str, Any] | None:
    """The columns of a stored line of a text format; None: it is none."""
    names = list(one.columns) if one.header is None else one.header
    if fmt.format == "w3c":
        return w3c_values(fmt, names, one.raw)
    if fmt.format != "csv":
        values_of = log_values if fmt.format in LOG_COLUMNS else json_values
        return values_of(fmt, one.raw.strip(), FileFacts(one.file))
    records = CsvRecords(fmt.dialect, len(names))
    found = list(records.feed(one.raw.splitlines(keepends=True), last=True))
    if len(found) != 1 or not found[0][2]:
        return None
    row = found[0][2]
    return {
        ours: row[names.index(theirs)]
        for ours, theirs in fmt.mapped.items()
        if theirs in names or ours not in fmt.names.either
    }


def _microseconds(text: str | None) -> str | None:
    """A stored typed time as its file has it; a text that is no such time stays what it is."""
    try:
        moment = datetime.fromisoformat(text or "").replace(tzinfo=UTC)
    except ValueError:
        return text
    return str((moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1))


# -- with them ------------------------------------------------------------------------------------


def _computed(fmt: Format, lines: list[Stored]) -> Iterator[dict[str, Any]]:
    """The records of lines of one file; `line` is the place of the line among these."""
    facts = FileFacts(lines[0].file)
    if fmt.privacy is not None and fmt.privacy.hashes:
        yield from _hashed(fmt, lines, facts)
    elif fmt.has_types:
        yield from _rows(evaluated(fmt, _parquet(fmt, lines, facts), facts))
    else:
        batch = Batches(fmt, facts.file, facts)
        for at, one in enumerate(lines):
            batch.add(at, one.raw, _values(fmt, one))
        yield from _rows(evaluated(fmt, [batch.drain()], facts))


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    return (row for batch in batches for row in batch.to_pylist())


def _parquet(fmt: Format, lines: list[Stored], facts: FileFacts) -> Iterator[pa.RecordBatch]:
    """Rows of a Parquet file, from their JSON and the types of the file's columns."""
    schema = pa.schema([(name, arrow_type(kind)) for name, kind in lines[0].columns.items()])
    names = parquet_names(fmt, schema, facts.file)
    read = {path for path in schema.names if any(_begins(one, path) for one in names.roots)}
    schema = pa.schema([one for one in schema if one.name in read])
    rows = from_json([one.raw for one in lines], schema)
    for at, batch in enumerate(rows):
        for made, _ in parquet_records(fmt, names, batch, at, facts):
            yield made


def _begins(path: str, name: str) -> bool:
    return path == name or path.startswith((f"{name}.", f"{name}["))


def from_json(texts: list[str], schema: pa.Schema) -> list[pa.RecordBatch]:
    """Each JSON object as a batch of one row, in the types of a schema."""
    con = expressions.shared()
    con.register("kinds", schema.empty_table())
    kinds = {row[0]: row[1] for row in con.execute("DESCRIBE kinds").fetchall()}
    con.unregister("kinds")
    shape = json.dumps(kinds)
    con.register("log", pa.table({"raw": pa.array(texts, pa.string())}))
    try:
        asked = "SELECT unnest(from_json(raw, ?)) FROM log"
        found = con.sql(asked, params=[shape]).to_arrow_table()
    finally:
        con.unregister("log")
    if len(texts) != found.num_rows:
        raise ValueError("what is stored is no row of a Parquet file")
    rows = found.cast(schema).combine_chunks()
    return [rows.slice(at, 1).combine_chunks().to_batches()[0] for at in range(len(texts))]


def _hashed(fmt: Format, lines: list[Stored], facts: FileFacts) -> Iterator[dict[str, Any]]:
    """Lines of which the log's columns are kept, but not the user's: `{"user_id": …, "line": …}`.
    What is computed of the user's columns, beside the user, is lost, and null."""
    assert fmt.computing is not None
    stored = [json.loads(one.raw or "{}") for one in lines]
    texts = [one.get(LINE) or "{}" for one in stored]
    if fmt.has_types:
        batches = _typed(fmt, texts, lines[0].columns, facts)
    else:
        batch = Batches(fmt, facts.file, facts)
        for at, text in enumerate(texts):
            row = json.loads(text, parse_int=str, parse_float=str)
            values = {name: _value(name, row.get(theirs)) for name, theirs in fmt.wanted.items()}
            batch.add(at, lines[at].raw, values if row else None)
        batches = [batch.drain()]
    flat = replace(fmt, computing=replace(fmt.computing, explode=None))
    for row in _rows(evaluated(flat, batches, facts)):
        at = row["line"]
        kind = "unparsable" if texts[at] == "{}" else row["kind"]
        mine = {"user_id": stored[at].get("user_id"), "kind": kind, "element": lines[at].element}
        yield row | mine


def _value(name: str, value: Any) -> Any:
    if name == "exposed_with" and isinstance(value, list):
        return [paths.scalar_text(one) for one in value]
    return paths.any_text(value)


def _typed(
    fmt: Format, texts: list[str], columns: dict[str, str], facts: FileFacts
) -> list[pa.RecordBatch]:
    """Columns of lines of a Parquet file by their names in the source file, in the file's types."""
    schema = pa.schema([(name, arrow_type(kind)) for name, kind in columns.items()])
    names = parquet_names(fmt, schema, facts.file)
    empty = pa.RecordBatch.from_pylist([], schema=schema)
    kinds = {name: one.type for name, one in exploded_rows(names, empty, facts)[0].items()}
    said = {fmt.wanted[name]: kind for name, kind in kinds.items()}
    made = []
    for at, batch in enumerate(from_json(texts, pa.schema(list(said.items())))):
        found = {name: batch.column(fmt.wanted[name]) for name in kinds}
        made.append(parquet_batch(fmt, found, np.array([at]), None, None, facts))
    return made


KINDS = {
    "float": pa.float32(), "double": pa.float64(), "halffloat": pa.float16(),
    "bool": pa.bool_(), "null": pa.null(), "date32[day]": pa.date32(), "date64[ms]": pa.date64(),
}  # fmt: skip


def arrow_type(text: str) -> pa.DataType:
    """The type that Arrow writes so.

    Raises:
        ValueError: none that a stored line is read by.
    """
    name, _, inner = text.partition("<")
    inner = inner.removesuffix(">")
    if name in ("list", "large_list"):
        return pa.list_(arrow_type(inner.removesuffix(" not null").partition(": ")[2]))
    if name == "struct":
        return pa.struct(
            [(one.partition(": ")[0], arrow_type(one.partition(": ")[2])) for one in _parts(inner)]
        )
    if name == "map":
        key, value = [one.partition(" ('")[0] for one in _parts(inner)][:2]
        return pa.map_(arrow_type(key), arrow_type(value))
    if name == "dictionary":
        return arrow_type(re.sub(r"^values=|, indices=.*$", "", inner))
    if found := re.fullmatch(r"timestamp\[(\w+)(?:, tz=(.+))?\]", text):
        return pa.timestamp(found[1], found[2])
    if found := re.fullmatch(r"decimal\d+\((\d+), (-?\d+)\)", text):
        return pa.decimal128(int(found[1]), int(found[2]))
    return KINDS.get(text.removesuffix(" not null")) or pa.type_for_alias(
        text.removesuffix(" not null")
    )


def _parts(text: str) -> Iterator[str]:
    """The parts of a type's inside, by its outer commas."""
    depth, start = 0, 0
    for at, sign in enumerate(text):
        depth += (sign in "<([") - (sign in ">)]")
        if sign == "," and not depth:
            yield text[start:at].strip()
            start = at + 1
    if text[start:].strip():
        yield text[start:].strip()
