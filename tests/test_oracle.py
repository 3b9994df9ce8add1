"""The sessionizer against another engine, whatever way the events arrived.

One log, many users, each user a small history full of edges: gaps of exactly `gap_s`, equal
times, native ids that interleave, are missing or come back. It arrives in three nights, in any
order, with repeats; the tables must be those that the oracle computes from the set of events.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs.tables import EVENTS, ITEMS, REJECTS, SEQUENCES, SESSIONS
from tests.oracle import expected_sequences, expected_sessions
from tests.spark_tools import Workshop

GAP_S, MAX_HOURS, MAX_EVENTS = 600, 2, 7
TOML = f"""
[source]
name = "log"
landing = "{{landing}}/*.csv"
format = "csv"

[columns]
user_id = "u"
item_id = "i"
event_ts = "t"
source_session_id = "s"
tie_break = "n"

[time]
unit = "s"

[sessions]
rule = "RULE"
gap_s = {GAP_S}
max_session_hours = {MAX_HOURS}
max_session_events = {MAX_EVENTS}
"""
START = int(datetime(2024, 3, 30, 22, tzinfo=UTC).timestamp())
STEPS = (0, 0, 1, 60, GAP_S - 1, GAP_S, GAP_S, GAP_S + 1, 3 * GAP_S, 40_000, 90_000)


def histories(chance: random.Random, users: int) -> list[str]:
    """Lines of a log; user names such as -12 and "7,x" are part of the exercise."""
    lines = []
    for user in range(users):
        name = chance.choice([f"-{user}", f"{user}", f'"{user},x"'])
        now = START + chance.randrange(100_000)
        native = chance.randrange(3)
        for _ in range(chance.randint(1, 14)):
            now += chance.choice(STEPS) if chance.random() < 0.8 else chance.choice(STEPS[:3])
            native = chance.choice([native, native, native, chance.randrange(4)])
            session = "" if native == 3 else f"s{native}"
            tie = chance.choice(["", "0", "1", "-1"])
            lines.append(f"{name},{chance.randrange(20)},{now},{session},{tie}")
    return lines


def read(shop: Workshop, table: Any) -> pa.Table:
    return DeltaTable(table.path(str(shop.lake_root), "log")).to_pyarrow_table()


def check_against_oracle(shop: Workshop, native: bool) -> None:
    expected = expected_sessions(
        read(shop, EVENTS), native=native, gap_s=GAP_S, max_hours=MAX_HOURS, max_events=MAX_EVENTS
    )
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    got = {
        row["session_id"]: (
            row["user_id"], round((row["start_ts"] - epoch).total_seconds() * 1e6),
            round((row["end_ts"] - epoch).total_seconds() * 1e6), row["event_count"],
            row["runaway"], [event["event_id"] for event in row["events"]],
        )
        for row in read(shop, SESSIONS).to_pylist()
    }  # fmt: skip
    wanted = {
        row["session_id"]: (
            row["user_id"], row["start_us"], row["end_us"], row["event_count"], row["runaway"],
            row["events"],
        )
        for row in expected
    }  # fmt: skip
    assert got == wanted
    names = {row["item_index"]: row["item_id"] for row in read(shop, ITEMS).to_pylist()}
    assert sorted(names) == list(range(1, len(names) + 1))
    sequences = {
        row["user_id"]: [
            (names[index], ordinal)
            for index, ordinal in zip(row["item_index"], row["session_ordinal"], strict=True)
        ]
        for row in read(shop, SEQUENCES).to_pylist()
    }
    assert sequences == expected_sequences(expected)


@pytest.mark.parametrize(("rule", "seed"), [("gap", 1), ("source_session_id", 2)])
def test_three_nights_in_any_order_equal_the_oracle(
    spark: Any, tmp_path: Path, rule: str, seed: int, request: pytest.FixtureRequest
) -> None:
    # The other tests interpret their plans, which is quicker on tiny logs; here they are compiled,
    # as in production, under one rule.
    compiled = str(rule == "gap").lower()
    request.addfinalizer(lambda: spark.conf.set("spark.sql.codegen.wholeStage", "false"))
    spark.conf.set("spark.sql.codegen.wholeStage", compiled)
    chance = random.Random(seed)
    shop = Workshop(spark, tmp_path, TOML.replace("RULE", rule))
    lines = histories(chance, users=150)
    repeated = chance.sample(lines, len(lines) // 10)
    arrival = lines + repeated
    chance.shuffle(arrival)
    nights = [arrival[0 : len(arrival) // 2], arrival[len(arrival) // 2 : -60], arrival[-60:]]
    totals = {"events_new": 0, "duplicates": 0, "read": 0}
    sessions_rows = 0
    merged = 0
    if rule != "gap":
        nights = [nights[0], nights[1] + nights[2]]
    for number, night in enumerate(nights):
        for part in range(2):
            shop.land(f"{number}-{part}.csv", "\n".join(["u,i,t,s,n", *night[part::2]]) + "\n")
        result = shop.run(day="2024-04-02")
        for name in totals:
            totals[name] += getattr(result, name)
        assert result.read == result.events_new + result.duplicates == len(night)
        sessions_rows += result.sessions_new - result.sessions_retired
        assert shop.lake.rows(SESSIONS) == sessions_rows
        merged += result.sessions_merged
        check_against_oracle(shop, native=rule != "gap")
    assert totals["events_new"] == len(set(lines)) and totals["read"] == len(arrival)
    assert merged > 0
    assert shop.lake.rows(REJECTS) == 0

    versions = {table.full_name: shop.version(table) for table in (EVENTS, SESSIONS, SEQUENCES)}
    again = shop.run(day="2024-04-02")
    assert again.read == 0 and again.sessions_new == again.sessions_changed == 0
    assert {t.full_name: shop.version(t) for t in (EVENTS, SESSIONS, SEQUENCES)} == versions
