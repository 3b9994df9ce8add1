"""Files of rows whose columns have types: Parquet, ORC, Avro."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.orc as orc
import pyarrow.parquet as pq

from jobs.lake.filesystem import open_seekable
from jobs.reading import avro_values, typed_columns, typed_rows
from jobs.reading.typed_texts import clock_of, is_list, shown, without_long_texts
from jobs.records import byte_streams
from jobs.records.records import (
    RECORD_SCHEMA,
    Batches,
    FileFacts,
    Format,
    Unusable,
    missing_column,
)

BATCH_BYTES = 32 * 1024 * 1024
"""Of rows, decoded: of long rows a batch has fewer."""

Rows = Callable[[list[str]], Iterable[pa.RecordBatch]]
"""The rows of a file, in some of its columns."""


def read_parquet(fmt: Format, path: str, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    with open_seekable(path) as stream:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        lacking = [one for one in fmt.table or () if one.name not in schema.names]

        def rows(columns: list[str]) -> Iterator[pa.RecordBatch]:
            added = [one for one in lacking if any(_is_in(name, one) for name in columns)]
            asked = [one for one in columns if not any(_is_in(one, field) for field in added)]
            for batch in _row_batches(parquet, asked or schema.names[:1]):
                for field in added:
                    nulls = pa.nulls(batch.num_rows, field.type)
                    batch = batch.append_column(field.name, nulls)
                yield batch

        whole = pa.schema([*schema, *lacking])
        yield from _records(fmt, path, facts, whole, rows)


def _is_in(column: str, field: pa.Field) -> bool:
    return column == field.name or column.startswith(f"{field.name}.")


def _row_batches(parquet: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a file, many of them at a time where they are short."""
    meta = parquet.metadata
    for group in range(meta.num_row_groups):
        part = meta.row_group(group)
        each = max(1, part.total_byte_size // max(1, part.num_rows))
        rows = max(1, min(byte_streams.BATCH_LINES * 3, BATCH_BYTES // each))
        yield from parquet.iter_batches(rows, row_groups=[group], columns=columns)


def read_orc(fmt: Format, path: str, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    with open_seekable(path) as stream:
        file = orc.ORCFile(stream)

        def rows(columns: list[str]) -> Iterator[pa.RecordBatch]:
            for stripe in range(file.nstripes):
                batch = file.read_stripe(stripe, columns)
                each = max(1, batch.nbytes // max(1, batch.num_rows))
                step = max(1, min(byte_streams.BATCH_LINES * 3, BATCH_BYTES // each))
                for at in range(0, batch.num_rows, step):
                    yield batch.slice(at, step)

        yield from _records(fmt, path, facts, file.schema, rows)


def _records(
    fmt: Format, path: str, facts: FileFacts, schema: pa.Schema, rows: Rows
) -> Iterator[pa.RecordBatch]:
    if fmt.computing is None:
        yield from _Typed(fmt, path, facts, schema).read(rows)
        return
    facts.columns = {one.name: str(one.type) for one in schema}
    names, columns = typed_rows.columns_read(fmt, schema, facts.file)
    yield from typed_rows.read_rows(fmt, names, rows(columns), facts)


class _Typed:
    """One file of typed columns while it is read."""

    def __init__(self, fmt: Format, path: str, facts: FileFacts, schema: pa.Schema) -> None:
        self.fmt, self.facts, self.schema = fmt, facts, schema
        self.batches = Batches(fmt, path)
        self.constants = typed_columns.partitions(path)
        facts.columns = {one.name: str(one.type) for one in schema}
        self.paths: dict[str, list[str] | None] = {}
        """Our column -> where it is; None: in the file's own path."""
        for ours, theirs in fmt.mapped.items():
            try:
                path_of = typed_columns.path_of(schema, theirs)
            except Unusable as error:
                raise Unusable(f"{facts.file}: {error}") from None
            if path_of is None and theirs not in self.constants:
                there = [*schema.names, *self.constants]
                raise Unusable(missing_column(facts.file, ours, theirs, there))
            self.paths[ours] = path_of
            if path_of is None:
                facts.columns[theirs] = "string"
            elif len(path_of) > 1:
                facts.columns[theirs] = str(typed_columns.type_of(schema, path_of))

    def read(self, rows: Rows) -> Iterator[pa.RecordBatch]:
        """Args: rows: the file's rows, in the columns that are asked for."""
        self._check_ids(rows)
        inner = [path for path in self.paths.values() if path is not None]
        wanted = list(dict.fromkeys(typed_columns.reading_of(self.schema, one) for one in inner))
        # (Where all columns are in the path, one of the file's says how many rows there are.)
        line = 1
        for batch in rows(wanted or self.schema.names[:1]):
            count = batch.num_rows
            made = self._columns(batch)
            made["kind"] = pa.repeat("record", count)
            made["file"] = pa.repeat(self.facts.file, count)
            made["line"] = pa.array(np.arange(line, line + count))
            made = without_long_texts(self.fmt, made, self.facts)
            line += count
            self.facts.lines += count
            yield pa.RecordBatch.from_arrays(
                [made.get(one.name, pa.nulls(count, one.type)) for one in RECORD_SCHEMA],
                schema=RECORD_SCHEMA,
            )

    def _check_ids(self, rows: Rows) -> None:
        for ours, path in self.paths.items():
            if path is None:
                continue
            theirs, asked = self.fmt.mapped[ours], typed_columns.reading_of(self.schema, path)

            def values(path: list[str] = path, asked: str = asked) -> Iterator[pa.Array]:
                for batch in rows([asked]):
                    yield typed_columns.array_at(batch, path)

            kind = typed_columns.type_of(self.schema, path)
            if typed_columns.refuse_floating_ids(kind, ours, theirs, self.facts.file, values):
                self.facts.columns[theirs] = "int64"

    def _columns(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """Our columns of some rows."""
        fmt, batches, count = self.fmt, self.batches, batch.num_rows
        made: dict[str, pa.Array] = {}
        for ours, theirs in fmt.mapped.items():
            path = self.paths[ours]
            if path is None:
                array = pa.array([self.constants[theirs]], pa.string()).take(
                    pa.array(np.zeros(count, np.int8))
                )
            else:
                array = typed_columns.array_at(batch, path)
            if ours == "exposed_with" and is_list(array.type):
                texts = typed_columns.texts_of_lists(array, ours, theirs, self.facts.file)
                made[ours] = shown(batches, texts)
                continue
            if ours == "event_ts" and "event_ts_2" in fmt.mapped:
                array = typed_columns.dates(array)
            text = typed_columns.text_of(array, ours, theirs, self.facts.file)
            text = batches.without_nulls(ours, text)
            if ours == "event_ts" and (clock := clock_of(array.type)):
                made["clock"] = pa.repeat(clock, count)
            if ours == "exposed_with":
                text = shown(batches, pc.split_pattern(text, fmt.list_separator))
            made[ours] = text
        return made


def read_avro(fmt: Format, stream: BinaryIO, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    """The records of an Avro container file; `line` counts them from 1."""
    try:
        records = fastavro.reader(stream)
    except ValueError as error:
        raise Unusable(
            f"{facts.file} cannot be read as avro ({error}): correct source.format"
        ) from None
    schema = records.writer_schema
    constants = typed_columns.partitions(facts.file)
    facts.columns = avro_values.columns_of(schema)
    for ours, theirs in fmt.mapped.items():
        kind = avro_values.kind_at(schema, theirs)
        if kind is None and theirs not in constants:
            there = [*facts.columns, *constants]
            raise Unusable(missing_column(facts.file, ours, theirs, there))
        facts.columns.setdefault(theirs, kind or "string")
    batches = Batches(fmt, facts.file, facts)
    for line, record in enumerate(_decoded(records, facts), 1):
        facts.lines += 1
        values: dict[str, Any] = {}
        clock = None
        for ours, theirs in fmt.mapped.items():
            value = avro_values.value_at(record, theirs, constants)
            if ours == "event_ts":
                clock = avro_values.clock_of(value)
            values[ours] = avro_values.text_of(value, ours, theirs, facts.file)
        batches.add(line, "", values, clock)
        if batches.full:
            yield batches.drain()
    if len(batches):
        yield batches.drain()


def _decoded(records: Iterable[Any], facts: FileFacts) -> Iterator[dict[str, Any]]:
    """Raises: EOFError: a block is damaged."""
    try:
        yield from records
    except (ValueError, KeyError, IndexError, TypeError, EOFError) as error:
        raise EOFError(f"after {facts.lines} records: {type(error).__name__} {error}") from error
