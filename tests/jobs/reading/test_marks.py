"""CSV with marks of its own, web logs with the server first, last lines without an end."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.core.errors import SourceError
from jobs.core.source_file import load_source
from jobs.reading import csv_reader
from jobs.reading.readers import read_file
from jobs.reading.stored import record_of
from jobs.records import byte_streams
from jobs.records.records import FileFacts, Format

MAPPED = {"user_id": "u", "item_id": "i", "event_ts": "t"}
CSV = Format("csv", MAPPED)


def read(fmt: Format, path: Path) -> tuple[list[dict[str, Any]], FileFacts]:
    facts = FileFacts(str(path))
    rows = [row for batch in read_file(fmt, str(path), facts) for row in batch.to_pylist()]
    return rows, facts


def write(tmp_path: Path, data: bytes | str, name: str = "log.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def fields(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["line"], row["user_id"], row["item_id"], row["event_ts"]) for row in rows]


# -- quotes, escapes, comments --------------------------------------------------------------------

TITLES = 'u1\t17\t"Foo\nu2\t18\tBar\nu3\t19\tBaz\nu4\t20\tQux"\nu5\t21\tEnd\n'
PLACES = {"user_id": "_0", "item_id": "_2", "event_ts": "_1"}
TAB = Format("csv", PLACES, delimiter="\t", header=False)


def test_a_lone_quote_is_a_text_like_another_where_nothing_is_quoted(tmp_path: Path) -> None:
    rows, facts = read(replace(TAB, quote=""), write(tmp_path, TITLES))
    assert fields(rows) == [
        (1, "u1", '"Foo', "17"), (2, "u2", "Bar", "18"), (3, "u3", "Baz", "19"),
        (4, "u4", 'Qux"', "20"), (5, "u5", "End", "21"),
    ]  # fmt: skip
    assert facts.lines == 5 and facts.swallowed == 0


def test_a_quoted_field_that_swallows_records_is_counted(tmp_path: Path) -> None:
    rows, facts = read(TAB, write(tmp_path, TITLES))
    assert len(rows) == 2 and (facts.swallowed, facts.first_swallowed) == (1, 1)
    harmless = 'u,i,t\n1,"a\nb, c and d, or e, f",2\n3,"two\r\nlines",4\n'
    rows, facts = read(CSV, write(tmp_path, harmless))
    assert len(rows) == 2 and facts.swallowed == 0


def test_another_quote_and_an_escape(tmp_path: Path) -> None:
    fmt = replace(CSV, quote="'", escape="\\")
    text = "u,i,t\n1,'a, ''b'' \\'c\\'',2\n2,x\\,y,3\n3,\"z\",\\N\n4,'line\\\nbreak',5\n\\N,N,6\n"
    rows, facts = read(fmt, write(tmp_path, text))
    assert fields(rows) == [
        (2, "1", "a, 'b' 'c'", "2"), (3, "2", "x,y", "3"), (4, "3", '"z"', "\\N"),
        (5, "4", "line\nbreak", "5"), (7, "\\N", "N", "6"),
    ]  # fmt: skip
    again = record_of(fmt, rows[1]["raw"], "f", 3, facts.columns, facts.header)
    assert again["item_id"] == "x,y"


def test_comments_are_no_lines(tmp_path: Path) -> None:
    fmt = replace(CSV, comment="#")
    text = '#made\n\nu,i,t\n1,a,2\n# "open\n#x\n3,"b\n#c",4\n5,d,6\n#end'
    rows, facts = read(fmt, write(tmp_path, text))
    assert fields(rows) == [(4, "1", "a", "2"), (7, "3", "b\n#c", "4"), (9, "5", "d", "6")]
    assert facts.lines == 3 and facts.header == ["u", "i", "t"]


MARKED = st.sampled_from(
    ["1", "x y", "'a,b'", "'a''b'", "'", "\\", "\\'", "\\,", "\\N", "\\\n", '"', '"a', "#", "#c\n",
     ",", "\n", "\r\n", "'a\nb'", "7,i7,7\n", "8,'i8',8\n"]
)  # fmt: skip


@pytest.mark.parametrize("delimiter", [",", "::"])
@pytest.mark.parametrize(("quote", "escape"), [("'", "\\"), ("", "\\"), ("", ""), ("'", "'")])
@given(
    pieces=st.lists(MARKED, max_size=30), size=st.integers(1, 6), block=st.integers(4, 60),
    comment=st.sampled_from(["", "#"]),
)  # fmt: skip
@settings(max_examples=120, deadline=None, derandomize=True)
def test_blocks_columns_and_single_lines_agree_whatever_the_marks(
    delimiter: str, quote: str, escape: str, pieces: list[str], size: int, block: int, comment: str
) -> None:
    import io

    fmt = Format("csv", MAPPED, delimiter, quote=quote, escape=escape, comment=comment)
    regular = "".join(f"{n},i{n},{n}\n" for n in range(size))
    text = ("u,i,t\n" + regular + "".join(pieces) + "\n" + regular).replace(",", delimiter)

    def rows() -> list[Any]:
        facts = FileFacts("log.csv")
        batches = csv_reader.read_csv(fmt, io.BytesIO(text.encode()), facts)
        return [*(row for batch in batches for row in batch.to_pylist()), vars(facts)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_streams, "BATCH_LINES", size)
        slow_lines = byte_streams.text_lines
        patch.setattr(byte_streams, "BLOCK_BYTES", block)
        quick = rows()
        patch.setattr(byte_streams.Block, "plain", False)
        by_columns = rows()
        patch.setattr(csv_reader.CsvRecords, "columns", lambda *_: None)
        patch.setattr(byte_streams, "pieces", slow_lines)
        assert quick == by_columns == rows()


SOURCE = """
[source]
name = "log"
landing = "l/*"
format = "{format}"
{more}
[columns]
user_id = "{user}"
item_id = "path"
event_ts = "time"
"""


@pytest.mark.parametrize(
    ("form", "more", "said"),
    [
        ("jsonl", 'quote = ""', "source.quote = '' is for format = 'csv' only"),
        ("combined_log", 'decimal = ","', "source.decimal = ',' is for format = 'csv' only"),
        ("csv", "quote = ','", "source.quote = ',' is a line end or part of source.delimiter"),
        (
            "vhost_combined",
            "",
            "columns.user_id = 'client': a vhost_combined has no such column: use one of vhost",
        ),
    ],
)
def test_marks_that_mean_nothing_are_refused(
    tmp_path: Path, form: str, more: str, said: str
) -> None:
    user = "client" if form == "vhost_combined" else "host"
    path = write(tmp_path, SOURCE.format(format=form, more=more, user=user), "log.toml")
    with pytest.raises(SourceError) as error:
        load_source(str(path))
    assert said in str(error.value)


# -- web logs -------------------------------------------------------------------------------------

HITS = [
    '{}203.0.113.{} - - [01/Jun/2024:10:0{}:00 +0200] "GET /p/{} HTTP/1.1" 200 5 "-" "x"\n',
    '{}2001:db8::{} - john doe [01/Jun/2024:10:0{}:00 +0200] "GET /p/{} HTTP/1.1" 200 -\n',
]
WEB = {"user_id": "host", "item_id": "path", "event_ts": "time", "event_type": "user"}


def hits(server: str) -> str:
    return "".join(HITS[n % 2].format(server, n, n, n) for n in range(4))


@pytest.mark.parametrize("server", ["shop.example:443 ", "[2001:db8::9]:80 ", "shop.example "])
def test_the_client_of_a_vhost_log_is_not_the_server(tmp_path: Path, server: str) -> None:
    path = write(tmp_path, hits(server), "other_vhosts_access.log")
    rows, facts = read(Format("combined_log", WEB), path)
    assert rows == [] and "looks like vhost_combined" in (facts.error or "")
    assert "source.format = 'vhost_combined'" in (facts.error or "")
    fmt = Format("vhost_combined", {**WEB, "source_session_id": "vhost", "value": "port"})
    rows, facts = read(fmt, path)
    assert [row["user_id"] for row in rows] == [
        "203.0.113.0", "2001:db8::1", "203.0.113.2", "2001:db8::3",
    ]  # fmt: skip
    assert [row["event_type"] for row in rows] == [None, "john doe"] * 2
    assert {row["source_session_id"] for row in rows} == {
        server.strip().removesuffix(":443").removesuffix(":80")
    }


def test_combined_logs_of_every_kind_of_client_are_combined(tmp_path: Path) -> None:
    text = hits("") + 'host7.example - - [01/Jun/2024:10:00:00 +0200] "GET / HTTP/1.1" 200 5\n'
    path = write(tmp_path, text + hits("shop.example:443 "), "access.log")
    rows, facts = read(Format("combined_log", WEB), path)
    assert [row["user_id"] for row in rows] == [
        "203.0.113.0", "2001:db8::1", "203.0.113.2", "2001:db8::3", "host7.example", *[None] * 4,
    ]  # fmt: skip
    assert [row["kind"] for row in rows[5:]] == ["unparsable"] * 4 and facts.error is None
    rows, _ = read(Format("vhost_combined", WEB), write(tmp_path, hits(""), "a.log"))
    assert rows[0]["kind"] == "unparsable"


# -- last lines -----------------------------------------------------------------------------------

YOUNG = 3600


def waiting(fmt: Format) -> Format:
    return replace(fmt, partial_since=round((time.time() - YOUNG) * 1000))


@pytest.mark.parametrize("form", ["csv", "latin", "jsonl", "crlf"])
def test_a_last_line_without_an_end_waits_while_its_file_is_young(
    tmp_path: Path, form: str
) -> None:
    lines = ["u,i,t", "a,x,17", "b,y,1"]
    fmt = waiting(CSV)
    if form == "jsonl":
        lines = ['{"u": "a", "i": "x", "t": 17}', '{"u": "b", "i": "y", "t": 1']
        fmt = waiting(Format("jsonl", MAPPED))
    if form == "latin":
        fmt = replace(fmt, encoding="latin-1")
    path = write(tmp_path, ("\r\n" if form == "crlf" else "\n").join(lines))
    rows, facts = read(fmt, path)
    assert [row["user_id"] for row in rows] == ["a"]
    assert (facts.lines, facts.waiting) == (1, 1)
    old = time.time() - YOUNG - 5
    os.utime(path, (old, old))
    rows, facts = read(fmt, path)
    assert (len(rows), facts.lines, facts.waiting) == (2, 2, 0)
    path.write_bytes(path.read_bytes() + b"\n")  # its end has come
    assert read(fmt, path)[1].waiting == 0
    rows, facts = read(replace(fmt, partial_since=None), path)
    assert (len(rows), facts.waiting) == (2, 0)


def test_what_waits_is_the_whole_record_and_nothing_else(tmp_path: Path) -> None:
    fmt = waiting(CSV)
    rows, facts = read(fmt, write(tmp_path, 'u,i,t\n1,a,2\n3,"b\nc'))
    assert fields(rows) == [(2, "1", "a", "2")] and (facts.lines, facts.waiting) == (1, 1)
    # A quote that is not closed, in a file that ends with a line, is what it was.
    rows, facts = read(fmt, write(tmp_path, 'u,i,t\n1,a,2\n3,"b\nc\n'))
    assert [row["kind"] for row in rows] == ["record", "unparsable", "unparsable"]
    assert facts.waiting == 0
    for whole in ("u,i,t\n", "u,i,t\n1,a,2\n", "u,i,t\n1,a,2\n  ", ""):
        assert read(fmt, write(tmp_path, whole))[1].waiting == 0
    rows, facts = read(fmt, write(tmp_path, "u,i"))  # not even the header is whole
    assert rows == [] and facts.error is None and facts.waiting == 1


def test_compressed_files_end_whole(tmp_path: Path) -> None:
    import gzip

    path = write(tmp_path, gzip.compress(b"u,i,t\n1,a,2\n3,b,4"), "log.csv.gz")
    rows, facts = read(waiting(CSV), path)
    assert len(rows) == 2 and facts.waiting == 0
