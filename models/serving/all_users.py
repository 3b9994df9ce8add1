"""The K best items of many users at once, as Arrow tables.

The same lists as `serving.recommend` gives for the same histories: both take `best_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.core.rows import Ints, Rows
from models.networks.scoring import exclude, parts
from models.serving.rules import Rules, best_of, only_allowed, permitted

if TYPE_CHECKING:
    import pyarrow as pa

    from models.networks.saved_model import Stored

USERS_AT_ONCE = 16_384  # ours: put in order of their histories' lengths, so that little is padding


def lists(
    stored: Stored, rows: Rows, k: int, rules: Rules | None = None
) -> Iterator[tuple[Ints, pa.Table]]:
    """(place of each user in `rows`, table of `items`: list<struct<item_id, score>>), a part of the
    users at a time. Users without a known item get what is popular.

    A request is made at the time of the last event, in its session.
    """
    import pyarrow as pa

    ids = pa.array(stored.item_ids, pa.string())
    count = len(rows.start) - 1
    counts = only_allowed(stored.popularity[None, :].to(torch.float64), rules)
    popular = best_of(counts, k, rules)
    size = popular[0].shape[1]
    model, asked = stored.model, stored.config.model

    def best_items(part: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        begin, end = rows.start[part], rows.start[part + 1]
        now = new = None
        if asked.request_time == "known":
            now, new = rows.ts[end - 1], np.zeros(len(part), dtype=bool)
        scores = model.score(rows, begin, end, now, new)
        if asked.repeat_policy == "exclude_seen":
            scores = exclude(scores, rows, begin, end)
        if rules is not None:
            scores = permitted(scores, rules, rows, begin, end, None)
        return best_of(scores, k, rules)

    for first in range(0, count, USERS_AT_ONCE):
        user = np.arange(first, min(count, first + USERS_AT_ONCE))
        place = popular[0].expand(len(user), size).clone()
        score = popular[1].expand(len(user), size).clone()
        length = rows.start[user + 1] - rows.start[user]
        order = user[np.argsort(length, kind="stable")]
        order = order[rows.start[order + 1] > rows.start[order]]
        some = parts(model, order, rows.start[order + 1] - rows.start[order])
        for part, (its_place, its_score) in zip(some, map(best_items, some), strict=True):
            place[part - first], score[part - first] = its_place, its_score.to(torch.float64)
        there = torch.isfinite(score)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(dim=1).cumsum(0)])
        item = ids.take(pa.array(place[there].numpy()))
        pair = pa.StructArray.from_arrays(
            [item, pa.array(score[there].numpy())], names=["item_id", "score"]
        )
        items = pa.ListArray.from_arrays(pa.array(offsets.numpy(), pa.int32()), pair)
        yield user, pa.table({"items": items})
