"""What every model must beat: popularity, recent popularity, the user's own most frequent items.

They have no parameters, only counts; they are kept and registered like any other method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from models.core.config import ModelConfig
from models.core.rows import Ints, Rows, ragged, run_starts

DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Baskets:
    """The baskets of R histories: sessions with a positive event, and their distinct positive items.

    One element for each item of a basket, in order of history, basket and item: history int64[N]
    (0..R-1), place int64[N] of the basket in its history (1: the oldest), item int64[N] (0..V-1).
    count int64[R]: baskets of each history.
    """

    history: Ints
    place: Ints
    item: Ints
    count: Ints

    @staticmethod
    def of(rows: Rows, begin: Ints, end: Ints) -> Baskets:
        """Of the histories rows[begin[r]:end[r]]; a session that is still open is the newest."""
        event, history = ragged(begin, end - begin)
        event, history = event[rows.positive[event]], history[rows.positive[event]]
        opens = run_starts(history, rows.session[event])
        width = int(rows.item[event].max(initial=0)) + 1
        pair = np.unique((np.cumsum(opens) - 1) * width + rows.item[event])
        basket, item = pair // width, pair % width - 1
        owner = history[opens]
        count = np.bincount(owner, minlength=len(begin))
        first = np.cumsum(count) - count
        return Baskets(owner[basket], basket - first[owner[basket]] + 1, item, count)


class Popularity(nn.Module):
    """`pop`: how often an item had positive feedback in the training rows, the same for everyone."""

    def __init__(self, num_items: int, config: ModelConfig) -> None:
        super().__init__()
        self.num_items, self.config = num_items, config
        self.count: torch.Tensor
        self.register_buffer("count", torch.zeros(num_items, dtype=torch.float64))

    def fit(self, rows: Rows) -> None:
        self._count(rows.item[rows.positive])

    def _count(self, item: np.ndarray) -> None:
        count = np.bincount(item, minlength=self.num_items + 1)[1:]
        self.count.copy_(torch.from_numpy(count))

    @property
    def share(self) -> torch.Tensor:
        """float64[V] below 1, for the places that counts of the method's own leave equal."""
        return self.count / (self.count.max() + 1)

    def score(self, rows: Rows, begin: np.ndarray, end: np.ndarray, *_: object) -> torch.Tensor:
        """float64[R, V] for the histories rows[begin[r]:end[r]]."""
        return self.count.expand(len(begin), -1)

    def _with_own(self, cell: Ints, rows: int) -> torch.Tensor:
        """float64[R, V]: counts of the rows' own items, each once in `cell` (row * V + item) for each
        time that it counts, and below 1 what the items' popularity says."""
        scores_RV = self.share.repeat(rows, 1)
        # (A row has few items of its own: counting all R * V of them costs more than their scores.)
        own, count = np.unique(cell, return_counts=True)
        scores_RV.view(-1)[torch.from_numpy(own)] += torch.from_numpy(count)
        return scores_RV

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        """What was counted has sizes of its own: take them from what is loaded."""
        for name in list(self._buffers):
            if prefix + name in state:
                self._buffers[name] = torch.empty_like(state[prefix + name])
        super()._load_from_state_dict(state, prefix, *rest)


class RecentPopularity(Popularity):
    """`recent_pop`: popularity of the last `recent_days` of the training rows; equal ones, and what
    was not seen then, by popularity of all time."""

    def fit(self, rows: Rows) -> None:
        late = rows.ts > rows.ts.max() - self.config.recent_days * DAY_US
        self._count(rows.item[rows.positive])
        share = self.share.clone()
        self._count(rows.item[rows.positive & late])
        self.count += share


class PersonalTop(Popularity):
    """`personal_top`: the user's most frequent items, equal ones and the rest by popularity.

    score = own count + popularity / (largest popularity + 1). The whole history counts.
    """

    def score(self, rows: Rows, begin: np.ndarray, end: np.ndarray, *_: object) -> torch.Tensor:
        event, row = ragged(begin, end - begin)
        event, row = event[rows.positive[event]], row[rows.positive[event]]
        cell = row * self.num_items + rows.item[event] - 1
        return self._with_own(cell, len(begin))


class GPTopFreq(Popularity):
    """`gp_topfreq`: items in most of the user's own baskets, the rest by the number of all baskets
    that hold them (GP-TopFreq of Li et al., "A Next Basket Recommendation Reality Check", 2021).

    An item counts once a basket, where `personal_top` counts events. Items in equally many of the
    user's baskets are by the number of all baskets, too [ours: the reference code leaves them in
    the order in which they were first bought].
    """

    def fit(self, rows: Rows) -> None:
        self._count(rows.sets[1])

    def score(self, rows: Rows, begin: np.ndarray, end: np.ndarray, *_: object) -> torch.Tensor:
        found = Baskets.of(rows, begin, end)
        cell = found.history * self.num_items + found.item
        return self._with_own(cell, len(begin))
