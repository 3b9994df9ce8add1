"""Records out of files: quotes, breaks, encodings, compressions; nothing typed yet."""

import bz2
import gzip
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.privacy.pseudonyms import Privacy
from jobs.reading import csv_reader, readers
from jobs.reading.readers import read_file
from jobs.reading.stored import record_of
from jobs.records import byte_streams, records
from jobs.records.ranges import Range
from jobs.records.records import FileFacts, Format

MAPPED = {"user_id": "u", "item_id": "i", "event_ts": "t"}
CSV = Format("csv", MAPPED)


def read(fmt: Format, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    facts = FileFacts(str(path))
    rows = [row for batch in read_file(fmt, str(path), facts) for row in batch.to_pylist()]
    return rows, vars(facts)


def write(tmp_path: Path, data: bytes, name: str = "log.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def fields(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["line"], row["user_id"], row["item_id"], row["event_ts"]) for row in rows]


def test_commas_quotes_and_line_breaks_inside_quotes(tmp_path: Path) -> None:
    rows, facts = read(CSV, write(tmp_path, b'u,i,t\r\n1,"a, ""b""\nc",3\r\n\r\n-9,x,4\r\n'))
    assert fields(rows) == [(2, "1", 'a, "b"\nc', "3"), (5, "-9", "x", "4")]
    assert rows[0]["raw"] == '1,"a, ""b""\nc",3'
    assert facts["lines"] == 2 and facts["columns"] == {"u": "text", "i": "text", "t": "text"}


def test_an_unclosed_quote_costs_its_own_line_only(tmp_path: Path) -> None:
    rows, facts = read(CSV, write(tmp_path, b'u,i,t\n1,"x,2\n3,y,4\n5,"z"w,6\n7,"q",8'))
    assert [(row["kind"], row["line"]) for row in rows] == [
        ("unparsable", 2), ("record", 3), ("unparsable", 4), ("record", 5),
    ]  # fmt: skip
    assert rows[0]["raw"] == '1,"x,2' and facts["lines"] == 4


def test_too_few_and_too_many_fields_are_no_records(tmp_path: Path) -> None:
    rows, _ = read(CSV, write(tmp_path, b"u,i,t\n1,2\n1,2,3,4\n1,2,3\n"))
    assert [row["kind"] for row in rows] == ["unparsable", "unparsable", "record"]


def test_quoted_records_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_streams, "BATCH_LINES", 2)
    text = "u,i,t\n" + "".join(f'{n},"item\n{n}",{n}\n' for n in range(20))
    rows, facts = read(CSV, write(tmp_path, text.encode()))
    assert fields(rows) == [(2 + 2 * n, str(n), f"item\n{n}", str(n)) for n in range(20)]
    assert facts["lines"] == 20


PIECES = st.sampled_from(
    ["1", "", "x y", '"a,b"', '"a""b"', '"a\nb"', '"', "é", "\udce9", ",", "\t", "\n", "\r\n", "NA",
     "\r", "\ufeff", "7,i7,7\n", "8,é,8\n", "9,i9,9\r\n"]
)  # fmt: skip


@pytest.mark.parametrize("delimiter", [",", "\t", "::"])
@given(
    pieces=st.lists(PIECES, max_size=40), size=st.integers(1, 6), block=st.integers(4, 90),
    mark=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True)
def test_blocks_and_columns_give_the_records_of_lines_taken_one_by_one(
    delimiter: str, pieces: list[str], size: int, block: int, mark: bool
) -> None:
    fmt = Format("csv", {**MAPPED, "exposed_with": "i"}, delimiter, null_values=frozenset(["NA"]))
    regular = "".join(f"{n},i{n}|NA,{n}\n" for n in range(size))
    text = ("u,i,t\n" + regular + "".join(pieces) + "\n" + regular).replace(",", delimiter)
    data = b"\xef\xbb\xbf" * mark + text.encode("utf-8", "surrogateescape")

    def rows() -> list[dict[str, Any]]:
        facts = records.FileFacts("log.csv")
        batches = csv_reader.read_csv(fmt, io.BytesIO(data), facts)
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


def test_lines_of_forgotten_people_are_counted_apart_in_the_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        write(tmp_path, b"u,i,t\nann,1,2\nbob,3,4\nann of bob,5\n", "a.csv"),
        write(tmp_path, b"u,i,t\nbob,5,6\n", "b.csv"),
    ]
    secret = Privacy(b"k" * 32, "clicks", False, frozenset())
    ann = replace(secret, forgotten=frozenset([secret.pseudonym("ann")]))
    monkeypatch.setattr(readers, "_attempt", lambda: 7)
    frame = pa.RecordBatch.from_pylist([asdict(Range(str(path))) for path in paths])
    batches = readers.reader(replace(CSV, privacy=ann), str(tmp_path / "facts"))([frame])
    assert [row["user_id"] for batch in batches for row in batch.to_pylist()] == ["bob", "bob"]
    told = json.loads((tmp_path / "facts" / "7.json").read_text())["files"]
    assert [(one["file"], one["lines"], one["forgotten"]) for one in told] == [
        (str(paths[0]), 1, 2), (str(paths[1]), 1, 0),
    ]  # fmt: skip


QUOTED = '"a,""b"" "'


def test_a_few_quotes_and_bad_lines_do_not_make_a_block_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "u,i,t\n" + "".join(f"{n},{'x' if n % 9 else QUOTED},{n}\n" for n in range(99))
    path = write(tmp_path, (text + "1,2\n1,2,3,4\n").encode())
    feed, fed = csv_reader.CsvRecords.feed, []

    def counting(self: Any, lines: list[str], last: bool) -> Any:
        fed.extend(lines)
        return feed(self, lines, last)

    monkeypatch.setattr(csv_reader.CsvRecords, "feed", counting)
    monkeypatch.setattr(csv_reader.CsvRecords, "columns", lambda *_: None)
    rows, facts = read(CSV, path)
    assert fed == ["u,i,t\n"] and facts["lines"] == 101
    assert fields(rows[:99]) == [
        (2 + n, str(n), "x" if n % 9 else 'a,"b" ', str(n)) for n in range(99)
    ]  # fmt: skip
    assert [(row["kind"], row["line"], row["raw"]) for row in rows[99:]] == [
        ("unparsable", 101, "1,2"), ("unparsable", 102, "1,2,3,4"),
    ]  # fmt: skip


def test_a_delimiter_of_two_characters_without_header(tmp_path: Path) -> None:
    fmt = Format("csv", {"user_id": "_0", "item_id": "_1", "event_ts": "_3"}, "::", False)
    rows, _ = read(fmt, write(tmp_path, b'1::a:b::5::9\n2::"x::y"::5::9\n3::z::9\n'))
    assert fields(rows[:2]) == [(1, "1", "a:b", "9"), (2, "2", "x::y", "9")]
    assert rows[2]["kind"] == "unparsable"


def test_a_byte_order_mark_is_dropped_and_broken_bytes_are_kept_readable(tmp_path: Path) -> None:
    rows, _ = read(CSV, write(tmp_path, b"\xef\xbb\xbfu,i,t\n1,caf\xc3\xa9,2\n1,caf\xe9,2\n"))
    assert fields(rows[:1]) == [(2, "1", "café", "2")]
    assert rows[1]["kind"] == "unparsable" and rows[1]["raw"] == "1,caf\\xe9,2"


def test_another_encoding(tmp_path: Path) -> None:
    fmt = Format("csv", MAPPED, encoding="latin-1")
    rows, _ = read(fmt, write(tmp_path, "u,i,t\n1,café,2\n".encode("latin-1")))
    assert rows[0]["item_id"] == "café"


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst"])
def test_compressed_files_read_as_what_they_hold(tmp_path: Path, ending: str) -> None:
    data = b"u,i,t\n1,2,3\n"
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": pa.Codec("zstd").compress}
    path = write(tmp_path, bytes(packed[ending](data)), f"log.csv{ending}")
    assert fields(read(CSV, path)[0]) == [(2, "1", "2", "3")]


def test_a_damaged_archive_is_an_error_of_the_file(tmp_path: Path) -> None:
    _, facts = read(CSV, write(tmp_path, gzip.compress(b"u,i,t\n1,2,3\n")[:-12], "log.csv.gz"))
    assert "log.csv.gz cannot be read as csv" in facts["error"]


@pytest.mark.parametrize("data", [b"", b"u,i,t\n", b"u,i,t", b"\n\n"])
def test_empty_and_header_only_files_have_no_lines(tmp_path: Path, data: bytes) -> None:
    rows, facts = read(CSV, write(tmp_path, data))
    assert rows == [] and facts["lines"] == 0 and facts["error"] is None


def test_lists_in_parquet_lose_their_nulls_as_in_every_format(tmp_path: Path) -> None:
    fmt = Format("parquet", {**MAPPED, "exposed_with": "e"}, null_values=frozenset(["", "NA"]))
    shown = [["a", None, "b"], [None], [], None, ["a", "", "NA"], ["a"]]
    path = str(tmp_path / "log.parquet")
    table = pa.table({"u": ["1"] * 6, "i": ["2"] * 6, "t": ["3"] * 6})
    pq.write_table(table.append_column("e", pa.array(shown, pa.list_(pa.string()))), path)
    expected = [["a", "b"], [], [], None, ["a"], ["a"]]
    assert [row["exposed_with"] for row in read(fmt, path)[0]] == expected
    texts = [None if one is None else "|".join(item or "" for item in one) for one in shown]
    pq.write_table(table.append_column("e", pa.array(texts, pa.string())), path)
    expected[2] = None  # an empty text means null
    expected[1] = None
    assert [row["exposed_with"] for row in read(fmt, path)[0]] == expected


def test_a_header_of_one_column_names_the_delimiter(tmp_path: Path) -> None:
    fmt = Format("csv", MAPPED, delimiter=";")
    _, facts = read(fmt, write(tmp_path, b"u,i,t\n1,2,3\n"))
    assert "one column, 'u,i,t'. Set source.delimiter = ','" in facts["error"]


def test_a_missing_column_is_named_with_what_there_is(tmp_path: Path) -> None:
    _, facts = read(CSV, write(tmp_path, b"u,item,t\n1,2,3\n"))
    for word in ("log.csv", "'i'", "columns.item_id", "'item'"):
        assert word in facts["error"]


def test_null_values_mean_nothing(tmp_path: Path) -> None:
    fmt = Format("csv", MAPPED, ";", null_values=frozenset(["NA"]))
    rows, _ = read(fmt, write(tmp_path, b"u;i;t\nNA;;3\n"))
    assert (rows[0]["user_id"], rows[0]["item_id"]) == (None, "")


def test_json_numbers_keep_their_text(tmp_path: Path) -> None:
    fmt = Format("jsonl", {**MAPPED, "value": "v", "exposed_with": "e", "event_type": "a.b"})
    lines = [
        {"u": -9007199254740993, "i": 9223372036854775807, "t": 1, "e": [1, "x", None]},
        {"u": "1", "i": True, "t": 1.5, "e": "p|q", "a": {"b": "read"}},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"u": 1.10, "i": {}, "t": 2}\n[1]\nnonsense\n'
    rows, facts = read(fmt, write(tmp_path, text.encode(), "log.jsonl"))
    assert fields(rows[:2]) == [
        (1, "-9007199254740993", "9223372036854775807", "1"), (2, "1", "true", "1.5"),
    ]  # fmt: skip
    assert rows[0]["exposed_with"] == ["1", "x"] and rows[1]["exposed_with"] == ["p", "q"]
    assert rows[1]["event_type"] == "read"
    assert [row["kind"] for row in rows[2:]] == ["unparsable"] * 3
    assert facts["lines"] == 5


def test_parquet_ids_never_pass_through_floating_point(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    table = {"u": [1.0], "i": [2], "t": [3]}
    pq.write_table(pa.table(table), path)
    _, facts = read(Format("parquet", MAPPED), path)
    assert "'u' is double" in facts["error"] and "floating point" in facts["error"]


def test_parquet_rows_are_numbered_and_timestamps_carry_their_zone(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    table = pa.table(
        {
            "u": pa.array([2**63 - 1, -5]),
            "i": ["a", None],
            "t": pa.array([0, 1_500_001], pa.timestamp("us", "Europe/Paris")),
        }
    )
    pq.write_table(table, path)
    rows, facts = read(Format("parquet", MAPPED), path)
    assert fields(rows) == [
        (1, "9223372036854775807", "a", "0"),
        (2, "-5", None, "1500001"),
    ]
    assert all(row["clock"] == "utc" for row in rows) and facts["lines"] == 2


@pytest.mark.parametrize(("zone", "clock"), [("Europe/Paris", "utc"), (None, "local")])
def test_a_stored_parquet_row_is_the_record_that_it_was(
    tmp_path: Path, zone: str | None, clock: str
) -> None:
    fmt, path = Format("parquet", MAPPED), str(tmp_path / "log.parquet")
    times = pa.array([-1_500_001, None], pa.timestamp("us", zone))
    pq.write_table(pa.table({"u": ["1", "2"], "i": ["a", "b"], "t": times}), path)
    rows, facts = read(fmt, path)
    assert [(row["event_ts"], row["clock"]) for row in rows] == [("-1500001", clock), (None, clock)]
    moment = "1969-12-31T23:59:58.499999" + "Z" * (clock == "utc")
    for row, stored in zip(rows, ({"u": "1", "i": "a", "t": moment}, {"u": "2", "i": "b"})):
        raw = json.dumps(stored)
        again = record_of(fmt, raw, path, row["line"], facts["columns"])
        assert again == {**{k: v for k, v in row.items() if k in again}, "raw": raw}


def test_a_combined_log(tmp_path: Path) -> None:
    fmt = Format("combined_log", {"user_id": "host", "item_id": "path", "event_ts": "time",
                                  "event_type": "method", "value": "bytes"})  # fmt: skip
    line = '1.2.3.4 - - [17/May/2015:10:05:03 +0000] "GET /a b HTTP/1.1" 200 - "-" "Moz \\"x\\""'
    rows, facts = read(fmt, write(tmp_path, f"{line}\nnonsense\n".encode(), "access.log"))
    assert fields(rows[:1]) == [(1, "1.2.3.4", "/a b", "17/May/2015:10:05:03 +0000")]
    assert rows[0]["event_type"] == "GET" and rows[0]["value"] is None
    assert rows[1]["kind"] == "unparsable" and facts["lines"] == 2
