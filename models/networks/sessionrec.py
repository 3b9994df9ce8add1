"""SessionRec: from sessions, predict the next session (paper B, arXiv 2502.10157).

A position is a session. Its vector is pooled from its items, taken, skipped and shown alike, each
with an embedding of what became of it; a causal encoder runs over the sessions; its output at
session t is compared with every item at once, and all positive items of session t+1 are right.
There is no public implementation; what the paper leaves open is decided here and marked [ours].

 * Feedback is added to items of the *history* only: candidates are scored without it, or a label
   would say of itself that it was taken [ours]. It scales an item's vector as well as being added
   to it: a mean of sums would forget which of the items was the skipped one [ours].
 * A session without positive items is history and never a target.
 * `+sse` and `+tsa` act on sessions (segment = the session's number, time = its start). `+st` says
   nothing here, where every position opens a session, and is refused.
 * Which items were shown: those of `exposed_with` and of events whose feedback is "exposed", each
   once a session, those of the session's other events left out; of more than `exposures` the last
   shown stay [ours].
 * When a request is made is not looked at: `request_time = "known"` changes nothing, but what
   +habit counts to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.core.config import Config, ModelConfig, TrainConfig
from models.core.rows import EXPOSED, FEEDBACK, Bools, Ints, Rows, chosen, ragged, run_starts
from models.networks.batch import Batch, Tokens, label_next, pad, take
from models.networks.encodings import Encoding
from models.networks.losses import rank_loss, session_cross_entropy
from models.networks.pooling import POOLINGS, Group
from models.networks.recommender import Recommender


class Mix(nn.Module):
    """x + W_2 gelu(W_1 norm(x)): what a session's items say together and none alone [ours].

    4 D^2 + 5 D parameters.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return result


@dataclass(frozen=True)
class SessionBatch(Batch):
    """B users x L sessions; `token` is 1 where there is a session.

    element_item, element_feedback, element_at int64[E]: the items of the sessions, and where each
    session is in B*L. ignored_start int64[N+1], ignored_item int64[...]: what the session to
    predict at each label showed and the user did not choose; num_pairs: (label, ignored) of all
    positions. groups: of the pooling that works on sessions of similar size.
    """

    element_item: torch.Tensor
    element_feedback: torch.Tensor
    element_at: torch.Tensor
    ignored_start: torch.Tensor
    ignored_item: torch.Tensor
    num_pairs: int
    groups: tuple[Group, ...]


class SessionRec(Recommender):
    """Items and feedback embedded, pooled by session, sessions encoded, all V items scored.

    The causal encoders are the next-item backbones. Parameters: (V + 1) D items (row 0 is padding)
    with their bias, 8 D feedback, the pooling's, 4 D^2 + 5 D of `Mix`, the encoder's, and
    `SideInformation`'s where a catalogue says something of the items.
    """

    full_loss = staticmethod(session_cross_entropy)

    def __init__(
        self,
        num_items: int,
        config: Config,
        encoder: Callable[[ModelConfig, int], nn.Module],
        encodings: Mapping[str, Callable[[ModelConfig], Encoding]],
    ) -> None:
        tied = replace(config, model=replace(config.model, tied=True))
        super().__init__(num_items, tied, encoder, encodings)
        dim = config.model.dim
        used = config.model.feedback
        self.feedback = nn.Embedding(len(FEEDBACK), dim) if used else None
        self.gate = nn.Embedding(len(FEEDBACK), dim) if used else None
        if self.feedback is not None and self.gate is not None:
            nn.init.normal_(self.feedback.weight, std=config.model.table_std)
            nn.init.ones_(self.gate.weight)
        if config.model.side:
            self.read_side()
        self.pooling = POOLINGS[config.model.pooling](config.model)
        self.mix = Mix(dim)

    def embedded(self, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, SessionBatch)
        x_ED = self.item_rows(batch.element_item)
        if self.side is not None:
            x_ED = self.side(batch.element_item, x_ED)
        if self.feedback is not None and self.gate is not None:
            became = batch.element_feedback
            x_ED = x_ED * self.gate(became) + self.feedback(became)
        rows, length = batch.token.shape
        pooled = self.pooling(x_ED, batch.element_at, rows * length, batch.groups)
        mixed: torch.Tensor = self.mix(pooled)
        return mixed.view(rows, length, -1)

    def windows(self, rows: Rows, shift: Ints | None) -> tuple[Ints, Ints]:
        """Users' events in windows of whole sessions, `max_len` at most."""
        users = np.flatnonzero(rows.start[1:] > rows.start[:-1])
        length = rows.start[users + 1] - rows.start[users]
        user = np.repeat(users, length)
        newer = rows.session[rows.start[user + 1] - 1] - rows.session
        part = (newer + (0 if shift is None else shift[user])) // self.config.max_len
        begin = np.flatnonzero(run_starts(part, user))
        end = np.append(begin[1:], len(user))
        newest = part[begin] == 0 if shift is None else np.ones(len(begin), dtype=bool)
        return begin[newest], end[newest]

    def training_tokens(
        self, rows: Rows, begin: Ints, end: Ints, train: TrainConfig, rng: np.random.Generator
    ) -> Tokens:
        """Each session with the next one's positive items to predict."""
        events = take(rows, begin, end, self.num_items, "next_session")
        label = label_next(events, rows, "next_session").label
        tokens = _sessions(events)
        last = np.append(np.flatnonzero(_first(events))[1:], len(events.row)) - 1
        return replace(tokens, label=label[last])

    def padded(self, tokens: Tokens, rows: Rows, train: TrainConfig) -> Batch:
        batch = self._batch(tokens, rows, rows.session_start[rows.session[tokens.event] + 1])
        return self.with_history(batch, rows, lambda: self.labelled(tokens, rows, "next_session"))

    def request(
        self,
        rows: Rows,
        begin: Ints,
        end: Ints,
        request_ts: Ints | None = None,
        new_session: np.ndarray | None = None,
    ) -> Batch:
        """The batch that asks what follows; the session that is not over yet is the last one."""
        first = np.maximum(rows.session[end - 1] - self.config.max_len + 1, 0)
        oldest = np.maximum(begin, rows.session_start[first])
        tokens = _sessions(take(rows, oldest, end, self.num_items, None))
        stop = rows.session_start[rows.session[tokens.event] + 1]
        batch = self._batch(tokens, rows, np.minimum(stop, end[tokens.row]))
        return self.asked_about(batch, rows, begin, end, request_ts, new_session)

    def _batch(self, tokens: Tokens, rows: Rows, stop: Ints) -> SessionBatch:
        """Sessions whose events are token.event .. stop-1, padded."""
        size = self.config.max_len
        age = tokens.row_end[tokens.row] - 1 - np.arange(len(tokens.row))
        tokens, stop, age = tokens.select(age < size), stop[age < size], age[age < size]
        plain = pad(tokens, size, rows, "next_session")
        width = plain.token.shape[1]
        at = tokens.row * width + (width - 1 - age)
        event, session = ragged(tokens.event, stop - tokens.event)
        item, feedback = rows.item[event].astype(np.int64), rows.became[event]
        own = feedback != EXPOSED
        shown, where = _shown(rows, event, session, item, own, self.config.exposures)
        item, feedback, session = item[own], feedback[own], session[own]
        ignored = chosen(rows.ignored, tokens.label[tokens.label >= 0])
        parts = {
            "element_item": np.concatenate([item, shown]),
            "element_feedback": np.concatenate([feedback, np.full(len(shown), EXPOSED)]),
            "element_at": at[np.concatenate([session, where])],
            "ignored_start": ignored[0],
            "ignored_item": ignored[1],
        }
        tensors: dict[str, Any] = {
            name: torch.from_numpy(part.astype(np.int64)) for name, part in parts.items()
        }
        groups = self.pooling.groups(parts["element_at"])
        pairs = int(np.dot(np.diff(plain.label_edges), np.diff(ignored[0])))
        known = vars(plain) | {"tokens": len(parts["element_item"])}
        return SessionBatch(**known, **tensors, num_pairs=pairs, groups=groups)

    def loss(self, batch: Batch, train: TrainConfig) -> torch.Tensor:
        """L_retrieval + alpha L_rank, means over the batch's labels."""
        assert isinstance(batch, SessionBatch)
        h_ND = self.states(batch, batch.label_at, batch.most_labels)
        loss = self.retrieval(h_ND, batch, train)
        if train.alpha and len(batch.ignored_item):
            label, ignored = batch.label_item - 1, batch.ignored_item - 1  # as classes
            loss = loss + train.alpha * rank_loss(
                h_ND,
                self.some_classes(),
                batch.label_start,
                label,
                batch.ignored_start,
                ignored,
                added=self.added(batch),
                num_pairs=batch.num_pairs,
            )
        return loss


def _first(events: Tokens) -> np.ndarray:
    """bool[T]: is this event the first of a session, as far as it is in the row?"""
    first: np.ndarray = events.opens | run_starts(events.row)
    return first


def _sessions(events: Tokens) -> Tokens:
    """One token a session, at its start."""
    tokens = events.select(_first(events))
    return replace(tokens, token=np.ones(len(tokens.row), dtype=np.int64), num_items=1)


def _shown(
    rows: Rows, event: Ints, session: Ints, item: Ints, own: Bools, most: int
) -> tuple[Ints, Ints]:
    """What was shown at the events, or by them (those that are not `own`): (item, session), at
    most `most` a session, the newest."""
    shown, place = item[~own], np.flatnonzero(~own)
    if rows.shown_start is not None and rows.shown is not None:
        start = rows.shown_start
        index, beside = ragged(start[event], start[event + 1] - start[event])
        shown, place = np.append(shown, rows.shown[index]), np.append(place, beside)
        order = np.argsort(place, kind="stable")
        shown, place = shown[order], place[order]
    where = session[place]
    if not len(shown) or not most:
        none = np.zeros(0, dtype=np.int64)
        return none, none
    width = int(max(shown.max(), item.max())) + 1
    # Each once, at its last showing; then the last of each session.
    pair, turned = np.unique((where * width + shown)[::-1], return_index=True)
    fresh = ~np.isin(pair, (session * width + item)[own])
    at = np.sort(len(shown) - 1 - turned[fresh])
    shown, where = shown[at], where[at]
    end = np.searchsorted(where, where, side="right")
    newest = end - np.arange(len(where)) <= most
    return shown[newest], where[newest]
