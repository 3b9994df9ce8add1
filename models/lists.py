"""The K best items of many users at once, as Arrow tables.

The same lists as `serving.recommend` gives for the same histories: both take `best`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.evaluate import exclude, parts
from models.rows import Ints, Rows

if TYPE_CHECKING:
    import pyarrow as pa

    from models.store import Stored

GROUP = 8
USERS_AT_ONCE = 16_384  # ours: put in order of their histories' lengths, so that little is padding


def _highest(scores_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk` in two steps: of V/8 groups of 8 scores, the k with the highest maxima hold the k best.

    A third of the time at 10,000 items and k = 100 (LAB_LOG.md); the same answer, ties apart.
    """
    rows, size = scores_RV.shape
    groups = size // GROUP
    if groups <= 2 * k:
        return scores_RV.topk(k, dim=1)
    inside = scores_RV[:, : GROUP * groups].view(rows, GROUP, groups)
    top = inside.amax(dim=1).topk(k, dim=1, sorted=False).indices
    place = (top[:, None, :] + groups * torch.arange(GROUP)[:, None]).view(rows, GROUP * k)
    if size > GROUP * groups:
        rest = torch.arange(GROUP * groups, size).expand(rows, -1)
        place = torch.cat([place, rest], dim=1)
    score, at = scores_RV.gather(1, place).topk(k, dim=1)
    return score, place.gather(1, at)


def best(scores_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row, falling, equal scores in order of the vocabulary: (place int64[R, K],
    score [R, K]), K = min(k, V). What is not finite is among them: it is no answer.
    """
    size = min(k, scores_RV.shape[1])
    score, place = _highest(scores_RV, min(size + 1, scores_RV.shape[1]))
    # Of equals at the end of the list, topk takes any: is there one more of them?
    more = score[:, -1] == score[:, size - 1]
    if score.shape[1] == size:
        more = torch.zeros_like(more)  # the list is the whole vocabulary
    place, order = place[:, :size].sort(dim=1)
    score, falls = score[:, :size].gather(1, order).sort(dim=1, descending=True, stable=True)
    place = place.gather(1, falls)
    for row in torch.nonzero(more).squeeze(1).tolist():
        at = torch.nonzero(scores_RV[row] >= score[row, -1]).squeeze(1)
        value, falls = torch.sort(scores_RV[row][at], descending=True, stable=True)
        place[row], score[row] = at[falls][:size], value[:size]
    return place, score


def lists(stored: Stored, rows: Rows, k: int) -> Iterator[tuple[Ints, pa.Table]]:
    """(place of each user in `rows`, table of `items`: list<struct<item_id, score>>), a part of the
    users at a time. Users without a known item get what is popular.

    A request is made at the time of the last event, in its session.
    """
    import pyarrow as pa

    ids = pa.array(stored.item_ids, pa.string())
    count = len(rows.start) - 1
    popular = best(stored.popularity[None, :].to(torch.float64), k)
    size = popular[0].shape[1]
    model, asked = stored.model, stored.config.model

    def best_of(part: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        begin, end = rows.start[part], rows.start[part + 1]
        now = new = None
        if asked.request_time == "known":
            now, new = rows.ts[end - 1], np.zeros(len(part), dtype=bool)
        scores = model.score(rows, begin, end, now, new)
        if asked.repeat_policy == "exclude_seen":
            scores = exclude(scores, rows, begin, end)
        return best(scores, k)

    for first in range(0, count, USERS_AT_ONCE):
        user = np.arange(first, min(count, first + USERS_AT_ONCE))
        place = popular[0].expand(len(user), size).clone()
        score = popular[1].expand(len(user), size).clone()
        length = rows.start[user + 1] - rows.start[user]
        order = user[np.argsort(length, kind="stable")]
        order = order[rows.start[order + 1] > rows.start[order]]
        some = parts(model, order, rows.start[order + 1] - rows.start[order])
        for part, (its_place, its_score) in zip(some, map(best_of, some), strict=True):
            place[part - first], score[part - first] = its_place, its_score.to(torch.float64)
        there = torch.isfinite(score)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(dim=1).cumsum(0)])
        item = ids.take(pa.array(place[there].numpy()))
        pair = pa.StructArray.from_arrays(
            [item, pa.array(score[there].numpy())], names=["item_id", "score"]
        )
        items = pa.ListArray.from_arrays(pa.array(offsets.numpy(), pa.int32()), pair)
        yield user, pa.table({"items": items})
