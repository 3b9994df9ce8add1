"""Paper A's way of preparing a log: against a slow reading of its description, and its counts."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from models.core.errors import UserError
from models.data.load import prepared
from models.data.paper_a import paper_a
from models.data.sequences import Sequences
from models.data.splits import Events

ML_1M_HALF = Path(__file__).parents[4] / "shared/data/ml-1m-half/ratings.dat.gz"
HOUR = 3_600_000_000
Row = tuple[int, int, int]  # user, item, us


def events_of(rows: list[Row]) -> Events:
    """Rows in a user's order of time, as gold has them; sessions as gold would cut them by hour."""
    users = sorted({row[0] for row in rows})
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    user = np.searchsorted(users, [row[0] for row in rows])
    ts = np.array([row[2] for row in rows], dtype=np.int64)
    length = np.bincount(user)
    opens = np.ones(len(rows), dtype=bool)
    opens[1:] = (np.diff(ts) > HOUR) | (user[1:] != user[:-1])
    session = np.cumsum(opens)
    start = np.cumsum(length) - length
    return Events.of(
        Sequences(
            path="", version=0, table_id="", user_id=[str(u) for u in users],
            start=start, length=length,
            item=np.array([row[1] for row in rows], dtype=np.int32), ts=ts,
            session=(session - session[start][user] + 1).astype(np.int32),
            feedback=np.zeros(len(rows), dtype=np.int8),
            exposed=np.zeros(0, dtype=np.int32),
            exposed_count=np.zeros(len(rows), dtype=np.int32),
        )
    )  # fmt: skip


def slowly(rows: list[Row]) -> list[tuple[int, list[list[int]]]]:
    """Users and the items of their sessions."""
    items = Counter(row[1] for row in rows)
    rows = [row for row in rows if items[row[1]] >= 5]
    count = Counter(row[0] for row in rows)
    found = []
    for user in sorted(count):
        if count[user] < 5:
            continue
        own = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])[-200:]
        sessions: list[list[int]] = []
        for before, row in zip([None, *own], own, strict=False):
            if before is None or row[2] - before[2] > 24 * HOUR:
                sessions.append([])
            sessions[-1].append(row[1])
        if len(sessions) >= 2 and all(len(one) >= 2 for one in sessions):
            found.append((user, sessions))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_it_is_its_description(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(60):
        at = 0
        for _ in range(int(rng.integers(1, 40) if user else 260)):
            at += int(rng.choice([1, 60, 24 * 3600, 24 * 3600 + 1], p=[0.5, 0.4, 0.05, 0.05]))
            rows.append((user, int(rng.zipf(1.3)) % 40, at * 1_000_000))
    got = paper_a(events_of(rows))
    want = slowly(rows)
    assert len(want) > 3
    assert np.flatnonzero(np.diff(got.start)).tolist() == [user for user, _ in want]
    assert got.item.tolist() == [i for _, sessions in want for one in sessions for i in one]
    sizes = [len(one) for _, sessions in want for one in sessions]
    assert np.diff(np.append(np.flatnonzero(got.opens), len(got.opens))).tolist() == sizes
    assert np.bincount(got.session).tolist() == sizes


@pytest.mark.skipif(not ML_1M_HALF.exists(), reason="shared/data/ml-1m-half is not here")
def test_movielens_gives_the_counts_of_the_reference_code() -> None:
    with gzip.open(ML_1M_HALF, "rt", encoding="latin-1") as lines:
        parts = [line.split("::") for line in lines]
    got = paper_a(events_of([(int(p[0]), int(p[1]), int(p[3]) * 1_000_000) for p in parts]))
    users = int((np.diff(got.start) > 0).sum())
    assert (users, len(got.index), int(got.opens.sum())) == (575, 73_034, 1_604)
    assert len(np.unique(got.item)) == 3_100


def test_an_unknown_preprocessing_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="gold, paper_a"):
        prepared(events_of([(1, 1, 1)]), "paper_b")
