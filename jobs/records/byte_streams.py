"""Streams of landed files: hashed, decompressed, cut at line ends."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, AnyStr, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv

BATCH_LINES = 20_000
BLOCK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


def is_utf8(encoding: str) -> bool:
    """Whether an encoding's name is one of UTF-8's."""
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8")


class Hashing(io.RawIOBase):
    """A binary stream that hashes what passes through it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw_stream, self.digest, self.size = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.raw_stream.read(len(buffer))
        buffer[: len(data)] = data
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def shortened(parts: Iterable[AnyStr], most: int | None) -> Iterator[AnyStr]:
    """The parts of a text, without most of what a line has beyond `most` bytes or characters.

    A line that is longer stays longer by at most one part, so it can still be seen to be too long;
    a line without an end, however long, is not held in memory. None: nothing is left out.
    """
    size = 0  # of the line that has not ended yet
    for part in parts:
        newline, returned = ("\n", "\r") if isinstance(part, str) else (b"\n", b"\r")
        if most is not None and size > most:
            ends = [at for at in (part.find(newline), part.find(returned)) if at >= 0]
            if not ends:
                continue
            part = part[min(ends) :]
        last = max(part.rfind(newline), part.rfind(returned))
        size = size + len(part) if last < 0 else len(part) - 1 - last
        yield part


Waits = Callable[[], bool]
"""Whether a last line without an end is left for a later reading of its file; counts it."""


def whole_lines(parts: Iterable[AnyStr], waits: Waits | None = None) -> Iterator[AnyStr]:
    """The parts of a text, cut at line ends instead: each is whole physical lines.

    Args:
        waits: asked if the last line has no end; None: it is a line like the others.
    """
    left: list[AnyStr] = []
    for part in parts:
        newline, returned = ("\n", "\r") if isinstance(part, str) else (b"\n", b"\r")
        # (Files whose lines end with a carriage return alone are cut at those.)
        cut = part.rfind(newline) + 1 or part.rfind(returned, 0, len(part) - 1) + 1
        if cut:
            left.append(part[:cut])
            yield part[:0].join(left)
            left = [part[cut:]]
        else:
            left.append(part)
    if any(left):
        rest = left[0][:0].join(left)
        if waits is not None:
            rest = _without_open_line(rest, waits)
        if rest:
            yield rest


def _without_open_line(rest: AnyStr, waits: Waits) -> AnyStr:
    newline, returned = ("\n", "\r") if isinstance(rest, str) else (b"\n", b"\r")
    cut = max(rest.rfind(newline), rest.rfind(returned)) + 1
    return rest[:cut] if rest[cut:].strip() and waits() else rest


def text_of(stream: BinaryIO, encoding: str) -> io.TextIOWrapper:
    """A stream as text, its byte-order mark dropped; bytes that are no text stay as surrogates."""
    codec = "utf-8-sig" if is_utf8(encoding) else encoding
    return io.TextIOWrapper(
        io.BufferedReader(stream, 1 << 20),  # type: ignore[type-var]
        encoding=codec,
        errors="surrogateescape",
        newline="",
    )


def text_lines(
    stream: BinaryIO, encoding: str, most: int | None = None, waits: Waits | None = None
) -> Iterator[list[str]]:
    """Batches of physical lines with their ends; bytes that are no text stay as surrogates.

    Args:
        most: as in `shortened`, in characters.
        waits: as in `whole_lines`.
    """
    text = text_of(stream, encoding)
    parts = iter(lambda: text.read(BLOCK_BYTES), "")
    for lines in whole_lines(shortened(parts, most), waits):
        yield io.StringIO(lines, newline="").readlines()


class Block:
    """Whole physical lines of a UTF-8 file, as bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @staticmethod
    def of(lines: list[str]) -> Block:
        return Block("".join(lines).encode("utf-8", "surrogateescape"))

    def lines(self) -> list[str]:
        """As `text_lines` would give them."""
        text = self.data.decode("utf-8", "surrogateescape")
        return io.StringIO(text, newline="").readlines()

    def has_line(self, beginning: str) -> bool:
        """Whether a line may begin so."""
        start = beginning.encode()
        return self.data.startswith(start) or b"\n" + start in self.data

    @property
    def plain(self) -> bool:
        """UTF-8 without blank lines, and line ends but newlines."""
        data = self.data
        lone = data.count(b"\r") != data.count(b"\r\n")
        blank = data[:1] in b"\r\n" or b"\n\n" in data or b"\n\r\n" in data
        if lone or blank or data.startswith(BOM):
            return False
        if not data.isascii():
            try:
                data.decode("utf-8")
            except UnicodeError:
                return False
        return True

    def raw(self) -> pa.Array:
        """The lines with their ends, without a copy."""
        ends = np.flatnonzero(np.frombuffer(self.data, np.uint8) == 10) + 1
        if not self.data.endswith(b"\n"):
            ends = np.append(ends, len(self.data))
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        return pa.StringArray.from_buffers(
            len(ends), pa.py_buffer(offsets), pa.py_buffer(self.data)
        )


def fields(
    lines: pa.Array, delimiter: str, count: int, places: Iterable[int]
) -> tuple[dict[int, pa.Array], np.ndarray]:
    """Some of the `count` fields of lines without quotes, where there are so many.

    Args:
        lines: physical lines with their ends, none of them blank.

    Returns:
        The fields by their place, of the lines that have `count`; and which lines those are.
    """
    names = [str(place) for place in range(count)]
    wanted = [str(place) for place in sorted(set(places))]
    good = np.ones(len(lines), bool)
    if not len(lines):
        return {int(name): pa.array([], pa.string()) for name in wanted}, good

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        good[row.number - 1] = False
        return "skip"

    _, ends, data = lines.buffers()
    data = data[: np.frombuffer(ends, np.int32)[len(lines)]]
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        pyarrow.csv.ReadOptions(column_names=names, use_threads=False, block_size=data.size + 1),
        pyarrow.csv.ParseOptions(
            delimiter=delimiter,
            quote_char=False,
            ignore_empty_lines=False,
            invalid_row_handler=skip,
        ),
        pyarrow.csv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(wanted, pa.string()),
            strings_can_be_null=False,
        ),
    )
    return {int(name): table[name].combine_chunks() for name in wanted}, good


def byte_blocks(
    stream: BinaryIO, most: int | None = None, waits: Waits | None = None
) -> Iterator[Block]:
    """A UTF-8 stream cut at line ends, its byte-order mark dropped.

    Args:
        most: as in `shortened`, in characters.
        waits: as in `whole_lines`.
    """

    def parts() -> Iterator[bytes]:
        first = True
        while data := stream.read(BLOCK_BYTES):
            yield data.removeprefix(BOM) if first else data
            first = False

    longest = None if most is None else most * 4  # bytes: a character has at most four
    for data in whole_lines(shortened(parts(), longest), waits):
        yield Block(data)


def pieces(
    stream: BinaryIO, encoding: str, most: int | None = None, waits: Waits | None = None
) -> Iterator[Block | list[str]]:
    """A text file in pieces of whole lines: bytes where they can be cut as bytes."""
    if is_utf8(encoding):
        yield from byte_blocks(stream, most, waits)
    else:
        yield from text_lines(stream, encoding, most, waits)


def has_broken_bytes(line: str) -> bool:
    return not line.isascii() and any("\ud800" <= char <= "\udfff" for char in line)


def printable(line: str) -> str:
    """A line as it may be stored: without its end, undecodable bytes as backslash escapes."""
    line = line.rstrip("\r\n")
    if has_broken_bytes(line):
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return line
