"""JSON lines by DuckDB, held against `json_values`, the rule for every line."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from jobs.reading.json_blocks import JsonBlocks
from jobs.reading.readers import json_values, read_file
from jobs.records.records import FileFacts, Format

FMT = Format(
    "jsonl",
    {"user_id": "user.id", "item_id": "item", "event_ts": "ts", "value": "v", "event_type": "e-t",
     "exposed_with": "shown"},
    null_ids=frozenset(["null", "None"]),
)  # fmt: skip
ODD_LINES = (
    "", "   ", "\t", "{}", "[]", "1", "null", "{", '{"item": 1', '{"item": 1,}', '{"item": [1,]}',
    '{"item": -0}', '{"item": 0, "ts": "a -0 b"}', '{"item": 1, "item": 2}',
    '{"user": {"id": 1, "id": 2}}', '{"user": {"id": {"x": 1}}}', '{"user": [1]}', '{"user": 3}',
    '{"user.id": 7, "user": {"id": 8}}', '{"user.id": null, "user": {"id": 8}}',
    '{"item": 1.10}', '{"item": 1e5}', '{"item": 12345678901234567890123}', '{"item": NaN}',
    '{"v": NaN}', '{"v": -Infinity}', '{"v": 1.50}', '{"v": 1e-7}', '{"v": 0.1000000000000000055511}',
    '{"item": true, "ts": false}', '{"item": null}', '{"item": ""}', '{"item": "null"}',
    '{"item": "None", "user": {"id": "None"}}', '{"item": "a\\u0000b"}', '{"item": "\\ud800"}',
    '{"item": "\\u00e4\\ud83d\\ude00"}', '{"item": "日本"}', '{"item": "a\\"b\\\\c\\/"}',
    '{"shown": ["a", 1, null]}', '{"shown": "a|b"}', '{"shown": null}', '{"item": "x" } ',
    ' {"item": 7}', '{"item": "a, ]"}', '{"item": 18446744073709551615}',
    '{"item": 18446744073709551616}', '{"item": -9223372036854775808}', '{"a": 01}',
    '{"item": "tab\tin"}', '{"e-t": "x", "E-T": "y"}', '{"item":1} {"item":2}',
    '{"item": 9007199254740993, "ts": 1700000000.25}', "{'item': 1}", '{"item": "é", "ts": 5}',
    '// {"item": 1}', '{"item": 1} // x', '{"a": ' * 60 + "1" + "}" * 60,
)  # fmt: skip


def some(chance: random.Random, depth: int = 0) -> Any:
    kinds: list[Any] = [
        None, True, False, 0, -3, 10**18, 2.5, "", "a", "ä", "null", "1", '"', "\\", "a,b", "-0",
    ]  # fmt: skip
    if depth < 2 and chance.random() < 0.3:
        names = ["id", "item", "ts", "user", "v", "e-t", "shown", "user.id", "x"]
        return {chance.choice(names): some(chance, depth + 1) for _ in range(4)}
    if depth < 2 and chance.random() < 0.1:
        return [some(chance, depth + 1) for _ in range(2)]
    return chance.choice(kinds)


def generated(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    lines = []
    for _ in range(count):
        row = {"user": {"id": some(chance, 2)}, "item": some(chance, 1), "ts": some(chance, 2)}
        row |= {name: some(chance, 1) for name in ("v", "e-t", "shown") if chance.random() < 0.5}
        lines.append(json.dumps(row, ensure_ascii=chance.random() < 0.5))
    return lines


def read(path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool) -> tuple[list[Any], FileFacts]:
    facts = FileFacts(str(path))
    with monkeypatch.context() as patch:
        if not quick:
            patch.setattr(JsonBlocks, "can", staticmethod(lambda fmt: False))
        batches = list(read_file(FMT, str(path), facts))
    assert facts.error is None
    rows = sorted((row for one in batches for row in one.to_pylist()), key=lambda row: row["line"])
    return rows, facts


@pytest.mark.parametrize("seed", range(5))
def test_lines_give_the_records_that_the_rule_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    lines = [*ODD_LINES, *generated(400, seed)]
    random.Random(seed).shuffle(lines)
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(line for line in lines if line).encode() + b"\n")
    slow, facts_slow = read(path, monkeypatch, quick=False)
    fast, facts_fast = read(path, monkeypatch, quick=True)
    assert len(slow) > 400
    for expected, row in zip(slow, fast, strict=True):
        if row["value"] != expected["value"]:
            # A number that was written otherwise; as a number it is the same.
            assert float(row["value"]) == float(expected["value"]) or "nan" in row["value"].lower()
            row["value"] = expected["value"]
        assert row == expected
    assert facts_fast.lines == facts_slow.lines
    assert facts_fast.columns == facts_slow.columns


def test_common_lines_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What most logs write is not left to the slow way."""
    line = (
        '{"user": {"id": 12}, "item": "日本", "ts": 1700000000, "v": 4.5, "x": [1, {"a": 2.5}]}\n'
    )
    called: list[str] = []
    monkeypatch.setattr(
        "jobs.reading.readers.json_values",
        lambda fmt, text, facts: called.append(text) or json_values(fmt, text, facts),
    )
    from jobs.reading import readers

    stream = io.BytesIO((line * 500).encode())
    rows = readers.read_lines(FMT, stream, FileFacts("f"), readers.json_values)
    assert sum(batch.num_rows for batch in rows) == 500
    assert called == []
