"""The K best items of many users at once, as Arrow tables.

The same lists as `serving.recommend` gives for the same histories: both take `best`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.evaluate import CHUNK_ROWS, CHUNK_SCORES, exclude
from models.rows import Ints, Rows

if TYPE_CHECKING:
    import pyarrow as pa

    from models.store import Stored

USERS_AT_ONCE = 16_384  # ours: put in order of their histories' lengths, so that little is padding


def best(scores_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row, falling, equal scores in order of the vocabulary: (place int64[R, K],
    score [R, K]), K = min(k, V). What is not finite is among them: it is no answer.
    """
    size = min(k, scores_RV.shape[1])
    score, place = scores_RV.topk(min(size + 1, scores_RV.shape[1]), dim=1)
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
    for first in range(0, count, USERS_AT_ONCE):
        user = np.arange(first, min(count, first + USERS_AT_ONCE))
        place = popular[0].expand(len(user), size).clone()
        score = popular[1].expand(len(user), size).clone()
        length = rows.start[user + 1] - rows.start[user]
        order = user[np.argsort(length, kind="stable")]
        order = order[rows.start[order + 1] > rows.start[order]]
        most = getattr(stored.model, "rows_at_once", CHUNK_ROWS)
        step = max(1, min(most, CHUNK_SCORES // max(1, len(stored.item_ids))))
        for low in range(0, len(order), step):
            part = order[low : low + step]
            begin, end = rows.start[part], rows.start[part + 1]
            now = new = None
            if stored.config.model.request_time == "known":
                now, new = rows.ts[end - 1], np.zeros(len(part), dtype=bool)
            scores = stored.model.score(rows, begin, end, now, new)
            if stored.config.model.repeat_policy == "exclude_seen":
                scores = exclude(scores, rows, begin, end)
            place[part - first], found = best(scores, k)
            score[part - first] = found.to(torch.float64)
        there = torch.isfinite(score)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(dim=1).cumsum(0)])
        item = ids.take(pa.array(place[there].numpy()))
        pair = pa.StructArray.from_arrays(
            [item, pa.array(score[there].numpy())], names=["item_id", "score"]
        )
        items = pa.ListArray.from_arrays(pa.array(offsets.numpy(), pa.int32()), pair)
        yield user, pa.table({"items": items})
