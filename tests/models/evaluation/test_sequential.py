"""Looking at each seed costs no more than the alpha that was planned, and ends early where there is much
to see."""

from __future__ import annotations

import numpy as np
import pytest

from models.core.config import ALPHA_SPENDING
from models.evaluation.components import difference, over_seeds
from models.evaluation.sequential import BETTER, NO_GAIN, OPEN, WORSE, bounds, look, spent
from tests.models.evaluation.test_components import trained

FIRST, MOST, USERS, REPEATS = 3, 8, 60, 400
LOOKS = range(FIRST, MOST + 1)


def test_bounds_are_those_of_the_literature() -> None:
    """Two-sided 5 %, five looks at equal distances: tables of Lan and DeMets's functions, as group
    sequential programs print them."""
    shares = [0.2, 0.4, 0.6, 0.8, 1.0]
    assert bounds(shares, 0.05, "obrien-fleming") == pytest.approx(
        [4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=2e-4
    )
    assert bounds(shares, 0.05, "pocock") == pytest.approx(
        [2.4380, 2.4268, 2.4101, 2.3966, 2.3859], abs=2e-4
    )


@pytest.mark.parametrize("spending", ALPHA_SPENDING)
def test_all_of_alpha_is_spent_and_no_more(spending: str) -> None:
    assert bounds([1.0], 0.05, spending) == pytest.approx([1.959964], abs=1e-6)
    assert spent(spending, 0.05, 1.0) == pytest.approx(0.05)
    shares = [n / MOST for n in LOOKS]
    used = [spent(spending, 0.05, share) for share in shares]
    assert used == sorted(used) and used[0] > 0
    # Sums of independent seeds, drawn: as many are outside up to each look as were to be.
    dice = np.random.default_rng(0)
    z = dice.normal(size=(200_000, MOST)).cumsum(1) / np.sqrt(np.arange(1, MOST + 1))
    outside = np.abs(z[:, FIRST - 1 :]) > bounds(shares, 0.05, spending)
    crossed = np.maximum.accumulate(outside, axis=1).mean(0)
    assert crossed == pytest.approx(used, abs=0.002)


def decided(
    effect: float, detect: float, spending: str, by_seed: float, repeats: int = REPEATS
) -> tuple[list[str], float]:
    """(verdicts of repeated experiments, the mean number of seeds of each method that they took)."""
    dice = np.random.default_rng(2)
    wide = bounds([n / MOST for n in LOOKS], 0.05, spending)
    verdicts, seeds = [], []
    for _ in range(repeats):
        mean = 0.5 + dice.beta(0.3, 3, USERS)
        one, other = (trained(dice, mean + more, MOST, by_seed) for more in (effect, 0.0))
        for number, bound in zip(LOOKS, wide, strict=True):
            found = look(one[:, :number], other[:, :number], bound, detect)
            if found.verdict != OPEN:
                break
        verdicts.append(found.verdict)
        seeds.append(number)
    return verdicts, float(np.mean(seeds))


@pytest.mark.parametrize("spending", ALPHA_SPENDING)
def test_without_an_effect_few_are_found_however_often_one_looks(spending: str) -> None:
    """Within what 1,000 draws allow of 5 % (more has a chance of 1 %), where nearly all variance is that
    of trainings."""
    verdicts, _ = decided(0.0, 0.0, spending, by_seed=0.05, repeats=1000)
    assert verdicts.count(OPEN) >= 1000 * (1 - 0.066)


def test_who_looks_at_each_95_percent_interval_finds_too_much() -> None:
    dice = np.random.default_rng(1)
    wrong = 0
    for _ in range(REPEATS):
        one, other = (trained(dice, np.zeros(USERS), MOST, 0.05) for _ in range(2))
        ends = [over_seeds(one[:, :n], other[:, :n])[1:] for n in LOOKS]
        wrong += any(not low <= 0 <= high for low, high in ends)
    assert wrong > 0.1 * REPEATS


@pytest.mark.parametrize("spending", ALPHA_SPENDING)
def test_an_effect_ends_it_before_the_last_seed(spending: str) -> None:
    verdicts, seeds = decided(0.06, 0.0, spending, by_seed=0.02)
    assert verdicts.count(BETTER) > 0.85 * REPEATS and WORSE not in verdicts
    assert seeds < 0.75 * MOST


def test_a_gain_that_is_not_there_is_excluded_and_one_that_is_there_seldom() -> None:
    """The gain of interest is 10 % of a mean of .5 + .3 / 3.3."""
    none, seeds = decided(0.0, 0.1, "obrien-fleming", by_seed=0.02)
    assert none.count(NO_GAIN) > 0.8 * REPEATS and seeds < MOST
    there, _ = decided(0.1 * (0.5 + 0.3 / 3.3), 0.1, "obrien-fleming", by_seed=0.02)
    assert there.count(NO_GAIN) <= 0.05 * REPEATS


def test_what_is_outside_of_a_bound_is_outside_of_its_interval() -> None:
    dice = np.random.default_rng(2)
    mean = dice.beta(0.3, 3, USERS)
    one, other = (trained(dice, mean + more, 4, 0.01) for more in (0.03, 0.0))
    z = difference(one, other, cautious=True).z
    assert 0 < z < difference(one, other).z
    assert look(one, other, z * 0.999, 0.0).verdict == BETTER
    assert look(one, other, z * 1.001, 0.0).verdict == OPEN
    assert look(other, one, z * 0.999, 0.0).verdict == WORSE
    low, high = difference(one, other).interval(0.95)
    assert over_seeds(one, other) == (difference(one, other).mean, low, high)
    same = look(one, one, 2.0, 0.03)
    assert same.difference == 0.0 and same.z == 0.0
