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
import lzma
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.core.source_file import field_of
from jobs.lake.filesystem import facts as facts_of
from jobs.lake.filesystem import open_binary, open_seekable, write_text
from jobs.reading import byte_streams
from jobs.reading.byte_streams import has_broken_bytes, printable
from jobs.reading.compression import decompressed
from jobs.reading.csv_reader import CsvRecords, read_csv
from jobs.reading.records import (
    RECORD_SCHEMA,
    Batches,
    FileFacts,
    Format,
    Unusable,
    cut_text,
    missing_column,
)
from jobs.reading.web_logs import log_values

BATCH_BYTES = 32 * 1024 * 1024
"""Of Parquet, decoded: of long rows a batch has fewer."""


def _scalar_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    raise ValueError(f"{type(value).__name__} where one value is expected")


def _reach(record: dict[str, Any], name: str) -> Any:
    """A column of a JSON record; `a.b` reaches into nested objects."""
    if name in record:
        return record[name]
    value: Any = record
    for step in name.split("."):
        if not isinstance(value, dict) or step not in value:
            return None
        value = value[step]
    return value


def json_values(fmt: Format, line: str, facts: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of one JSON line; numbers stay the text they were written as."""
    try:
        record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        if not isinstance(record, dict):
            return None
        values: dict[str, Any] = {}
        for ours, theirs in fmt.mapped.items():
            value = _reach(record, theirs)
            if ours == "exposed_with" and isinstance(value, list):
                values[ours] = [_scalar_text(one) for one in value]
            else:
                values[ours] = _scalar_text(value)
            if value is not None or theirs in record:
                facts.columns.setdefault(theirs, "json")
        for name in record:
            facts.columns.setdefault(name, "json")
        return values
    except (ValueError, RecursionError):
        return None


def read_lines(
    fmt: Format,
    stream: BinaryIO,
    facts: FileFacts,
    values_of: Callable[[Format, str, FileFacts], dict[str, Any] | None],
    waits: Callable[[], bool] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Args: waits: as in `byte_streams.whole_lines`."""
    batches = Batches(fmt, facts.file, facts)
    number = 0
    for lines in byte_streams.text_lines(stream, fmt.encoding, fmt.longest_record, waits):
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
    fmt: Format, made: dict[str, pa.Array], line: int, facts: FileFacts
) -> dict[str, pa.Array]:
    """Rows in which a column is longer than a table takes are `unparsable`, and keep its beginning.

    Args:
        made: our columns, `kind` among them; line: the first row's.
    """
    bad = np.zeros(len(made["kind"]), bool)
    for ours in set(made) & set(fmt.mapped):
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
        facts.add_too_long(line + int(np.flatnonzero(bad)[0]), int(bad.sum()))
    return made


def _row_batches(parquet: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a file, many of them at a time where they are short."""
    meta = parquet.metadata
    for group in range(meta.num_row_groups):
        part = meta.row_group(group)
        each = max(1, part.total_byte_size // max(1, part.num_rows))
        rows = max(1, min(byte_streams.BATCH_LINES * 3, BATCH_BYTES // each))
        yield from parquet.iter_batches(rows, row_groups=[group], columns=columns)


def read_parquet(fmt: Format, path: str, facts: FileFacts) -> Iterator[pa.RecordBatch]:
    with open_seekable(path) as stream:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        facts.columns = {one.name: str(one.type) for one in schema}
        for ours, theirs in fmt.mapped.items():
            if theirs not in schema.names:
                raise Unusable(missing_column(facts.file, ours, theirs, schema.names))
        batches = Batches(fmt, path)
        line = 1
        columns = list(dict.fromkeys(fmt.mapped.values()))
        for batch in _row_batches(parquet, columns):
            count = batch.num_rows
            made: dict[str, pa.Array] = {}
            for ours, theirs in fmt.mapped.items():
                array = batch.column(theirs)
                if ours == "exposed_with" and pa.types.is_list(array.type):
                    made[ours] = _shown(batches, array.cast(pa.list_(pa.string())))
                    continue
                text = _parquet_text(array, ours, theirs, facts.file)
                text = batches.without_nulls(ours, text)
                if ours == "event_ts" and (clock := clock_of(array.type)):
                    made["clock"] = pa.repeat(clock, count)
                if ours == "exposed_with":
                    text = _shown(batches, pc.split_pattern(text, fmt.list_separator))
                made[ours] = text
            made["kind"] = pa.array(["record"] * count, pa.string())
            made["file"] = pa.array([facts.file] * count, pa.string())
            made["line"] = pa.array(range(line, line + count), pa.int64())
            made = _without_long_texts(fmt, made, line, facts)
            line += count
            facts.lines += count
            yield pa.RecordBatch.from_arrays(
                [made.get(one.name, pa.nulls(count, one.type)) for one in RECORD_SCHEMA],
                schema=RECORD_SCHEMA,
            )


def record_of(
    fmt: Format, raw: str, file: str, line: int, columns: dict[str, str],
    header: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One stored line as the record that its file would give today.

    Args:
        columns: the file's columns with their kinds, as the ledger has them.
        header: of a CSV, its columns in order when the line was read; None: those of `columns`.
    """
    values: dict[str, Any] | None = None
    if fmt.privacy is not None and fmt.privacy.hashes:
        stored = json.loads(raw or "{}")  # (what was no record is not kept)
        values = {ours: stored.get(theirs) for ours, theirs in fmt.mapped.items()} or None
        values = values if stored else None
    elif fmt.format == "csv":
        names = list(columns) if header is None else header
        records = CsvRecords(fmt.dialect, len(names))
        found = list(records.feed(raw.splitlines(keepends=True), last=True))
        if len(found) == 1 and found[0][2]:
            row = found[0][2]
            values = {ours: row[names.index(theirs)] for ours, theirs in fmt.mapped.items()}
    elif fmt.format == "parquet":
        stored = json.loads(raw)
        values = {ours: stored.get(theirs) for ours, theirs in fmt.mapped.items()}
    else:
        values_of = json_values if fmt.format == "jsonl" else log_values
        values = values_of(fmt, raw.strip(), FileFacts(file))
    batch = Batches(fmt, file)
    batch.add(line, raw, values)
    made = {name: column[0] for name, column in batch.columns.items() if column}
    kind = columns.get(fmt.mapped["event_ts"], "")
    if fmt.format == "parquet" and kind.startswith("timestamp"):
        made["clock"] = "utc" if "tz=" in kind else "local"
        made["event_ts"] = _microseconds(made["event_ts"])
    return {**made, "file": file}


def _microseconds(text: str | None) -> str | None:
    """A stored typed time as its file has it; a text that is no such time stays what it is."""
    try:
        moment = datetime.fromisoformat(text or "").replace(tzinfo=UTC)
    except ValueError:
        return text
    return str((moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1))


def read_text(
    fmt: Format, path: str, raw: io.BufferedReader, facts: FileFacts
) -> Iterator[pa.RecordBatch]:
    """The records of a file of text, compressed or not."""
    stream, codec = decompressed(path, raw)  # type: ignore[arg-type]

    def waits() -> bool:
        assert fmt.partial_since is not None
        facts.waiting = int(facts_of(path)[1] > fmt.partial_since)
        return bool(facts.waiting)

    # (What is compressed ends whole.)
    asked = None if fmt.partial_since is None or codec is not None else waits
    if fmt.format == "csv":
        return read_csv(fmt, stream, facts, asked)
    values_of = json_values if fmt.format == "jsonl" else log_values
    return read_lines(fmt, stream, facts, values_of, asked)


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
                batches = read_text(fmt, path, io.BufferedReader(hashing, 1 << 20), facts)  # type: ignore[type-var]
            for batch in batches:
                facts.look_at(batch)
                yield batch
            while hashing.read(1 << 20):
                pass
            facts.size, facts.sha256 = hashing.size, hashing.digest.hexdigest()
    except Unusable as error:
        facts.error = str(error)
    except (
        OSError,
        EOFError,
        UnicodeError,
        LookupError,
        lzma.LZMAError,
        zlib.error,
        zipfile.BadZipFile,
        pa.ArrowException,
    ) as error:
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
