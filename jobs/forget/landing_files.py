"""Takes a person's lines out of the landing files; what is compressed stays compressed."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fastavro
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq

from jobs.bronze import landing
from jobs.core.source_file import TYPED
from jobs.core.tables import FILES
from jobs.lake import filesystem
from jobs.lake.context import Context
from jobs.privacy.person import Person
from jobs.reading import byte_streams
from jobs.reading.compression import compressed, decompressed
from jobs.reading.readers import read_file
from jobs.reading.records import FileFacts, Format


def from_landing(context: Context, person: Person) -> int:
    """Take the person's lines out of the landing files; how many there were.

    The ledger learns what the files are now, so that no line is read again for it.
    """
    lake, removed, rows = context.lake, 0, []
    # (Records that are too long for the tables are somebody's, too.)
    fmt = replace(
        landing.file_format(context.source),
        privacy=None,
        longest_record=sys.maxsize,
        longest_text=sys.maxsize,
    )
    if fmt.format == "delta":
        return 0  # (a table of others: whoever writes it deletes the rows)
    ledger = {row["file"]: row for row in lake.small(FILES).to_pylist()}
    for path, size, modified in landing.landing_files(replace(context, day=None)):
        data, gone = without_person(fmt, path, person)
        if not gone:
            continue
        known = ledger.get(path)
        told = known is not None and (known["size"], known["modified_ms"]) == (size, modified)
        _put(path, data)
        removed += gone
        if known is not None and told:
            size, modified = filesystem.facts(path)
            known |= {
                "size": size,
                "modified_ms": modified,
                "sha256": hashlib.sha256(data).hexdigest(),
                "lines": known["lines"] - gone,
            }
            known["columns"] = list(dict(known["columns"] or ()).items())
            rows.append(tuple(known.get(name) for name in FILES.columns))
    if rows:
        lake.create(FILES)  # (with the columns of today)
        lake.put_small(FILES, rows)
    return removed


def without_person(fmt: Format, path: str, person: Person) -> tuple[bytes, int]:
    """A file without the person's records, and how many those are; none: no bytes."""
    bad, starts = _lines_of(fmt, path, person)
    if not bad:
        return b"", 0
    if fmt.format in TYPED:
        return _without_rows(fmt, path, bad), len(bad)
    if fmt.format == "json":
        return _without_objects(fmt, path, person), len(bad)
    return _without(fmt, path, bad, starts), len(bad)


def _lines_of(fmt: Format, path: str, person: Person) -> tuple[list[int], list[int]]:
    """The lines at which the person's records begin, and those at which any record does."""
    bad, starts = [], []
    for batch in read_file(fmt, path, FileFacts(path)):
        for kind, user, raw, line in zip(
            *(batch.column(name).to_pylist() for name in ("kind", "user_id", "raw", "line")),
            strict=True,
        ):
            starts.append(line)
            if _is_theirs(person, kind, user, raw):
                bad.append(line)
    return bad, starts


def _is_theirs(person: Person, kind: str, user: str | None, raw: str | None) -> bool:
    return user == person.said or (kind == "unparsable" and person.stands_in(raw or ""))


def _without(fmt: Format, path: str, bad: list[int], starts: list[int]) -> bytes:
    """A text file without records; what is compressed stays compressed."""
    gone: set[int] = set()
    after = dict(zip(starts, [*starts[1:], 1 << 62], strict=True))
    # (Only records of a CSV have several lines; between others may stand what the log says of itself.)
    spans = [(line, after[line] if fmt.format == "csv" else line + 1) for line in bad]
    with filesystem.open_binary(path) as raw:
        stream, codec = decompressed(path, io.BufferedReader(raw))  # type: ignore[type-var,arg-type]
        plain = stream.read()
    bom = byte_streams.BOM if plain.startswith(byte_streams.BOM) else b""
    lines = [line for part in _text(plain, fmt.encoding) for line in part]
    for first, end in spans:
        gone.update(range(first, min(end, len(lines) + 1)))
    kept = "".join(line for number, line in enumerate(lines, 1) if number not in gone)
    data = bom + kept.encode(fmt.encoding, "surrogateescape")
    return compressed(path, codec, data)


def _text(data: bytes, encoding: str) -> Iterator[list[str]]:
    yield from byte_streams.text_lines(io.BytesIO(data), encoding)


def _without_objects(fmt: Format, path: str, person: Person) -> bytes:
    """A file of JSON without objects: an array of the others, as they were written."""
    kept = []
    for batch in read_file(fmt, path, FileFacts(path)):
        for kind, user, raw in zip(
            *(batch.column(name).to_pylist() for name in ("kind", "user_id", "raw")), strict=True
        ):
            if not _is_theirs(person, kind, user, raw):
                kept.append(raw)
    with filesystem.open_binary(path) as raw:
        _, codec = decompressed(path, io.BufferedReader(raw))  # type: ignore[type-var,arg-type]
    text = "[\n" + ",\n".join(kept) + "\n]\n"
    return compressed(path, codec, text.encode(fmt.encoding, "surrogateescape"))


def _without_rows(fmt: Format, path: str, bad: list[int]) -> bytes:
    """A file whose rows have types, without some of them."""
    gone = set(bad)
    if fmt.format == "avro":
        return _without_records(path, gone)
    with filesystem.open_seekable(path) as stream:
        rows = orc.ORCFile(stream).read() if fmt.format == "orc" else pq.ParquetFile(stream).read()
    kept = [number for number in range(rows.num_rows) if number + 1 not in gone]
    sink = pa.BufferOutputStream()
    write = orc.write_table if fmt.format == "orc" else pq.write_table
    write(rows.take(pa.array(kept, pa.int64())), sink)
    return bytes(sink.getvalue())


def _without_records(path: str, gone: set[int]) -> bytes:
    with filesystem.open_binary(path) as stream:
        reader = fastavro.reader(stream)
        kept = [one for number, one in enumerate(reader, 1) if number not in gone]
    made = io.BytesIO()
    fastavro.writer(made, reader.writer_schema, kept, codec=reader.codec)
    return made.getvalue()


def _put(path: str, data: bytes) -> None:
    """A file in place of the old one, complete or not at all."""
    if "://" in path:
        system, inner = filesystem.located(path)
        with system.open_output_stream(inner, compression=None) as out:
            out.write(data)
        return
    file = Path(path).resolve()  # (a link stays one)
    aside = file.with_name(f".{file.name}.forgetting")
    aside.write_bytes(data)
    aside.chmod(file.stat().st_mode)
    aside.rename(file)
