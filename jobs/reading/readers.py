"""Landing files to records: the part of ingestion that runs in Spark's Python workers.

Each task reads whole files, streaming, and yields Arrow batches of *records*: the mapped columns
as text exactly as the log has them (no number ever becomes a float), the raw line, its file and
its first physical line (the header counted; Parquet: the row, from 1). Nothing is judged here but
"is this a record at all"; typing, reasons and hashes are Spark SQL (`ingest.py`).

Beside the records, each task writes the facts of its files (`FileFacts`): size, content hash,
lines, columns, or the error that makes a file unreadable as the source file describes it.
"""

from __future__ import annotations

import io
import json
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.core.source_file import field_of
from jobs.lake.filesystem import open_binary, open_seekable, write_text
from jobs.reading import byte_streams, paths
from jobs.reading.byte_streams import has_broken_bytes, printable
from jobs.reading.csv_reader import read_csv
from jobs.reading.evaluate import evaluated, json_rows, without_user
from jobs.reading.explode import ParquetNames, ambiguous, cut_raws, exploded_rows, pieces
from jobs.reading.expressions import FIELD
from jobs.reading.records import (
    RECORD_SCHEMA,
    SCALARS,
    Batches,
    FileFacts,
    Format,
    Unusable,
    cut_text,
    cut_texts,
    missing_column,
)

BATCH_BYTES = 32 * 1024 * 1024
"""Of Parquet, decoded: of long rows a batch has fewer."""
COMBINED_LOG = re.compile(
    r'^(\S+) \S+ (\S.*?) \[([^\]]+)\] "(?:([A-Z]+) (.*?)(?: HTTP/[\d.]+)?|[^"]*)" (\d{3}) (\d+|-)'
    r'(?: "((?:[^"\\]|\\.)*)" "((?:[^"\\]|\\.)*)")?\s*$'
)


def json_values(fmt: Format, line: str, facts: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of one JSON line; numbers stay the text they were written as."""
    try:
        record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        if not isinstance(record, dict):
            return None
        values: dict[str, Any] = {}
        for ours, theirs in fmt.mapped.items():
            value = paths.reach(record, theirs)
            if ours == "exposed_with" and isinstance(value, list):
                values[ours] = [paths.scalar_text(one) for one in value]
            else:
                text = paths.any_text if ":" in ours else paths.scalar_text
                values[ours] = text(value)
            if value is not None or theirs in record:
                facts.columns.setdefault(theirs, "json")
        for name in record:
            facts.columns.setdefault(name, "json")
        return values
    except (ValueError, RecursionError):
        return None


def log_values(fmt: Format, line: str, _: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of one line of a web server's combined log; '-' means nothing."""
    from jobs.core.source_file import COMBINED_LOG_COLUMNS

    found = COMBINED_LOG.match(line)
    if found is None:
        return None
    parts = dict(zip(COMBINED_LOG_COLUMNS, found.groups(), strict=True))
    there = {name: None if text == "-" else text for name, text in parts.items()}
    return {ours: there.get(theirs) for ours, theirs in fmt.mapped.items()}


def read_lines(
    fmt: Format,
    stream: BinaryIO,
    facts: FileFacts,
    values_of: Callable[[Format, str, FileFacts], dict[str, Any] | None],
) -> Iterator[pa.RecordBatch]:
    batches = Batches(fmt, facts.file, facts)
    number = 0
    for lines in byte_streams.text_lines(stream, fmt.encoding, fmt.longest_record):
        for line in lines:
            number += 1
            stripped = line.strip()
            if not stripped:
                continue
            facts.lines += 1
            broken = len(line) > fmt.longest_record or has_broken_bytes(line)
            values = None if broken else values_of(fmt, stripped, facts)
            if values and any(
                isinstance(value, str) and not value.isascii() and has_broken_bytes(value)
                for value in values.values()
            ):
                values = None  # a JSON escape such as \\ud800 is no text
            batches.add(number, printable(line), values)
            if batches.full:
                yield batches.drain()
        if len(batches):
            yield batches.drain()


def _parquet_text(array: pa.Array, ours: str, theirs: str, file: str) -> pa.Array:
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if pa.types.is_floating(kind) and ours not in ("value", "event_ts", "event_type"):
        raise Unusable(
            f"{file}: column {theirs!r} is {kind}, and {field_of(ours)} is an id: ids never pass "
            "through floating point. Write the column as integers or text"
        )
    if pa.types.is_timestamp(kind):
        us = array.cast(pa.timestamp("us", kind.tz), safe=False)
        if ours == "event_ts":
            return us.cast(pa.int64()).cast(pa.string())
        form = "%Y-%m-%dT%H:%M:%S" + ("Z" if kind.tz else "")
        if kind.tz:
            us = us.cast(pa.timestamp("us", "UTC"))
        return pc.strftime(us, format=form)
    if pa.types.is_nested(kind):
        raise Unusable(
            f"{file}: column {theirs!r} is {kind}, {field_of(ours)} needs one value a row"
        )
    return array.cast(pa.string())


def _shown(batches: Batches, lists: pa.Array) -> pa.Array:
    """Lists without what is null or means null, as in every other format."""
    nulls = pa.array([None, *sorted(batches.nulls["exposed_with"])], pa.string())
    if not pc.any(pc.is_in(lists.flatten(), nulls)).as_py():
        return lists
    return pa.array(map(batches.list_of, lists.to_pylist()), lists.type)


def clock_of(kind: pa.DataType) -> str | None:
    """The clock of a column of times; null where it is none."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not pa.types.is_timestamp(kind):
        return None
    return "utc" if kind.tz else "local"


def _lengths(texts: pa.Array) -> np.ndarray:
    """int64[N]: the characters of texts, or of lists of them."""
    if pa.types.is_string(texts.type):
        length = pc.fill_null(pc.utf8_length(texts), 0)
        return np.asarray(length.to_numpy(zero_copy_only=False), np.int64)
    ends = np.cumsum(np.append(0, _lengths(texts.flatten())))
    number = pc.fill_null(pc.list_value_length(texts), 0).to_numpy(zero_copy_only=False)
    last = np.cumsum(number)
    return np.asarray(ends[last] - ends[last - number], np.int64)


def _without_long_texts(
    fmt: Format, made: dict[str, pa.Array], facts: FileFacts
) -> dict[str, pa.Array]:
    """Rows in which a column is longer than a table takes are `unparsable`, and keep its beginning.

    Args:
        made: our columns, `kind` and `line` among them.
    """
    bad = np.zeros(len(made["kind"]), bool)
    for ours in set(made) & {*SCALARS, "exposed_with"}:
        array = made[ours]
        # (No text has more characters than bytes, and most batches have fewer of those.)
        if array.nbytes <= fmt.longest_text:
            continue
        long = _lengths(array) > fmt.longest_text
        if not long.any():
            continue
        bad |= long
        places = np.flatnonzero(long)
        some = array.take(pa.array(places)).to_pylist()
        put = [None if isinstance(one, list) else cut_text(one, fmt) for one in some]
        made[ours] = (
            pc.replace_with_mask(array, pa.array(long), pa.array(put, array.type))
            if pa.types.is_string(array.type)
            else pc.if_else(pa.array(long), None, array)
        )
    if bad.any():
        made["kind"] = pc.if_else(pa.array(bad), "unparsable", made["kind"])
        first = made["line"][int(np.flatnonzero(bad)[0])].as_py()
        facts.add_too_long(first, int(bad.sum()))
    return made


def _row_batches(parquet: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a file, many of them at a time where they are short."""
    meta = parquet.metadata
    for group in range(meta.num_row_groups):
        part = meta.row_group(group)
        each = max(1, part.total_byte_size // max(1, part.num_rows))
        rows = max(1, min(byte_streams.BATCH_LINES * 3, BATCH_BYTES // each))
        yield from parquet.iter_batches(rows, row_groups=[group], columns=columns)


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
            path is not None and inner is not None and pa.types.is_struct(inner)
            and paths.has_path(inner, path)
        )  # fmt: skip
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


def read_parquet(fmt: Format, path: str, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    with open_seekable(path) as stream:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        facts.columns = {one.name: str(one.type) for one in schema}
        names = parquet_names(fmt, schema, facts.file)
        line = 1
        read = {paths.root_of(schema, one) for one in names.roots}
        columns = [name for name in schema.names if name in read]
        for batch in _row_batches(parquet, columns):
            for made, count in parquet_records(fmt, names, batch, line, facts):
                facts.lines += count
                yield made
            line += batch.num_rows


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
        if ours == "exposed_with" and pa.types.is_list(array.type):
            made[ours] = _shown(batches, array.cast(pa.list_(pa.string())))
            continue
        text = _parquet_text(array, ours, wanted[ours], facts.file)
        text = batches.without_nulls(ours, text)
        if ours == "event_ts" and (clock := clock_of(array.type)):
            made["clock"] = pa.repeat(clock, count)
        if ours == "exposed_with":
            text = _shown(batches, pc.split_pattern(text, fmt.list_separator))
        made[ours] = text
    made["kind"] = pa.array(["record"] * count, pa.string())
    made["file"] = pa.array([facts.file] * count, pa.string())
    made["line"] = pa.array(lines, pa.int64())
    if fmt.hashes and fmt.computing is not None:
        raw = without_user(fmt, found, count)
    made |= {name: one for name, one in (("element", places), ("raw", raw)) if one is not None}
    made = _without_long_texts(fmt, made, facts)
    for name in fmt.inputs:
        if name in made and pa.types.is_string(made[name].type):
            made[name] = batches.without_nulls(name, made[name])
    schema = pa.schema(
        [*RECORD_SCHEMA, *((name, made[name].type) for name in fmt.inputs if name in made)]
    )
    arrays = [made.get(one.name, pa.nulls(count, one.type)) for one in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def read_file(fmt: Format, path: str, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    """All records of one file.

    Args:
        facts: of this file; whole when the last record was taken. `error` is there instead of an
            exception.
    """
    try:
        with open_binary(path) as raw:
            hashing = byte_streams.Hashing(raw)
            if fmt.format == "parquet":
                batches = read_parquet(fmt, path, facts)
            else:
                stream = byte_streams.decompressed(path, io.BufferedReader(hashing, 1 << 20))  # type: ignore[arg-type]
                if fmt.format == "csv":
                    batches = read_csv(fmt, stream, facts)
                else:
                    values_of = json_values if fmt.format == "jsonl" else log_values
                    batches = read_lines(fmt, stream, facts, values_of)
            for batch in evaluated(fmt, batches, facts):
                facts.look_at(batch)
                yield batch
            while hashing.read(1 << 20):
                pass
            facts.size, facts.sha256 = hashing.size, hashing.digest.hexdigest()
    except Unusable as error:
        facts.error = str(error)
    except (OSError, EOFError, UnicodeError, LookupError, pa.ArrowException) as error:
        facts.error = (
            f"{path} cannot be read as {fmt.format} ({type(error).__name__}: {error}). Deliver it "
            "again whole, or correct [source] format and encoding"
        )
    except Exception as error:
        traceback.print_exc()  # (the worker's log has it; who runs the job gets a sentence)
        facts.error = (
            f"{path}: reading it failed after {facts.lines} lines ({type(error).__name__}: "
            f"{error}). This is a fault of sessionmill: report it with this line; to go on without "
            "the file, move it out of the landing"
        )


def reader(
    fmt: Format, facts_folder: str
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """For `mapInArrow` over a frame with one column of paths: their records.

    Args:
        facts_folder: each attempt of a task writes the facts of its files here, as one JSON file
            that is named by the attempt's number: of two attempts the later holds.
    """

    def read(paths: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        found: list[FileFacts] = []
        for batch in paths:
            for path in batch.column(0).to_pylist():
                facts = FileFacts(path)
                records = read_file(fmt, path, facts)
                if fmt.privacy is None:
                    yield from records
                else:
                    facts.skip_forgotten((yield from fmt.privacy.guarded(records)))
                found.append(facts)
        if found:
            text = json.dumps([vars(one) for one in found])
            write_text(f"{facts_folder}/{_attempt()}.json", text)

    return read


def _attempt() -> int:
    """The number of this attempt of a Spark task; none has it twice in an application."""
    from pyspark import TaskContext

    task = TaskContext.get()
    assert task is not None
    return task.taskAttemptId()
