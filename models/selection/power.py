"""How much evidence a comparison has, and how much a smaller effect would need.

From the trainings of a comparison (a pilot: two seeds of each method or more) the variance between
users, between trainings and between nights is estimated; from these follow the smallest difference
that is seen, and the seeds, users and nights that a difference of 3, 5 or 10 % of the other method's
NDCG@10 needs to be significant at 95 % with a probability of 80 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from models.core.errors import UserError
from models.evaluation.components import LEVEL, POWER, components
from models.registry import tracking
from models.selection.compare import BY, Entry, entries, entry_of, other_method, seen

if TYPE_CHECKING:
    from mlflow import MlflowClient

EFFECTS = (3.0, 5.0, 10.0)
MOST_NIGHTS = 365


def power(
    source: str, comparison: str | None = None, split: str | None = None,
    methods: list[str] | None = None, against: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a comparison could have seen, method by method.

    Args:
        comparison: its name; None: the newest with finished trainings (of this split).
        methods: those wanted; None: all that have something to be compared with.
        against: compare with this method; None: with what the comparison compares with.
    """
    client, experiment = tracking.connect(source)
    comparison = comparison or newest(client, experiment, source, split)
    trainings: dict[str, list[Entry]] = {}
    for entry in entries(client, experiment, source, comparison):
        trainings.setdefault(entry.report["method"], []).append(entry)
    cut = next(iter(trainings.values()))[0].facts["cut"]
    if split is not None and cut["split"] != split:
        raise UserError(
            f"comparison {comparison!r} of {source!r} has the split {cut['split']!r}, not {split!r}: "
            "name another --comparison, or leave --split out"
        )
    for name in [*(methods or []), *([against] if against else [])]:
        if name not in trainings:
            raise UserError(
                f"comparison {comparison!r} of {source!r} has no finished training of {name!r}; it "
                f"has {', '.join(sorted(trainings))}"
            )
    rows = []
    for method in methods or sorted(trainings):
        best = {name: many[0] for name, many in trainings.items()}
        other = best[against] if against else other_method(method, best)
        if other is not None and other.report["method"] != method:
            rows.append(_row(trainings[method], trainings[other.report["method"]]))
    if not rows:
        raise UserError(
            f"comparison {comparison!r} of {source!r} has no two methods to compare: set --against"
        )
    users = len(next(iter(trainings.values()))[0].user_id)
    return {"source": source, "comparison": comparison, "cut": cut, "users": users,
            "level": LEVEL, "power": POWER, "methods": rows}  # fmt: skip


def newest(client: MlflowClient, experiment: str, source: str, split: str | None) -> str:
    """The comparison of the newest finished training (with this split)."""
    asked: set[str] = set()
    for run in tracking.runs(client, experiment, kind="train"):
        name = run.data.tags.get(tracking.COMPARISON)
        if name is None or name in asked:
            continue
        asked.add(name)
        if split is None or entry_of(client, run.info.run_id).facts["cut"]["split"] == split:
            return str(name)
    raise UserError(
        f"no finished training of {source!r}{f' with the split {split!r}' if split else ''} belongs "
        f"to a comparison in {tracking.tracking_uri()}: train with `--comparison NAME` first, two "
        "seeds of each method"
    )


def _row(mine: list[Entry], others: list[Entry]) -> dict[str, Any]:
    ours, theirs = (np.stack([one.by_user for one in each], axis=1) for each in (mine, others))
    found, users, base = components(ours, theirs), len(ours), float(theirs.mean())
    trainings = max(2, min(ours.shape[1], theirs.shape[1])) if found.several else 1
    row: dict[str, Any] = {
        "method": mine[0].report["method"], "against": others[0].report["method"],
        BY: float(ours.mean()), f"{BY}_against": base, "seeds": [ours.shape[1], theirs.shape[1]],
        "sd_users": float(np.sqrt(found.users)),
        "sd_seeds": [float(np.sqrt(one)) for one in found.seeds] if found.several else None,
        "sd_rest": [float(np.sqrt(one)) for one in found.rest] if found.several else None,
        **seen(ours, theirs),
    }  # fmt: skip
    nights = _by_night(mine, others)
    row["nights"] = None if nights is None else len(nights)
    row["sd_nights"] = None if nights is None else float(nights.std(ddof=1))
    row["needs"] = [
        {
            "effect_pct": share,
            "seeds": found.seeds_for(share / 100 * base, users),
            "users": found.users_for(share / 100 * base, trainings, users),
            "nights": None if nights is None else nights_for(share / 100 * base, nights),
        }
        for share in EFFECTS
        if base
    ]
    return row


def _by_night(mine: list[Entry], others: list[Entry]) -> np.ndarray | None:
    """float64[N]: the difference of each test night, over trainings; None: fewer than two nights."""
    sides = []
    for each in (mine, others):
        told = [one.report.get("by_night") or [] for one in each]
        values = [[night["metrics"][BY]["value"] for night in nights] for nights in told]
        if not values or len(values[0]) < 2 or any(len(one) != len(values[0]) for one in values):
            return None
        sides.append(np.mean(values, axis=0))
    return np.asarray(sides[0] - sides[1])


def nights_for(effect: float, nights: np.ndarray) -> int | None:
    """The fewest nights like these over which such a mean difference is significant; None: more than
    a year's. (What differs from night to night includes what users and trainings bring to each.)"""
    spread = float(nights.std(ddof=1))
    for number in range(2, MOST_NIGHTS + 1):
        factor = stats.t.ppf((1 + LEVEL) / 2, number - 1) + stats.t.ppf(POWER, number - 1)
        if factor * spread / np.sqrt(number) <= effect:
            return number
    return None


def show(outcome: dict[str, Any]) -> None:
    """A paragraph a method."""
    print(
        f"{outcome['source']}, comparison {outcome['comparison']}: {outcome['users']:,} users, "
        f"significant at {outcome['level']:.0%} with a probability of {outcome['power']:.0%}"
    )
    for row in outcome["methods"]:
        print(f"  {row['method']} against {row['against']} ({BY} {row[f'{BY}_against']:.4f}):")
        for sentence in sentences(row):
            print(f"    {sentence}")


def sentences(row: dict[str, Any]) -> list[str]:
    """What one row says, a line each."""
    share = row["detectable_pct"]
    said = [
        f"a difference below {row['detectable']:.4f}"
        + (f" ({share:.1f} %)" if share is not None else "")
        + " would probably not have been seen"
    ]
    if row["sd_seeds"] is None:
        said.append("one training of each: train with --seed 1, too, to know what seeds bring")
    else:
        seeds, rest = (
            " and ".join(f"{one:.4f}" for one in row[name]) for name in ("sd_seeds", "sd_rest")
        )
        said.append(
            f"standard deviation of a user's difference {row['sd_users']:.4f}, of a training's mean "
            f"{seeds}, of the rest {rest}"
        )
    if row["sd_nights"] is not None:
        said.append(
            f"standard deviation of a night's difference {row['sd_nights']:.4f}, of {row['nights']} nights"
        )
    for need in row["needs"]:
        ways = (
            [_way(need["seeds"], "seeds of each method with these users")]
            if row["sd_seeds"]
            else []
        )
        ways.append(_way(need["users"], "users with these seeds"))
        if row["sd_nights"] is not None:
            ways.append(_way(need["nights"], "nights"))
        said.append(f"{need['effect_pct']:g} % needs {', or '.join(ways)}")
    return said


def _way(number: int | None, what: str) -> str:
    return f"more {what} than can be had" if number is None else f"{number:,} {what}"
