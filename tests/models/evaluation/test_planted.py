"""A planted log with an effect of known size: comparisons find it as often as `power` promises, and do
not find one where there is none.

Small models are trained on a drawn log, 100 times anew: what follows an item is counted, alone or by a
bit that the log has beside each event (such as: it opens a session). The bit tells something or
nothing, by the plan of the log. A seed of a training is a sample of the log's lines, with replacement.
The true effect is that of models of the whole distribution over very many users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from models.core.rows import Floats, Ints
from models.evaluation.components import components, over_seeds
from models.evaluation.metrics import per_target

pytestmark = pytest.mark.training

ITEMS, USERS, TARGETS, LINES, SEEDS = 40, 40, 12, 60_000, 3
REPEATS = 100


@dataclass(frozen=True)
class Log:
    """float64[ITEMS, 2, ITEMS]: what follows an item, by the bit; `habits`: how far users differ."""

    follows: Floats
    habits: float = 0.6

    @staticmethod
    def planned(told: float, seed: int = 0) -> Log:
        """`told`: the share of events that follow the bit and not the item alone."""
        dice = np.random.default_rng(seed)
        places = np.argsort(dice.random((ITEMS, 3, ITEMS)), axis=2)
        zipf = 1 / np.arange(1, ITEMS + 1) ** 1.1
        drawn = (zipf / zipf.sum())[places]
        return Log((1 - told) * drawn[:, :1] + told * drawn[:, 1:])

    def lines(self, number: int, dice: np.random.Generator) -> Floats:
        """float64[ITEMS, 2, ITEMS]: how often each line comes in a log of so many lines."""
        whole = self.follows / self.follows.sum()
        return dice.multinomial(number, whole.ravel()).reshape(whole.shape).astype(float)

    def asked(self, users: int, dice: np.random.Generator) -> tuple[Ints, Ints, Ints]:
        """int64[users, TARGETS]: items, bits, and what followed; each user has favourite items."""
        favourites = dice.dirichlet(np.full(ITEMS, self.habits), users)
        item = (dice.random((users, TARGETS, 1)) > favourites.cumsum(1)[:, None]).sum(2)
        item = np.minimum(item, ITEMS - 1)
        bit = dice.integers(0, 2, item.shape)
        chance = self.follows[item, bit].cumsum(-1)
        target = (dice.random((*item.shape, 1)) * chance[..., -1:] > chance).sum(-1)
        return item, bit, np.minimum(target, ITEMS - 1)


def trained(lines: Floats, sees_bit: bool, dice: np.random.Generator | None) -> Ints:
    """int64[ITEMS, 2, ITEMS]: the place of each item in the list of a model of these lines, from 1."""
    if dice is not None:
        share = lines / lines.sum()
        lines = dice.multinomial(int(lines.sum()), share.ravel()).reshape(share.shape).astype(float)
    counts = lines if sees_bit else np.repeat(lines.sum(1, keepdims=True), 2, axis=1)
    return np.argsort(np.argsort(-counts, axis=2, kind="stable"), axis=2) + 1


def ndcg(places: Ints, asked: tuple[Ints, Ints, Ints]) -> Floats:
    """float64[U]: NDCG@10 of each user."""
    place = places[asked].ravel()
    values = per_target(place, np.arange(len(place) + 1), (10,))["ndcg@10"]
    mean: Floats = values.reshape(asked[0].shape).mean(1)
    return mean


def effect_of(log: Log) -> tuple[float, float]:
    """(NDCG@10 without the bit, what the bit adds) of models of the whole distribution."""
    asked = log.asked(60_000, np.random.default_rng(99))
    plain, told = (ndcg(trained(log.follows, sees, None), asked).mean() for sees in (False, True))
    return float(plain), float(told - plain)


def repeated(log: Log, sees_bit: bool, seed: int) -> tuple[float, float]:
    """(share of comparisons whose interval excludes 0, mean of the detectable difference)."""
    dice = np.random.default_rng(seed)
    found, least = 0, []
    for _ in range(REPEATS):
        lines, asked = log.lines(LINES, dice), log.asked(USERS, dice)
        one, other = (
            np.stack([ndcg(trained(lines, sees, dice), asked) for _ in range(SEEDS)], axis=1)
            for sees in (sees_bit, False)
        )
        _, low, high = over_seeds(one, other)
        found += not low <= 0 <= high
        least.append(components(one, other).detectable(USERS, SEEDS))
    return found / REPEATS, float(np.mean(least))


def test_an_effect_of_five_percent_is_found_and_none_is_not() -> None:
    log = Log.planned(0.37)
    plain, effect = effect_of(log)
    assert 0.045 < effect / plain < 0.055
    found, least = repeated(log, sees_bit=True, seed=1)
    assert least < effect, "the instrument says that it sees less than what is there"
    assert found >= 0.8
    wrong, _ = repeated(Log.planned(0.0), sees_bit=False, seed=2)
    assert wrong <= 0.11  # of 100 at 5 %: more has a chance of 1 %


def test_what_is_below_what_can_be_seen_is_mostly_not_found() -> None:
    log = Log.planned(0.2)
    plain, effect = effect_of(log)
    assert 0 < effect / plain < 0.02
    found, least = repeated(log, sees_bit=True, seed=3)
    assert least > effect and found < 0.8
