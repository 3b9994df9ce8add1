"""An epoch of training as batches, each made when it is asked for.

Windows, their order, masks and noise follow from the seed, the epoch and the batch's number, and
from nothing that happened before: a training that goes on from a checkpoint sees what it would
have seen, and so do several processes that share the rows of each batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from models.batch import Batch, Rows, Target, label_cloze, label_next, pad, take, windows
from models.methods import Recommender
from models.parallel import ALONE, Team
from models.presets import Config

GROUP = 8  # batches whose windows are put in order of length: less padding, still shuffled


class Epoch:
    """The batches of one epoch; `epoch[n]` is this process's share of batch n, None if empty."""

    def __init__(
        self, model: Recommender, rows: Rows, config: Config, number: int, team: Team = ALONE
    ) -> None:
        self.model, self.rows, self.config, self.team = model, rows, config, team
        self.number, self.target = number, cast(Target, config.train.target)
        train, size = config.train, config.model.max_len
        rng = np.random.default_rng([train.seed, number])
        shift = rng.integers(0, size, len(rows.start) - 1) if train.all_windows else None
        cost = 1 + model.extra_tokens(rows.opens)
        self.begin, self.end = windows(rows, size, cost, shift)
        order = rng.permutation(len(self.begin))
        group = train.batch_size * GROUP
        for low in range(0, len(order), group):
            part = order[low : low + group]
            order[low : low + group] = part[
                np.argsort((self.end - self.begin)[part], kind="stable")
            ]
        self.order = order
        self.firsts = rng.permutation(np.arange(0, len(order), train.batch_size))

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, number: int) -> Batch | None:
        first, train, model = self.firsts[number], self.config.train, self.model
        rng = np.random.default_rng([train.seed, self.number, number])
        at = self.order[first : first + train.batch_size]
        tokens = take(self.rows, self.begin[at], self.end[at], model.num_items, self.target)
        if model.cloze:
            newest = self.config.model.request_time == "last_event"
            tokens = label_cloze(tokens, self.target, rng, train.mask_share, newest)
        else:
            tokens = label_next(tokens, self.rows, self.target)
            if train.item_noise:
                noisy = rng.random(len(tokens.token)) < train.item_noise
                other = rng.integers(1, model.num_items + 1, len(tokens.token))
                tokens = replace(tokens, token=np.where(noisy, other, tokens.token))
        for encoding in model.all_encodings():
            tokens = encoding.layout(tokens, causal=not model.cloze)
        if self.team.size > 1:
            tokens = tokens.share(self.team.rank, self.team.size)
        if not tokens.num_rows:
            return None
        batch = pad(tokens, self.config.model.max_len, self.rows, self.target)
        return batch if len(batch.label_at) else None
