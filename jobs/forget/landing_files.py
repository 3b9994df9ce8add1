"""Takes a person's lines out of the landing files; what is compressed stays compressed."""

from __future__ import annotations

import hashlib
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fastavro
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq

from jobs.bronze import landing
from jobs.core.source_log import TABLES_OF_OTHERS, TYPED
from jobs.core.tables import FILES
from jobs.lake import filesystem
from jobs.lake.context import Context
from jobs.privacy.person import Person
from jobs.reading.readers import read_file
from jobs.records import byte_streams, paths
from jobs.records.compression import compressed, decompressed
from jobs.records.elements import without_elements
from jobs.records.file_format import file_format
from jobs.records.records import FileFacts, Format


def from_landing(context: Context, person: Person, theirs: Callable[[str], bool]) -> int:
    """Take the person's lines out of the landing files; how many there were.

    The ledger learns what the files are now, so that no line is read again for it.

    Args:
        theirs: whether an anonymous id of the log is one of theirs: so are its lines without a user.
    """
    lake, removed, rows = context.lake, 0, []
    # (Records that are too long for the tables are somebody's, too.)
    fmt = replace(
        file_format(context.source),
        privacy=None,
        longest_record=sys.maxsize,
        longest_text=sys.maxsize,
        empty_lines=True,
    )
    if context.source.source.format in TABLES_OF_OTHERS:
        return 0  # (a table of others: whoever writes it deletes the rows)
    ledger = {row["file"]: row for row in lake.small(FILES).to_pylist()}
    for path, size, modified in landing.landing_files(replace(context, day=None)):
        data, gone, records = without_person(fmt, path, person, theirs)
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
                "lines": known["lines"] - records,
            }
            known["columns"] = list(dict(known["columns"] or ()).items())
            rows.append(tuple(known.get(name) for name in FILES.columns))
    if rows:
        lake.create(FILES)  # (with the columns of today)
        lake.put_small(FILES, rows)
    return removed


Edits = dict[int, list[int]]
"""Line -> the places of the elements in it that are the person's, where others are not."""
IsTheirs = Callable[[str], bool]
"""Whether an anonymous id of the log is the person's."""


def without_person(
    fmt: Format, path: str, person: Person, is_theirs: IsTheirs = lambda _: False
) -> tuple[bytes, int, int]:
    """A file without the person's records, in how many lines they were, and how many records that
    were read are gone with them; none: no bytes."""
    bad, edits, starts = _lines_of(fmt, path, person, is_theirs)
    if not bad and not edits:
        return b"", 0, 0
    if fmt.format in TYPED:
        data = _without_rows(fmt, path, bad, edits)
    elif fmt.format == "json":
        data = _without_objects(fmt, path, person, is_theirs)
    else:
        data = _without(fmt, path, bad, edits, starts)
    return data, len(bad) + len(edits), sum(bad.values()) + sum(map(len, edits.values()))


def _lines_of(
    fmt: Format, path: str, person: Person, is_theirs: IsTheirs
) -> tuple[dict[int, int], Edits, list[int]]:
    """The lines at which the person's records begin, with how many read records they are; elements
    of lines that have others', too; and the lines at which any record does."""
    theirs: defaultdict[int, list[int | None]] = defaultdict(list)
    others: Counter[int] = Counter()
    starts: list[int] = []
    for batch in read_file(fmt, path, FileFacts(path)):
        whose = _whose(fmt, person, is_theirs, batch)
        places = zip(whose, batch["line"].to_pylist(), batch["element"].to_pylist(), strict=True)
        for mine, line, element in places:
            starts.append(line)
            if mine:
                theirs[line].append(element)
            else:
                others[line] += 1
    edits = {
        line: [one for one in places if one is not None]
        for line, places in theirs.items()
        if others[line] and _partly(fmt)
    }
    # (A line without elements is none of the lines read.)
    exploded = fmt.computing is not None and fmt.computing.explode is not None
    bad = {
        line: sum(one is not None or not exploded for one in places) + others[line]
        for line, places in theirs.items()
        if line not in edits
    }
    return bad, edits, starts


def _partly(fmt: Format) -> bool:
    """Whether single elements of a line can be taken out: those of lists, not of a text."""
    explode = fmt.computing.explode if fmt.computing else None
    text = explode is not None and bool(explode.separator)
    return fmt.has_types or (fmt.format in ("jsonl", "json") and not text)


def _whose(
    fmt: Format, person: Person, is_theirs: IsTheirs, batch: pa.RecordBatch
) -> Iterator[bool]:
    """Whether each record is the person's: by the user, by an anonymous id without one, or by the
    text of a line whose person is not known."""
    names = ("kind", "user_id", "anonymous_id", "raw")
    for kind, user, name, raw in zip(*(batch[one].to_pylist() for one in names), strict=True):
        unclear = kind == "unparsable" or (
            user is None and name is None and fmt.computing is not None
        )
        yield (
            user == person.said
            or (user is None and name is not None and is_theirs(name))
            or (unclear and person.stands_in(raw or ""))
        )


def _without(fmt: Format, path: str, bad: dict[int, int], edits: Edits, starts: list[int]) -> bytes:
    """A text file without records; what is compressed stays compressed."""
    gone: set[int] = set()
    after = dict(zip(starts, [*starts[1:], 1 << 62], strict=True))
    # (Only records of a CSV have several lines; between others may be what the log says of itself.)
    spans = [(line, after[line] if fmt.format == "csv" else line + 1) for line in bad]
    with filesystem.open_binary(path) as raw:
        stream, codec = decompressed(path, io.BufferedReader(raw))  # type: ignore[type-var,arg-type]
        plain = stream.read()
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
    return compressed(path, codec, data)


def _text(data: bytes, encoding: str) -> Iterator[list[str]]:
    yield from byte_streams.text_lines(io.BytesIO(data), encoding)


def _without_objects(fmt: Format, path: str, person: Person, is_theirs: IsTheirs) -> bytes:
    """A file of JSON without objects, or elements of them: an array of the others, as they were
    written."""
    # (Two objects may begin in one line; the elements of one follow each other.)
    objects: list[tuple[tuple[int, str], list[tuple[bool, int | None]]]] = []
    for batch in read_file(fmt, path, FileFacts(path)):
        whose = _whose(fmt, person, is_theirs, batch)
        columns = (batch[one].to_pylist() for one in ("raw", "line", "element"))
        for theirs, raw, line, element in zip(whose, *columns, strict=True):
            seen = objects and element is not None and objects[-1][1][-1][1] is not None
            if seen and objects[-1][0] == (line, raw) and element > objects[-1][1][-1][1]:
                objects[-1][1].append((theirs, element))
            else:
                objects.append(((line, raw), [(theirs, element)]))
    kept = []
    for (_, raw), found in objects:
        places = [element for theirs, element in found if theirs and element is not None]
        if not any(theirs for theirs, _ in found):
            kept.append(raw)
        elif 0 < len(places) < len(found) and _partly(fmt):
            assert fmt.computing is not None and fmt.computing.explode is not None
            kept.append(without_elements(raw, fmt.computing.explode.column, places))
    with filesystem.open_binary(path) as raw:
        _, codec = decompressed(path, io.BufferedReader(raw))  # type: ignore[type-var,arg-type]
    text = "[\n" + ",\n".join(kept) + "\n]\n"
    return compressed(path, codec, text.encode(fmt.encoding, "surrogateescape"))


def _without_rows(fmt: Format, path: str, bad: dict[int, int], edits: Edits) -> bytes:
    """A file whose rows have types, without some of them, or some of their elements."""
    if fmt.format == "avro":
        return _without_records(path, set(bad))
    with filesystem.open_seekable(path) as stream:
        rows = orc.ORCFile(stream).read() if fmt.format == "orc" else pq.ParquetFile(stream).read()
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
