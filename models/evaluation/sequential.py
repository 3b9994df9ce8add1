"""Looking at a difference several times while seeds are added, with alpha spent as planned.

Who looks after each seed and stops at the first 95 % interval without 0 finds far more than 5 % of
differences that are not there. So bounds are wider at early looks: what of alpha may be used up to a look
is a function of the share of the seeds that are there by then (Lan and DeMets, Discrete sequential
boundaries for clinical trials, Biometrika 70, 1983), written down before the first look. Bounds are found
by the recursion of Armitage, McPherson and Rowe (1969); intervals of that level hold at all looks together
(Jennison and Turnbull, Repeated confidence intervals, 1989), so that it is allowed to stop for any reason.
Where variances are estimated from few trainings, a bound is taken as the probability that it leaves outside,
and that of Student's t is compared with it (Jennison and Turnbull, Group Sequential Methods, 2000).

Users are the same at every look. What they bring makes looks more alike than the share of the seeds says,
so fewer differences are found by chance, not more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from models.core.config import ALPHA_SPENDING
from models.core.rows import Floats
from models.evaluation.components import difference

NODES = 201  # of the quadrature; bounds are right to 1e-5
FARTHEST = 38.0  # standard deviations: beyond, a probability is 0 in floating point


def _obrien_fleming(alpha: float, share: float) -> float:
    return float(2 * norm.sf(norm.isf(alpha / 2) / np.sqrt(share)))


def _pocock(alpha: float, share: float) -> float:
    return float(alpha * np.log1p((np.e - 1) * share))


SPENDING: dict[str, Callable[[float, float], float]] = dict(
    zip(ALPHA_SPENDING, (_obrien_fleming, _pocock), strict=True)
)
"""Name -> function(alpha of one side, share of the seeds): what is spent up to there (Lan and DeMets, like
the bounds of O'Brien and Fleming, hardly anything early; like those of Pocock, more evenly)."""


def spent(spending: str, alpha: float, share: float) -> float:
    """What a two-sided level alpha has spent when `share` (0 to 1) of the seeds are there."""
    return 2 * SPENDING[spending](alpha / 2, share)


def bounds(shares: Sequence[float], alpha: float, spending: str) -> Floats:
    """float64[K]: how many standard errors a difference must be from 0 at each look.

    Args:
        shares: of the seeds that are there at each look, rising, the last one 1.
        alpha: the probability of ever being outside without a difference, on both sides together.
    """
    found: list[float] = []
    before, already = 0.0, 0.0
    place, weight = np.zeros(1), np.ones(1)  # where the sum of what was seen is, and how likely
    for share in shares:
        step = np.sqrt(share - before)
        may = spent(spending, alpha, share) - already

        def too_many(
            bound: float, edge: float = float(np.sqrt(share)), step: float = step, may: float = may,
            place: Floats = place, weight: Floats = weight,
        ) -> float:  # fmt: skip
            above = norm.sf((bound * edge - place) / step) + norm.cdf(
                (-bound * edge - place) / step
            )
            return float(weight @ above) - may

        bound = float(brentq(too_many, 0.0, FARTHEST, xtol=1e-9))
        found.append(bound)
        edge = min(bound, 9.0) * np.sqrt(share)
        nodes, each = np.polynomial.legendre.leggauss(NODES)
        here = nodes * edge
        density = norm.pdf((here[:, None] - place) / step) @ weight / step
        before, already, place, weight = share, already + may, here, each * edge * density
    return np.asarray(found)


BETTER, WORSE, NO_GAIN, OPEN = "better", "worse", "no gain", "cannot tell"


@dataclass(frozen=True)
class Look:
    """A difference at one look, in the metric's unit.

    low, high: the interval that holds at all looks together; `level`: what an interval for one look alone
    would have to be to be as wide. z: how far from 0 the difference is, in standard errors of a normal
    distribution; bound: how far it must be. verdict: `better` and `worse`: the interval excludes 0; `no
    gain`: it includes 0, and excludes the gain of interest; else `cannot tell`.
    """

    difference: float
    low: float
    high: float
    level: float
    z: float
    bound: float
    effect: float
    verdict: str


def look(one_US: Floats, other_US: Floats, bound: float, detect: float) -> Look:
    """What is known of a difference.

    Args:
        one_US, other_US: float64[U, S], a metric of each user by training.
        bound: of this look.
        detect: the gain of interest, a share of the other method's mean; 0: none.
    """
    found = difference(one_US, other_US, cautious=True)
    level = 1 - 2 * float(norm.sf(bound))
    low, high = found.interval(level)
    effect = detect * float(other_US.mean())
    if low > 0 or high < 0:
        verdict = BETTER if low > 0 else WORSE
    else:
        verdict = NO_GAIN if high < effect else OPEN
    return Look(found.mean, low, high, level, found.z, bound, effect, verdict)
