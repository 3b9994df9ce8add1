"""A planted log with an effect of known size: comparisons find it as often as `power` promises, and do
not find one where there is none. `benchmarks/power.py` makes the logs and prints the whole table.

Models that count are made 100 times anew, alone or by a bit that the log has beside each event (such as:
it opens a session), which tells something or nothing. The true effect is that of models of the whole
distribution over very many users.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import power
from benchmarks.power import TOLD, Log, Recorded, counted, effect_of
from models.evaluation.components import Components, components

pytestmark = pytest.mark.training

SEEDS, REPEATS = 3, 100


def repeated(log: Log, sees_bit: bool, seed: int) -> tuple[float, float]:
    """(share of comparisons whose interval excludes 0, mean of the detectable difference)."""
    drawn = list(counted(log, sees_bit, SEEDS, REPEATS, seed))
    found = [power.by_compare(values, SEEDS) for values in drawn]
    least = [components(*values).detectable(power.USERS, SEEDS) for values in drawn]
    return float(np.mean(found)), float(np.mean(least))


def test_an_effect_of_five_percent_is_found_and_none_is_not() -> None:
    log = Log.planned(TOLD)
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


@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_values_like_those_of_a_recorded_comparison(rest: float) -> None:
    """What can be seen with 80 % is seen as often, by planned looks less; what is not there hardly
    ever, and no gate promotes a model that is no better."""
    log = Recorded.of("completejourney.json")
    assert log.users > 400 and 0.1 < log.base < 0.2
    own = rest * log.by_user / 2
    seeds = log.by_training - own / log.users
    true = Components((1 - rest) * log.by_user, (seeds,) * 2, (own,) * 2, several=True)
    share = true.detectable(log.users, power.MOST) / log.base
    dice, bounds = np.random.default_rng(4), power.PLAN.bounds
    for effect, low, high in ((share, 0.68, 0.92), (0.0, 0.0, 0.085)):
        drawn = [log.drawn(effect, rest, power.MOST, dice) for _ in range(200)]
        assert low <= np.mean([power.by_compare(v, power.MOST) for v, _ in drawn]) <= high
        # (`seeds` counts the rest twice, so it sees less where all is the rest.)
        seen = np.mean([power.by_seeds(values, bounds) for values, _ in drawn])
        assert low * (1 - 0.4 * rest) - 0.05 <= seen <= high
        gate = [power.promoted(*each) for each in drawn[:100]]
        assert np.mean([wrong for _, wrong in gate]) <= 0.05
        # (One training of each, so it sees much less where a further training would change all.)
        better = np.mean([better for better, _ in gate])
        assert better > 0.4 * (1 - 0.8 * rest) or not effect


def test_shares_have_binomial_intervals() -> None:
    row = power.row("values", "compare", 5.0, [True] * 8 + [False] * 2)
    assert (row["found"], row["repeats"]) == (8, 10)
    assert row["low"] == pytest.approx(0.4439, abs=1e-4)  # tables of Clopper and Pearson
    assert row["high"] == pytest.approx(0.9748, abs=1e-4)
    none = power.row("values", "compare", 0.0, [False] * 10)
    text = power.table([row, none, power.row("values", "gate", 5.0, [True])])
    assert "| values | +5.0 % | 8 of 10 (0.44 to 0.97) | 1 of 1 (0.03 to 1.00) |" in text
    assert "| values | none | 0 of 10 (0.00 to 0.31) |  |" in text


@pytest.mark.slow
def test_really_trained_models_differ_where_sessions_tell_something() -> None:
    effect, none = power.run_trained(3)
    assert effect["repeats"] == none["repeats"] == 3
    assert 2 < effect["effect_pct"] < 9 and effect["effect_pct"] > effect["effect_error_pct"]
    assert 0.5 < effect["detectable_pct"] < 12
    assert none["found"] <= 1 <= effect["found"]
