"""How good a ranking is, on the full catalogue, and how sure we are.

Ties count against the model: an item is placed after every item with the same score that was not
asked for. A metric of a set of items (one item is a set of one) at K:
 * hr: 1 if any of them is in the top K;  * recall: hits / min(K, |set|);
 * ndcg: DCG / DCG of the best possible order of min(K, |set|) hits;
 * mrr: 1 / place of the first hit, 0 beyond K;
 * first_item_hr: 1 if the item that came first is in the top K (of sets: a next session).
Items that the model does not know are in the set and never hit.

Decision 10 in docs/design/decisions.md.
"""

from __future__ import annotations

import numpy as np
import torch

from models.core.rows import Floats, Ints, run_starts

KINDS = ("ndcg", "hr", "recall", "mrr")
UNRANKED = np.iinfo(np.int64).max


def ranks(scores_RV: torch.Tensor, item_start: Ints, item: Ints) -> Ints:
    """int64[M]: the place (from 1) of each wanted item among all V; UNRANKED if item is 0.

    Within a set, the m-th best of the known items is at m plus the number of other items that
    score as high or higher. Never -inf items: what cannot be returned has no place; nor has what
    has no score (NaN), which is before every other item: no number is as good as none.
    """
    place = np.full(len(item), UNRANKED, dtype=np.int64)
    length = np.diff(item_start)
    row = np.repeat(np.arange(len(length)), length)
    known = np.flatnonzero(item > 0)
    if not len(known):
        return place
    value = scores_RV[torch.from_numpy(row[known]), torch.from_numpy(item[known] - 1)]
    # Within each row, by falling score.
    order = np.lexsort((-value.numpy(), row[known]))
    known, value = known[order], value[torch.from_numpy(order)]
    rows = row[known]
    first = np.searchsorted(rows, rows)  # where the row's wanted items begin
    nth = np.arange(len(rows)) - first + 1
    as_high = np.empty(len(rows), dtype=np.int64)
    step = max(1, 16_000_000 // scores_RV.shape[1])
    for low in range(0, len(rows), step):
        part = slice(low, low + step)
        block = scores_RV[torch.from_numpy(rows[part])]
        as_high[part] = block.shape[1] - (block < value[part, None]).sum(1).numpy()
    # Wanted items with a score as high: up to the end of the run of equal scores in the row.
    scores = value.numpy()
    new_run = run_starts(rows, scores)
    run_start = np.append(np.flatnonzero(new_run), len(rows))
    run_end = run_start[np.cumsum(new_run)]
    wanted_as_high = run_end - first
    result = nth + as_high - wanted_as_high
    place[known] = np.where(np.isneginf(scores) | np.isnan(scores), UNRANKED, result)
    return place


def per_target(
    place: Ints, item_start: Ints, ks: tuple[int, ...], first: Ints | None = None
) -> dict[str, Floats]:
    """Metric name ("ndcg@10") -> float64[N], one value a target, from the places of its items.

    `first` int64[N]: the places of what came first in each set, evaluated alone.
    """
    size = np.diff(item_start)
    row = np.repeat(np.arange(len(size)), size)
    best = np.full(len(size), UNRANKED, dtype=np.int64)
    np.minimum.at(best, row, place)
    gain = 1.0 / np.log2(np.arange(2, max(ks) + 2))
    ideal = np.concatenate([[0.0], np.cumsum(gain)])
    result: dict[str, Floats] = {}
    for k in ks:
        hit = place <= k
        hits = np.bincount(row, weights=hit, minlength=len(size))
        gains = np.where(hit, gain[np.minimum(place, k) - 1], 0.0)
        possible = np.minimum(size, k)
        result[f"ndcg@{k}"] = np.bincount(row, gains, minlength=len(size)) / ideal[possible]
        result[f"hr@{k}"] = (best <= k).astype(np.float64)
        result[f"recall@{k}"] = hits / possible
        result[f"mrr@{k}"] = np.where(best <= k, 1.0 / np.minimum(best, k), 0.0)
        if first is not None:
            result[f"first_item_hr@{k}"] = (first <= k).astype(np.float64)
    return result


def per_user(values: dict[str, Floats], user: Ints) -> tuple[Ints, dict[str, Floats]]:
    """Mean over each user's targets: (users, name -> float64[U])."""
    users, place = np.unique(user, return_inverse=True)
    count = np.bincount(place)
    return users, {name: np.bincount(place, value) / count for name, value in values.items()}


def catalogue(shown_KV: Ints, popularity_V: Ints, ks: tuple[int, ...]) -> dict[str, float]:
    """What lists of the K best are made of, from how often each item was in one.

    coverage@K: share of the vocabulary that is in any list. popularity@K: mean over all places
    of the share of training events that belong to less popular items, equals half: .5 where items
    are shown as often as they are chosen, 1 where only the most popular one is.
    """
    level = np.sort(popularity_V)
    sums = np.concatenate([[0], np.cumsum(level)])
    sides = [sums[np.searchsorted(level, popularity_V, side)] for side in ("left", "right")]
    below = (sides[0] + sides[1]) / 2 / max(1, sums[-1])
    result = {}
    for k, shown in zip(ks, shown_KV, strict=True):
        result[f"coverage@{k}"] = float((shown > 0).mean())
        result[f"popularity@{k}"] = float((shown * below).sum() / max(1, shown.sum()))
    return result


def draw_means(values_UM: Floats, draws: int, seed: int = 0) -> Floats:
    """float64[draws, M]: means over users drawn with replacement, the same draw for all M."""
    users, width = values_UM.shape
    rng = np.random.default_rng(seed)
    means = np.empty((draws, width))
    step = max(1, 2_000_000 // users)
    for low in range(0, draws, step):
        size = min(step, draws - low)
        drawn = rng.integers(0, users, (size, users), dtype=np.int32)
        cell = drawn + (np.arange(size, dtype=np.int64) * users)[:, None]
        count = np.bincount(cell.ravel(), minlength=size * users).reshape(size, users)
        means[low : low + size] = count @ values_UM / users
    return means


def bootstrap(values_UM: Floats, draws: int = 2000, seed: int = 0, level: float = 0.95) -> Floats:
    """Percentile interval of the mean over users, for M metrics at once: float64[2, M].

    Given differences of two methods for the same users it is the paired bootstrap.
    """
    return _interval(draw_means(values_UM, draws, seed), level)


def _interval(means: Floats, level: float) -> Floats:
    tail = 100 * (1 - level) / 2
    return np.percentile(means, [tail, 100 - tail], axis=0)
