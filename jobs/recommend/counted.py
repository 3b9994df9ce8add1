"""Lists of ten by counting, for some users: `recent_pop` and `personal_top` as
`models/networks/baselines.py` defines them, without a score for every item."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from models.core.rows import Ints
    from models.data.sequences import Sequences
    from models.serving.rules import Rules

K = 10


@dataclass(frozen=True)
class Counted:
    """What was known of V items, named by gold's item_index (1..V).

    recent, popular: all items in falling order of `recent_pop`, and of popularity. share:
    float64[V+1], popularity below 1. rules: over the V items; lists keep them.
    """

    past: Sequences
    rules: Rules | None
    recent: list[int]
    popular: list[int]
    share: NDArray[np.float64]

    @staticmethod
    def of(past: Sequences, rules: Rules | None = None) -> Counted:
        from models.core.rows import POSITIVE, Rows
        from models.networks.baselines import PersonalTop, RecentPopularity
        from models.networks.methods import config

        rows = Rows(
            item=past.item,
            ts=past.ts,
            ordinal=past.session,
            positive=past.feedback == POSITIVE,
            start=np.array([0, len(past.item)]),  # (who had an event is not asked)
        )
        size = int(past.item.max(initial=0))
        recent = RecentPopularity(size, config("recent_pop").model)
        personal = PersonalTop(size, config("personal_top").model)
        recent.fit(rows)
        personal.fit(rows)
        first, second = (
            (np.argsort(-one.count.numpy(), kind="stable") + 1).tolist()
            for one in (recent, personal)
        )
        return Counted(past, rules, first, second, np.append(0.0, personal.share.numpy()))

    def recent_pop(self, users: Ints) -> Ints:
        """int64[Q, 10] item_index, 0 where there is none, for users by their place in `past`; -1: a
        stranger, who gets no list."""
        if self.rules is None:
            tens = np.zeros((len(users), K), dtype=np.int64)
            tens[users >= 0, : len(self.recent)] = self.recent[:K]
            return tens
        return self._tens(users, lambda _: self.recent)

    def personal_top(self, users: Ints) -> Ints:
        """As `recent_pop`."""
        own = self._own(users)
        return self._tens(users, lambda place: chain(own[place], self.popular))

    def _tens(self, users: Ints, candidates: Callable[[int], Iterable[int]]) -> Ints:
        tens = np.zeros((len(users), K), dtype=np.int64)
        for place in np.flatnonzero(users >= 0).tolist():
            given = self._ten(candidates(place), self._left_out(int(users[place])))
            tens[place, : len(given)] = given
        return tens

    def _own(self, users: Ints) -> list[list[int]]:
        """Each user's positive items, the most frequent first, equal ones by popularity."""
        from models.core.rows import POSITIVE, ragged

        there = np.flatnonzero(users >= 0)
        event, row = ragged(self.past.start[users[there]], self.past.length[users[there]])
        positive = self.past.feedback[event] == POSITIVE
        event, row = event[positive], there[row[positive]]
        width = len(self.share)
        cell, count = np.unique(row * width + self.past.item[event], return_counts=True)
        row, item = cell // width, cell % width
        order = np.lexsort((item, -(count + self.share[item]), row))
        ends = np.searchsorted(row, np.arange(len(users) + 1)).tolist()
        items = item[order].tolist()
        return [items[low:high] for low, high in pairwise(ends)]

    def _left_out(self, user: int) -> set[int]:
        """Items that the user had an event with in the last days, by the rules."""
        rules = self.rules
        if rules is None or rules.seen_us is None or rules.now_us is None:
            return set()
        start = int(self.past.start[user])
        at = slice(start, start + int(self.past.length[user]))
        late = self.past.ts[at] >= rules.now_us - rules.seen_us
        return set(self.past.item[at][late].tolist())

    def _ten(self, candidates: Iterable[int], left_out: set[int]) -> list[int]:
        """The first ten that the rules allow, each once."""
        rules, given, held = self.rules, list[int](), dict[int, int]()
        for item in candidates:
            if item in left_out:
                continue
            left_out.add(item)
            if rules is not None:
                category = -1 if rules.category is None else int(rules.category[item - 1])
                if not rules.allowed[item - 1]:
                    continue
                if rules.most and category >= 0:
                    if held.get(category, 0) >= rules.most:
                        continue
                    held[category] = held.get(category, 0) + 1
            given.append(item)
            if len(given) == K:
                break
        return given
