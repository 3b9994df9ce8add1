"""Metrics against a slow and obvious computation, ties included; the bootstrap against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.data.splits import Targets
from models.evaluation.evaluate import Sampled, evaluate
from models.evaluation.metrics import (
    UNRANKED,
    bootstrap,
    catalogue,
    per_target,
    per_user,
    ranks,
)
from models.evaluation.rescore import describe_report
from models.networks.scoring import best, parts
from tests.support.gold_world import rows_of


def obvious(scores: list[float], wanted: list[int], k: int) -> dict[str, float]:
    """Sort by score, those not asked for first among equals; read the metrics off the list."""
    order = sorted(range(1, len(scores) + 1), key=lambda i: (-scores[i - 1], i in wanted))
    top = [item for item in order[:k] if scores[item - 1] > -math.inf]
    hits = [place for place, item in enumerate(top, 1) if item in wanted]
    possible = min(k, len(wanted))
    return {
        f"hr@{k}": float(bool(hits)),
        f"recall@{k}": len(hits) / possible,
        f"mrr@{k}": 1 / hits[0] if hits else 0.0,
        f"ndcg@{k}": sum(1 / math.log2(p + 1) for p in hits)
        / sum(1 / math.log2(p + 1) for p in range(1, possible + 1)),
    }


@pytest.mark.parametrize("seed", range(30))
def test_metrics_are_what_the_sorted_list_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, items = 9, 12
    scores = rng.integers(0, [2, 4, 1000][seed % 3], (rows, items)).astype(float)  # many ties
    if seed % 2:
        scores[rng.random(scores.shape) < 0.2] = -math.inf  # excluded, as seen
    wanted = [rng.choice(items, rng.integers(1, 6), replace=False) + 1 for _ in range(rows)]
    # Unknown items: they count in the set, and never hit.
    unknown = rng.integers(0, 3, rows)
    sets = [[*w.tolist(), *[0] * u] for w, u in zip(wanted, unknown, strict=True)]
    start = np.cumsum([0, *(len(s) for s in sets)])
    item = np.array([i for s in sets for i in s])
    table = torch.tensor(scores)
    first = ranks(table, np.arange(rows + 1), item[start[:-1]])
    got = per_target(ranks(table, start, item), start, (1, 3, 10), first)
    for row, (w, u) in enumerate(zip(wanted, unknown, strict=True)):
        for k in (1, 3, 10):
            want = obvious(scores[row].tolist(), [*w.tolist(), *range(100, 100 + u)], k)
            want[f"first_item_hr@{k}"] = obvious(scores[row].tolist(), [int(w[0])], k)[f"hr@{k}"]
            for name, value in want.items():
                assert got[name][row] == pytest.approx(value), (name, row)


def test_a_constant_model_gets_nothing_for_its_ties() -> None:
    start, item = np.array([0, 1]), np.array([1])
    assert ranks(torch.zeros(1, 50), start, item).tolist() == [50]


def test_what_has_no_score_has_no_place() -> None:
    start, item = np.array([0, 1]), np.array([2])
    nothing = torch.full((1, 4), torch.nan)
    assert ranks(nothing, start, item).tolist() == [UNRANKED]
    some = torch.tensor([[torch.nan, 0.5, 0.1, 0.9]])
    assert ranks(some, start, item).tolist() == [3], "an item without a score stands before it"
    values = per_target(ranks(nothing, start, item), start, (1, 10))
    assert all(value[0] == 0 for value in values.values())


class Fixed:
    """Scores item i by i, whoever asks."""

    num_items = 4

    def score(self, rows, begin, end, request_ts=None, new_session=None):  # type: ignore[no-untyped-def]
        return torch.arange(1.0, 5.0).expand(len(begin), -1)


def test_users_count_alike_however_many_targets_they_have() -> None:
    rows = rows_of([(4, 1, 1), (3, 2, 1), (4, 3, 1)], [(1, 1, 1), (1, 2, 1)])
    asked = Targets(
        rows, np.array([0, 0, 1]), np.array([0, 0, 3]), np.array([1, 2, 4]),
        np.zeros(3, dtype=np.int64), np.zeros(3, dtype=bool), np.zeros(3, dtype=bool),
        np.array([0, 1, 2, 3]), np.array([3, 4, 1]), {},
    )  # fmt: skip
    result = evaluate(Fixed(), asked, (1, 2))
    assert result.users.tolist() == [0, 1]
    assert result.values["hr@1"].tolist() == [0.5, 0.0]
    assert result.values["mrr@2"].tolist() == [0.75, 0.0]
    assert result.mean("hr@2") == 0.5
    seen = evaluate(Fixed(), asked, (1,), "exclude_seen")
    # 4 is seen in the first two histories: 3 is the best of the first, nothing hits in the second.
    assert seen.values["hr@1"].tolist() == [0.5, 0.0]


def test_what_is_excluded_stands_in_no_list() -> None:
    """Of 30 items both users have seen 28: two items make all lists, though lists have ten places."""

    class Model:
        num_items = 30

        def score(self, rows, begin, end, request_ts=None, new_session=None):  # type: ignore[no-untyped-def]
            return torch.arange(30.0).expand(len(begin), -1)

    story = [(item, item, 1) for item in range(1, 29)]
    rows = rows_of([*story, (29, 40, 1)], [*story, (30, 40, 1)])
    asked = Targets(
        rows, np.array([0, 1]), rows.start[:-1], rows.start[1:] - 1, np.array([40, 40]),
        np.zeros(2, dtype=bool), np.zeros(2, dtype=bool), np.array([0, 1, 2]), np.array([29, 30]), {},
    )  # fmt: skip
    popularity = np.ones(30, dtype=np.int64)
    hidden = evaluate(Model(), asked, (1,), "exclude_seen", popularity=popularity)
    assert hidden.catalogue["coverage@10"] == hidden.catalogue["coverage@20"] == 2 / 30
    open_to_all = evaluate(Model(), asked, (1,), popularity=popularity)
    assert open_to_all.catalogue["coverage@10"] == 10 / 30
    assert hidden.counts["first_of_a_session"] == 0 and not hidden.parts


def test_per_user_means() -> None:
    users, values = per_user({"x": np.array([1.0, 3.0, 5.0])}, np.array([7, 7, 2]))
    assert users.tolist() == [2, 7]
    assert values["x"].tolist() == [5.0, 2.0]


def test_the_bootstrap_agrees_with_theory_and_covers() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 0.2, (900, 2))
    low, high = bootstrap(values, 4000)
    half = 1.96 * values.std(0) / 30
    assert np.allclose(low, values.mean(0) - half, atol=0.0015)
    assert np.allclose(high, values.mean(0) + half, atol=0.0015)
    covered = sum(
        low <= 0.3 <= high
        for low, high in (bootstrap(rng.normal(0.3, 0.2, (60, 1)), 400)[:, 0] for _ in range(200))
    )
    assert 170 <= covered <= 199


def test_many_users_give_a_narrow_interval() -> None:
    low, high = bootstrap(np.random.default_rng(0).random((100_000, 2)), 300)
    assert ((high - low) < 0.005).all()


def test_first_of_a_session_and_inside_are_told_apart() -> None:
    rows = rows_of([(4, 1, 1), (3, 2, 1), (4, 3, 2)], [(1, 1, 1), (1, 2, 1)])
    asked = Targets(
        rows, np.array([0, 0, 1]), np.array([0, 0, 3]), np.array([1, 2, 4]),
        np.zeros(3, dtype=np.int64), np.array([False, True, False]), np.array([True, True, False]),
        np.array([0, 1, 2, 3]), np.array([3, 4, 1]), {},
    )  # fmt: skip
    result = evaluate(Fixed(), asked, (1, 2), popularity=np.array([5, 3, 1, 1]))
    assert result.parts["first"].users.tolist() == [0]
    assert result.parts["first"].values["hr@1"].tolist() == [1.0]
    assert result.parts["inside"].users.tolist() == [0, 1]
    assert result.parts["inside"].values["hr@1"].tolist() == [0.0, 0.0]
    assert result.parts["inside"].counts["targets"] == 2
    assert result.values["hr@1"].tolist() == [0.5, 0.0]


def test_what_the_lists_are_made_of() -> None:
    """Items shown as often as they are chosen have no bias; the most popular one alone the most."""
    popularity = np.array([6, 2, 1, 1])
    found = catalogue(np.array([[6, 2, 1, 1], [9, 0, 0, 0]]), popularity, (1, 2))
    assert found["coverage@1"] == 1.0 and found["coverage@2"] == 0.25
    assert found["popularity@1"] == pytest.approx(0.5)
    assert found["popularity@2"] == pytest.approx(0.7)


def test_sampled_places_are_among_unseen_items_and_follow_from_the_seed() -> None:
    class Random:
        num_items = 50

        def score(self, rows, begin, end, request_ts=None, new_session=None):  # type: ignore[no-untyped-def]
            return torch.rand(len(begin), 50, generator=torch.Generator().manual_seed(3))

    users = 400
    rows = rows_of(*[[(u % 50 + 1, 1, 1), ((u + 1) % 50 + 1, 2, 1)] for u in range(users)])
    at = np.arange(users)
    asked = Targets(
        rows, at, rows.start[:-1], rows.start[:-1] + 1, at, np.zeros(users, dtype=bool),
        np.zeros(users, dtype=bool), np.arange(users + 1), (at + 1) % 50 + 1, {},
    )  # fmt: skip
    lists = [Sampled(9, by, np.arange(1, 51)) for by in ("random", "popular")]
    first, again = (evaluate(Random(), asked, (1, 5), sampled=lists) for _ in range(2))
    # One of ten items, at random: it is first once in ten, among the first five in half.
    for by in ("random", "popular"):
        assert first.mean(f"sampled_{by}_hr@1") == pytest.approx(0.1, abs=0.05)
        assert first.mean(f"sampled_{by}_hr@5") == pytest.approx(0.5, abs=0.08)
        assert np.array_equal(
            first.values[f"sampled_{by}_ndcg@5"], again.values[f"sampled_{by}_ndcg@5"]
        )
    # Where everything unseen is drawn, the sampled list is the full one.
    whole = [Sampled(48, "random", np.ones(50))]
    both = evaluate(Random(), asked, (5,), "exclude_seen", sampled=whole)
    assert np.array_equal(both.values["sampled_random_hr@5"], both.values["hr@5"])
    assert first.counts["sampled_short"] == both.counts["sampled_short"] == 0
    more = [Sampled(49, "random", np.ones(50))]
    assert evaluate(Random(), asked, (5,), sampled=more).counts["sampled_short"] == users


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"first_of_a_session": 3}, "2 users without history left out)"),
        ({"first_of_a_session": 0}, "left out; each is inside a session)"),
        ({"first_of_a_session": 9}, "left out; each opens one)"),
        ({}, "left out)"),  # next sessions have no such count
        (
            {"first_of_a_session": 3, "sampled_short": 4},
            "left out; for 4 of them there were fewer unseen items than --sampled asks for: lists of "
            "what there is)",
        ),
    ],
)
def test_what_a_report_says_of_its_targets(counts: dict[str, int], says: str) -> None:
    ndcg = {"value": 0.25, "low": 0.125, "high": 0.5}
    report = {
        "method": "narm", "target": "next_item", "table_version": 7, "metrics": {"ndcg@10": ndcg},
        "mlflow_run_id": "abc",
        "counts": {"users": 5, "targets": 9, "unseen_share": 0.5, "users_without_history": 2}
        | counts,
    }  # fmt: skip
    told = describe_report(report)
    assert says in told and told.endswith("). MLflow run abc")
    assert "ndcg@10 0.2500 [0.1250, 0.5000] over 5 users and 9 targets (50.0 %" in told


def test_the_loss_is_the_cross_entropy_of_known_items() -> None:
    class Model:
        num_items, gives_logits = 3, True

        def score(self, rows, begin, end, request_ts=None, new_session=None):  # type: ignore[no-untyped-def]
            return torch.log(torch.tensor([[0.5, 0.25, 0.25]])).expand(len(begin), -1) + 7

    rows = rows_of([(3, 1, 1), (3, 2, 2), (3, 3, 3)])
    asked = Targets(
        rows, np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64), np.array([1, 2, 2]),
        np.zeros(3, dtype=np.int64), np.ones(3, dtype=bool), np.ones(3, dtype=bool),
        np.array([0, 3, 4, 5]), np.array([1, 2, 0, 3, 0]), {}, sets=True,
    )  # fmt: skip
    # {1, 2, unknown}: mean of ln 2 and ln 4; {3}: ln 4; {unknown} does not count.
    wanted = (1.5 * math.log(2) + 2 * math.log(2)) / 2
    found = evaluate(Model(), asked, (1,), popularity=np.ones(3, dtype=np.int64))
    assert found.catalogue["test_loss"] == pytest.approx(wanted)
    assert "test_loss" not in evaluate(Model(), asked, (1,)).catalogue, "not at every validation"
    counts = evaluate(Fixed(), asked, (1,), popularity=np.ones(4, dtype=np.int64))
    assert "test_loss" not in counts.catalogue and "coverage@10" in counts.catalogue


@pytest.mark.parametrize("size", [3, 90, 1600, 1999])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_the_best_are_those_of_a_full_sort(size: int, k: int) -> None:
    """Equal scores in order of the vocabulary, whatever shortcut finds them."""
    torch.manual_seed(size + k)
    tied = torch.randint(0, 40, (7, size)).float()
    tied[0] = 1.0
    tied[1, ::3] = -torch.inf
    for scores in (torch.randn(7, size), tied):
        place, score = best(scores, k)
        want, order = scores.sort(dim=1, descending=True, stable=True)
        assert torch.equal(score, want[:, :k]) and torch.equal(place, order[:, :k])


def test_parts_have_every_history_once_and_fit() -> None:
    class Model:
        num_items, tokens_at_once = 100, 8192

        class config:
            max_len = 50

    length = np.sort(np.random.default_rng(3).geometric(0.02, 5000))
    found = parts(Model(), np.arange(5000), length)
    assert np.array_equal(np.concatenate(found), np.arange(5000))
    for part in found:
        longest = min(int(length[part[-1]]), 50)
        assert 1 <= len(part) <= 512 and len(part) * longest <= 8192
    fewest = 8192 // 50
    assert all(len(part) >= fewest for part in found[:-1])
    assert parts(Model(), np.arange(0), length[:0]) == []
