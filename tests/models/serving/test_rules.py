"""Rules hold inside a list: each equals taking the items one by one, the best first."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.core.rows import Rows
from models.networks.baselines import Popularity
from models.networks.methods import config
from models.networks.saved_model import Stored
from models.networks.scoring import best, exclude
from models.serving.all_users import lists
from models.serving.answer import recommend
from models.serving.rules import DAY_US, Rules, best_of, of_text, permitted
from tests.support.gold_world import SECOND, rows_of

CASES = 300


def slow(scores: list[float], k: int, left_out: set[int], rules: Rules) -> list[tuple[int, float]]:
    """One list, item by item."""
    found: list[tuple[int, float]] = []
    held: dict[int, int] = {}
    for item in sorted(range(len(scores)), key=lambda one: (-scores[one], one)):
        category = -1 if rules.category is None else int(rules.category[item])
        if not rules.allowed[item] or item in left_out or not np.isfinite(scores[item]):
            continue
        if rules.most and category >= 0 and held.get(category, 0) >= rules.most:
            continue
        held[category] = held.get(category, 0) + 1
        found.append((item, scores[item]))
    return found[:k]


def any_rules(dice: np.random.Generator, size: int) -> Rules:
    return Rules(
        allowed=dice.random(size) < dice.choice([0.1, 0.6, 1.0]),
        seen_us=None if dice.random() < 0.3 else int(dice.integers(1, 8)) * SECOND,
        now_us=8 * SECOND,
        most=int(dice.integers(0, 4)),
        category=dice.integers(-1, int(dice.integers(1, 6)), size) if dice.random() < 0.8 else None,
    )


def any_rows(dice: np.random.Generator, users: int, size: int) -> Rows:
    told = []
    for _ in range(users):
        times = sorted(int(one) for one in dice.integers(0, 9, int(dice.integers(1, 6))))
        told.append([(int(dice.integers(1, size + 1)), when, 1) for when in times])
    return rows_of(*told)


def test_lists_by_rules_are_those_of_a_slow_oracle() -> None:
    dice = np.random.default_rng(5)
    for case in range(CASES):
        size, users, k = (int(dice.integers(1, high)) for high in (40, 4, 12))
        rules, rows = any_rules(dice, size), any_rows(dice, users, size)
        scores = torch.tensor(dice.integers(-3, 4, (users, size)) / 2)
        begin, end = rows.start[:-1], rows.start[1:]
        place, score = best_of(permitted(scores, rules, rows, begin, end, None), k, rules)
        for user in range(users):
            left_out = set()
            if rules.seen_us is not None:
                assert rules.now_us is not None
                left_out = {
                    int(rows.item[at]) - 1
                    for at in range(begin[user], end[user])
                    if rows.ts[at] >= rules.now_us - rules.seen_us
                }
            there = torch.isfinite(score[user])
            mine = list(zip(place[user][there].tolist(), score[user][there].tolist(), strict=True))
            assert mine == slow(scores[user].tolist(), k, left_out, rules), case


def test_without_rules_nothing_is_another() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    for ours, theirs in zip(best_of(scores, 3, None), best(scores, 3), strict=True):
        assert torch.equal(ours, theirs)
    bounded = best_of(scores, 3, Rules(np.ones(4, dtype=bool)))
    assert bounded[0].tolist() == [[1, 2, 3]]


def pop_of(counts: list[int], **options: Any) -> Stored:
    made = config("pop", **options)
    pop = Popularity(len(counts), made.model)
    pop.count.copy_(torch.tensor(counts))
    ids = [f"i{number}" for number in range(len(counts))]
    return Stored(pop, made, ids, pop.count, {"gap_us": 1800 * SECOND, "session_rule": "gap"})


def test_a_request_gives_what_scoring_all_users_gives() -> None:
    """The rules as a text, over ids; users without a known item among them."""
    stored = pop_of([9, 8, 7, 6, 5, 4, 3, 2])
    told = {
        "blocked": ["i0", "a stranger"], "exclude_seen_days": 1, "as_of": "1970-01-03T00:00:00Z",
        "max_per_category": 2,
        "category": {"i1": "a", "i2": "a", "i3": "a", "i4": "b", "i5": "a", "i7": "b", "x": "a"},
    }  # fmt: skip
    rules = of_text(json.dumps(told), stored.lookup)
    day = 86_400
    rows = rows_of([(2, 100, 1), (5, 2 * day - 5, 2)], [(4, day - 1, 1)], [(4, day, 1)], [])
    [(_, table)] = list(lists(stored, rows, 4, rules))
    ours = [[one["item_id"] for one in row] for row in table["items"].to_pylist()]
    assert ours == [
        ["i1", "i2", "i6", "i7"], ["i1", "i2", "i4", "i6"], ["i1", "i2", "i4", "i6"],
        ["i1", "i2", "i4", "i6"],
    ]  # fmt: skip
    frame = pd.DataFrame(
        [("u", "i1", "1970-01-01T00:01:40"), ("u", "i4", "1970-01-02T23:59:55"),
         ("v", "i3", "1970-01-01T23:59:59"), ("w", "i3", "1970-01-02T00:00:00"),
         ("x", "never heard of", "1970-01-02T00:00:00")],
        columns=["user_id", "item_id", "event_ts"],
    )  # fmt: skip
    asked = recommend(stored, frame, 4, rules=rules)
    assert [[one["item_id"] for one in row] for row in asked["items"]] == ours
    # Without `as_of` days count back from a user's newest event, with `request_ts` from that.
    del told["as_of"]
    rules = of_text(json.dumps(told), stored.lookup)
    asked = recommend(stored, frame.iloc[:2], 4, rules=rules)
    assert [one["item_id"] for one in asked["items"][0]] == ["i1", "i2", "i6", "i7"]
    asked = recommend(stored, frame.iloc[:2], 4, "1970-02-01T00:00:00", rules=rules)
    assert [one["item_id"] for one in asked["items"][0]] == ["i1", "i2", "i4", "i6"]


def test_the_day_of_the_rule_is_the_last_moment_that_counts() -> None:
    rows = rows_of([(1, 0, 1), (2, 86_400, 2)])
    rules = Rules(np.ones(3, dtype=bool), seen_us=DAY_US, now_us=DAY_US)
    ends = rows.start[:-1], rows.start[1:]
    scores = permitted(torch.zeros(1, 3), rules, rows, *ends, None)
    assert torch.isfinite(scores).tolist() == [[False, False, True]], "exactly a day ago counts"
    later = np.array([DAY_US + 1])
    scores = permitted(torch.zeros(1, 3), rules, rows, *ends, later)
    assert torch.isfinite(scores).tolist() == [[True, False, True]]


def test_rules_come_on_top_of_what_was_seen() -> None:
    rows = rows_of([(1, 0, 1)])
    ends = rows.start[:-1], rows.start[1:]
    scores = exclude(torch.ones(1, 3), rows, *ends)
    rules = Rules(np.array([True, True, False]))
    place, score = best_of(permitted(scores, rules, rows, *ends, None), 3, rules)
    assert place[torch.isfinite(score)].tolist() == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["no JSON", "object"]),
        ("[]", ["object", "allowed"]),
        ('{"allow": []}', ["'allow'", "allowed"]),
        ('{"allowed": "i1"}', ["allowed", "i1", "list of item ids"]),
        ('{"blocked": [1]}', ["blocked", "[1]", "texts"]),
        ('{"exclude_seen_days": 0}', ["exclude_seen_days", "0", "above 0"]),
        ('{"exclude_seen_days": 1, "as_of": "noon"}', ["as_of", "'noon'", "ISO 8601"]),
        ('{"max_per_category": 2}', ["category", "object"]),
        ('{"category": {"i1": "a"}}', ["max_per_category", "None", "above 0"]),
    ],
)
def test_rules_that_are_none_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="rules") as raised:
        of_text(text, pop_of([1, 2]).lookup)
    assert all(one in str(raised.value) for one in words), raised.value


def test_scores_that_are_given_stay_as_they_are() -> None:
    rows = rows_of([(1, 0, 1)])
    ends = rows.start[:-1], rows.start[1:]
    for allowed in (np.ones(3, dtype=bool), np.array([True, True, False])):
        given = torch.ones(1, 3)
        rules = Rules(allowed, seen_us=DAY_US, now_us=DAY_US)
        asked = permitted(given, rules, rows, *ends, None)
        assert not torch.isfinite(asked[0, 0]) and torch.isfinite(given).all()
