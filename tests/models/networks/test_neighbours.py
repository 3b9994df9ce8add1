"""Baselines that look at neighbours, and popularity of late: by hand, and against slow loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.core.rows import Rows
from models.networks.methods import build, config
from models.networks.saved_model import Stored, load, save
from tests.support.gold_world import rows_of

DAY = 86_400


def fitted(method: str, rows: Rows, items: int, **options: object) -> torch.nn.Module:
    model = build(items, config(method, **options))
    model.fit(rows)
    return model


def last_scores(model: torch.nn.Module, rows: Rows) -> np.ndarray:
    return model.score(rows, rows.start[:-1], rows.start[1:]).numpy()  # type: ignore[operator]


def test_recent_popularity_by_hand() -> None:
    rows = rows_of([(1, 0, 1), (1, 1, 1), (1, 2, 1), (2, 9 * DAY, 2), (3, 10 * DAY, 3)])
    model = fitted("recent_pop", rows, 4, recent_days=7.0)
    scores = last_scores(model, rows)[0]
    assert np.argsort(-scores, kind="stable").tolist() == [1, 2, 0, 3]
    assert scores[1] == scores[2] == 1 + 1 / 4 and scores[0] == 3 / 4


def sessions_of(rows: Rows) -> list[set[int]]:
    found: dict[int, set[int]] = {}
    for event, session in enumerate(rows.session.tolist()):
        found.setdefault(session, set())
        if rows.positive[event]:
            found[session].add(int(rows.item[event]))
    return list(found.values())


def random_rows(seed: int, users: int = 12, items: int = 9) -> Rows:
    rng = np.random.default_rng(seed)
    users_ = []
    for _ in range(users):
        ordinal = np.cumsum(rng.random(int(rng.integers(1, 30))) < 0.3) + 1
        at = np.sort(rng.integers(0, 10**6, len(ordinal)))
        drawn = rng.integers(1, items + 1, len(ordinal))
        users_.append(
            [(int(i), int(t), int(o)) for i, t, o in zip(drawn, at, ordinal, strict=True)]
        )
    flat = sum(len(u) for u in users_)
    return rows_of(*users_, positive=(rng.random(flat) < 0.9).tolist())


@pytest.mark.parametrize("seed", range(3))
def test_item_knn_is_a_damped_cosine_of_sessions_in_common(seed: int) -> None:
    rows = random_rows(seed)
    got = last_scores(fitted("item_knn", rows, 9, neighbours=4), rows)
    sessions = sessions_of(rows)
    size = {i: sum(i in s for s in sessions) for i in range(1, 10)}
    for user in range(len(rows.start) - 1):
        events = [e for e in range(rows.start[user], rows.start[user + 1]) if rows.positive[e]]
        want = np.zeros(9)
        if events:
            last = int(rows.item[events[-1]])
            for other in set(size) - {last}:
                common = sum({last, other} <= s for s in sessions)
                want[other - 1] = common / np.sqrt((size[last] + 20) * (size[other] + 20))
            want[want < np.sort(want)[-4]] = 0
        # Where the fourth place is shared, any of those may be kept.
        shared = np.isclose(want, np.min(want[want > 0], initial=9.0))
        assert np.allclose(got[user][~shared], want[~shared], atol=1e-6)
        assert (got[user] > 1e-6).sum() <= 4


@pytest.mark.parametrize("seed", range(3))
def test_vsknn_is_its_description(seed: int) -> None:
    rows = random_rows(seed, users=30)
    got = last_scores(fitted("vsknn", rows, 9, neighbours=1000), rows)
    sessions = [s for s in sessions_of(rows) if s]
    for user in range(len(rows.start) - 1):
        end = int(rows.start[user + 1])
        here = [e for e in range(end) if rows.session[e] == rows.session[end - 1]]
        item = [int(rows.item[e]) for e in here if rows.positive[e]]
        want = np.zeros(9)
        place = {one: at for at, one in enumerate(item, 1)}
        for session in sessions:
            if shared := session & set(place):
                alike = sum(place[one] for one in shared) / len(item) / len(place)
                steps = len(item) - max(place[one] for one in shared)
                for one in session:
                    want[one - 1] += alike * max(0.0, 1 - steps / 10)
        assert np.allclose(got[user], want, atol=1e-6)


def test_vsknn_looks_at_the_newest_sessions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.networks.neighbours.SAMPLE", 2)
    old = [(1, 10 * n, n) for n in range(1, 4)]
    rows = rows_of(
        [event for i, t, o in old for event in ((i, t, o), (2, t, o))],
        [(1, 500, 1), (3, 500, 1)], [(1, 600, 1), (4, 600, 1)], [(1, 0, 1)],
    )  # fmt: skip
    scores = last_scores(fitted("vsknn", rows, 4), rows)[3]
    assert scores[1] < 1e-6 and scores[2] > 0.5 and scores[3] > 0.5


@pytest.mark.parametrize("method", ["recent_pop", "item_knn", "vsknn"])
def test_stored_and_loaded_they_say_the_same(method: str, tmp_path: Path) -> None:
    rows = random_rows(5)
    model = fitted(method, rows, 9)
    names = [f"i{n}" for n in range(9)]
    stored = Stored(model, config(method), names, torch.ones(9), {})  # type: ignore[arg-type]
    save(stored, tmp_path / "kept")
    again = load(tmp_path / "kept").model
    assert np.array_equal(last_scores(again, rows), last_scores(model, rows))
