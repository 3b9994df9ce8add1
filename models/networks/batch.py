"""Turns users' events into padded tensors, without a Python loop over items.

The way of a batch: `Rows` (flat arrays of many users) -> `take` (a ragged handful of windows) ->
labels (`label_next`, `label_cloze`, or `append_request` when predicting) -> the encodings' `layout`
(they may insert tokens) -> `pad` (cut to the newest L tokens, left padding, newest at L-1).

Letters: B rows, L positions, E events, T tokens of a ragged batch, V items. Tokens: 0 padding,
1..V items, V+1 [MASK], V+2 [ST]. Times are integer microseconds since 1970, UTC.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from models.core.habit import OwnItems
from models.core.on_device import OnDevice
from models.core.rows import NO_LABEL, Bools, Ints, Rows, Target, ragged, run_starts

NO_FEEDBACK = -1  # of tokens that are no event, or whose event is to be predicted
SIMILAR, PART = 0.7, 1024  # ours: a part's shortest row to its longest; below so many tokens, any
DROP = -1  # a token that stands for "the request" in causal models and is dropped before padding


@dataclass(frozen=True)
class Tokens:
    """A ragged batch: T tokens, rows one after another, each row oldest first.

    `label` refers to what must be predicted *at* this token (see `Rows.own_label`), `own` is the
    token's own event as a label, `crossing` says that `label` lies in the next session. Tokens of
    one event follow each other, the event itself first.
    """

    row: Ints
    event: Ints
    token: Ints
    ts: Ints
    ordinal: Ints
    opens: Bools
    feedback: Ints
    own: Ints
    label: Ints
    crossing: Bools
    num_rows: int
    num_items: int

    ARRAYS = (
        "row", "event", "token", "ts", "ordinal", "opens", "feedback", "own", "label", "crossing",
    )  # fmt: skip

    @property
    def mask_token(self) -> int:
        return self.num_items + 1

    @property
    def session_token(self) -> int:
        return self.num_items + 2

    @property
    def head(self) -> Ints:
        """int64[T]: the place of the first token of each token's event."""
        first = run_starts(self.event, self.row)
        return np.asarray(np.flatnonzero(first)[np.cumsum(first) - 1])

    def labels(self, max_len: int) -> int:
        """How many tokens have a label once rows are cut to their newest `max_len` tokens."""
        age = self.row_end[self.row] - 1 - np.arange(len(self.row))
        return int(((age < max_len) & (self.label != NO_LABEL)).sum())

    @property
    def row_end(self) -> Ints:
        """int64[B]: one past each row's last token."""
        return np.cumsum(np.bincount(self.row, minlength=self.num_rows))

    def select(self, keep: Bools) -> Tokens:
        kept: dict[str, Any] = {name: getattr(self, name)[keep] for name in self.ARRAYS}
        return replace(self, **kept)

    def share(self, rank: int, size: int) -> Tokens:
        """Every size-th row, from row `rank` on."""
        mine = self.select(self.row % size == rank)
        rows = len(range(rank, self.num_rows, size))
        return replace(mine, row=mine.row // size, num_rows=rows)

    def parts(self, max_len: int, budget: int) -> list[Tokens]:
        """The rows in groups of similar length: each, padded, takes `budget` tokens at most (one
        row at least). Of a row only the newest `max_len` tokens will be padded. No rows, no groups: the
        share of a process may be empty."""
        length = np.minimum(np.bincount(self.row, minlength=self.num_rows), max_len)
        order = np.argsort(-length, kind="stable")
        falling = length[order]
        group, number, begin = np.zeros(self.num_rows, dtype=np.int64), 0, 0
        while begin < self.num_rows:
            longest = max(1, int(falling[begin]))
            similar = int(np.searchsorted(-falling, -SIMILAR * longest, side="right"))
            end = min(begin + max(1, budget // longest), max(similar, begin + PART // longest))
            group[order[begin:end]] = number
            begin, number = end, number + 1
        if number < 2:
            return [self] if number else []
        found = []
        for one in range(number):
            rows = group == one
            part = self.select(rows[self.row])
            place = np.cumsum(rows) - 1
            found.append(replace(part, row=place[part.row], num_rows=int(rows.sum())))
        return found

    def insert(self, at: Ints, **values: Ints | Bools | int) -> Tokens:
        """New tokens before the tokens `at`; each array is given, or repeats one value."""
        longer: dict[str, Any] = {
            name: np.insert(getattr(self, name), at, values[name]) for name in self.ARRAYS
        }
        return replace(self, **longer)


@dataclass(frozen=True)
class Batch(OnDevice):
    """Padded tensors. Left padding: column L-1 is the newest token of every row.

    token, ts, ordinal, feedback int64[B, L] (feedback: NO_FEEDBACK where there is none); newest int64[B] (the last ordinal); label_at int64[N] (indices
    into B*L), label_start int64[N+1] and label_item int64[M] (the items to predict at each).
    `max_len` is the model's L; learned positions count from there, so padding changes nothing.
    `own`: what is known of users' own items, where an encoding reads it; its rows are the labels'
    positions in training, and the batch's rows in a request.

    What a step must know as numbers is counted where the batch is made, so that no step asks the
    device for it: `tokens` without padding, `most_labels` of one row, and `label_edges`,
    `label_start` on the host.
    """

    token: torch.Tensor
    ts: torch.Tensor
    ordinal: torch.Tensor
    feedback: torch.Tensor
    newest: torch.Tensor
    max_len: int
    num_items: int
    label_at: torch.Tensor
    label_start: torch.Tensor
    label_item: torch.Tensor
    tokens: int
    most_labels: int
    label_edges: Ints
    own: OwnItems | None = field(default=None, kw_only=True)

    @property
    def padding(self) -> torch.Tensor:
        """bool[B, L]"""
        return self.token == 0


def take(rows: Rows, begin: Ints, end: Ints, num_items: int, target: Target | None) -> Tokens:
    """The events begin[r]..end[r]-1 of every row, as tokens without labels."""
    event, row = ragged(begin, end - begin)
    none = np.full(len(event), NO_LABEL)
    return Tokens(
        row=row,
        event=event,
        token=rows.item[event].astype(np.int64),
        ts=rows.ts[event],
        ordinal=rows.ordinal[event].astype(np.int64),
        opens=rows.opens[event],
        feedback=rows.became[event],
        own=none if target is None else rows.own_label(event, target),
        label=none,
        crossing=np.zeros(len(event), dtype=bool),
        num_rows=len(begin),
        num_items=num_items,
    )


def label_next(tokens: Tokens, rows: Rows, target: Target) -> Tokens:
    """Causal labels: the next event; for `next_session` the next session's set, at session ends.

    The next event may lie beyond the window: windows of one user share no label, and lose those
    only whose token `pad` cuts off a window's first event. Of an event's tokens the last has its
    label.
    """
    last = rows.last[tokens.event]
    following = np.where(last, tokens.event, tokens.event + 1)
    crossing = ~last & rows.opens[following]
    labelled = crossing if target == "next_session" else ~last
    head = tokens.head
    labelled[:-1] &= run_starts(head)[1:]
    label = np.where(labelled, rows.own_label(following, target), NO_LABEL)
    return replace(tokens, label=label, crossing=crossing)


def label_cloze(
    tokens: Tokens, target: Target, rng: np.random.Generator, share: float, mask_newest: bool
) -> Tokens:
    """Cloze labels: a random share is hidden; with `mask_newest` also each row's newest, as served.

    `next_item` hides events, 80 % by [MASK], 10 % by a random item, 10 % left as they are [code].
    `next_session` hides whole sessions, each behind a single [MASK] whose label is the session's
    set [ours: a served request has one [MASK] and does not know how many items will follow].
    Hidden tokens keep time, segment and [ST]; the newest takes those of the event before it and
    has no [ST], which is how a request looks under `last_event`. They lose their feedback and the
    other tokens of their event: these are not known before it happens.
    """
    count = len(tokens.row)
    token, ts, ordinal = tokens.token.copy(), tokens.ts.copy(), tokens.ordinal.copy()
    opens, label = tokens.opens.copy(), np.full(count, NO_LABEL)
    end = tokens.row_end
    begin = np.concatenate([[0], end[:-1]])
    if target == "next_item":
        unit_first, unit = np.arange(count), np.arange(count)
    else:  # units are the sessions as far as they are in the row
        first = tokens.opens | run_starts(tokens.row)
        unit_first, unit = np.flatnonzero(first), np.cumsum(first) - 1
    drawn = rng.random(len(unit_first))
    can_be = tokens.own[unit_first] != NO_LABEL
    hidden = (drawn < share) & can_be
    at = unit_first[hidden]
    label[at] = tokens.own[at]
    if target == "next_item":
        style = rng.random(len(at))
        other = rng.integers(1, tokens.num_items + 1, len(at))
        token[at] = np.where(
            style < 0.8, tokens.mask_token, np.where(style < 0.9, other, token[at])
        )
    else:
        token[at] = tokens.mask_token
    if mask_newest:
        newest = unit_first[unit[tokens.head[end[end > begin] - 1]]]
        newest = newest[(newest > begin[end > begin]) & (tokens.own[newest] != NO_LABEL)]
        token[newest], label[newest] = tokens.mask_token, tokens.own[newest]
        ts[newest], ordinal[newest] = tokens.ts[newest - 1], tokens.ordinal[newest - 1]
        opens[newest] = False
        hidden[unit[newest]] = True
    if can_be.any() and (label == NO_LABEL).all():  # few users: something must be asked
        one = np.argmin(np.where(can_be, drawn, np.inf))
        token[unit_first[one]], label[unit_first[one]] = (
            tokens.mask_token,
            tokens.own[unit_first[one]],
        )
        hidden[one] = True
    feedback = np.where(label == NO_LABEL, tokens.feedback, NO_FEEDBACK)
    result = replace(
        tokens, token=token, ts=ts, ordinal=ordinal, opens=opens, feedback=feedback, label=label
    )
    if target == "next_item":
        head = tokens.head
        return result.select((head == unit) | (label[head] == NO_LABEL))
    keep = ~hidden[unit]
    keep[unit_first] = True
    return result.select(keep)


def append_request(
    tokens: Tokens, *, cloze: bool, request_ts: Ints | None = None, new_session: Bools | None = None
) -> Tokens:
    """One token a row for what is asked: [MASK] for cloze models, a placeholder for causal ones.

    Without `request_ts` (policy `last_event`) it has the last event's time and segment; with it
    (policy `known`) the request's time, and a new segment where `new_session`.
    """
    end = tokens.row_end
    ts, ordinal = tokens.ts[end - 1], tokens.ordinal[end - 1]
    opens = np.zeros(tokens.num_rows, dtype=bool)
    if request_ts is not None:
        if new_session is not None:
            opens = new_session
        ts, ordinal = request_ts, ordinal + opens
    return tokens.insert(
        end,
        row=np.arange(tokens.num_rows),
        event=NO_LABEL,
        token=tokens.mask_token if cloze else DROP,
        ts=ts,
        ordinal=ordinal,
        opens=opens,
        feedback=NO_FEEDBACK,
        own=NO_LABEL,
        label=NO_LABEL,
        crossing=False,
    )


def pad(
    tokens: Tokens, max_len: int, rows: Rows | None = None, target: Target | None = None
) -> Batch:
    """Cut every row to its newest `max_len` tokens, pad on the left, look labels up."""
    if (tokens.token == DROP).any():
        tokens = tokens.select(tokens.token != DROP)
    age = tokens.row_end[tokens.row] - 1 - np.arange(len(tokens.row))
    tokens, age = tokens.select(age < max_len), age[age < max_len]
    width = int(age.max(initial=0)) + 1
    at = tokens.row * width + (width - 1 - age)
    size = tokens.num_rows * width
    first = np.concatenate([[0], tokens.row_end[:-1]])
    token = np.zeros(size, dtype=np.int64)
    token[at] = tokens.token
    # Padding carries the first event's time and segment 0.
    ts = np.repeat(tokens.ts[first], width)
    ts[at] = tokens.ts
    ordinal = np.zeros(size, dtype=np.int64)
    ordinal[at] = tokens.ordinal
    feedback = np.full(size, NO_FEEDBACK, dtype=np.int64)
    feedback[at] = tokens.feedback
    label_at = np.flatnonzero(tokens.label != NO_LABEL)
    label_start: Ints = np.zeros(1, dtype=np.int64)
    label_item: Ints = np.zeros(0, dtype=np.int64)
    if rows is not None and target is not None:
        label_start, label_item = rows.label_items(tokens.label[label_at], target)
    label_start = np.asarray(label_start, dtype=np.int64)
    shape = (tokens.num_rows, width)
    return Batch(
        token=torch.from_numpy(token.reshape(shape)),
        ts=torch.from_numpy(ts.reshape(shape)),
        ordinal=torch.from_numpy(ordinal.reshape(shape)),
        feedback=torch.from_numpy(feedback.reshape(shape)),
        newest=torch.from_numpy(tokens.ordinal[tokens.row_end - 1]),
        max_len=max_len,
        num_items=tokens.num_items,
        label_at=torch.from_numpy(at[label_at]),
        label_start=torch.from_numpy(label_start),
        label_item=torch.from_numpy(np.asarray(label_item, dtype=np.int64)),
        tokens=int((tokens.token > 0).sum()),
        most_labels=int(np.bincount(tokens.row[label_at], minlength=1).max()),
        label_edges=label_start,
    )


def windows(rows: Rows, max_len: int, size: Ints, shift: Ints | None) -> tuple[Ints, Ints]:
    """Cut every user's events into windows of at most `max_len` tokens: (begin, end), event numbers.

    `size[e]` is what event e takes (1, and 1 more where an encoding puts a token before it).
    `shift` int64[U] moves all boundaries but the newest window's end, so that epochs differ.
    None keeps only the newest window of each user, as the reference does.
    """
    users = np.flatnonzero(rows.start[1:] > rows.start[:-1])
    begin, end = rows.start[users], rows.start[users + 1]
    total = np.concatenate([[0], np.cumsum(size)])
    if shift is None:
        # The event that the cut goes through is in: `pad` takes the newest of its tokens.
        oldest = np.searchsorted(total, total[end] - max_len, side="right") - 1
        return np.maximum(begin, oldest), end
    length = end - begin
    user = np.repeat(users, length)
    newer = total[rows.start[user + 1]] - total[1:]  # tokens that come after this event
    part = (newer + shift[user]) // max_len
    starts = np.flatnonzero(run_starts(part, user))
    return starts, np.append(starts[1:], len(user))
