"""`replay-rejects`: after a fix, lines land as if they had been good the first time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.tables import EVENTS, REJECTS
from tests.spark_tools import CLICKS, Workshop

DAY = "2024-03-10"
LOG = """user,item,ts,note
ann,1,2024-03-09T10:00:00,x
ann,"2, b",2024-03-09T10:05:00,x
ann,1,2024-03-09T10:00:00,again
bob,1,2024-01-01T10:00:00,late
bob,,2024-03-09T10:00:00,x
bob,3,1710000000,x
eve,"4,2024-03-09T10:00:00,x
"""


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_lines_rejected_for_a_wrong_unit_come_back(spark: Any, tmp_path: Path, form: str) -> None:
    wrong = CLICKS if form == "csv" else CLICKS.replace("csv", "jsonl")
    right = wrong.replace('unit = "s"', 'unit = "iso8601"\nzone = "Europe/Paris"')
    text = LOG
    if form == "jsonl":
        rows = [line.replace('"2, b"', "2; b").split(",") for line in LOG.splitlines()[1:-1]]
        text = "".join(
            f'{{"user": "{u}", "item": "{i}", "ts": "{t}"}}\n'.replace('"item": ""', '"item": null')
            for u, i, t, _ in rows
        )
    mended, first = (tmp_path / name for name in ("mended", "first"))
    mended.mkdir()
    first.mkdir()
    shop = Workshop(spark, mended, wrong)
    shop.land(f"log.{form}", text)
    before = shop.run("ingest", day=DAY)
    assert before.events_new == 1  # the only line whose time is a number
    shop.describe(right)
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (sum(before.rejects.values()), 2)
    assert (replayed.duplicates, replayed.rejects["late"]) == (1, 1)
    assert "python -m jobs run" in replayed.notes[0]

    calm = Workshop(spark, first, right)
    calm.land(f"log.{form}", text)
    calm.run("ingest", day=DAY)
    here = ("ingest_file", "ingest_ts", "first_seen_ts", "file")
    wanted = calm.rows(EVENTS, drop=here)
    # The number was good under the wrong unit, and stays the event that it was.
    assert [row for row in shop.rows(EVENTS, drop=here) if row["item_id"] != "3"] == wanted
    left = [row for row in calm.rows(REJECTS, drop=here) if "1710000000" not in row["raw"]]
    assert shop.rows(REJECTS, drop=here) == left
    assert {row["file"] for row in shop.rows(REJECTS)} == {str(shop.landing / f"log.{form}")}

    again = shop.run("replay-rejects")
    assert (again.events_new, again.duplicates) == (0, 0) and again.rejects == replayed.rejects
