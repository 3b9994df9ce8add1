"""Neighbours without learning: hard to beat where people click on (Ludewig & Jannach, UMUAI 2018).

`item_knn` asks which items were in the same sessions as the last one; `vsknn` which sessions look
like the present one. For baskets, `tifu_knn` and `up_cf` ask which users buy alike. All see
positive events only, and fall back on popularity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.core.config import ModelConfig
from models.core.rows import Floats, Ints, Rows, ragged
from models.networks.baselines import Baskets, Popularity
from models.networks.scoring import best

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

DAMPING = 20.0  # of similarities of rare items
SAMPLE = 1000  # the most recent sessions that share an item are looked at
BLOCK = 2048  # items whose neighbours are counted at once
FORGET = 0.1  # a neighbour counts less by so much for every step since the item that it shares
USERS = 100_000  # of training, at most, are stored as neighbours: those who bought last
SCORES = 16_000_000  # of users' likeness at once


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

    def __init__(self, num_items: int, config: ModelConfig) -> None:
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

    def __init__(self, num_items: int, config: ModelConfig) -> None:
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


class UserNeighbours(Popularity):
    """Users who buy alike: each training user is a sparse vector of items, and so is a history.

    A history's scores are its own vector and those of its nearest users, weighted; who bought last
    comes first among equals. Items that no vector holds follow by popularity, as all do for a
    history without a basket. A user of the training rows may be their own neighbour, as they were
    then: who asks is not known, and nothing that is stored names a user.

    Stored: at most 100,000 users, those who bought last, in this order; of each the items that they
    bought and a weight, 12 bytes an item: user_start int64[U+1], user_item int32[P],
    user_weight float64[P].
    """

    def __init__(self, num_items: int, config: ModelConfig) -> None:
        super().__init__(num_items, config)
        self.user_start: torch.Tensor
        self.user_item: torch.Tensor
        self.user_weight: torch.Tensor
        self.register_buffer("user_start", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("user_item", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("user_weight", torch.zeros(0, dtype=torch.float64))
        self._ready: tuple[csr_matrix, csr_matrix, Floats] | None = None

    def weights(self, found: Baskets) -> Floats:
        """float64[N]: what each item of each basket adds to its history's vector."""
        raise NotImplementedError

    def compared(self, vectors: csr_matrix) -> csr_matrix:
        """The same, as they are compared."""
        return vectors

    def likeness(self, common: Floats, own: Floats, other: Floats) -> Floats:
        """float64[R, U], the higher the nearer.

        Args:
            common: [R, U], dot products. own, other: [R, 1] and [1, U], squared lengths.
        """
        raise NotImplementedError

    def mixture(self, near: Floats) -> tuple[float, Floats]:
        """Weight of a history's own vector, and float64[R, K] of its nearest users'."""
        raise NotImplementedError

    @property
    def most(self) -> int:
        """Neighbours of a history, at most."""
        raise NotImplementedError

    def fit(self, rows: Rows) -> None:
        super().fit(rows)
        place = np.where(rows.positive, np.arange(len(rows.item)), -1)
        users = np.flatnonzero(np.diff(rows.start))
        last = np.maximum.reduceat(place, rows.start[users])
        users, last = users[last >= 0], last[last >= 0]
        users = users[np.argsort(-rows.ts[last], kind="stable")][:USERS]
        vectors = self._vectors(rows, rows.start[users], rows.start[users + 1])
        self._buffers |= {
            "user_start": torch.from_numpy(vectors.indptr.astype(np.int64)),
            "user_item": torch.from_numpy(vectors.indices),
            "user_weight": torch.from_numpy(vectors.data),
        }
        self._ready = None

    def score(self, rows: Rows, begin: np.ndarray, end: np.ndarray, *_: object) -> torch.Tensor:
        own, users = self._vectors(rows, begin, end), self._stored()
        result = np.zeros((len(begin), self.num_items))
        step = max(1, SCORES // len(self.user_start))
        for low in range(0, len(begin), step):
            result[low : low + step] = self._mixed(own[low : low + step], *users)
        scores = torch.from_numpy(result)
        # A billionth of a score decides between equal ones, and nothing else.
        return torch.where(scores > 0, scores * (1 + 1e-9 * self.share), self.share - 1)

    def _mixed(
        self, own: csr_matrix, users: csr_matrix, shared: csr_matrix, size: Floats
    ) -> Floats:
        """float64[R, V] of R vectors: themselves and their neighbours; no basket, no neighbour."""
        from scipy.sparse import csr_matrix

        compared = self.compared(own)
        length = np.asarray(compared.power(2).sum(axis=1))
        if not users.shape[0]:
            alone: Floats = self.mixture(np.zeros((len(length), 0)))[0] * own.toarray()
            return alone
        near = self.likeness((compared @ shared).toarray(), length, size)
        place, value = best(torch.from_numpy(near), min(self.most, near.shape[1]))
        share, weight = self.mixture(value.numpy())
        weight = weight * (np.diff(own.indptr) > 0)[:, None]
        start = np.arange(own.shape[0] + 1) * place.shape[1]
        arrays = weight.ravel(), place.numpy().ravel(), start
        chosen = csr_matrix(arrays, shape=(own.shape[0], users.shape[0]))
        mixed: Floats = share * own.toarray() + (chosen @ users).toarray()
        return mixed

    def _vectors(self, rows: Rows, begin: Ints, end: Ints) -> csr_matrix:
        """[R, V]: the vectors of histories; what was bought is there, though its weight be 0."""
        from scipy.sparse import csr_matrix

        found = Baskets.of(rows, begin, end)
        cell, inverse = np.unique(found.history * self.num_items + found.item, return_inverse=True)
        weight = np.bincount(inverse, self.weights(found), minlength=len(cell))
        history, item = cell // self.num_items, (cell % self.num_items).astype(np.int32)
        start = np.searchsorted(history, np.arange(len(begin) + 1)).astype(np.int32)
        return csr_matrix((weight, item, start), shape=(len(begin), self.num_items))

    def _stored(self) -> tuple[csr_matrix, csr_matrix, Floats]:
        """The users' vectors [U, V]; as they are compared, by item [V, U]; squared lengths [1, U]."""
        from scipy.sparse import csr_matrix

        if self._ready is None:
            start = self.user_start.numpy().astype(np.int32)
            arrays = self.user_weight.numpy(), self.user_item.numpy(), start
            users = csr_matrix(arrays, shape=(len(start) - 1, self.num_items))
            compared = self.compared(users)
            size = np.asarray(compared.power(2).sum(axis=1)).reshape(1, -1)
            self._ready = users, compared.T.tocsr(), size
        return self._ready

    def _load_from_state_dict(self, *what: Any) -> None:
        super()._load_from_state_dict(*what)
        self._ready = None


class TIFUKNN(UserNeighbours):
    """`tifu_knn`: how often and how lately a user, and users like them, bought an item (TIFU-KNN,
    Hu et al., "Modeling Personalized Item Frequency Information for Next-basket Recommendation",
    SIGIR 2020).

    Of t baskets, place j from 1, in m groups of neighbouring baskets of all but equal size, the
    newer ones larger by one, a basket in group g of n baskets adds
        r_b^(t-j) * r_g^(m-g) / n / min(m, t)
    to its items; fewer than m baskets are groups of their own, the oldest of which is group 1. The
    `tifu_neighbours` users at the least Euclidean distance are averaged: score = alpha * own +
    (1 - alpha) * average. So does the authors' code [code]; their paper's r_b counts from the end
    of the group rather than of the history.
    """

    @property
    def most(self) -> int:
        return self.config.tifu_neighbours

    def weights(self, found: Baskets) -> Floats:
        config, place, baskets = self.config, found.place, found.count[found.history]
        groups = np.minimum(config.tifu_groups, baskets)
        size, larger = baskets // groups, baskets % groups
        first = (groups - larger) * size  # baskets of the groups of the smaller size
        newer = place > first
        group = np.where(
            newer, groups - larger + (place - 1 - first) // (size + 1), (place - 1) // size
        )
        within = config.tifu_within_decay ** (baskets - place)
        between = config.tifu_group_decay ** (config.tifu_groups - 1 - group)
        weight: Floats = within * between / (size + newer) / groups
        return weight

    def likeness(self, common: Floats, own: Floats, other: Floats) -> Floats:
        return 2 * common - own - other

    def mixture(self, near: Floats) -> tuple[float, Floats]:
        alpha = self.config.tifu_alpha
        return alpha, np.full(near.shape, (1 - alpha) / max(1, near.shape[1]))


class UPCF(UserNeighbours):
    """`up_cf`: popularity in the last r baskets of a user and of users who buy the same items
    (UP-CF@r: Faggioli, Polato, Aiolli, "Recency Aware Collaborative Filtering for Next Basket
    Recommendation", UMAP 2020).

    Popularity of item i with user v is the share of v's last r baskets that hold it. Users are
    alike by the asymmetric cosine of the sets of items that they ever bought,
    |u and v| / (|u|^alpha |v|^(1-alpha)), u the user who asks. score = sum over v of
    likeness(u, v)^q * popularity(v, i), over the `up_cf_neighbours` users most alike [the authors
    take all] and u, with likeness 1.
    """

    @property
    def most(self) -> int:
        return self.config.up_cf_neighbours

    def weights(self, found: Baskets) -> Floats:
        baskets = found.count[found.history]
        recent = np.minimum(baskets, self.config.up_cf_recent or baskets)
        weight: Floats = (found.place > baskets - recent) / recent
        return weight

    def compared(self, vectors: csr_matrix) -> csr_matrix:
        from scipy.sparse import csr_matrix

        ones = np.ones(len(vectors.data))
        return csr_matrix((ones, vectors.indices, vectors.indptr), shape=vectors.shape)

    def likeness(self, common: Floats, own: Floats, other: Floats) -> Floats:
        alpha = self.config.up_cf_asymmetry
        like: Floats = common / (np.maximum(own, 1) ** alpha * other ** (1 - alpha))
        return like

    def mixture(self, near: Floats) -> tuple[float, Floats]:
        return 1.0, near**self.config.up_cf_locality
