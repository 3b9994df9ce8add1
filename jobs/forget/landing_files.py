"""Takes a person's lines out of the landing files; what is compressed stays compressed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bronze import landing
from jobs.core.tables import FILES
from jobs.lake import filesystem
from jobs.lake.context import Context
from jobs.privacy.person import Person
from jobs.reading import byte_streams
from jobs.reading.readers import read_file
from jobs.reading.records import FileFacts, Format


def from_landing(context: Context, person: Person, theirs: Callable[[str], bool]) -> int:
    """Take the person's lines out of the landing files; how many there were.

    The ledger learns what the files are now, so that no line is read again for it.

    Args:
        theirs: whether an anonymous id of the log is one of theirs: so are its lines without a user.
    """
    lake, removed, rows = context.lake, 0, []
    # (Records that are too long for the tables are somebody's, too.)
    fmt = replace(
        landing.file_format(context.source),
        privacy=None,
        longest_record=sys.maxsize,
        longest_text=sys.maxsize,
    )
    ledger = {row["file"]: row for row in lake.small(FILES).to_pylist()}
    for path, size, modified in landing.landing_files(replace(context, day=None)):
        bad, starts = _lines_of(fmt, path, person, theirs)
        if not bad:
            continue
        known = ledger.get(path)
        told = known is not None and (known["size"], known["modified_ms"]) == (size, modified)
        data = (
            _without_rows(path, bad)
            if fmt.format == "parquet"
            else _without(fmt, path, bad, starts)
        )
        _put(path, data)
        removed += len(bad)
        if known is not None and told:
            size, modified = filesystem.facts(path)
            known |= {
                "size": size,
                "modified_ms": modified,
                "sha256": hashlib.sha256(data).hexdigest(),
                "lines": known["lines"] - len(bad),
            }
            known["columns"] = list(dict(known["columns"] or ()).items())
            rows.append(tuple(known[name] for name in FILES.columns))
    if rows:
        lake.put_small(FILES, rows)
    return removed


def _lines_of(
    fmt: Format, path: str, person: Person, theirs: Callable[[str], bool]
) -> tuple[list[int], list[int]]:
    """The lines at which the person's records begin, and those at which any record does."""
    bad, starts = [], []
    for batch in read_file(fmt, path, FileFacts(path)):
        columns = ("kind", "user_id", "anonymous_id", "raw", "line")
        for kind, user, name, raw, line in zip(
            *(batch.column(one).to_pylist() for one in columns), strict=True
        ):
            starts.append(line)
            alone = user is None and name is not None and theirs(name)
            if (
                user == person.said
                or alone
                or (kind == "unparsable" and person.stands_in(raw or ""))
            ):
                bad.append(line)
    return bad, starts


def _without(fmt: Format, path: str, bad: list[int], starts: list[int]) -> bytes:
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


def _without_rows(path: str, bad: list[int]) -> bytes:
    with filesystem.open_seekable(path) as stream:
        rows = pq.ParquetFile(stream).read()
    gone = set(bad)
    kept = [number for number in range(rows.num_rows) if number + 1 not in gone]
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
