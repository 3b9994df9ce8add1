"""A small log with everything that can go wrong between the tables and a served model, and its
tables as the jobs would leave them: sessions are cut by the oracle, not by the jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import CommitProperties, Transaction, write_deltalake

from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import ITEM_ATTRIBUTES, ITEMS, SEQUENCES, SESSIONS
from tests.support.oracle import expected_sessions
from tests.support.recorded import World

GAP_S, MAX_HOURS, MAX_EVENTS = 600, 36, 20
START_US = 1_709_251_200_000_000  # 2024-03-01
SOURCE = """
[source]
name = "toy"
landing = "landing/*.csv"
format = "csv"
[columns]
user_id = "u"
item_id = "i"
event_ts = "t"
event_type = "e"
value = "v"
tie_break = "n"
source_session_id = "s"
exposed_with = "x"
[feedback]
positive = ["buy", "value >= 3"]
negative = ["skip", "value < 0"]
exposed = ["view"]
[sessions]
rule = "{rule}"
gap_s = 600
[items]
landing = "catalogue/*.csv"
format = "csv"
id = "item"
categories = ["kind"]
[filters]
min_item_events = 4
min_user_sessions = 1
[training]
preset = "tiny"
"""
EVENTS = pa.schema(
    {
        "user_id": pa.string(), "event_id": pa.string(), "item_id": pa.string(),
        "event_ts": pa.timestamp("us", "UTC"), "event_type": pa.string(), "value": pa.float64(),
        "tie_break": pa.int64(), "source_session_id": pa.string(),
        "exposed_with": pa.list_(pa.string()), "feedback": pa.string(),
    }  # type: ignore[arg-type]
)  # fmt: skip


def log(
    seed: int = 0, users: int = 26, events: int = 40, runaways: bool = True
) -> list[dict[str, Any]]:
    """Events with ties that neither items nor rows order rightly, rare items, rows that say
    nothing, ids of sessions that agree with the silences or do not; with `runaways` every twelfth
    user has a session that is too long."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    steps = np.array([0, 0, 1, 30, GAP_S - 1, GAP_S, GAP_S + 1, 3600, 40_000])
    for user in range(users):
        native, item = 0, int(rng.integers(12))
        pauses, endless = rng.choice(steps, events), np.zeros(events, dtype=bool)
        pauses[[13, 27]] = 100_000  # (paper A's sessions are apart by a day)
        endless[8 : 10 + MAX_EVENTS] = runaways and user % 12 == 0
        pauses[endless] = 60
        times = np.cumsum(pauses) - pauses.sum() + rng.integers(400_000, 410_000)
        for number in range(events):
            native += int(rng.random() < 0.25 and not endless[number])
            item = (item + 1) % 12 if rng.random() < 0.7 else int(rng.integers(12))
            rare = rng.random() < 0.08
            shown = [f"i{n:02d}" for n in rng.choice(12, int(rng.integers(0, 4)))]
            made.append(
                {
                    "user_id": ["", "-", "ü", "user "][user % 4] + f"{user:03d}",
                    "event_id": f"{rng.integers(2**32):08x}{user:02d}{number:03d}",
                    "item_id": f"rare{rng.integers(40)}" if rare else f"i{item:02d}",
                    "event_ts": START_US + 1_000_000 * int(times[number]),
                    "event_type": [None, "buy", "buy", "view", "skip", "look"][rng.integers(6)],
                    "value": [None, None, 5.0, 3.0, 2.5, -0.0, -1.0][rng.integers(7)],
                    "tie_break": [None, None, 2, 1, -1][rng.integers(5)],
                    "source_session_id": None
                    if rng.random() < 0.2 and not endless[number]
                    else f"s{native}",
                    "exposed_with": [*shown, "nowhere"] if rng.random() < 0.5 else None,
                }
            )
    for one in made:
        one["feedback"] = became(one["event_type"], one["value"])
    return [made[at] for at in rng.permutation(len(made))]


def became(event_type: str | None, value: float | None) -> str:
    """The feedback rule of SOURCE, in Python's own words."""
    if event_type == "skip" or (value is not None and value < 0):
        return "negative"
    if event_type == "buy" or (value is not None and value >= 3):
        return "positive"
    return "exposed" if event_type == "view" else "neutral"


def write_tables(lake: Path, rows: list[dict[str, Any]], native: bool) -> None:
    """silver.sessions, gold.items and gold.sequences of a log."""
    table = pa.Table.from_pylist(rows, EVENTS)
    sessions = expected_sessions(
        table, native=native, gap_s=GAP_S, max_hours=MAX_HOURS, max_events=MAX_EVENTS
    )
    by_id = {row["event_id"]: row for row in rows}
    write_sessions(lake, sessions, by_id)
    seen: dict[str, int] = {}
    for row in sorted(rows, key=lambda one: one["event_id"]):
        for item in (row["item_id"], *(row["exposed_with"] or ())):
            seen.setdefault(item, len(seen) + 1)
    users: dict[str, dict[str, list[Any]]] = {}
    for session in sessions:
        if session["runaway"]:
            continue
        user = users.setdefault(session["user_id"], {name: [] for name in SEQUENCES.columns})
        ordinal = user["session_ordinal"][-1] + 1 if user["session_ordinal"] else 1
        for row in (by_id[one] for one in session["events"]):
            user["item_index"].append(seen[row["item_id"]])
            user["event_ts"].append(row["event_ts"])
            user["session_ordinal"].append(ordinal)
            user["feedback"].append(row["feedback"])
            user["exposed_items"].append([seen[item] for item in row["exposed_with"] or ()])
    sequences = [columns | {"user_id": user} for user, columns in users.items()]
    consumed = Transaction("toy/gold.sequences<-silver.sessions", 0)
    _write(lake, SEQUENCES, sequences, CommitProperties(app_transactions=[consumed]))
    items = [
        {"item_id": item, "item_index": index, "first_seen_ts": START_US, "event_count": 1}
        for item, index in seen.items()
    ]
    _write(lake, ITEMS, items)
    said = [
        {"item_id": item, "known_from": START_US, "attributes": [("kind", f"k{index % 3}")]}
        for item, index in seen.items()
    ]
    _write(lake, ITEM_ATTRIBUTES, said)


def write_sessions(
    lake: Path, sessions: list[dict[str, Any]], by_id: dict[str, dict[str, Any]]
) -> None:
    kept = [
        {
            "session_id": one["session_id"], "user_id": one["user_id"],
            "start_ts": one["start_us"], "end_ts": one["end_us"],
            "start_date": one["start_us"] // 86_400_000_000, "event_count": one["event_count"],
            "runaway": one["runaway"],
            "events": [{n: by_id[e][n] for n in EVENTS.names if n != "user_id"} for e in one["events"]],
        }
        for one in sessions
    ]  # fmt: skip
    # (In no order at all: the jobs lay them out by time.)
    np.random.default_rng(1).shuffle(kept)  # type: ignore[arg-type]
    _write(lake, SESSIONS, kept)


def _write(lake: Path, table: Any, rows: list[dict[str, Any]], commit: Any = None) -> None:
    schema = arrow_schema(table.columns)
    made = pa.Table.from_pylist(rows, schema)
    path = table.path(str(lake), "toy")
    write_deltalake(path, made, mode="overwrite", commit_properties=commit)


@contextmanager
def raw_world(root: Path, rule: str, **options: Any) -> Iterator[World]:
    """The log at `root`, which is the working directory too."""
    from jobs.core.settings import settings

    there = World(root)
    there.source.write_text(SOURCE.format(rule=rule))
    write_tables(there.lake, log(**options), native=rule != "gap")
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SESSIONMILL_LAKE", str(there.lake))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        settings.cache_clear()
        os.chdir(root)
        yield there
        os.chdir(before)
    settings.cache_clear()
