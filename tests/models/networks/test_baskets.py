"""Baselines for next baskets, held against slow loops written from the papers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from models.core.config import ModelConfig
from models.core.knobs import knobs
from models.core.rows import Rows
from models.networks.baselines import PersonalTop
from models.networks.methods import config, count_parameters
from models.networks.saved_model import Stored, load, save
from models.serving.all_users import lists
from models.serving.answer import recommend
from tests.models.networks.test_neighbours import fitted, last_scores, random_rows
from tests.support.gold_world import rows_of

ITEMS = 9
NAMES = ("gp_topfreq", "tifu_knn", "up_cf")
Basket = set[int]


def baskets_of(rows: Rows, begin: int, end: int) -> list[Basket]:
    """Sessions with a positive event, the oldest first."""
    found: dict[int, Basket] = {}
    for event in range(begin, end):
        if rows.positive[event]:
            found.setdefault(int(rows.session[event]), set()).add(int(rows.item[event]) - 1)
    return list(found.values())


def users_of(rows: Rows) -> list[list[Basket]]:
    """Of the training users with a basket, who bought last first."""
    bounds = list(zip(rows.start[:-1].tolist(), rows.start[1:].tolist(), strict=True))
    users = [(b, e) for b, e in bounds if baskets_of(rows, b, e)]

    def last(user: tuple[int, int]) -> int:
        return max(int(rows.ts[e]) for e in range(*user) if rows.positive[e])

    users.sort(key=last, reverse=True)
    return [baskets_of(rows, *user) for user in users]


def placed(scores: np.ndarray, rows: Rows) -> list[int]:
    """Items by score, equal ones and those of score 0 by popularity, then by the vocabulary."""
    pop = np.bincount(rows.item[rows.positive], minlength=ITEMS + 1)[1:]
    return sorted(range(ITEMS), key=lambda i: (-round(float(scores[i]), 10), -pop[i], i))


def tifu_vector(baskets: list[Basket], chosen: ModelConfig) -> np.ndarray:
    """The paper's steps, with the decays as in the authors' code."""
    m, t = chosen.tifu_groups, len(baskets)
    vectors = np.zeros((t, ITEMS))
    for j, basket in enumerate(baskets, 1):
        vectors[j - 1, list(basket)] = chosen.tifu_within_decay ** (t - j)
    if t < m:
        groups = [vectors[j : j + 1] for j in range(t)]
    else:
        sizes = [t // m + (g >= m - t % m) for g in range(m)]
        groups = np.split(vectors, np.cumsum(sizes)[:-1])
    total = np.zeros(ITEMS)
    for g, group in enumerate(groups):
        total += chosen.tifu_group_decay ** (m - 1 - g) * group.mean(axis=0)
    return total / len(groups)


def slow_tifu_knn(baskets: list[Basket], users: list[list[Basket]], c: ModelConfig) -> np.ndarray:
    own, others = tifu_vector(baskets, c), [tifu_vector(user, c) for user in users]
    # Distances that differ by rounding alone are equal.
    order = sorted(
        range(len(users)), key=lambda v: (round(float(((others[v] - own) ** 2).sum()), 12), v)
    )
    near = [others[v] for v in order[: c.tifu_neighbours]]
    result: np.ndarray = c.tifu_alpha * own + (1 - c.tifu_alpha) * np.mean(near, axis=0)
    return result


def recent_share(baskets: list[Basket], r: int) -> np.ndarray:
    newest = baskets[-r:] if r else baskets
    return np.array([sum(i in b for b in newest) / len(newest) for i in range(ITEMS)])


def slow_up_cf(baskets: list[Basket], users: list[list[Basket]], c: ModelConfig) -> np.ndarray:
    own = set.union(*baskets)
    like = []
    for user in users:
        other = set.union(*user)
        size = len(own) ** c.up_cf_asymmetry * len(other) ** (1 - c.up_cf_asymmetry)
        like.append(len(own & other) / size)
    near = sorted(range(len(users)), key=lambda v: (-round(like[v], 12), v))[: c.up_cf_neighbours]
    score = recent_share(baskets, c.up_cf_recent)
    for v in near:
        score += like[v] ** c.up_cf_locality * recent_share(users[v], c.up_cf_recent)
    return score


SLOW = {"tifu_knn": slow_tifu_knn, "up_cf": slow_up_cf}
SOME: list[tuple[str, dict[str, float]]] = [
    ("tifu_knn", {}),
    ("tifu_knn", {"tifu_neighbours": 4, "tifu_groups": 3, "tifu_alpha": 0.2}),
    ("tifu_knn", {"tifu_neighbours": 1, "tifu_groups": 1, "tifu_within_decay": 0.5}),
    ("tifu_knn", {"tifu_alpha": 0.0, "tifu_group_decay": 1.0, "tifu_neighbours": 5}),
    ("up_cf", {}),
    ("up_cf", {"up_cf_recent": 0, "up_cf_locality": 1.0, "up_cf_neighbours": 3}),
    ("up_cf", {"up_cf_recent": 2, "up_cf_asymmetry": 0.0, "up_cf_locality": 2.5}),
    ("up_cf", {"up_cf_recent": 1, "up_cf_asymmetry": 1.0, "up_cf_neighbours": 1}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("method", "options"), SOME)
def test_they_are_their_papers(method: str, options: dict[str, float], seed: int) -> None:
    rows = random_rows(seed, users=20)
    got = last_scores(fitted(method, rows, ITEMS, **options), rows)
    chosen, users = config(method, **options).model, users_of(rows)
    for user, (begin, end) in enumerate(zip(rows.start[:-1], rows.start[1:], strict=True)):
        baskets = baskets_of(rows, begin, end)
        want = SLOW[method](baskets, users, chosen) if baskets else np.zeros(ITEMS)
        assert np.allclose(np.maximum(got[user], 0), want, rtol=1e-7, atol=1e-15)
        assert np.argsort(-got[user], kind="stable").tolist() == placed(want, rows)


@pytest.mark.parametrize("seed", range(3))
def test_gp_topfreq_counts_baskets(seed: int) -> None:
    rows = random_rows(seed, users=20)
    got = last_scores(fitted("gp_topfreq", rows, ITEMS), rows)
    bounds = list(zip(rows.start[:-1], rows.start[1:], strict=True))
    every = sum(
        (recent_share(b, 0) * len(b) for b in (baskets_of(rows, *x) for x in bounds) if b),
        np.zeros(ITEMS),
    )
    for user, bound in enumerate(bounds):
        baskets = baskets_of(rows, *bound)
        own = [sum(i in b for b in baskets) for i in range(ITEMS)]
        want = sorted(range(ITEMS), key=lambda i: (-own[i], -every[i], i))
        assert np.argsort(-got[user], kind="stable").tolist() == want


def test_an_item_twice_in_a_basket_counts_once_and_what_was_not_taken_never() -> None:
    rows = rows_of(
        [(1, 0, 1), (1, 1, 1), (1, 2, 1), (2, 3, 2), (2, 4, 3), (3, 5, 4)],
        positive=[True, True, True, True, True, False],
    )
    for name in NAMES:
        scores = last_scores(fitted(name, rows, 3), rows)[0]
        assert scores[1] > scores[0] > scores[2], name
    own = last_scores(fitted("personal_top", rows, 3), rows)[0]
    assert own[0] > own[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_history_is_scored_alike_in_any_company(name: str) -> None:
    rows = random_rows(3, users=40)
    model = fitted(name, rows, ITEMS)
    begin, end = rows.start[:-1], rows.start[1:]
    together = last_scores(model, rows)
    for user in range(len(begin)):
        alone = model.score(rows, begin[user : user + 1], end[user : user + 1])  # type: ignore[operator]
        assert np.array_equal(alone[0].numpy(), together[user])


@pytest.mark.parametrize("name", ["tifu_knn", "up_cf"])
def test_users_in_parts_are_users_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(4, users=30)
    together = last_scores(fitted(name, rows, ITEMS), rows)
    monkeypatch.setattr("models.networks.neighbours.SCORES", 70)
    assert np.array_equal(last_scores(fitted(name, rows, ITEMS), rows), together)


@pytest.mark.parametrize("name", ["tifu_knn", "up_cf"])
def test_the_users_who_bought_last_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.networks.neighbours.USERS", 2)
    rows = rows_of(
        [(1, 10, 1), (4, 900, 2)], [(1, 500, 1), (2, 500, 1)], [(1, 600, 1), (3, 600, 1)],
        positive=[True, False, True, True, True, True],
    )  # fmt: skip
    model = fitted(name, rows, 4)
    assert len(model.user_start) == 3  # type: ignore[arg-type]
    scores = last_scores(model, rows)[0]
    assert scores[2] > 0 and scores[1] > 0 > scores[3]
    assert model.user_item.tolist() == [0, 2, 0, 1]  # type: ignore[operator]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_basket_popularity(name: str) -> None:
    rows = rows_of([(3, 0, 1), (1, 1, 2), (3, 2, 3)], [(2, 0, 1)], positive=[True] * 3 + [False])
    scores = last_scores(fitted(name, rows, 4), rows)[1]
    assert np.argsort(-scores, kind="stable").tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("name", NAMES)
def test_nobody_to_learn_from_leaves_the_users_own_baskets(name: str) -> None:
    events = [(3, 0, 1), (1, 1, 2), (3, 2, 3)]
    model = fitted(name, rows_of(events, positive=[False] * 3), 4)
    scores = last_scores(model, rows_of(events))[0]
    assert np.argsort(-scores, kind="stable").tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_counted_and_their_options_are_declared(name: str) -> None:
    assert count_parameters(100, config(name))["num_params"] == 0
    helps = {one.name: told for one, told in knobs(ModelConfig)}
    for _, options in SOME:
        assert all(not helps[option].hidden for option in options)


@pytest.mark.parametrize("name", NAMES)
def test_stored_they_say_the_same_and_name_nobody(name: str, tmp_path: Path) -> None:
    rows = random_rows(5)
    model = fitted(name, rows, ITEMS)
    names = [f"i{n}" for n in range(ITEMS)]
    save(Stored(model, config(name), names, torch.ones(ITEMS), {}), tmp_path / "kept")  # type: ignore[arg-type]
    again = load(tmp_path / "kept").model
    assert np.array_equal(last_scores(again, rows), last_scores(model, rows))
    kept = set(again.state_dict())
    assert kept - {"count", "user_start", "user_item", "user_weight"} == set()
    pairs = sum(len(set.union(*user)) for user in users_of(rows))
    assert name == "gp_topfreq" or len(again.user_item) == pairs  # type: ignore[arg-type]


@pytest.mark.parametrize("request_time", ["last_event", "known"])
@pytest.mark.parametrize("name", NAMES)
def test_raw_ids_get_the_lists_of_all_users(name: str, request_time: str) -> None:
    rows = random_rows(6)
    rows = replace(rows, positive=np.ones(len(rows.item), dtype=bool))
    ids = [f"i{n}" for n in range(ITEMS)]
    # A day between sessions, which serving cuts anew from the times.
    days = rows.ordinal.astype(np.int64) * 86_400_000_000
    apart = replace(rows, ts=days + np.arange(len(days)))
    chosen = config(name, request_time=request_time)
    facts = {"gap_us": 43_200_000_000}
    stored = Stored(fitted(name, apart, ITEMS), chosen, ids, torch.ones(ITEMS), facts)  # type: ignore[arg-type]
    owner = np.repeat(np.arange(len(rows.start) - 1), np.diff(rows.start))
    frame = pd.DataFrame(
        {
            "user_id": [f"u{n:02d}" for n in owner],
            "item_id": [ids[item - 1] for item in rows.item],
            "event_ts": pd.to_datetime(apart.ts, unit="us", utc=True),
        }
    )
    [(_, table)] = lists(stored, apart, 5)
    answers = recommend(stored, frame, 5)["items"]
    assert table["items"].to_pylist() == answers.tolist()


def test_a_users_own_counts_are_those_of_a_slow_count() -> None:
    """Of `personal_top`, to the last bit: own counts, and below 1 the items' popularity."""
    rows = rows_of([(1, 0, 1), (2, 1, 1), (1, 2, 1)], [], [(3, 5, 1)] * 4, [(2, 9, 1)])
    model = PersonalTop(3, config("personal_top").model)
    model.fit(rows)
    begin, end = rows.start[:-1], rows.start[1:]
    scores = model.score(rows, begin, end)
    for row, (first, last) in enumerate(zip(begin, end, strict=True)):
        for item in (1, 2, 3):
            own = int((rows.item[first:last] == item).sum())
            assert scores[row, item - 1] == own + model.share[item - 1]
    before = model.share.clone()
    scores.fill_(7.0)
    assert torch.equal(model.share, before), "the model has counts of its own"
