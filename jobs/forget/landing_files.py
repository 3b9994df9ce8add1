"""Takes a person's lines out of the landing files; what is compressed stays compressed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bronze import landing
from jobs.core.tables import FILES
from jobs.lake import filesystem
from jobs.lake.context import Context
from jobs.privacy.person import Person
from jobs.reading import byte_streams, paths
from jobs.reading.elements import without_elements
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
        empty_lines=True,
    )
    ledger = {row["file"]: row for row in lake.small(FILES).to_pylist()}
    for path, size, modified in landing.landing_files(replace(context, day=None)):
        bad, edits, starts = _lines_of(fmt, path, person)
        if not bad and not edits:
            continue
        known = ledger.get(path)
        told = known is not None and (known["size"], known["modified_ms"]) == (size, modified)
        data = (
            _without_rows(fmt, path, bad, edits)
            if fmt.format == "parquet"
            else _without(fmt, path, bad, edits, starts)
        )
        _put(path, data)
        removed += len(bad) + len(edits)
        records = sum(bad.values()) + sum(map(len, edits.values()))
        if known is not None and told:
            size, modified = filesystem.facts(path)
            known |= {
                "size": size,
                "modified_ms": modified,
                "sha256": hashlib.sha256(data).hexdigest(),
                "lines": known["lines"] - records,
            }
            known["columns"] = list(dict(known["columns"] or ()).items())
            rows.append(tuple(known[name] for name in FILES.columns))
    if rows:
        lake.put_small(FILES, rows)
    return removed


Edits = dict[int, list[int]]
"""Line -> the places of the elements in it that are the person's, where others are not."""


def _lines_of(fmt: Format, path: str, person: Person) -> tuple[dict[int, int], Edits, list[int]]:
    """The lines at which the person's records begin, with how many read records they are; elements
    of lines that have others', too; and the lines at which any record does."""
    theirs: defaultdict[int, list[int | None]] = defaultdict(list)
    others: Counter[int] = Counter()
    starts: list[int] = []
    names = ("kind", "user_id", "raw", "line", "element")
    for batch in read_file(fmt, path, FileFacts(path)):
        for kind, user, raw, line, element in zip(
            *(batch.column(name).to_pylist() for name in names), strict=True
        ):
            starts.append(line)
            unclear = kind == "unparsable" or (user is None and fmt.computing is not None)
            if user == person.said or (unclear and person.stands_in(raw or "")):
                theirs[line].append(element)
            else:
                others[line] += 1
    # (Only in lists of JSON and of Parquet can single elements be taken out.)
    explode = fmt.computing.explode if fmt.computing else None
    partly = fmt.format == "parquet" or (
        fmt.format == "jsonl" and not (explode and explode.separator)
    )
    edits = {
        line: [one for one in places if one is not None]
        for line, places in theirs.items()
        if others[line] and partly
    }
    # (A line without elements is none of the lines read.)
    exploded = explode is not None
    bad = {
        line: sum(one is not None or not exploded for one in places) + others[line]
        for line, places in theirs.items()
        if line not in edits
    }
    return bad, edits, starts


def _without(fmt: Format, path: str, bad: dict[int, int], edits: Edits, starts: list[int]) -> bytes:
    """A text file without records; what is compressed stays compressed."""
    gone: set[int] = set()
    after = dict(zip(starts, [*starts[1:], 1 << 62], strict=True))
    spans = [(line, after[line]) for line in bad]
    with filesystem.open_binary(path) as raw:
        plain = byte_streams.decompressed(path, raw).read()
    bom = byte_streams.BOM if plain.startswith(byte_streams.BOM) else b""
    lines = [line for part in _text(plain, fmt.encoding) for line in part]
    for first, end in spans:
        gone.update(range(first, min(end, len(lines) + 1)))
    for number, places in edits.items():
        assert fmt.computing is not None and fmt.computing.explode is not None
        column = fmt.computing.explode.column
        lines[number - 1] = without_elements(lines[number - 1], column, places)
    kept = "".join(line for number, line in enumerate(lines, 1) if number not in gone)
    data = bom + kept.encode(fmt.encoding, "surrogateescape")
    if path.endswith(".gz"):
        return gzip.compress(data)
    if path.endswith(".bz2"):
        return bz2.compress(data)
    if path.endswith((".zst", ".zstd")):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as out:
            out.write(data)
        return bytes(sink.getvalue())
    return data


def _text(data: bytes, encoding: str) -> Iterator[list[str]]:
    yield from byte_streams.text_lines(io.BytesIO(data), encoding)


def _without_rows(fmt: Format, path: str, bad: dict[int, int], edits: Edits) -> bytes:
    with filesystem.open_seekable(path) as stream:
        rows = pq.ParquetFile(stream).read()
    if edits:
        assert fmt.computing is not None and fmt.computing.explode is not None
        column = fmt.computing.explode.column
        name = paths.root_of(rows.schema, column)
        inner = [] if name == column else [step for step, _ in paths.steps(column)][1:]
        values = rows[name].to_pylist()
        for line, places in edits.items():
            found = values[line - 1]
            for step in inner:
                found = found[step]
            for place in places:
                found[place - 1] = None
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.types[at]))
    kept = [number for number in range(rows.num_rows) if number + 1 not in bad]
    sink = pa.BufferOutputStream()
    pq.write_table(rows.take(pa.array(kept, pa.int64())), sink)
    return bytes(sink.getvalue())


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
