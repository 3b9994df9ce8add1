"""Large files of text read in ranges of bytes, held against the files read whole."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from jobs.reading.readers import read_file
from jobs.records import ranges
from jobs.records.records import FileFacts, Format

CSV = Format("csv", {"user_id": "u", "item_id": "i", "event_ts": "t"})
JSON = Format("jsonl", CSV.mapped)


def rows_of(fmt: Format, path: Path, part: ranges.Range | None) -> tuple[list[Any], FileFacts]:
    facts = FileFacts(str(path), begin=0 if part is None else part.begin)
    batches = list(read_file(fmt, str(path), facts, part))
    assert facts.error is None
    return [row for one in batches for row in one.to_pylist()], facts


def in_ranges(fmt: Format, path: Path, count: int) -> tuple[list[Any], FileFacts, int]:
    size = path.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "RANGE_BYTES", max(1, size // count))
        asked = ranges.asked(fmt, str(path), size)
    parts = ranges.ranges(found for one in asked for found in ranges.measure(one))
    read = [rows_of(fmt, path, None if part.whole else part) for part in parts]
    return (
        [row for rows, _ in read for row in rows],
        ranges.together([f for _, f in read]),
        len(parts),
    )


def lines_of(chance: random.Random, count: int, quoted: bool) -> list[str]:
    fields = ["a", "ä", "日本", "x y", "", "1", "null"]
    odd = ["only one", "a,b,c,d,e", " ", "", '"a,1', 'x"y,b,3', "\x00,b,3"]
    spread = ['"two\nlines",b,1', '"a ""b""\n\n",c,2']
    lines = []
    for _ in range(count):
        kind = chance.random()
        if kind < 0.1:
            lines.append(chance.choice(odd))
        elif kind < 0.2 and quoted:
            lines.append(chance.choice(spread))
        else:
            ending = "\r" if chance.random() < 0.1 else ""
            lines.append(
                f"{chance.choice(fields)},{chance.choice(fields)},{chance.random()}{ending}"
            )
    return lines


def same(fmt: Format, path: Path, count: int) -> bool:
    """Whether ranges give what the whole file gives; False: a record lies across an edge, and the
    facts say so."""
    whole, facts = rows_of(fmt, path, None)
    rows, of_ranges, _ = in_ranges(fmt, path, count)
    if of_ranges.unfinished:
        return False
    assert sorted(rows, key=str) == sorted(whole, key=str)
    told = {
        name: value for name, value in vars(of_ranges).items() if name not in ("size", "sha256")
    }
    assert told == {name: vars(facts)[name] for name in told}
    return True


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("quoted", [False, True], ids=["lines", "records of lines"])
def test_ranges_of_csv_give_the_records_of_the_file(
    tmp_path: Path, seed: int, quoted: bool
) -> None:
    chance = random.Random(seed)
    lines = lines_of(chance, 300, quoted)
    ending = chance.choice(["", "\n", "\r\n"])
    path = tmp_path / "a.csv"
    path.write_bytes(("\ufeff" * (seed % 3 == 0) + "u,i,t\n" + "\n".join(lines) + ending).encode())
    agreed = [same(CSV, path, count) for count in (2, 3, 7, 40)]
    assert quoted or '"a,1' in lines or all(agreed)


def test_a_record_across_an_edge_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"u,i,t\n" + b'"a\n' * 1 + b"b\n" * 400 + b'c",i,1\n' + b"d,e,2\n" * 10)
    _, facts, _ = in_ranges(CSV, path, 4)
    assert facts.unfinished


@pytest.mark.parametrize("seed", range(4))
def test_ranges_of_json_lines(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    lines = [
        chance.choice(
            ["", "{", json.dumps({"u": "ä", "i": n, "t": n, "x": "é" * chance.randrange(9)})]
        )
        for n in range(300)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    assert all(same(JSON, path, count) for count in (2, 5, 30))


@pytest.mark.parametrize(
    "data", [b"u,i,t\r" + b"a,b,1\r" * 100, gzip.compress(random.Random(1).randbytes(600))]
)
def test_files_that_cannot_be_cut_are_read_whole(tmp_path: Path, data: bytes) -> None:
    """Lines that end with carriage returns alone; compressed files."""
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "RANGE_BYTES", 20)
        asked = ranges.asked(CSV, str(path), len(data))
    parts = ranges.ranges(found for one in asked for found in ranges.measure(one))
    assert len(asked) > 2 and [part.whole for part in parts] == [True]


def test_small_files_and_other_formats_are_not_cut(tmp_path: Path) -> None:
    assert ranges.asked(CSV, "a.csv", ranges.RANGE_BYTES) == []
    assert ranges.asked(Format("parquet", CSV.mapped), "a", 10**12) == []
    assert ranges.asked(Format("csv", CSV.mapped, encoding="utf-16"), "a", 10**12) == []
