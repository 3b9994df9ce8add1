"""Sessions of programs: what flags them against another engine, and against what audits. No Spark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expectations.behaviour_rule import MINUTE_US, NO_PAUSE, RATE, BehaviourRule, without
from tests.support.oracle import behaviour_of

S = 1_000_000
RULES = {
    "both": BehaviourRule(events_per_minute=3, events_without_pause=4, pause_us=20 * S),
    "a minute": BehaviourRule(events_per_minute=3),
    "no pause": BehaviourRule(events_without_pause=4, pause_us=20 * S),
    "one event": BehaviourRule(events_per_minute=1, events_without_pause=1, pause_us=1),
}
STEPS = st.sampled_from(
    [0, 0, 1, 20 * S - 1, 20 * S, 20 * S + 1, 30 * S, MINUTE_US - 1, MINUTE_US, MINUTE_US + 1]
)
SESSIONS = st.lists(st.lists(STEPS, max_size=9), min_size=1, max_size=6)
EDGES = [
    [0, 0, 0],  # four in a moment
    [20 * S, 20 * S, 20 * S - 1], [20 * S, 20 * S, 20 * S],  # within a minute, and not
    [20 * S] * 4, [20 * S] * 3 + [20 * S + 1], [20 * S + 1] + [20 * S] * 4,  # five without a pause
    [], [MINUTE_US] * 9,
]  # fmt: skip


def flat(sessions: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Times of the events of sessions, by the steps between them, and how many each has."""
    times = [np.cumsum([1_000 * S - 7 * at, *steps]) for at, steps in enumerate(sessions)]
    return np.concatenate(times), np.array([len(one) for one in times])


@pytest.fixture(scope="module")
def db() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as made:
        yield made


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None, max_examples=60)
@given(sessions=SESSIONS)
@example(sessions=EDGES)
def test_flags_are_those_of_another_engine_and_are_audited_by_counts(
    db: duckdb.DuckDBPyConnection, name: str, sessions: list[list[int]]
) -> None:
    rule, (times, count) = RULES[name], flat(sessions)
    wanted = behaviour_of(db, times, count, vars(rule))
    flags = rule.flags(times, count)
    assert flags.tolist() == wanted
    assert rule.flagged(flags, times, count).all()
    for flag in (None, RATE, NO_PAUSE):
        said = np.full(len(count), flag, object)
        told = rule.flagged(said, times, count)
        assert told.tolist() == [one == flag for one in wanted]


def test_edges_are_where_the_source_file_says() -> None:
    found = RULES["both"].flags(*flat(EDGES)).tolist()
    assert found == [RATE, RATE, None, NO_PAUSE, None, NO_PAUSE, None, None]


def test_a_flag_of_a_bound_stands_before_these() -> None:
    rule, (times, count) = RULES["both"], flat([[0] * 5, [0] * 5, [MINUTE_US]])
    bounds: Any = np.array(["hours", None, "events"], object)
    flags = rule.behind(bounds, times, count)
    assert flags.tolist() == ["hours", RATE, "events"]
    assert rule.flagged(flags, times, count).all()
    assert without(flags).tolist() == ["hours", None, "events"]


def test_nothing_is_flagged_where_nothing_is_there() -> None:
    nothing = np.zeros(0, np.int64)
    assert RULES["both"].flags(nothing, nothing).tolist() == []
    assert RULES["both"].flagged(np.zeros(0, object), nothing, nothing).tolist() == []
