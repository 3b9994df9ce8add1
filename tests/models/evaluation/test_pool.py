"""Results of several nights, put together: a user's value is the mean over all of their targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.core.config import ModelConfig
from models.core.rows import Ints, Rows
from models.data.splits import Targets
from models.evaluation import metrics, pool
from models.evaluation.evaluate import Result, evaluate
from models.networks.baselines import Popularity

V, KS = 30, (5, 10)


def asked(seed: int, *, sets: bool = False, opens: bool | None = None, most: int = 40) -> Targets:
    """Targets of six users; `opens` True or False: all are of that kind."""
    dice = np.random.default_rng(seed)
    number = int(dice.integers(10, most))
    size = dice.integers(1, 5, number) if sets else np.ones(number, dtype=np.int64)
    item = np.concatenate([dice.choice(V + 1, n, replace=False) for n in size])
    rows = Rows(
        item=np.ones(1, dtype=np.int32), ts=np.zeros(1, dtype=np.int64),
        ordinal=np.ones(1, dtype=np.int32), positive=np.ones(1, dtype=bool), start=np.array([0, 1]),
    )  # fmt: skip
    begin = np.zeros(number, dtype=np.int64)
    new = dice.random(number) < 0.4 if opens is None else np.full(number, opens)
    left = {"users_without_history": 1, "targets_without_history": 2}
    return Targets(
        rows, dice.integers(0, 6, number), begin, begin + 1, begin, new, new,
        np.concatenate([[0], np.cumsum(size)]), item, left, sets, gold=item,
    )  # fmt: skip


class Loud(Popularity):
    """Other scores for each target, so that places differ."""

    def __init__(self, seed: int) -> None:
        super().__init__(V, ModelConfig())
        self.dice = torch.Generator().manual_seed(seed)

    def score(self, rows: Rows, begin: Ints, end: Ints, *_: object) -> torch.Tensor:
        return torch.rand((len(begin), V), generator=self.dice, dtype=torch.float64)


def ages_of(one: Targets) -> dict[str, np.ndarray]:
    return {"low": one.item < 10, "high": one.item >= 10}


def judged(targets: list[Targets]) -> list[Result]:
    popularity = np.arange(1, V + 1)
    return [
        evaluate(Loud(n), one, KS, popularity=popularity, ages=ages_of(one))
        for n, one in enumerate(targets)
    ]


def slow(targets: list[Targets], name: str, keep: str = "") -> dict[int, float]:
    """User -> the mean over all targets of all nights, one target at a time; `keep`: of a kind."""
    values: dict[int, list[float]] = {}
    for n, one in enumerate(targets):
        scores = Loud(n).score(one.rows, one.begin, one.end)
        for t in range(len(one.user)):
            wanted = one.item[one.item_start[t] : one.item_start[t + 1]]
            place = metrics.ranks(scores[t : t + 1], np.array([0, len(wanted)]), wanted)
            if keep in ("low", "high"):
                place = place[(wanted < 10) == (keep == "low")]
            elif keep and bool(one.new_session[t]) != (keep == "first"):
                continue
            if not len(place):
                continue
            k = int(name.partition("@")[2])
            hits = sorted(int(p) for p in place if p <= k)
            if name.startswith("ndcg"):
                ideal = sum(1 / np.log2(m + 2) for m in range(min(k, len(place))))
                value = sum(1 / np.log2(p + 1) for p in hits) / ideal
            else:
                value = float(bool(hits))
            values.setdefault(int(one.user[t]), []).append(value)
    return {user: float(np.mean(some)) for user, some in values.items()}


def same(result: Result, name: str, expected: dict[int, float]) -> None:
    assert dict(zip(result.users.tolist(), result.values[name].tolist(), strict=True)) == (
        pytest.approx(expected, abs=1e-12)
    )


@pytest.mark.parametrize("sets", [False, True])
@pytest.mark.parametrize("name", ["ndcg@10", "hr@5"])
def test_a_users_value_is_the_mean_over_the_targets_of_all_nights(sets: bool, name: str) -> None:
    targets = [asked(seed, sets=sets) for seed in range(5)]
    nights = judged(targets)
    one = pool.pooled(nights)
    same(one, name, slow(targets, name))
    for age in ("low", "high"):
        same(one.ages[age], name, slow(targets, name, age))
    for kind in () if sets else ("first", "inside"):
        same(one.parts[kind], name, slow(targets, name, kind))
    number = sum(len(each.user) for each in targets)
    assert one.counts["targets"] == number == one.asked.sum()
    assert one.counts["users"] == len(one.users) == 6
    assert one.counts["targets_without_history"] == 10
    unseen = sum(int((each.item == 0).sum()) for each in targets)
    items = sum(len(each.item) for each in targets)
    assert one.counts["unseen_items"] == unseen
    assert one.counts["unseen_share"] == round(unseen / items, 4)
    weight = np.array([len(each.user) for each in targets])
    covered = np.array([night.catalogue["coverage@10"] for night in nights])
    assert one.catalogue["coverage@10"] == pytest.approx((covered * weight).sum() / weight.sum())


def test_a_night_of_one_kind_counts_among_that_kind() -> None:
    """Alone it has no parts, because there is nothing to hold apart."""
    targets = [asked(0, opens=True), asked(1), asked(2, opens=False)]
    nights = judged(targets)
    assert not nights[0].parts and nights[1].parts and not nights[2].parts
    one = pool.pooled(nights)
    for kind in ("first", "inside"):
        same(one.parts[kind], "ndcg@10", slow(targets, "ndcg@10", kind))
    assert one.parts["first"].counts["targets"] == one.counts["first_of_a_session"]
    assert not pool.pooled([nights[0], nights[0]]).parts


def test_a_night_in_which_nobody_is_asked_changes_nothing() -> None:
    targets = [asked(0), asked(1)]
    empty = asked(2).select(np.zeros(0, dtype=np.int64))
    nights = judged(targets)
    none = evaluate(Loud(9), empty, KS, popularity=np.arange(1, V + 1), ages=ages_of(empty))
    assert not len(none.users) and none.counts["targets"] == 0
    with_it, without = pool.pooled([nights[0], none, nights[1]]), pool.pooled(nights)
    same(with_it, "ndcg@10", dict(zip(without.users, without.values["ndcg@10"], strict=True)))
    assert with_it.catalogue == pytest.approx(without.catalogue)
    assert not len(pool.pooled([none]).users)


def test_one_night_alone_is_itself() -> None:
    [night] = judged([asked(4)])
    one = pool.pooled([night])
    same(one, "ndcg@10", dict(zip(night.users, night.values["ndcg@10"], strict=True)))
    assert {k: v for k, v in one.counts.items()} == night.counts


def test_what_is_kept_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    [night] = judged([asked(5)])
    night = replace(night, counts={**night.counts, "sampled_short": 3})
    pool.keep(night, tmp_path)
    again = pool.kept(tmp_path)

    def equal(one: Result, other: Result) -> None:
        assert np.array_equal(one.users, other.users) and np.array_equal(one.asked, other.asked)
        assert one.counts == other.counts and one.catalogue == other.catalogue
        assert one.values.keys() == other.values.keys()
        assert all(np.array_equal(one.values[n], other.values[n]) for n in one.values)
        for mine, theirs in ((one.parts, other.parts), (one.ages, other.ages)):
            assert mine.keys() == theirs.keys()
            for name in mine:
                equal(mine[name], theirs[name])

    equal(night, again)
    assert set(again.parts) == {"first", "inside"} and set(again.ages) == {"low", "high"}
