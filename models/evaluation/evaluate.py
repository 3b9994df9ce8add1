"""Ask a model about every target of a period and score its full ranking.

Averaged over a user's targets, then over users. Next items are also reported apart, by what they
are: the `first` of a new session, or `inside` one, and where ages are given by the age of the item.
Sampled candidate lists (`sampled_…`) exist to compare with papers that used them, and decide about
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from models.core import rows as core_rows
from models.core.process_group import ALONE, Team
from models.core.rows import Bools, Ints, Rows, ragged
from models.data.splits import Targets
from models.evaluation import metrics
from models.networks.scoring import best, exclude, parts

KS = (1, 5, 10, 20, 50)
LIST_KS = (10, 20)  # lists whose items are counted


class Scorer(Protocol):
    num_items: int

    def score(
        self,
        rows: Rows,
        begin: Ints,
        end: Ints,
        request_ts: Ints | None = None,
        new_session: Bools | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Result:
    """Per-user metrics, and what they are of."""

    users: Ints  # place in Sequences
    values: dict[str, core_rows.Floats]  # name -> float64[U]
    counts: dict[str, Any]
    parts: dict[str, Result] = field(default_factory=dict)  # by kind of target: first, inside
    catalogue: dict[str, float] = field(default_factory=dict)  # of all lists together
    asked: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  # targets of each user
    ages: dict[str, Result] = field(default_factory=dict)  # by age of the targets' items

    def mean(self, name: str) -> float:
        value = self.values[name]
        return float(value.mean()) if len(value) else math.nan

    def plain(self) -> dict[str, dict[str, float]]:
        """name -> {"value"} of what is no mean over users, and so has no interval."""
        return {name: {"value": value} for name, value in self.catalogue.items()}

    def summary(self, draws: int = 2000) -> dict[str, dict[str, float]]:
        """name -> {"value", "low", "high"}: mean over users and its 95 % bootstrap interval."""
        if not len(self.users):
            return {}
        low, high = metrics.bootstrap(np.stack(list(self.values.values()), axis=1), draws)
        return {
            name: {"value": self.mean(name), "low": float(low[i]), "high": float(high[i])}
            for i, name in enumerate(self.values)
        }


def evaluate(
    model: Scorer,
    targets: Targets,
    ks: tuple[int, ...] = KS,
    repeat_policy: str = "allow",
    team: Team = ALONE,
    popularity: Ints | None = None,
    sampled: Sequence[Sampled] = (),
    ask: Callable[[Targets, Ints], torch.Tensor] | None = None,
    ages: Mapping[str, Bools] | None = None,
) -> Result:
    """Rank the whole vocabulary for every target; processes of a team share them out.

    With `popularity` (training events of each item, int64[V]) also what the lists of the K best
    are made of, and of models whose scores are logits the loss on the targets; with `sampled` also
    the places among a few drawn items. `ask` gives the scores float[R, V] of a part of the targets,
    and of their numbers int64[R], in place of the model itself (`models/selection/verify.py`).
    `ages` (name -> bool[M], which of the targets' items have it) are scored apart; a set is asked
    for its items of that age, at the places where the whole list has them.
    """
    if isinstance(model, torch.nn.Module):
        model.eval()
    with_loss = popularity is not None and getattr(model, "gives_logits", False)
    totals = _Totals(targets, model.num_items, sampled)
    # Histories of one length together: less padding, the same scores.
    length = targets.end - targets.begin
    order = np.argsort(length, kind="stable")
    for index in parts(model, order, length[order])[team.rank :: team.size]:
        part = targets.select(index)
        if ask is None:
            scores = model.score(part.rows, part.begin, part.end, part.request_ts, part.opens)
        else:
            scores = ask(part, index)
        if with_loss:
            totals.add_loss(scores, part)
        if repeat_policy == "exclude_seen":
            scores = exclude(scores, part.rows, part.begin, part.end)
        totals.add_places(scores, part, index)
        if popularity is not None:
            totals.add_lists(scores)
    return totals.result(ks, popularity, team, ages or {})


class _Totals:
    """What the parts of a period's targets add up to; N targets of M items, V items.

    place int64[M] of each item, first int64[N] of what came first in each set, drawn_place
    int64[S, M] among the items of each of S sampled lists, short int64[N] whether one of these had
    fewer items than was asked for, shown int64[len(LIST_KS), V] how many lists have an item,
    loss float64[2] the sum of the targets' and their number. Each target is met once, by one
    process of the team, and is 0 in all others: sums over processes put them together.
    """

    def __init__(self, targets: Targets, num_items: int, sampled: Sequence[Sampled]) -> None:
        number, items = len(targets.user), len(targets.item)
        self.targets, self.sampled = targets, sampled
        self.place = np.zeros(items, dtype=np.int64)
        self.first = np.zeros(number if targets.sets else 0, dtype=np.int64)
        self.drawn_place = np.zeros((len(sampled), items), dtype=np.int64)
        self.short = np.zeros(number if sampled else 0, dtype=np.int64)
        self.shown = np.zeros((len(LIST_KS), num_items), dtype=np.int64)
        self.loss = torch.zeros(2, dtype=torch.float64)

    def add_loss(self, scores_RV: torch.Tensor, part: Targets) -> None:
        self.loss += _negative_log_likelihood(scores_RV, part)

    def add_places(self, scores_RV: torch.Tensor, part: Targets, index: Ints) -> None:
        """`index` int64[R]: the numbers of the part's targets."""
        start = self.targets.item_start
        where, _ = ragged(start[:-1][index], np.diff(start)[index])
        self.place[where] = metrics.ranks(scores_RV, part.item_start, part.item)
        if self.targets.sets:
            alone = np.arange(len(index) + 1), part.item[part.item_start[:-1]]
            self.first[index] = metrics.ranks(scores_RV, *alone)
        for n, one in enumerate(self.sampled):
            self.drawn_place[n, where], lacking = one.places(scores_RV, part, index)
            self.short[index[lacking]] = 1

    def add_lists(self, scores_RV: torch.Tensor) -> None:
        listing, score = best(scores_RV, max(LIST_KS))  # as they are served
        listed = torch.isfinite(score)  # what has been excluded is in no list
        for n, k in enumerate(LIST_KS):
            item = listing[:, :k][listed[:, :k]]
            self.shown[n] += torch.bincount(item, minlength=self.shown.shape[1]).numpy()

    def result(
        self,
        ks: tuple[int, ...],
        popularity: Ints | None,
        team: Team,
        ages: Mapping[str, Bools],
    ) -> Result:
        """The metrics of all processes' targets. All must ask for it together."""
        targets, everywhere = self.targets, _sum_over(team)
        place, first = everywhere(self.place), everywhere(self.first)
        values = metrics.per_target(place, targets.item_start, ks, first if targets.sets else None)
        for n, one in enumerate(self.sampled):
            among = everywhere(self.drawn_place[n])
            few = metrics.per_target(among, targets.item_start, tuple(k for k in ks if k <= 20))
            values |= {f"{one.name}_{name}": value for name, value in few.items()}
        result = _result(targets, values, np.arange(len(targets.user)))
        if self.sampled:
            result.counts["sampled_short"] = int(everywhere(self.short).sum())
        result.counts.update(targets.left_out)
        if not targets.sets:
            result.counts["first_of_a_session"] = int(targets.new_session.sum())
            result.parts.update(_by_kind(targets, values))
        for age, mask in ages.items():
            result.ages[age] = _of_items(targets, place, mask, ks)
        if popularity is not None:
            result.catalogue.update(metrics.catalogue(everywhere(self.shown), popularity, LIST_KS))
        loss = team.total(self.loss)
        if loss[1]:
            result.catalogue["test_loss"] = float(loss[0] / loss[1])
        return result


def _sum_over(team: Team) -> Callable[[Ints], Ints]:
    return lambda array: team.total(torch.from_numpy(array)).numpy()


def _by_kind(targets: Targets, values: dict[str, core_rows.Floats]) -> dict[str, Result]:
    """Targets that open a session, and those inside one, apart; nothing if all are of one kind."""
    opens = targets.new_session
    if not opens.any() or opens.all():
        return {}
    kinds = {"first": opens, "inside": ~opens}
    return {kind: _result(targets, values, np.flatnonzero(at)) for kind, at in kinds.items()}


def _of_items(targets: Targets, place: Ints, mask: Bools, ks: tuple[int, ...]) -> Result:
    """Targets that have some of these items (bool[M]), asked for these alone."""
    size = np.diff(targets.item_start)
    row = np.repeat(np.arange(len(size)), size)[mask]
    count = np.bincount(row, minlength=len(size))
    at = np.flatnonzero(count)
    start = np.concatenate([[0], np.cumsum(count[at])])
    values = metrics.per_target(place[mask], start, ks)
    return _scored(targets.user[at], values, targets.item[mask])


def _negative_log_likelihood(scores_RV: torch.Tensor, part: Targets) -> torch.Tensor:
    """Cross-entropy of the targets over the catalogue, in nats: its sum, and of how many targets.

    A target's is the mean over its items that the model knows; targets without any do not count.
    """
    row = np.repeat(np.arange(len(part.user)), np.diff(part.item_start))
    known = np.flatnonzero(part.item > 0)
    at, item = torch.from_numpy(row[known]), torch.from_numpy(part.item[known].astype(np.int64) - 1)
    scores = scores_RV.double()
    each = scores.logsumexp(dim=1)[at] - scores[at, item]
    count = torch.bincount(at, minlength=len(part.user))
    total = torch.zeros(len(part.user), dtype=torch.float64).index_add_(0, at, each)
    asked = count > 0
    return torch.stack([(total[asked] / count[asked]).sum(), asked.sum().double()])


def _result(targets: Targets, values: dict[str, core_rows.Floats], at: Ints) -> Result:
    """The targets `at`, averaged over each user's."""
    items, _ = ragged(targets.item_start[:-1][at], np.diff(targets.item_start)[at])
    return _scored(targets.user[at], {n: v[at] for n, v in values.items()}, targets.item[items])


def _scored(user: Ints, values: dict[str, core_rows.Floats], item: Ints) -> Result:
    """Targets of `user` int64[N], with their values float64[N], that asked for `item` in all."""
    users, by_user = metrics.per_user(values, user)
    unseen = int((item == 0).sum())
    counts = {
        "users": len(users),
        "targets": len(user),
        "target_items": len(item),
        "unseen_items": unseen,
        "unseen_share": round(unseen / max(1, len(item)), 4),
    }
    asked = np.unique(user, return_counts=True)[1]
    return Result(users, by_user, counts, asked=asked)


@dataclass(frozen=True)
class Sampled:
    """The place of a target among `size` drawn items that its user has not seen.

    `by`: "random" (all items alike) or "popular" (by training events). Seeded by the target.
    """

    size: int
    by: str
    popularity: Ints

    @property
    def name(self) -> str:
        return f"sampled_{self.by}"

    def places(self, scores_RV: torch.Tensor, part: Targets, index: Ints) -> tuple[Ints, Bools]:
        """int64[M]: the places of each row's items among themselves and the drawn ones; bool[R]:
        fewer could be drawn than were asked for; where none could, its items are missed."""
        lacking = np.zeros(len(index), dtype=bool)
        V = scores_RV.shape[1]
        weight = np.ones(V) if self.by == "random" else self.popularity.astype(np.float64)
        place = np.full(len(part.item), metrics.UNRANKED, dtype=np.int64)
        for row, target in enumerate(index):
            low, high = part.item_start[row], part.item_start[row + 1]
            possible = weight.copy()
            possible[part.rows.item[part.begin[row] : part.end[row]] - 1] = 0
            known = part.item[low:high][part.item[low:high] > 0]
            possible[known - 1] = 0
            size = min(self.size, int((possible > 0).sum()))
            lacking[row] = size < self.size
            if not size or not len(known):
                continue
            rng = np.random.default_rng([17, int(target)])
            drawn = rng.choice(V, size, replace=False, p=possible / possible.sum())
            column = torch.from_numpy(np.concatenate([known - 1, drawn]))
            asked = np.zeros(high - low, dtype=np.int64)  # the known ones are the first columns
            asked[part.item[low:high] > 0] = np.arange(1, len(known) + 1)
            place[low:high] = metrics.ranks(
                scores_RV[row : row + 1, column], np.array([0, high - low]), asked
            )
        return place, lacking
