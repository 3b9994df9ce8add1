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
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import pyarrow as pa

from jobs.lake.filesystem import facts as facts_of
from jobs.lake.filesystem import open_binary, open_seekable, write_text
from jobs.reading.csv_reader import read_csv
from jobs.reading.json_blocks import JsonBlocks
from jobs.reading.json_texts import read_json
from jobs.reading.typed_files import read_avro, read_orc, read_parquet
from jobs.reading.w3c_logs import read_w3c
from jobs.reading.web_logs import log_values
from jobs.records import byte_streams, paths
from jobs.records.byte_streams import Block, has_broken_bytes, printable
from jobs.records.compression import decompressed
from jobs.records.evaluate import evaluated
from jobs.records.ranges import Limited, Range
from jobs.records.records import (
    Batches,
    FileFacts,
    Format,
    Unusable,
)

if TYPE_CHECKING:
    from jobs.privacy.pseudonyms import Privacy


def json_values(fmt: Format, line: str, facts: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of one JSON line; numbers stay the text they were written as."""
    try:
        record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return object_values(fmt, record, facts) if isinstance(record, dict) else None


def object_values(fmt: Format, record: dict[str, Any], facts: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of a JSON object whose numbers are texts; None: one is no single value."""
    values: dict[str, Any] = {}
    try:
        for ours, theirs in fmt.mapped.items():
            value = paths.reach(record, theirs)
            if ours == "exposed_with" and isinstance(value, list):
                values[ours] = [paths.scalar_text(one) for one in value]
            else:
                text = paths.any_text if ":" in ours else paths.scalar_text
                values[ours] = text(value)
            if value is not None or theirs in record:
                facts.columns.setdefault(theirs, "json")
    except ValueError:
        return None
    for name in record:
        facts.columns.setdefault(name, "json")
    if any(
        isinstance(value, str) and not value.isascii() and has_broken_bytes(value)
        for value in values.values()
    ):
        return None  # a JSON escape such as \\ud800 is not text
    return values


def read_lines(
    fmt: Format,
    stream: BinaryIO,
    facts: FileFacts,
    values_of: Callable[[Format, str, FileFacts], dict[str, Any] | None],
    waits: Callable[[], bool] | None = None,
    number: int = 0,
) -> Iterator[pa.RecordBatch]:
    """Args: waits: as in `byte_streams.whole_lines`; number: how many lines are before."""
    batches = Batches(fmt, facts.file, facts)

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
    for piece in byte_streams.pieces(stream, fmt.encoding, fmt.longest_record, waits):
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
    batches.add(number, printable(line), values)


def read_text(
    fmt: Format, path: str, raw: BinaryIO, facts: FileFacts, part: Range | None = None
) -> Iterator[pa.RecordBatch]:
    """The records of a file of text, compressed or not; or of a range of one that is not.

    Args:
        raw: of the range, if it is one.
    """
    stream, codec = (raw, None) if part is not None else decompressed(path, raw)

    def waits() -> bool:
        assert fmt.partial_since is not None
        facts.waiting = int(facts_of(path)[1] > fmt.partial_since)
        return bool(facts.waiting)

    # (What is compressed ends whole.)
    ends_whole = codec is not None or (part is not None and not part.last)
    asked = None if fmt.partial_since is None or ends_whole else waits
    if fmt.format == "csv":
        return read_csv(fmt, stream, facts, asked, part)
    if fmt.format == "json":
        return read_json(fmt, stream, facts, object_values, asked)
    if fmt.format == "w3c":
        return read_w3c(fmt, stream, facts, asked)
    values_of = json_values if fmt.format == "jsonl" else log_values
    return read_lines(fmt, stream, facts, values_of, asked, 0 if part is None else part.line)


def read_file(
    fmt: Format, path: str, facts: FileFacts, part: Range | None = None
) -> Iterator[pa.RecordBatch]:
    """All records of one file, or of a range of it.

    Args:
        facts: of this file; whole when the last record was taken. `error` is there instead of an
            exception.
    """
    with _as_facts(fmt, path, facts):
        if part is not None:
            with open_seekable(path) as file:
                limited = io.BufferedReader(Limited(file, part.begin, part.end), 1 << 20)  # type: ignore[type-var]
                yield from _told(fmt, read_text(fmt, path, limited, facts, part), facts)  # type: ignore[arg-type]
            return
        with open_binary(path) as raw:
            hashing = byte_streams.Hashing(raw)
            stream: BinaryIO = io.BufferedReader(hashing, 1 << 20)  # type: ignore[type-var,assignment]
            if fmt.format == "parquet":
                batches = read_parquet(fmt, path, facts)
            elif fmt.format == "orc":
                batches = read_orc(fmt, path, facts)
            elif fmt.format == "avro":
                batches = read_avro(fmt, stream, facts)
            else:
                batches = read_text(fmt, path, stream, facts)
            yield from _told(fmt, batches, facts)
            while hashing.read(1 << 20):
                pass
            facts.size, facts.sha256 = hashing.size, hashing.digest.hexdigest()


def _told(
    fmt: Format, batches: Iterable[pa.RecordBatch], facts: FileFacts
) -> Iterator[pa.RecordBatch]:
    """Records with what is computed, noted in the facts."""
    for batch in evaluated(fmt, batches, facts):
        facts.look_at(batch)
        if fmt.unit is not None:
            facts.count_units(batch)
        yield batch


@contextmanager
def _as_facts(fmt: Format, path: str, facts: FileFacts) -> Iterator[None]:
    """What goes wrong becomes the facts' `error`."""
    try:
        yield
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
            f"{path} cannot be read as {fmt.format} ({type(error).__name__}: {error}). Correct "
            "source.format and source.encoding, or have the whole file delivered again"
        )
    except Exception as error:
        traceback.print_exc()  # (the worker's log has it; who runs the job gets a sentence)
        facts.error = (
            f"{path}: reading it failed after {facts.lines} lines ({type(error).__name__}: "
            f"{error}). This is a fault of sessionmill: report it with this line; to continue without "
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
    """For `mapInArrow` over a frame of ranges (`ranges.DDL`): their records.

    Args:
        facts_folder: each attempt of a task writes the facts of its files here, as one JSON file
            that is named by the attempt's number: of two attempts the later holds.
        taker: makes, from the attempt's number, what takes records first; the stream has those that
            it leaves.
    """

    def read(rows: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        found: list[FileFacts] = []
        taking = None
        for batch in rows:
            for row in batch.to_pylist():
                taking = taker(_attempt()) if taker and taking is None else taking
                part = Range(**row)
                facts = FileFacts(part.path, begin=part.begin)
                records = read_file(fmt, part.path, facts, None if part.whole else part)
                yield from taken(records, facts, fmt, taking)
                found.append(facts)
        if found:
            written = [] if taking is None else taking.close()
            told = {"files": [vars(one) for one in found], "lines": written}
            write_text(f"{facts_folder}/{_attempt()}.json", json.dumps(told))

    return read


def taken(
    records: Iterator[pa.RecordBatch], facts: FileFacts, fmt: Format, taking: Taker | None
) -> Iterator[pa.RecordBatch]:
    """The records of a file that are left when erased users are skipped, and what
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
    """The number of this attempt of a Spark task; none has it twice in an application. 0: it is none."""
    from pyspark import TaskContext

    task = TaskContext.get()
    return 0 if task is None else task.taskAttemptId()
