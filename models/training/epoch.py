"""An epoch of training as batches, each made when it is asked for.

Windows, their order, masks and noise follow from the seed, the epoch and the batch's number, and
from nothing that happened before: a training that continues from a checkpoint sees what it would
have seen, and so do several processes that share the rows of each batch.

A batch is worked on in parts of rows of similar length, whose gradients are summed: little padding,
little memory, and batches as random as if nobody had looked at lengths.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from models.core.config import Config
from models.core.process_group import ALONE, Team
from models.core.rows import Ints, Rows
from models.networks.batch import Batch
from models.networks.recommender import Recommender

PART_TOKENS = {"cpu": 2048, "cuda": 65_536}  # ours: padded tokens of a part, at most
# Ours: threads that make batches while the device computes; on a CPU they would take its cores.
AHEAD = {"cpu": 0, "cuda": 2}


@dataclass(frozen=True)
class Parts:
    """A batch's parts in this process, and how many labels the batch has in all processes."""

    parts: list[Batch]
    labels: int

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def pin_memory(self) -> Parts:
        return Parts([part.pin_memory() for part in self.parts], self.labels)


class Epoch:
    """The batches of one epoch; `epoch[n]` are the parts of this process's share of batch n."""

    def __init__(
        self,
        model: Recommender,
        rows: Rows,
        config: Config,
        number: int,
        team: Team = ALONE,
        device: str = "cpu",
    ) -> None:
        self.model, self.rows, self.config, self.team = model, rows, config, team
        self.device, self.kind = device, device.partition(":")[0]
        self.budget = PART_TOKENS[self.kind]
        self.number = number
        train, size = config.train, config.model.max_len
        rng = np.random.default_rng([train.seed, number])
        shift = rng.integers(0, size, len(rows.start) - 1) if train.all_windows else None
        self.begin, self.end = _with_a_label(rows, *model.windows(rows, shift))
        self.order = rng.permutation(len(self.begin))

    def __len__(self) -> int:
        return -(-len(self.order) // self.config.train.batch_size)

    def __getitem__(self, number: int) -> Parts:
        train, model = self.config.train, self.model
        first = number * train.batch_size
        rng = np.random.default_rng([train.seed, self.number, number])
        at = self.order[first : first + train.batch_size]
        tokens = model.training_tokens(self.rows, self.begin[at], self.end[at], train, rng)
        size = self.config.model.max_len
        labels = tokens.labels(size)
        if self.team.size > 1:
            tokens = tokens.share(self.team.rank, self.team.size)
        parts = [model.padded(one, self.rows, train) for one in tokens.parts(size, self.budget)]
        return Parts([part for part in parts if len(part.label_at)], labels)

    def after(self, done: int) -> Iterator[tuple[int, Parts]]:
        """The batches from number `done` on, with their numbers. Threads make them ahead where the
        device has time for it; what is in a batch follows from its number alone."""
        numbers = range(done, len(self))
        threads = AHEAD[self.kind]
        if not threads or not numbers:
            yield from ((number, self[number]) for number in numbers)
            return
        with ThreadPoolExecutor(threads, "batches", self._begin) as pool:
            made: deque[Future[Parts]] = deque([pool.submit(self._ready, done)])
            made[0].result()  # (what all batches read of the rows is made by one thread)
            try:
                for number in numbers:
                    while len(made) < 2 * threads and number + len(made) < len(self):
                        made.append(pool.submit(self._ready, number + len(made)))
                    yield number, made.popleft().result()
            finally:
                for one in made:
                    one.cancel()

    def _begin(self) -> None:
        """Of a thread: its pinned memory is this process's GPU's."""
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)

    def _ready(self, number: int) -> Parts:
        return self[number].pin_memory() if self.kind == "cuda" else self[number]


def _with_a_label(rows: Rows, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """The windows in which something is to be predicted; the newest event of a window has the label
    of the event after it."""
    if rows.labels is None:
        return begin, end
    before = np.concatenate([[0], np.cumsum(rows.labels)])
    some = before[np.minimum(end + 1, len(rows.labels))] > before[begin]
    return begin[some], end[some]
