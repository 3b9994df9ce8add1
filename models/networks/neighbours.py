"""Neighbours without learning: hard to beat where people click on (Ludewig & Jannach, UMUAI 2018).

`item_knn` asks which items stood in the same sessions as the last one; `vsknn` which sessions look
like the present one. Both see positive events only, and fall back on popularity.
"""

from __future__ import annotations

import numpy as np
import torch

from models.core.rows import Ints, Rows, ragged
from models.networks.baselines import BaselineSizes, Popularity

DAMPING = 20.0  # of similarities of rare items
SAMPLE = 1000  # the most recent sessions that share an item are looked at
BLOCK = 2048  # items whose neighbours are counted at once
FORGET = 0.1  # a neighbour counts less by so much for every step since the item that it shares


def _sessions(rows: Rows) -> tuple[Ints, Ints]:
    """Sessions with a positive event, the newest first: (start int64[S+1], distinct items)."""
    newest = np.full(int(rows.opens.sum()), np.iinfo(np.int64).min)
    np.maximum.at(newest, rows.session[rows.positive], rows.ts[rows.positive])
    start, item = rows.sets
    count = np.diff(start)
    order = np.argsort(-newest, kind="stable")
    order = order[count[order] > 0]
    index, _ = ragged(start[:-1][order], count[order])
    return np.concatenate([[0], np.cumsum(count[order])]), item[index]


class ItemKNN(Popularity):
    """`item_knn`: cosine of sessions in common with the last item, damped: c / sqrt((a+20)(b+20)).

    The `neighbours` best of each item are kept: neighbour int32[V, K], similarity float32[V, K].
    """

    def __init__(self, num_items: int, config: BaselineSizes) -> None:
        super().__init__(num_items, config)
        self.neighbour: torch.Tensor
        self.similarity: torch.Tensor
        self.register_buffer("neighbour", torch.zeros(num_items, 0, dtype=torch.int32))
        self.register_buffer("similarity", torch.zeros(num_items, 0))

    def fit(self, rows: Rows) -> None:
        from scipy.sparse import csr_matrix

        super().fit(rows)
        start, item = _sessions(rows)
        number, V = len(start) - 1, self.num_items
        session = np.repeat(np.arange(number), np.diff(start))
        ones = np.ones(len(item), dtype=np.float32)
        there = csr_matrix((ones, (session, item - 1)), shape=(number, V))
        by_item = there.T.tocsr()
        size = np.sqrt(np.bincount(item - 1, minlength=V) + DAMPING)
        K = min(self.config.neighbours, V)
        neighbour, similarity = np.zeros((V, K), np.int32), np.zeros((V, K), np.float32)
        for low in range(0, V, BLOCK):
            block = (by_item[low : low + BLOCK] @ there).tocsr()
            block.sort_indices()
            row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
            value = block.data / (size[low + row] * size[block.indices])
            value[block.indices == low + row] = 0.0  # an item is no neighbour of itself
            order = np.lexsort((block.indices, -value, row))  # stable: no sum decides by its order
            place = np.arange(len(order)) - block.indptr[row]
            kept = place < K
            at = low + row[kept], place[kept]
            neighbour[at], similarity[at] = block.indices[order][kept], value[order][kept]
        self.neighbour, self.similarity = torch.from_numpy(neighbour), torch.from_numpy(similarity)

    def score(self, rows: Rows, begin: np.ndarray, end: np.ndarray, *_: object) -> torch.Tensor:
        place = np.maximum.accumulate(np.where(rows.positive, np.arange(len(rows.item)), -1))
        last = place[end - 1]
        asked = last >= begin
        item = torch.from_numpy(rows.item[np.where(asked, last, 0)].astype(np.int64) - 1)
        near = self.similarity[item].double() * torch.from_numpy(asked)[:, None]
        result = torch.zeros(len(begin), self.num_items, dtype=torch.float64)
        result.scatter_add_(1, self.neighbour[item].long(), near)
        return result + 1e-9 * self.share


class VSKNN(Popularity):
    """`vsknn`: items of the sessions most like the present one, recent items weighing more.

    The present session is the history's last. Its items weigh (place from 1) / length; a
    neighbour's likeness is the mean weight of what it shares; the `neighbours` most alike of the
    1,000 most recent that share anything give their items likeness * max(0, 1 - steps / 10), steps
    counted from the session's end to the newest item they share [ours where variants differ].
    """

    def __init__(self, num_items: int, config: BaselineSizes) -> None:
        super().__init__(num_items, config)
        for name in ("session_start", "session_item", "item_start", "item_session"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))

    def fit(self, rows: Rows) -> None:
        super().fit(rows)
        start, item = _sessions(rows)
        session = np.repeat(np.arange(len(start) - 1), np.diff(start))
        order = np.argsort(item, kind="stable")  # sessions of an item, the newest first
        of_item = np.searchsorted(item[order], np.arange(1, self.num_items + 2))
        self._buffers |= {
            "session_start": torch.from_numpy(start),
            "session_item": torch.from_numpy(item.astype(np.int64)),
            "item_start": torch.from_numpy(of_item.astype(np.int64)),
            "item_session": torch.from_numpy(session[order]),
        }

    def score(self, rows: Rows, begin: np.ndarray, end: np.ndarray, *_: object) -> torch.Tensor:
        names = ("session_start", "session_item", "item_start", "item_session")
        arrays = [getattr(self, name).numpy() for name in names]
        opened = np.flatnonzero(rows.opens)[rows.session[end - 1]]
        result = np.zeros((len(begin), self.num_items))
        for row, (low, high) in enumerate(zip(np.maximum(begin, opened), end, strict=True)):
            item = rows.item[low:high][rows.positive[low:high]]
            if len(item):
                result[row] = self._near(item, *arrays)
        return torch.from_numpy(result) + 1e-9 * self.share

    def _near(
        self, item: Ints, start: Ints, session_item: Ints, of_item: Ints, item_session: Ints
    ) -> Ints:
        """float64[V]"""
        length = len(item)
        # Each item once, at its newest place, the oldest first.
        distinct, from_end = np.unique(item[::-1], return_index=True)
        order = np.argsort(-from_end)
        distinct, place = distinct[order], length - from_end[order]
        lists = [
            item_session[of_item[i - 1] : min(of_item[i], of_item[i - 1] + SAMPLE)]
            for i in distinct
        ]
        found, cell = np.unique(np.concatenate(lists), return_inverse=True)
        where = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
        alike = np.bincount(cell, place[where] / length) / len(distinct)
        newest = np.zeros(len(found), dtype=np.int64)
        newest[cell] = place[where]  # of equal cells the last, which is the newest item, stays
        found, alike, newest = found[:SAMPLE], alike[:SAMPLE], newest[:SAMPLE]
        best = np.argsort(-alike, kind="stable")[: self.config.neighbours]
        weight = alike[best] * np.maximum(0.0, 1.0 - FORGET * (length - newest[best]))
        index, at = ragged(start[:-1][found[best]], np.diff(start)[found[best]])
        return np.bincount(session_item[index], weight[at], minlength=self.num_items + 1)[1:]
