"""Do sessions and the table of events have the same events of the same users? Arrow's print and
Spark's by id, and the fingerprints of `ops.fingerprints` by time, say the same, whatever is wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.audit import arrow_columns, fingerprints, spark_checks
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import SESSIONS
from jobs.lake import filesystem

Pairs = list[tuple[str, str]]
"""(user, event)."""


def swapped_users(drawn: random.Random, pairs: Pairs) -> Pairs:
    one, other = (next(p for p in pairs if p[0] == user) for user in ("u0", "u1"))
    rest = [pair for pair in pairs if pair not in (one, other)]
    return [*rest, (other[0], one[1]), (one[0], other[1])]


WAYS: dict[str, tuple[bool, Callable[[random.Random, Pairs], Pairs]]] = {
    "as they are": (True, lambda _, pairs: pairs),
    "in another order": (True, lambda drawn, pairs: drawn.sample(pairs, len(pairs))),
    "one is lost": (False, lambda _, pairs: pairs[1:]),
    "one stands twice": (False, lambda _, pairs: [*pairs, pairs[5]]),
    "one stands twice in place of another": (False, lambda _, pairs: [*pairs[1:], pairs[5]]),
    "two have each other's user": (False, swapped_users),
    "one has another id": (False, lambda _, pairs: [*pairs[1:], (pairs[0][0], "another")]),
    "there are none": (False, lambda _, pairs: []),
}


def drawn_pairs(drawn: random.Random) -> Pairs:
    return [(f"u{number % 7}", f"{drawn.getrandbits(128):032x}") for number in range(60)] + [
        ("a user of any length", "a native id"), ("u0", "é"),
    ]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_the_prints_of_both_engines_agree(spark: Any, tmp_path: Path, way: str) -> None:
    drawn = random.Random(way)
    log = drawn_pairs(drawn)
    same, change = WAYS[way]
    inside = change(drawn, log)
    by_user: dict[str, list[str]] = {}
    for user, event in inside:
        by_user.setdefault(user, []).append(event)
    ddl = "user_id string, events array<struct<event_id:string>>"
    rows = [(user, [(event,) for event in events]) for user, events in by_user.items()]
    sessions = spark.createDataFrame(rows, ddl)
    events = spark.createDataFrame(log, "user_id string, event_id string")
    assert spark_checks.same_events(sessions, events) == (len(inside), len(log), same)

    # Each id has a time of its own, so that by id and by time the same events are the same.
    times = {event: number for number, event in enumerate(sorted({e for _, e in [*log, *inside]}))}
    schema = arrow_schema({"user_id": "string", "event_id": "string", "event_ts": "timestamp"})
    prints, rows_of_files = [], []
    for number, part in enumerate((log[:20], log[20:])):
        columns = [pa.array([pair[at] for pair in part], pa.string()) for at in (0, 1)]
        stamps = pa.array([times[event] for _, event in part], pa.timestamp("us", "UTC"))
        path = f"{tmp_path}/{number}.parquet"
        filesystem.write_parquet(path, pa.Table.from_arrays([*columns, stamps], schema=schema))
        prints += fingerprints.print_of_events(path)
        rows_of_files += [json.loads(one["file"]) for one in prints[-1:]]
        assert rows_of_files[-1:] == fingerprints.of_events(path)
    words = [
        arrow_columns.words_of(pa.array([pair[at] for pair in inside], pa.string()))
        for at in (0, 1)
    ]
    of_sessions = arrow_columns.joined([arrow_columns.fingerprint(*words)])
    assert len(np.unique(words[1])) == len({event for _, event in inside})
    assert (of_sessions == arrow_columns.joined(prints)) == same

    cut = [
        {"user_id": user, "runaway": None, "events": [{"event_ts": times[one]} for one in events]}
        for user, events in by_user.items()
    ]
    path = f"{tmp_path}/sessions.parquet"
    filesystem.write_parquet(path, pa.Table.from_pylist(cut, arrow_schema(SESSIONS.columns)))
    by_time = fingerprints.table_of(fingerprints.of_sessions(path))
    wanted = fingerprints.summed(fingerprints.table_of(rows_of_files))
    assert (fingerprints.summed(by_time) == wanted) == same
    assert fingerprints.summed(by_time, kept=True) == fingerprints.summed(by_time)
