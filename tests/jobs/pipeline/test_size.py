"""At a size where engines behave differently: plans compiled, shuffles spilled, many files.

(Collecting after a shuffle gave six of 2.5 million sessions in the wrong order once; no small log
showed it.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest

from jobs.core.tables import EVENTS, ITEMS, REJECTS, SEQUENCES, SESSIONS
from tests.support.oracle import expected_sequences, expected_sessions
from tests.support.spark_tools import CLICKS, Workshop

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


def write_night(folder: Path, events: int) -> None:
    """Events of new and of known users, among and after those of the log, some of them again."""
    duckdb.sql(f"""
        COPY (
            (SELECT 'u' || (hash(n, 11) % {events * 2})::VARCHAR AS user,
                    (hash(n, 13) % 5100)::BIGINT AS item,
                    make_timestamptz(1700000000000000 + (hash(n, 17) % 2100000)::BIGINT * 1000000) AS ts
             FROM range({events // 2}) t(n))
            UNION ALL  -- around bursts of the log's first file
            (SELECT 'u' || (hash(n, 0) % {EVENTS_COUNT // 10})::VARCHAR, (hash(n, 19) % 5000)::BIGINT,
                    make_timestamptz(
                        1700000000000000 + (hash(n, 3) % 2000000)::BIGINT * 1000000
                        + (hash(n, 23) % 9000)::BIGINT * 1000000)
             FROM range({events // 2}) t(n))
            UNION ALL
            (SELECT * FROM '{folder}/0.parquet' LIMIT {events // 10})
        ) TO '{folder}/night.parquet' (FORMAT parquet)
    """)


def check(shop: Workshop, runaways: int | None = None) -> None:
    """Sessions and sequences are those that another engine makes of the same events."""
    columns = ["event_id", "user_id", "item_id", "event_ts", "tie_break", "source_session_id"]
    events = shop.table(EVENTS).to_pyarrow_table(columns=columns)
    expected = expected_sessions(events, native=False, gap_s=1800, max_hours=2, max_events=40)
    found = shop.table(SESSIONS).to_pyarrow_table(columns=["session_id", "runaway", "events"])
    got = {
        row["session_id"]: (row["runaway"], [one["event_id"] for one in row["events"]])
        for row in found.to_pylist()
    }
    assert len(got) == found.num_rows == len(expected) > EVENTS_COUNT // 50
    flagged = sum(runaway is not None for runaway, _ in got.values())
    assert flagged > 0 and runaways in (None, flagged)
    wrong = [one for one in expected if got[one["session_id"]] != (one["runaway"], one["events"])]
    assert not wrong, f"{len(wrong)} sessions differ, such as {wrong[0]}"

    items = shop.table(ITEMS).to_pyarrow_table().to_pylist()
    name = {row["item_index"]: row["item_id"] for row in items}
    assert sorted(name) == list(range(1, len(items) + 1))
    rows = shop.table(SEQUENCES).to_pyarrow_table()
    sequences = expected_sequences(expected)
    assert rows.num_rows == len(sequences)
    for batch in rows.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            indices, ordinals = row["item_index"], row["session_ordinal"]
            positions = [(name[at], number) for at, number in zip(indices, ordinals, strict=True)]
            assert positions == sequences[row["user_id"]], row["user_id"]


@pytest.mark.long
def test_a_log_of_millions_and_a_night_on_it_are_the_oracles(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, TOML)
    write_log(shop.landing, EVENTS_COUNT)
    result = shop.run()
    assert result.read == EVENTS_COUNT == result.events_new + result.duplicates
    check(shop, result.runaways)
    write_night(shop.landing, 60_000)
    night = shop.run()
    assert night.duplicates >= 6000 and night.events_new > 50_000
    assert night.sessions_new > 10_000 and night.sessions_changed + night.sessions_retired > 5000
    check(shop)


GIGABYTES = 10
LINE_BYTES = 1024


@pytest.mark.long
def test_one_file_of_ten_gigabytes(spark: Any, tmp_path: Path) -> None:
    """Read in ranges of bytes by all cores, and every line once: lines that make no event are those that
    were planted, with their numbers in the file."""
    lines = GIGABYTES * 10**9 // LINE_BYTES
    bad = [0, 1, lines // 3, lines // 2, lines - 2, lines - 1]
    shop = Workshop(spark, tmp_path, CLICKS)
    file = shop.landing / "one.csv"
    duckdb.sql(f"""
        COPY (
            SELECT 'u' || (n // 20)::VARCHAR AS user,
                   CASE WHEN n IN {tuple(bad)} THEN '' ELSE 'i' || (hash(n) % 5000)::VARCHAR END AS item,
                   1700000000 + n // 7 AS ts,
                   repeat(chr(97 + (n % 26)::INTEGER), {LINE_BYTES} - 26) AS payload
            FROM range({lines}) t(n)
        ) TO '{file}' (FORMAT csv, HEADER)
    """)
    assert file.stat().st_size > GIGABYTES * 10**9 * 0.98
    result = shop.run("ingest")
    assert (result.read, result.events_new, result.duplicates) == (lines, lines - len(bad), 0)
    assert result.rejects == {"missing_item_id": len(bad)}
    rejects = shop.table(REJECTS).to_pyarrow_table(columns=["line", "reason"])
    assert sorted(rejects["line"].to_pylist()) == [number + 2 for number in bad]  # (line 1: names)
    counted = shop.table(EVENTS).to_pyarrow_dataset().count_rows()
    assert counted == lines - len(bad)
    file.unlink()
