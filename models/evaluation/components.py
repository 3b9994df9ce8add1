"""What makes the difference of two methods uncertain, and how much evidence would settle it.

Both methods are evaluated on the same users, and each was trained with several seeds. The value of a
user is taken as the sum of the method's mean, what the user brings, what the training brings (all
users of one seed together) and a rest: two crossed random effects without replication (Searle,
Casella and McCulloch, Variance Components, 1992, chapter 4). The components are estimated by
analysis of variance, the degrees of freedom of their sum by Satterthwaite (An approximate distribution
of estimates of variance components, 1946): by the mean squares that they are made of, also by those that
are taken off. By the components that are left, they would be too many where trainings vary little by
chance, and with two seeds 7 to 9 % of intervals missed the truth instead of 5 to 6 % (LAB_LOG.md).

Drawing the two or three seeds that there are with replacement, which was done before, gives intervals
that are too narrow where seeds differ most (16 % of 95 % intervals missed the truth with two seeds)
and too wide where they hardly differ (LAB_LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from models.core.rows import Floats

LEVEL, POWER = 0.95, 0.8
MOST_SEEDS = 50  # of a method; who needs more needs other questions


@dataclass(frozen=True)
class Components:
    """Variances of a difference of two methods, in squares of the metric's unit.

    users: of a user's difference, over trainings. seeds: of a training's mean over all users, of the
    first method and the second; rest: of what is neither, in one training of one user. Of a method
    with one training both are 0, because nothing is known of them (a counted method has none).
    several: whether any method has several trainings.
    """

    users: float
    seeds: tuple[float, float]
    rest: tuple[float, float]
    several: bool

    def variance(self, users: int, seeds: int) -> tuple[float, float]:
        """(variance, degrees of freedom) of the mean difference over so many users, with so many
        trainings of each method."""
        if not self.several:
            return self.users / users, users - 1.0
        over_users = (self.users + sum(self.rest) / seeds) / users
        squares = [
            (one + rest / users, rest / users, seeds)
            for one, rest in zip(self.seeds, self.rest, strict=True)
        ]
        return _sum(over_users, users, squares)

    def detectable(
        self, users: int, seeds: int, level: float = LEVEL, power: float = POWER
    ) -> float:
        """The smallest true difference, in the metric's unit, that a two-sided interval of `level`
        excludes 0 of with probability `power`; infinite for one training where several were seen."""
        if self.several and seeds < 2:
            return float("inf")
        variance, freedom = self.variance(users, seeds)
        factor = stats.t.ppf((1 + level) / 2, freedom) + stats.t.ppf(power, freedom)
        return float(factor * np.sqrt(variance))

    def seeds_for(self, effect: float, users: int, power: float = POWER) -> int | None:
        """The fewest trainings of each method that detect such a difference with these users; None:
        more than `MOST_SEEDS`, or not known, because nothing was trained with several."""
        if not self.several:
            return None
        enough = (
            s for s in range(2, MOST_SEEDS + 1) if self.detectable(users, s, power=power) <= effect
        )
        return next(enough, None)

    def users_for(self, effect: float, seeds: int, users: int, power: float = POWER) -> int | None:
        """The fewest users that detect such a difference with so many trainings, to a tenth; None:
        no number does. `users`: how many there are, from where the search begins."""
        most, fewest = 10_000_000, 2
        if self.detectable(most, seeds, power=power) > effect:
            return None
        number = max(fewest, users)
        while self.detectable(number, seeds, power=power) > effect:
            number = int(number * 1.1) + 1
        while number > fewest and self.detectable(int(number / 1.1), seeds, power=power) <= effect:
            number = max(fewest, int(number / 1.1))
        return number


def components(one_US: Floats, other_US: Floats) -> Components:
    """The components of the difference of two methods.

    Args:
        one_US, other_US: float64[U, S], a metric of each user by training; the same users in the same
            order, and any number of trainings of each.
    """
    users = len(one_US)
    own = float((one_US.mean(1) - other_US.mean(1)).var(ddof=1))
    seeds, rest = [0.0, 0.0], [0.0, 0.0]
    for side, values in enumerate((one_US, other_US)):
        if (count := values.shape[1]) > 1:
            rest[side] = _rest(values)
            seeds[side] = max(0.0, float(values.mean(0).var(ddof=1)) - rest[side] / users)
            own -= rest[side] / count
    several = max(one_US.shape[1], other_US.shape[1]) > 1
    return Components(max(0.0, own), (seeds[0], seeds[1]), (rest[0], rest[1]), several)


def _rest(values_US: Floats) -> float:
    """The mean square of what neither user nor training explains."""
    users, seeds = values_US.shape
    left = values_US - values_US.mean(1, keepdims=True) - values_US.mean(0) + values_US.mean()
    return float((left**2).sum() / ((users - 1) * (seeds - 1)))


def _sum(
    over_users: float, users: int, trainings: list[tuple[float, float, int]]
) -> tuple[float, float]:
    """(variance of a mean difference, Satterthwaite's degrees of freedom).

    Args:
        over_users: the variance of users' differences over the number of users; it has the rest in it.
        trainings: of each method with several: the variance of its trainings' means, what of that is
            the rest, and how many they are. The rest is taken off, as `over_users` has it; what would
            then be below 0 counts as 0.
    """
    total = over_users + sum(max(0.0, means - rest) / n for means, rest, n in trainings)
    below = over_users**2 / (users - 1)
    for means, rest, n in trainings:
        below += (means / n) ** 2 / (n - 1)
        below += (rest / n) ** 2 / ((users - 1) * (n - 1))
    return total, (total**2 / below if below else users - 1.0)


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods over users and trainings, in the metric's unit; its variance,
    and the degrees of freedom of that."""

    mean: float
    variance: float
    freedom: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """(low, high), two-sided, by Student's t."""
        half = float(stats.t.isf((1 - level) / 2, self.freedom) * np.sqrt(self.variance))
        return self.mean - half, self.mean + half

    @property
    def z(self) -> float:
        """Standard errors from 0, as many as leave as much outside under a normal distribution as
        Student's t says; 0 where nothing differs."""
        if not self.variance:
            return float(np.copysign(np.inf, self.mean)) if self.mean else 0.0
        outside = stats.t.sf(abs(self.mean) / np.sqrt(self.variance), self.freedom)
        return float(np.copysign(stats.norm.isf(outside), self.mean))


def difference(one_US: Floats, other_US: Floats, *, cautious: bool = False) -> Difference:
    """The difference of two methods with several trainings each.

    It knows that other users would have asked other things and that other seeds would have given other
    models; of a method with one training it knows of the users alone.

    cautious: what is neither of users nor of trainings counts with both. The component of the trainings
    is then never 0 by chance: who looks several times would stop at just these looks (LAB_LOG.md).
    """
    users = len(one_US)
    over_users = float((one_US.mean(1) - other_US.mean(1)).var(ddof=1)) / users
    trainings = [
        (float(values.mean(0).var(ddof=1)), 0.0 if cautious else _rest(values) / users, count)
        for values in (one_US, other_US)
        if (count := values.shape[1]) > 1
    ]
    return Difference(float(one_US.mean() - other_US.mean()), *_sum(over_users, users, trainings))


def over_seeds(
    one_US: Floats, other_US: Floats, level: float = LEVEL
) -> tuple[float, float, float]:
    """`difference` of two methods as (mean, low, high)."""
    found = difference(one_US, other_US)
    return found.mean, *found.interval(level)
