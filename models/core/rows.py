"""Users' events as flat arrays, and what follows from them: sessions, sets, what was ignored.

Letters: E events, U users, S sessions, X shown items, V items. Items are vocabulary indices 1..V,
times integer microseconds since 1970, UTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expectations import feedback_rule

Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Target = Literal["next_item", "next_session"]
NO_LABEL = -1
FEEDBACK = feedback_rule.FEEDBACK
POSITIVE, NEGATIVE, EXPOSED, NEUTRAL = range(len(FEEDBACK))
"""Feedback's codes are the places of the names."""


def run_starts(*columns: NDArray[Any]) -> Bools:
    """bool[N]: whether a run of equal rows begins here: the row differs from the one before it in
    some column, or is the first."""
    starts = np.zeros(len(columns[0]), dtype=bool)
    starts[:1] = True
    for column in columns:
        starts[1:] |= column[1:] != column[:-1]
    return starts


def ragged(begin: Ints, length: Ints) -> tuple[Ints, Ints]:
    """Indices begin[r] .. begin[r]+length[r]-1 of every row r, one after another, and their rows."""
    row = np.repeat(np.arange(len(begin)), length)
    first = np.cumsum(length) - length
    return np.arange(int(length.sum())) + np.repeat(begin - first, length), row


def chosen(sets: tuple[Ints, Ints], at: Ints) -> tuple[Ints, Ints]:
    """Of ragged sets (start, item) the sets `at`, in that order, as (start, item)."""
    start, item = sets
    length = start[at + 1] - start[at]
    index, _ = ragged(start[at], length)
    return np.concatenate([[0], np.cumsum(length)]), item[index]


@dataclass(frozen=True)
class Rows:
    """Flat events of many users, each user's oldest first, items as vocabulary indices 1..V.

    item int32[E], ts int64[E], ordinal int32[E] (sessions of a user, from 1, dense),
    positive bool[E], start int64[U+1] (user u owns events start[u]..start[u+1]-1).
    Where it is known: feedback int8[E] (a code) and what was shown with each
    event, shown_start int64[E+1] and shown int32[X] (vocabulary indices).
    labels bool[E]: the events that are labels, if positive (a session: by its first event); the
    others are history only. None: all are.
    """

    item: Ints
    ts: Ints
    ordinal: Ints
    positive: Bools
    start: Ints
    feedback: Ints | None = None
    shown_start: Ints | None = None
    shown: Ints | None = None
    labels: Bools | None = None

    def part(self, begin: Ints, end: Ints) -> Rows:
        """The events begin[r]..end[r]-1 of one user each, as users of their own."""
        event, row = ragged(begin, end - begin)
        shown: dict[str, Any] = {}
        if self.feedback is not None:
            shown["feedback"] = self.feedback[event]
        if self.shown_start is not None and self.shown is not None:
            shown["shown_start"], shown["shown"] = chosen((self.shown_start, self.shown), event)
        return Rows(
            item=self.item[event],
            ts=self.ts[event],
            ordinal=self.ordinal[event] - self.ordinal[begin[row]] + 1,
            positive=self.positive[event],
            start=np.concatenate([[0], np.cumsum(end - begin)]),
            **shown,
        )

    @cached_property
    def opens(self) -> Bools:
        """bool[E]: is this event the first of its session?"""
        opens = run_starts(self.ordinal)
        opens[self.start[:-1][self.start[:-1] < len(opens)]] = True
        return opens

    @cached_property
    def last(self) -> Bools:
        """bool[E]: is this event its user's last?"""
        last = np.zeros(len(self.item), dtype=bool)
        last[self.start[1:][self.start[1:] > self.start[:-1]] - 1] = True
        return last

    @cached_property
    def session(self) -> Ints:
        """int64[E]: running number of the session over all users, from 0."""
        return np.cumsum(self.opens) - 1

    @cached_property
    def session_start(self) -> Ints:
        """int64[S+1]: the first event of each session of all users; E."""
        return np.append(np.flatnonzero(self.opens), len(self.item))

    @cached_property
    def sets(self) -> tuple[Ints, Ints]:
        """The distinct positive items of each session: (start int64[S+1], item int64[...])."""
        return self._by_session(self._pairs(self.session[self.positive], self.item[self.positive]))

    @cached_property
    def ignored(self) -> tuple[Ints, Ints]:
        """What each session showed, or had of negative feedback, and no positive event took:
        (start int64[S+1], item int64[...])."""
        session, item = [], []
        if self.feedback is not None:
            passed = (self.feedback == NEGATIVE) | (self.feedback == EXPOSED)
            session.append(self.session[passed])
            item.append(self.item[passed])
        if self.shown_start is not None and self.shown is not None:
            session.append(np.repeat(self.session, np.diff(self.shown_start)))
            item.append(self.shown)
        if not session:
            return np.zeros(len(self.session_start), dtype=np.int64), np.zeros(0, dtype=np.int64)
        pairs = self._pairs(np.concatenate(session), np.concatenate(item))
        taken = self._pairs(self.session[self.positive], self.item[self.positive])
        return self._by_session(np.setdiff1d(pairs, taken, assume_unique=True))

    @cached_property
    def offered(self) -> tuple[Ints, Ints, Ints]:
        """What was shown with each event and had not come up in its session before: (start
        int64[E+1], item int64[X], nth int64[X]: so many of the session's come before it).

        Nothing after an event decides about what it offers.
        """
        none = np.zeros(0, dtype=np.int64)
        if self.shown_start is None or self.shown is None:
            return np.zeros(len(self.item) + 1, dtype=np.int64), none, none
        own = np.arange(len(self.item))
        event, item = np.repeat(own, np.diff(self.shown_start)), self.shown.astype(np.int64)
        pair = np.concatenate([self.item, item]) + self.session[np.append(own, event)] * self._width
        order = np.argsort(np.concatenate([2 * own, 2 * event + 1]), kind="stable")
        first = order[np.unique(pair[order], return_index=True)[1]]
        fresh = np.sort(first[first >= len(own)]) - len(own)
        event, item = event[fresh], item[fresh]
        session = self.session[event]
        nth = np.arange(len(event)) - np.searchsorted(session, session)
        return np.searchsorted(event, np.arange(len(own) + 1)), item, nth

    @cached_property
    def memo(self) -> dict[str, Any]:
        """What other modules make of these events once, by a name of theirs."""
        return {}

    @cached_property
    def became(self) -> Ints:
        """int64[E]: feedback, or what `positive` says of it where more is not known."""
        if self.feedback is not None:
            return self.feedback.astype(np.int64)
        return np.where(self.positive, POSITIVE, NEUTRAL)

    @cached_property
    def _width(self) -> int:
        shown = 0 if self.shown is None else int(self.shown.max(initial=0))
        return max(int(self.item.max(initial=0)), shown) + 1

    def _pairs(self, session: Ints, item: Ints) -> Ints:
        """Distinct (session, item) as numbers, rising."""
        return np.unique(session * self._width + item)

    def _by_session(self, pairs: Ints) -> tuple[Ints, Ints]:
        count = np.bincount(pairs // self._width, minlength=len(self.session_start) - 1)
        return np.concatenate([[0], np.cumsum(count)]), pairs % self._width

    def own_label(self, event: Ints, target: Target) -> Ints:
        """What event e is as a label: itself, or its session's set; NO_LABEL if not positive."""
        if target == "next_item":
            first, label, yes = event, event, self.positive[event]
        else:
            start, label = self.sets[0], self.session[event]
            first, yes = self.session_start[label], start[label + 1] > start[label]
        if self.labels is not None:
            yes = yes & self.labels[first]
        return np.where(yes, label, NO_LABEL)

    def label_items(self, label: Ints, target: Target) -> tuple[Ints, Ints]:
        """The items of each label: (start int64[N+1], item int64[...])."""
        if target == "next_item":
            return np.arange(len(label) + 1), self.item[label].astype(np.int64)
        return chosen(self.sets, label)
