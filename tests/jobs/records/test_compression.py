"""Compressed files by their first bytes, whatever their names say."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import cramjam
import pyarrow as pa
import pytest

from jobs.reading.readers import read_file
from jobs.records import compression
from jobs.records.records import FileFacts, Format

CSV = Format("csv", {"user_id": "u", "item_id": "i", "event_ts": "t"})
LINES = 30_000
DATA = b"u,i,t\n" + b"".join(b"u%d,i%d,%d\n" % (n, n % 77, n) for n in range(LINES))


def framed(codec: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as out:
            out.write(data)
        return bytes(sink.getvalue())

    return pack


def zipped(data: bytes, *names: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        archive.writestr("__MACOSX/._log.csv", b"\0")
        for name in names or ("folder/log.csv",):
            archive.writestr(name, data)
    return made.getvalue()


def hadoop(data: bytes) -> bytes:
    made = b""
    for at in range(0, len(data), 100_000):
        block = data[at : at + 100_000]
        made += len(block).to_bytes(4, "big")
        for half in (block[:60_000], block[60_000:]):
            if half:
                packed = bytes(cramjam.snappy.compress_raw(half))
                made += len(packed).to_bytes(4, "big") + packed
    return made


SKIPPED = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "lz4": framed("lz4"),
    "zstd": framed("zstd"), "snappy": lambda data: bytes(cramjam.snappy.compress(data)),
    "zip": zipped, "two gzips": lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
    "two zstds": lambda data: framed("zstd")(data[:999]) + framed("zstd")(data[999:]),
    "zstd after a skippable frame": lambda data: SKIPPED + framed("zstd")(data),
}  # fmt: skip


def read(path: Path, data: bytes) -> tuple[int, FileFacts]:
    path.write_bytes(data)
    facts = FileFacts(str(path))
    return sum(batch.num_rows for batch in read_file(CSV, str(path), facts)), facts


@pytest.mark.parametrize("name", ["log", "log.csv", "LOG.GZ", "log.csv.bz2"])
@pytest.mark.parametrize("codec", PACKED)
def test_whatever_the_name(tmp_path: Path, codec: str, name: str) -> None:
    data = PACKED[codec](DATA)
    count, facts = read(tmp_path / name, data)
    assert count == LINES and facts.error is None
    assert facts.size == len(data)


def test_hadoops_snappy_by_its_ending(tmp_path: Path) -> None:
    for name in ("part-0.snappy", "part-0.SNAPPY"):
        assert read(tmp_path / name, hadoop(DATA))[0] == LINES
    assert "damaged" not in (read(tmp_path / "a.snappy", b"u,i,t\n")[1].error or "")
    assert "a.snappy cannot be read as csv" in (
        read(tmp_path / "a.snappy", b"u,i,t\n")[1].error or ""
    )


def test_plain_text_with_an_ending_of_a_codec_is_plain_text(tmp_path: Path) -> None:
    for name in ("log.gz", "log.ZST", "log.zip"):
        assert read(tmp_path / name, DATA)[0] == LINES
        assert read(tmp_path / name, b"")[0] == 0


@pytest.mark.parametrize("codec", PACKED)
def test_what_is_cut_short_is_an_error_of_its_file(tmp_path: Path, codec: str) -> None:
    _, facts = read(tmp_path / "log", PACKED[codec](DATA)[:-7])
    assert "log cannot be read as csv" in (facts.error or "") and "fault of" not in (
        facts.error or ""
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            zipped(DATA, "a.csv", "b.csv"),
            "a zip archive of 2 files (a.csv, b.csv), and one is read",
        ),
        (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive"),
        (b"PAR1\x15\0", "is a Parquet file: set source.format = 'parquet'"),
        (gzip.compress(b"log.csv".ljust(257, b"\0") + b"ustar\x0000", mtime=0), "is a tar archive"),
        (gzip.compress(b"ORC\n\3\0\0", mtime=0), "is an ORC file"),
    ],
)
def test_archives_and_other_formats_are_named(tmp_path: Path, data: bytes, said: str) -> None:
    assert said in (read(tmp_path / "log.csv.gz", data)[1].error or "")


@pytest.mark.parametrize("head", [b"ORC,i,t\n", b"PAR1,i,t\n", b"PKID,i,t\n"])
def test_a_header_that_begins_like_a_format_is_text(tmp_path: Path, head: bytes) -> None:
    _, facts = read(tmp_path / "log.csv", head + b"a,b,1\n")
    assert "has no column 'u'" in (facts.error or "")


@pytest.mark.parametrize("codec", [*PACKED, "hadoop", "none"])
def test_what_is_compressed_stays_compressed(tmp_path: Path, codec: str) -> None:
    path = tmp_path / ("log.snappy" if codec == "hadoop" else "log")
    pack = {"hadoop": hadoop, "none": bytes}.get(codec) or PACKED[codec]
    path.write_bytes(pack(DATA))
    with path.open("rb") as raw:
        stream, name = compression.decompressed(str(path), raw)
        assert stream.read() == DATA
    again = compression.compressed(str(path), name, DATA[:600])
    assert read(path, again)[1].error is None
    with path.open("rb") as raw:
        stream, then = compression.decompressed(str(path), raw)
        assert then == name and stream.read() == DATA[:600]
