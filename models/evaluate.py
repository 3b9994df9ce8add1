"""Ask a model about every target of a period and score its full ranking.

No sampled candidate lists. Averaged over a user's targets, then over users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from models import metrics
from models.batch import Bools, Ints, Rows, ragged
from models.splits import Targets

KS = (1, 5, 10, 20, 50)
CHUNK_SCORES = 16_000_000
CHUNK_ROWS = 512


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
    values: dict[str, metrics.Floats]  # name -> float64[U]
    counts: dict[str, Any]

    def mean(self, name: str) -> float:
        value = self.values[name]
        return float(value.mean()) if len(value) else math.nan

    def summary(self, draws: int = 2000) -> dict[str, dict[str, float]]:
        """name -> {"value", "low", "high"}: mean over users and its 95 % bootstrap interval."""
        if not len(self.users):
            return {}
        low, high = metrics.bootstrap(np.stack(list(self.values.values()), axis=1), draws)
        return {
            name: {"value": self.mean(name), "low": float(low[i]), "high": float(high[i])}
            for i, name in enumerate(self.values)
        }


def exclude(scores_RV: torch.Tensor, rows: Rows, begin: Ints, end: Ints) -> torch.Tensor:
    """`repeat_policy = "exclude_seen"`: items of the history are never returned."""
    event, row = ragged(begin, end - begin)
    scores_RV = scores_RV.clone()
    scores_RV[
        torch.from_numpy(row), torch.from_numpy(rows.item[event].astype(np.int64) - 1)
    ] = -torch.inf
    return scores_RV


def evaluate(
    model: Scorer, targets: Targets, ks: tuple[int, ...] = KS, repeat_policy: str = "allow"
) -> Result:
    """Rank the whole vocabulary for every target."""
    if isinstance(model, torch.nn.Module):
        model.eval()
    number = len(targets.user)
    place = np.empty(len(targets.item), dtype=np.int64)
    step = max(1, min(CHUNK_ROWS, CHUNK_SCORES // max(1, model.num_items)))
    # Histories of one length together: less padding, the same scores.
    order = np.argsort(targets.end - targets.begin, kind="stable")
    for low in range(0, number, step):
        part = targets.select(order[low : low + step])
        scores = model.score(part.rows, part.begin, part.end, part.request_ts, part.new_session)
        if repeat_policy == "exclude_seen":
            scores = exclude(scores, part.rows, part.begin, part.end)
        index = order[low : low + step]
        where, _ = ragged(targets.item_start[:-1][index], np.diff(targets.item_start)[index])
        place[where] = metrics.ranks(scores, part.item_start, part.item)
    values = metrics.per_target(place, targets.item_start, ks)
    users, by_user = metrics.per_user(values, targets.user)
    unseen = int((targets.item == 0).sum())
    counts = {
        "users": len(users),
        "targets": number,
        "target_items": len(targets.item),
        "unseen_items": unseen,
        "unseen_share": round(unseen / max(1, len(targets.item)), 4),
        **targets.left_out,
    }
    return Result(users, by_user, counts)
