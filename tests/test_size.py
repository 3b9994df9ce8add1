"""At a size where engines behave differently: plans compiled, shuffles spilled, many files.

(Collecting after a shuffle gave six of 2.5 million sessions in the wrong order once; no small log
showed it.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest

from jobs.tables import EVENTS, SESSIONS
from tests.oracle import expected_sessions
from tests.spark_tools import Workshop

EVENTS_COUNT = 2_000_000
TOML = """
[source]
name = "clicks"
landing = "{landing}/*.parquet"
format = "parquet"
[columns]
user_id = "user"
item_id = "item"
event_ts = "ts"
[sessions]
max_session_hours = 2
max_session_events = 40
"""


def write_log(folder: Path, events: int) -> None:
    """Bursts of clicks with ties in time, a tenth as many users as events, in four files."""
    for part in range(4):
        duckdb.sql(f"""
            COPY (
                SELECT 'u' || (hash(n // 20, {part}) % {events // 10})::VARCHAR AS user,
                       (hash(n, 7) % 5000)::BIGINT AS item,
                       make_timestamptz(
                           1700000000000000 + (hash(n // 20, 3) % 2000000)::BIGINT * 1000000
                           + (hash(n, 5) % 2500)::BIGINT * 2000000) AS ts
                FROM range({events // 4}) t(n)
            ) TO '{folder}/{part}.parquet' (FORMAT parquet)
        """)


@pytest.mark.long
def test_sessions_of_millions_of_events_are_the_oracles(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, TOML)
    write_log(shop.landing, EVENTS_COUNT)
    result = shop.run()
    assert result.read == EVENTS_COUNT == result.events_new + result.duplicates
    columns = ["event_id", "user_id", "item_id", "event_ts", "tie_break", "source_session_id"]
    events = shop.table(EVENTS).to_pyarrow_table(columns=columns)
    expected = expected_sessions(events, native=False, gap_s=1800, max_hours=2, max_events=40)
    found = shop.table(SESSIONS).to_pyarrow_table(columns=["session_id", "runaway", "events"])
    got = {
        row["session_id"]: (row["runaway"], [one["event_id"] for one in row["events"]])
        for row in found.to_pylist()
    }
    assert len(got) == found.num_rows == len(expected) > EVENTS_COUNT // 50
    assert result.runaways == sum(runaway is not None for runaway, _ in got.values()) > 0
    wrong = [one for one in expected if got[one["session_id"]] != (one["runaway"], one["events"])]
    assert not wrong, f"{len(wrong)} sessions differ, such as {wrong[0]}"
