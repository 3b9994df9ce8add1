"""Rows of files whose columns have types, where something is computed of them: expressions, filters,
and lists whose elements are lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.source_events import field_of
from jobs.reading import typed_columns
from jobs.reading.typed_texts import clock_of, is_list, shown, without_long_texts
from jobs.records import paths
from jobs.records.evaluate import json_rows, without_user
from jobs.records.explode import ParquetNames, ambiguous, cut_raws, exploded_rows, pieces
from jobs.records.expressions import FIELD
from jobs.records.records import (
    RECORD_SCHEMA,
    Batches,
    FileFacts,
    Format,
    Unusable,
    cut_texts,
    missing_column,
)


def columns_read(fmt: Format, schema: pa.Schema, file: str) -> tuple[ParquetNames, list[str]]:
    """What is read of a file: our names, and the file's columns.

    Raises:
        Unusable: a column is not there.
    """
    names = parquet_names(fmt, schema, file)
    read = {paths.root_of(schema, one) for one in names.roots}
    return names, [name for name in schema.names if name in read]


def read_rows(
    fmt: Format, names: ParquetNames, batches: Iterable[pa.RecordBatch], facts: FileFacts
) -> Iterator[pa.RecordBatch]:
    """Records of the rows of a file."""
    line = 1
    for batch in batches:
        for made, count in parquet_records(fmt, names, batch, line, facts):
            facts.lines += count
            yield made
        line += batch.num_rows


def _text(array: pa.Array, ours: str, theirs: str, file: str) -> pa.Array:
    kind = typed_columns.kind_of(array.type)
    if pa.types.is_floating(kind) and ours not in typed_columns.NO_IDS:
        plain = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
        if not typed_columns.whole_numbers(plain):
            raise Unusable(
                f"{file}: column {theirs!r} is {kind}, and {field_of(ours)} is an id: ids never "
                "pass through floating point. Write the column as integers or text"
            )
    return typed_columns.text_of(array, ours, theirs, file)


def parquet_names(fmt: Format, schema: pa.Schema, file: str) -> ParquetNames:
    """Which column of the file each of the wanted ones is.

    Raises:
        Unusable: one is not there, or is both the line's and the elements'.
    """
    explode = fmt.computing.explode if fmt.computing else None
    if explode is None:
        for ours, theirs in fmt.mapped.items():
            if not paths.has_path(schema, theirs):
                raise Unusable(missing_column(file, ours, theirs, schema.names))
        return ParquetNames(dict(fmt.mapped), {}, (), None)
    if not paths.has_path(schema, explode.column):
        raise Unusable(missing_column(file, FIELD, explode.column, schema.names))
    lists = paths.column_at(pa.RecordBatch.from_pylist([], schema=schema), explode.column).type
    inner = (
        lists.value_type if pa.types.is_nested(lists) and not pa.types.is_struct(lists) else None
    )
    line, elements = {}, {}
    for name, theirs in fmt.wanted.items():
        path = fmt.names.elements.get(name)
        of_element = path == "" or (
            path is not None
            and inner is not None
            and pa.types.is_struct(inner)
            and paths.has_path(inner, path)
        )
        of_line = name in fmt.names.line and paths.has_path(schema, fmt.names.line[name])
        if of_element and of_line:
            raise ambiguous(file, theirs, explode.column)
        if of_element and path is not None:
            elements[name] = path
        elif of_line:
            line[name] = fmt.names.line[name]
        elif name not in fmt.names.positions:
            raise Unusable(missing_column(file, name, theirs, schema.names))
    return ParquetNames(line, elements, fmt.names.positions, explode.column)


def parquet_records(
    fmt: Format, names: ParquetNames, batch: pa.RecordBatch, line: int, facts: FileFacts
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Records of the rows of a batch, and how many they are.

    Args:
        line: the first row's.
    """
    raws = None
    if fmt.computing is not None:
        raws = cut_texts(json_rows(pa.Table.from_batches([batch])), fmt)
    found, parents, places = exploded_rows(names, batch, facts, fmt.empty_lines)
    if raws is None:
        yield parquet_batch(fmt, found, parents + line, places, None, facts), len(parents)
        return
    raws, sizes = cut_raws(fmt, raws, np.bincount(parents, minlength=batch.num_rows))
    for first, end in pieces(sizes[parents]):
        part = {name: one.slice(first, end - first) for name, one in found.items()}
        rows = parents[first:end]
        place = None if places is None else places.slice(first, end - first)
        raw = raws.take(pa.array(rows))
        yield parquet_batch(fmt, part, rows + line, place, raw, facts), end - first


def plain_texts(array: pa.Array) -> pa.Array:
    """A column for expressions: texts as texts, whichever way the file's writer chose; a column
    without any value may be one."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    texts = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return array.cast(pa.string()) if any(one(kind) for one in texts) else array


def parquet_batch(
    fmt: Format, found: dict[str, pa.Array], lines: np.ndarray, places: pa.Array | None,
    raw: pa.Array | None, facts: FileFacts,
) -> pa.RecordBatch:  # fmt: skip
    """Columns of a Parquet file by name -> records, and beside them the inputs as they are typed."""
    batches, count = Batches(fmt, facts.file), len(lines)
    wanted = fmt.wanted or fmt.mapped
    made: dict[str, pa.Array] = {}
    for ours, array in found.items():
        if ours not in RECORD_SCHEMA.names:
            made[ours] = plain_texts(array)
            continue
        if ours == "exposed_with" and is_list(array.type):
            texts = typed_columns.texts_of_lists(array, ours, wanted[ours], facts.file)
            made[ours] = shown(batches, texts)
            continue
        text = _text(array, ours, wanted[ours], facts.file)
        text = batches.without_nulls(ours, text)
        if ours == "event_ts" and (clock := clock_of(array.type)):
            made["clock"] = pa.repeat(clock, count)
        if ours == "exposed_with":
            text = shown(batches, pc.split_pattern(text, fmt.list_separator))
        made[ours] = text
    made["kind"] = pa.repeat("record", count)
    made["file"] = pa.repeat(facts.file, count)
    made["line"] = pa.array(lines, pa.int64())
    if fmt.hashes and fmt.computing is not None:
        raw = without_user(fmt, found, count)
    made |= {name: one for name, one in (("element", places), ("raw", raw)) if one is not None}
    made = without_long_texts(fmt, made, facts)
    for name in fmt.inputs:
        if name in made and pa.types.is_string(made[name].type):
            made[name] = batches.without_nulls(name, made[name])
    schema = pa.schema(
        [*RECORD_SCHEMA, *((name, made[name].type) for name in fmt.inputs if name in made)]
    )
    arrays = [made.get(one.name, pa.nulls(count, one.type)) for one in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
