"""Compressed files: recognised by their first bytes, whatever they are called.

gzip, bzip2, xz, LZ4 and Zstandard frames, snappy (the framing format, and Hadoop's blocks, which
have no magic, by the ending `.snappy`), and zip archives of one file. What has none of these
beginnings is read as it is, whatever its ending says.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import cramjam
import pyarrow as pa

from jobs.lake.filesystem import open_seekable
from jobs.records.records import Unusable

PEEKED = 512
SKIPPABLE = tuple(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))
"""Frames of LZ4 and Zstandard that hold nothing to decompress may come first."""
MAGIC = {
    "gz": (b"\x1f\x8b",),
    "bz2": tuple(
        b"BZh%d" % n + end
        for n in range(1, 10)
        for end in (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
    ),
    "xz": (b"\xfd7zXZ\x00",),
    "lz4": (b"\x04\x22\x4d\x18",),
    "zst": (b"\x28\xb5\x2f\xfd",),
    "snappy": (b"\xff\x06\x00\x00sNaPpY",),
    "zip": (b"PK\x03\x04", b"PK\x05\x06"),
}
OTHERS = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it, or deliver it as gzip, xz or zip",
    b"Rar!\x1a\x07": "a RAR archive: unpack it, or deliver it as gzip, xz or zip",
    b"\x1f\x9d": "compressed by compress (.Z): unpack it, or deliver it as gzip",
    b"\x1f\xa0": "compressed by pack: unpack it, or deliver it as gzip",
    b"LZIP\x01": "compressed by lzip: unpack it, or deliver it as xz",
    b"\x02\x21\x4c\x18": "in LZ4's legacy form: deliver it as an LZ4 frame (.lz4 of today's tools)",
    b"Obj\x01": "an Avro file: set source.format = 'avro'",
    b"SQLite format 3": "an SQLite database: export its table, as CSV for example",
}
BINARY = {
    b"PAR1": "a Parquet file: set source.format = 'parquet'",
    b"ORC": "an ORC file: set source.format = 'orc'",
}
"""A text may begin so, too, but has no zero bytes."""
TAR_AT = slice(257, 262)


def codec_of(path: str, head: bytes) -> str | None:
    """How a file is compressed; None: it is not.

    Args:
        head: its first `PEEKED` bytes.
    """
    for name, beginnings in MAGIC.items():
        if head.startswith(beginnings):
            return name
    if head.startswith(SKIPPABLE):
        return "lz4" if path.lower().endswith(".lz4") else "zst"
    if path.lower().endswith(".snappy") and head:
        return "hadoop-snappy"
    return None


def decompressed(path: str, raw: BinaryIO) -> tuple[BinaryIO, str | None]:
    """The bytes that a file holds, and how it is compressed (None: it is not).

    Args:
        raw: the file from its beginning, buffered (`peek`).

    Raises:
        Unusable: it is an archive of several files, or of a kind that is not read.
    """
    head = raw.peek(PEEKED)[:PEEKED]  # type: ignore[attr-defined]
    codec = codec_of(path, head)
    if codec == "zip":
        return _only_member(path), codec
    if codec is None:
        _refuse_others(path, head)
        return raw, None
    stream: Any
    if codec == "gz":
        stream = gzip.GzipFile(fileobj=raw)
    elif codec == "bz2":
        stream = bz2.BZ2File(raw)
    elif codec == "xz":
        stream = lzma.LZMAFile(raw)  # noqa: SIM115 (whoever reads it closes the file)
    elif codec in ("lz4", "zst"):
        kind = "zstd" if codec == "zst" else codec
        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), kind)
    else:
        blocks = _snappy_frames(raw) if codec == "snappy" else _hadoop_snappy(raw)
        stream = io.BufferedReader(Chunks(blocks))
    stream = io.BufferedReader(Pulled(stream))
    _refuse_others(path, stream.peek(PEEKED)[:PEEKED])
    return stream, codec


def _refuse_others(path: str, head: bytes) -> None:
    """Raises: Unusable: the bytes are no text."""
    known = OTHERS | BINARY if b"\0" in head else OTHERS
    for beginning, what in known.items():
        if head.startswith(beginning):
            raise Unusable(f"{path} is {what}")
    if head[TAR_AT] == b"ustar":
        raise Unusable(f"{path} is a tar archive: unpack it into the landing")


class Pulled(io.RawIOBase):
    """Reads from a stream that has `read` alone."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Chunks(io.RawIOBase):
    """A stream of pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.left = memoryview(piece)
        count = min(len(buffer), len(self.left))
        buffer[:count] = self.left[:count]
        self.left = self.left[count:]
        return count


def _exactly(raw: BinaryIO, count: int) -> bytes:
    data = raw.read(count)
    if len(data) != count:
        raise EOFError("the file ends inside a block")
    return data


def _snappy_frames(raw: BinaryIO) -> Iterator[bytes]:
    """The framing format: chunks of a kind and a length of three bytes; each has its checksum."""
    start = MAGIC["snappy"][0]
    while head := raw.read(4):
        if len(head) < 4:
            raise EOFError("the file ends inside a block")
        body = _exactly(raw, int.from_bytes(head[1:], "little"))
        if head[0] in (0, 1):
            try:
                yield bytes(cramjam.snappy.decompress(start + head + body))
            except cramjam.DecompressionError as error:
                raise OSError(f"a damaged snappy block: {error}") from error
        elif head[0] < 0x80:  # (from there on, chunks may be skipped)
            raise OSError(f"a chunk of the unknown kind {head[0]} in a snappy stream")


def _hadoop_snappy(raw: BinaryIO) -> Iterator[bytes]:
    """Hadoop's SnappyCodec: the length of a block, then chunks, each behind its own length."""
    while head := raw.read(4):
        if len(head) < 4:
            raise EOFError("the file ends inside a block")
        left = int.from_bytes(head, "big")
        while left > 0:
            packed = _exactly(raw, int.from_bytes(_exactly(raw, 4), "big"))
            try:
                piece = bytes(cramjam.snappy.decompress_raw(packed))
            except cramjam.DecompressionError as error:
                raise OSError(f"neither a snappy stream nor Hadoop's blocks: {error}") from error
            left -= len(piece)
            yield piece


def _only_member(path: str) -> BinaryIO:
    """The one file in a zip archive.

    Raises:
        Unusable: it has none or several, or is encrypted.
    """
    try:
        archive = zipfile.ZipFile(open_seekable(path))
    except zipfile.BadZipFile as error:
        raise EOFError(f"the zip archive is not whole: {error}") from error
    members = [one for one in archive.infolist() if not one.is_dir() and not _is_mac(one.filename)]
    if len(members) != 1:
        names = ", ".join(one.filename for one in members[:3])
        raise Unusable(
            f"{path} is a zip archive of {len(members)} files ({names or 'none'}), and one is read: "
            "unpack it into the landing"
        )
    if members[0].flag_bits & 1:
        raise Unusable(f"{path} is an encrypted zip archive: unpack it into the landing")
    try:
        stream = io.BufferedReader(archive.open(members[0]))  # type: ignore[type-var]
    except NotImplementedError as error:
        raise Unusable(f"{path}: {error}: unpack it into the landing") from error
    _refuse_others(f"{members[0].filename} in {path}", stream.peek(PEEKED)[:PEEKED])
    return stream  # type: ignore[return-value]


def _is_mac(name: str) -> bool:
    """What macOS puts beside each file of an archive."""
    return name.startswith("__MACOSX/")


def compressed(path: str, codec: str | None, data: bytes) -> bytes:
    """Bytes as a file of the codec that `decompressed` named."""
    if codec is None:
        return data
    if codec == "gz":
        return gzip.compress(data)
    if codec == "bz2":
        return bz2.compress(data)
    if codec == "xz":
        return lzma.compress(data)
    if codec == "snappy":
        return bytes(cramjam.snappy.compress(data))
    if codec == "hadoop-snappy":
        packed = bytes(cramjam.snappy.compress_raw(data))
        return len(data).to_bytes(4, "big") + len(packed).to_bytes(4, "big") + packed
    if codec == "zip":
        with zipfile.ZipFile(open_seekable(path)) as old:
            [member] = [
                one for one in old.infolist() if not one.is_dir() and not _is_mac(one.filename)
            ]
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", member.compress_type) as archive:
            archive.writestr(member.filename, data)
        return made.getvalue()
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd" if codec == "zst" else codec) as out:
        out.write(data)
    return bytes(sink.getvalue())
