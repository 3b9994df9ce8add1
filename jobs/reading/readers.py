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
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.core.source_file import field_of
from jobs.lake.filesystem import open_binary, open_seekable, write_text

if TYPE_CHECKING:
    from jobs.privacy.pseudonyms import Privacy
from jobs.reading import byte_streams
from jobs.reading.byte_streams import Block, has_broken_bytes, printable
from jobs.reading.csv_reader import CsvRecords, read_csv
from jobs.reading.json_blocks import JsonBlocks
from jobs.reading.records import (
    RECORD_SCHEMA,
    Batches,
    FileFacts,
    Format,
    Unusable,
    cut_text,
    missing_column,
)

BATCH_BYTES = 32 * 1024 * 1024
"""Of Parquet, decoded: of long rows a batch has fewer."""
COMBINED_LOG = re.compile(
    r'^(\S+) \S+ (\S.*?) \[([^\]]+)\] "(?:([A-Z]+) (.*?)(?: HTTP/[\d.]+)?|[^"]*)" (\d{3}) (\d+|-)'
    r'(?: "((?:[^"\\]|\\.)*)" "((?:[^"\\]|\\.)*)")?\s*$'
)


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


def log_values(fmt: Format, line: str, _: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of one line of a web server's combined log; '-' means nothing."""
    from jobs.core.source_file import COMBINED_LOG_COLUMNS

    found = COMBINED_LOG.match(line)
    if found is None:
        return None
    parts = dict(zip(COMBINED_LOG_COLUMNS, found.groups(), strict=True))
    return {
        ours: None if parts[theirs] == "-" else parts[theirs] for ours, theirs in fmt.mapped.items()
    }


def read_lines(
    fmt: Format,
    stream: BinaryIO,
    facts: FileFacts,
    values_of: Callable[[Format, str, FileFacts], dict[str, Any] | None],
) -> Iterator[pa.RecordBatch]:
    batches = Batches(fmt, facts.file, facts)
    number = 0

    def one_by_one(lines: Iterable[tuple[int, str]]) -> Iterator[pa.RecordBatch]:
        for at, line in lines:
            add_line(fmt, batches, at, line, values_of)
            if batches.full:
                yield batches.drain()
        if len(batches):
            yield batches.drain()

    quick = None
    if values_of is json_values and JsonBlocks.can(fmt):
        quick = JsonBlocks(fmt, facts, batches)
    for piece in byte_streams.pieces(stream, fmt.encoding, fmt.longest_record):
        found = quick.read(number + 1, piece) if quick and isinstance(piece, Block) else None
        if found is None:
            lines = piece.lines() if isinstance(piece, Block) else piece
            yield from one_by_one(enumerate(lines, number + 1))
            number += len(lines)
            continue
        records, others, raw = found
        facts.lines += records.num_rows
        if records.num_rows:
            yield records
        left = raw.take(pa.array(others)).to_pylist()
        yield from one_by_one(zip((number + 1 + others).tolist(), left, strict=True))
        number += len(raw)


def add_line(
    fmt: Format,
    batches: Batches,
    number: int,
    line: str,
    values_of: Callable[[Format, str, FileFacts], dict[str, Any] | None],
) -> None:
    """Add what a physical line says as a record; a blank line is none."""
    stripped = line.strip()
    if not stripped:
        return
    batches.facts.lines += 1
    broken = len(line) > fmt.longest_record or has_broken_bytes(line)
    values = None if broken else values_of(fmt, stripped, batches.facts)
    if values and any(
        isinstance(value, str) and not value.isascii() and has_broken_bytes(value)
        for value in values.values()
    ):
        values = None  # a JSON escape such as \\ud800 is no text
    batches.add(number, printable(line), values)


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
            made["kind"] = pa.repeat("record", count)
            made["file"] = pa.repeat(facts.file, count)
            made["line"] = pa.array(np.arange(line, line + count))
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
        records = CsvRecords(fmt.delimiter, len(names))
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
            for batch in batches:
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


class Taker(Protocol):
    """Takes records out of a task's stream: those that it can finish by itself."""

    def take(self, records: pa.RecordBatch) -> pa.RecordBatch:
        """Keep some records; returns the others."""

    def close(self) -> list[str]:
        """The files that it wrote."""


def reader(
    fmt: Format, facts_folder: str, taker: Callable[[int], Taker] | None = None
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """For `mapInArrow` over a frame with one column of paths: their records.

    Args:
        facts_folder: each attempt of a task writes the facts of its files here, as one JSON file
            that is named by the attempt's number: of two attempts the later holds.
        taker: makes, from the attempt's number, what takes records first; the stream has those that
            it leaves.
    """

    def read(paths: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        found: list[FileFacts] = []
        taking = None
        for batch in paths:
            for path in batch.column(0).to_pylist():
                taking = taker(_attempt()) if taker and taking is None else taking
                facts = FileFacts(path)
                records = taken(read_file(fmt, path, facts), facts, fmt, taking)
                yield from records
                found.append(facts)
        if found:
            written = [] if taking is None else taking.close()
            told = {"files": [vars(one) for one in found], "lines": written}
            write_text(f"{facts_folder}/{_attempt()}.json", json.dumps(told))

    return read


def taken(
    records: Iterator[pa.RecordBatch], facts: FileFacts, fmt: Format, taking: Taker | None
) -> Iterator[pa.RecordBatch]:
    """The records of a file that are left when people who were forgotten are skipped, and what
    `taking` takes is gone."""
    if fmt.privacy is not None:
        records = _allowed(records, facts, fmt.privacy)
    for batch in records:
        left = batch if taking is None else taking.take(batch)
        if left.num_rows or taking is None:
            yield left


def _allowed(
    records: Iterator[pa.RecordBatch], facts: FileFacts, privacy: Privacy
) -> Iterator[pa.RecordBatch]:
    facts.skip_forgotten((yield from privacy.guarded(records)))


def _attempt() -> int:
    """The number of this attempt of a Spark task; none has it twice in an application."""
    from pyspark import TaskContext

    task = TaskContext.get()
    assert task is not None
    return task.taskAttemptId()
