"""+habit: its features against a slow oracle, and that a position sees its own past and no more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.core.habit import DAY_RATES, FEATURES, SESSION_RATES, Asked
from models.core.process_group import ALONE
from models.core.rows import EXPOSED, NEGATIVE, NEUTRAL, POSITIVE, Rows
from models.networks.methods import (
    BACKBONES,
    SESSION_ENCODERS,
    config,
    count_parameters,
    recommender,
)
from models.networks.recommender import Recommender
from models.training.epoch import Epoch
from models.training.fit import Run
from tests.support.device import DEVICE
from tests.support.gold_world import DAY, SECOND, evidence, rows_of

V = 6
HOUR = 3600


def told(rows: Rows, begin: int, end: int) -> list[tuple[int, int, int, int, int]]:
    """(event, item, us, session, feedback) of a past: its events, and exposures that count."""
    had: set[int] = set()
    shown_in: set[tuple[int, int]] = set()
    came_up: set[tuple[int, int]] = set()
    found = []

    def exposure(event: int, item: int) -> None:
        session = int(rows.ordinal[event])
        if item in had and (session, item) not in shown_in:
            shown_in.add((session, item))
            found.append((event, item, int(rows.ts[event]), session, EXPOSED))

    for event in range(begin, end):
        item, session = int(rows.item[event]), int(rows.ordinal[event])
        feedback = int(rows.became[event])
        if feedback == EXPOSED:
            exposure(event, item)
        else:
            had.add(item)
            found.append((event, item, int(rows.ts[event]), session, feedback))
        came_up.add((session, item))
        if rows.shown_start is not None and rows.shown is not None:
            for other in rows.shown[rows.shown_start[event] : rows.shown_start[event + 1]].tolist():
                if (session, other) not in came_up:
                    came_up.add((session, other))
                    exposure(event, other)
    return found


def oracle(
    rows: Rows, begin: int, end: int, ts: int, ordinal: int, most: int
) -> dict[int, dict[str, float]]:
    """Own item -> its features, by the formulas of ARCHITECTURE.md, one item after another."""
    past = told(rows, begin, end)
    answer = {}
    for item in {one[1] for one in past}:
        mine = [one for one in past if one[1] == item]
        if mine[-1][0] < end - most:
            continue
        visits: list[tuple[int, int]] = []  # session, us
        for _, _, us, session, feedback in mine:
            visited = feedback in (POSITIVE, NEUTRAL)
            if visited and (not visits or visits[-1][0] != session):
                visits.append((session, us))
        many = {
            name: math.log1p(sum(one[4] == code for one in mine))
            for name, code in (("neutral", NEUTRAL), ("negative", NEGATIVE), ("exposed", EXPOSED))
        }
        k = len(visits)
        one = dict.fromkeys(FEATURES, 0.0) | many
        answer[item] = one
        if not k:
            continue
        n, u = ordinal, ts
        s, t = visits[-1]
        since, days = n - s, max(0, u - t) / DAY
        one |= {
            "visits": math.log1p(k), "once": float(k == 1), "share": k / n,
            "since_sessions": math.log1p(since), "since_days": math.log1p(24 * days) / 4,
            "latest": float(s == rows.ordinal[end - 1]),
        }  # fmt: skip
        if k > 1:
            g, d = (s - visits[0][0]) / (k - 1), (t - visits[0][1]) / (k - 1) / DAY
            one |= {"gap_sessions": math.log1p(g), "gap_days": math.log1p(24 * d) / 4}
            one["due_sessions"] = 4 * since / (since + g) - 2
            one["due_days"] = 4 * days / (days + d) - 2 if days else -2.0
        for rate in SESSION_RATES:
            total = sum(math.exp(-(n - session) / rate) for session, _ in visits)
            one[f"sessions_{rate:g}"] = math.log1p(total)
        for rate in DAY_RATES:
            total = sum(math.exp(-max(0, u - us) / DAY / rate) for _, us in visits)
            one[f"days_{rate:g}"] = math.log1p(total)
    return answer


@st.composite
def histories(draw: st.DrawFn) -> Rows:
    """A few users with repeats, ties, all kinds of feedback, and exposures where the log has them."""
    users, feedback, shown = [], [], {}
    kinds = draw(st.sampled_from([(POSITIVE,), (0, 0, 0, 1, 3), (0, 1, 2, 3)]))
    lists = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        ts, session, events = draw(st.integers(0, 10**6)), 1, []
        for n in range(draw(st.integers(0, 14))):
            if n and draw(st.integers(0, 2)) == 0:
                session += 1
                ts += draw(st.sampled_from([HOUR, 40 * HOUR, 900 * HOUR]))
            ts += draw(st.sampled_from([0, 0, 7, 600]))
            events.append((draw(st.integers(1, V)), ts, session))
            feedback.append(draw(st.sampled_from(kinds)))
            if lists and draw(st.booleans()):
                shown[len(feedback) - 1] = draw(st.lists(st.integers(1, V), max_size=3))
        users.append(events)
    rows = rows_of(*users)
    if kinds == (POSITIVE,) and not lists:
        return rows
    return evidence(rows, feedback, shown if lists else None)


def positions(rows: Rows, new: bool) -> Asked:
    """Every event of every user as a position: its past, asked an hour later or at its end."""
    end = np.arange(1, len(rows.item) + 1)
    begin = rows.start[np.searchsorted(rows.start, end - 1, side="right") - 1]
    return Asked(
        begin, end, rows.ts[end - 1] + new * HOUR * SECOND, rows.ordinal[end - 1].astype(int) + new
    )


@settings(max_examples=150, deadline=None)
@given(rows=histories(), most=st.sampled_from([1, 3, 1000]), new=st.booleans())
def test_features_are_those_of_a_slow_oracle(rows: Rows, most: int, new: bool) -> None:
    asked = positions(rows, new)
    own = rows.habits.own_items(rows, asked, most)
    got: list[dict[int, list[float]]] = [{} for _ in asked.end]
    for row, item, one in zip(
        own.row.tolist(), own.item.tolist(), own.feature.T.tolist(), strict=True
    ):
        assert item not in got[row], "each item once"
        got[row][item] = one
    assert own.feature.dtype == torch.float32 and torch.isfinite(own.feature).all()
    assert own.row.tolist() == sorted(own.row.tolist())
    for n in range(len(asked.end)):
        want = oracle(
            rows, *(int(x[n]) for x in (asked.begin, asked.end, asked.ts, asked.ordinal)), most
        )
        assert got[n].keys() == want.keys()
        for item, one in want.items():
            assert got[n][item] == pytest.approx([one[name] for name in FEATURES], abs=2e-5)


@settings(max_examples=60, deadline=None)
@given(rows=histories(), data=st.data())
def test_the_future_and_other_users_change_no_bit(rows: Rows, data: st.DataObject) -> None:
    """Every past alone gives, to the last bit, what it gives among its future and other users."""
    if not len(rows.item):
        return
    asked = positions(rows, True)
    whole = rows.habits.own_items(rows, asked, 1000)
    n = data.draw(st.integers(0, len(asked.end) - 1))
    begin, end = asked.begin[n : n + 1], asked.end[n : n + 1]
    alone = rows.part(begin, end)
    part = Asked(np.array([0]), end - begin, asked.ts[n : n + 1], asked.ordinal[n : n + 1])
    own = alone.habits.own_items(alone, part, 1000)
    mine = whole.row == n
    order, other = torch.argsort(whole.item[mine]), torch.argsort(own.item)
    assert torch.equal(whole.item[mine][order], own.item[other])
    assert torch.equal(whole.feature[:, mine][:, order], own.feature[:, other])


def test_counts_of_sessions_by_hand() -> None:
    """1 in sessions 1, 2 and 4 of four, a day apart; asked two days after, in a new session."""
    rows = rows_of([(1, 0, 1), (1, 5, 1), (1, 86400, 2), (2, 172800, 3), (1, 259200, 4)])
    asked = Asked(np.array([0]), np.array([5]), np.array([5 * DAY]), np.array([5]))
    own = rows.habits.own_items(rows, asked, 10)
    at = {int(i): dict(zip(FEATURES, f, strict=True)) for i, f in zip(own.item, own.feature.T.tolist())}
    one, two = at[1], at[2]
    assert one["visits"] == pytest.approx(math.log(4)) and two["once"] == 1 and one["once"] == 0
    assert one["share"] == pytest.approx(3 / 5) and two["share"] == pytest.approx(1 / 5)
    assert one["gap_sessions"] == pytest.approx(math.log(2.5))  # (4 - 1) / 2
    assert one["due_sessions"] == pytest.approx(4 * 1 / 2.5 - 2)
    assert one["since_days"] == pytest.approx(math.log(49) / 4)
    assert (one["latest"], two["latest"]) == (1, 0)
    assert one["days_2"] == pytest.approx(math.log1p(sum(math.exp(-d / 2) for d in (5, 4, 2))))
    assert one["sessions_2"] == pytest.approx(math.log1p(sum(math.exp(-n / 2) for n in (4, 3, 1))))


