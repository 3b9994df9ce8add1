"""What users did with each of their own items: the features of `+habit`. Source: ours.

A position is scored with a past, the events before it, and with the time and the session's
ordinal that count as now. An item is the user's own if the past has an event of it that is no
exposure. A *visit* is a session in which the item had positive or neutral feedback, at the time of
the first such event. Of an item with k visits, the last in session s at time t, now in session n at
time u (days are fractions, gaps are means over neighbouring visits):

 0 `visits`        log(1 + k)
 1 `once`          1 if k = 1
 2 `gap_sessions`  log(1 + g), g the usual gap in sessions; 0 if k < 2
 3 `gap_days`      log(1 + 24 d) / 4, d the usual gap in days; 0 if k < 2
 4 `neutral`       log(1 + events with neutral feedback)
 5 `negative`      log(1 + events with negative feedback)
 6 `exposed`       log(1 + sessions that showed it; of lists those in which it had not come up)
 7 `share`         k / n
 8 `since_sessions` log(1 + n - s)
 9 `since_days`    log(1 + 24 (u - t)) / 4
10 `latest`        1 if s is the session of the past's last event
11 `due_sessions`  4 (n - s) / (n - s + g) - 2; 0 if k < 2
12 `due_days`      4 (u - t) / (u - t + d) - 2; 0 if k < 2
13-15 `sessions_r` log(1 + sum over visits of exp(-(n - their session) / r)), r of 2, 8, 32 sessions
16-18 `days_r`     log(1 + sum over visits of exp(-(u - their time) / r)), r of 2, 14, 90 days

Features 0 and 7 to 18 are 0 where k = 0 (all of the item's feedback was negative). `due` is the
ratio since / usual, bounded: x / (1 + x), put between -2 and 2 (-2 where nothing has passed).

What follows from an item's events up to one of them is worked out once for all events (`Habits`);
of a position only the time since then is left to be counted. Nothing depends on later events, not
even by rounding: sums run along each item's own events, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.core.on_device import OnDevice
from models.core.rows import EXPOSED, NEGATIVE, NEUTRAL, Ints, Rows, ragged, run_starts

SESSION_RATES = (2.0, 8.0, 32.0)
DAY_RATES = (2.0, 14.0, 90.0)
DAY_US = 86_400_000_000
HOURS = 24.0
LOG_HOURS = 4.0  # of a month in hours the logarithm is 6.6
FEATURES = (
    "visits", "once", "gap_sessions", "gap_days", "neutral", "negative", "exposed",
    "share", "since_sessions", "since_days", "latest", "due_sessions", "due_days",
    *(f"sessions_{rate:g}" for rate in SESSION_RATES), *(f"days_{rate:g}" for rate in DAY_RATES),
)  # fmt: skip
FIXED = 7  # features that do not change while the item does not come up
DECAYED = FIXED + 4
COLUMNS = DECAYED + len(SESSION_RATES) + len(DAY_RATES)
LEAST = 1e-9  # where nothing has passed and usually nothing does, in days or sessions


@dataclass(frozen=True)
class Asked:
    """N positions that are scored: each knows the events begin..end-1 (of one user, from that
    user's first on), that it is `ts` (us since 1970) and that the session is number `ordinal`."""

    begin: Ints
    end: Ints
    ts: Ints
    ordinal: Ints


@dataclass(frozen=True)
class OwnItems(OnDevice):
    """Of N positions the users' own items, P pairs: row int64[P] (rising), item int64[P] (1..V), each
    pair once; feature float32[F, P]. host_row: `row` on the host."""

    row: torch.Tensor
    item: torch.Tensor
    feature: torch.Tensor
    host_row: Ints


@dataclass(frozen=True)
class Habits:
    """What is known of items after each of their events. H elements, in order of time: the events
    that are no exposures, and exposures of items that their user has had before.

    start int64[E+1]: the first element of each event; item int64[H]; until int64[H]: the event with
    which the item comes up again (E: never does); day float64[H] of the last visit; known
    float32[COLUMNS, H]: the fixed features, k, g, d, the session of the last visit, and logarithms
    of the decayed counts. Where there was no visit, it will never have been: day and session are
    infinite, counts 0.
    """

    start: Ints
    item: Ints
    until: Ints
    day: torch.Tensor
    known: torch.Tensor

    @staticmethod
    def of(rows: Rows) -> Habits:
        """Made once for a log, about 110 bytes an event, and kept with it."""
        if "habits" not in rows.memo:
            rows.memo["habits"] = Habits._made(rows)
        found: Habits = rows.memo["habits"]
        return found

    @staticmethod
    def _made(rows: Rows) -> Habits:
        event, item, kind = _elements(rows)
        user = np.repeat(np.arange(len(rows.start) - 1), np.diff(rows.start))[event]
        chain = user * (int(item.max(initial=0)) + 1) + item
        order = np.argsort(chain, kind="stable")
        chain, event_in, kind_in = chain[order], event[order], kind[order]
        first = run_starts(chain)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        until = np.full(len(order), len(rows.item), dtype=np.int64)
        until[:-1][~first[1:]] = event_in[1:][~first[1:]]
        visit, visits = _visits(rows, chain, event_in, kind_in)
        # The last visit of each element's item, if there was one.
        latest = np.cumsum(visit) - 1
        begin = np.flatnonzero(first)[np.cumsum(first) - 1]
        there = latest >= (np.cumsum(visit) - visit)[begin]
        at = np.where(there, latest, 0)
        known = np.zeros((COLUMNS, len(order)), dtype=np.float32)
        known[FIXED + 3], known[DECAYED:] = np.inf, -np.inf
        known[:, there] = visits.known[:, at[there]]
        for column, which in ((4, NEUTRAL), (5, NEGATIVE), (6, EXPOSED)):
            many = np.cumsum(kind_in == which)
            known[column] = np.log1p(many - (many - (kind_in == which))[begin])
        day = np.full(len(order), np.inf)
        day[there] = visits.day[at[there]]
        return Habits(
            start=np.searchsorted(event, np.arange(len(rows.item) + 1)),
            item=item,
            until=until[back],
            day=torch.from_numpy(day[back]),
            known=torch.from_numpy(np.take(known, back, axis=1)),
        )

    def own_items(self, rows: Rows, asked: Asked, most: int) -> OwnItems:
        """The items that came up in the `most` newest events of each past; what is said of them is
        of the whole past."""
        begin = np.maximum(asked.begin, asked.end - most)
        first = self.start[begin]
        element, row = ragged(first, self.start[asked.end] - first)
        live = self.until[element] >= asked.end[row]
        element, row = element[live], row[live]
        last = rows.ordinal[np.maximum(asked.end - 1, 0)]
        feature = self._features(element, row, asked, last)
        item = torch.from_numpy(self.item[element])
        return OwnItems(torch.from_numpy(row), item, feature, row)

    def _features(self, element: Ints, row: Ints, asked: Asked, last: Ints) -> torch.Tensor:
        """float32[F, P]. Large temporary arrays cost more than what is computed in them: few."""
        at, of = torch.from_numpy(element), torch.from_numpy(row)
        found = torch.empty(len(FEATURES), len(element))
        torch.index_select(self.known[:FIXED], 1, at, out=found[:FIXED])
        visits, gap, gap_days, session, *decayed = self.known[FIXED:].index_select(1, at)
        ordinal, newest = (
            torch.from_numpy(one.astype(np.float32)).index_select(0, of)
            for one in (asked.ordinal, last)
        )
        again = (visits > 1).float()
        torch.div(visits, ordinal, out=found[7])
        torch.eq(session, newest, out=found[10])
        since = ordinal.sub_(session).clamp_(min=0)
        day = torch.from_numpy(_days(asked.ts)).index_select(0, of)
        days = day.sub_(self.day.index_select(0, at)).float().clamp_(min=0)
        torch.log1p(since, out=found[8])
        torch.log1p(days * HOURS, out=found[9]).div_(LOG_HOURS)
        for number, passed, usual in ((11, since, gap), (12, days, gap_days)):
            ratio = torch.div(passed, usual.add_(passed).clamp_(min=LEAST), out=found[number])
            ratio.mul_(4).sub_(2).mul_(again)
        for number, rate in enumerate(SESSION_RATES + DAY_RATES):
            passed = since if number < len(SESSION_RATES) else days
            torch.sub(decayed[number], passed, alpha=1 / rate, out=found[13 + number])
        found[13:].exp_().log1p_()
        return found


def _days(ts: Ints) -> NDArray[np.float64]:
    """Days since 1970, exact to the microsecond."""
    return np.asarray(ts / DAY_US)


@dataclass(frozen=True)
class _Visits:
    """day float64[W], known float32[COLUMNS, W] of visits, item after item."""

    day: NDArray[np.float64]
    known: NDArray[np.float32]


def _elements(rows: Rows) -> tuple[Ints, Ints, Ints]:
    """(event int64[H], item int64[H], feedback int64[H]) in order of time; an exposure counts once
    a session, and only of items that its user has had before."""
    event, item, kind = np.arange(len(rows.item)), rows.item.astype(np.int64), rows.became
    if rows.shown_start is None and not (kind == EXPOSED).any():
        return event, item, kind
    start, shown, _ = rows.offered
    beside = np.repeat(event, np.diff(start))
    event, item = np.append(event, beside), np.append(item, shown)
    kind = np.append(kind, np.full(len(shown), EXPOSED))
    user = np.repeat(np.arange(len(rows.start) - 1), np.diff(rows.start))[event]
    width = int(item.max(initial=0)) + 1
    order = np.lexsort((event, user * width + item))
    chain, own = (user * width + item)[order], kind[order] != EXPOSED
    first = run_starts(chain)
    had = np.cumsum(own)
    begin = np.flatnonzero(first)[np.cumsum(first) - 1]
    keep = own | (had > (had - own)[begin])
    # Of the exposures of a session the first.
    shows = np.flatnonzero(~own & keep)
    keep[shows] = run_starts(chain[shows], rows.session[event[order[shows]]])
    kept = np.sort(order[keep])
    kept = kept[np.argsort(event[kept], kind="stable")]
    return event[kept], item[kept], kind[kept]


def _visits(rows: Rows, chain: Ints, event: Ints, kind: Ints) -> tuple[Ints, _Visits]:
    """bool[H]: which elements, item after item, are visits; and what is known after each visit."""
    there = np.flatnonzero((kind != NEGATIVE) & (kind != EXPOSED))
    at = there[run_starts(chain[there], rows.session[event[there]])]
    visit = np.zeros(len(chain), dtype=bool)
    visit[at] = True
    session, ts = rows.ordinal[event[at]].astype(np.int64), rows.ts[event[at]]
    first = run_starts(chain[at])
    place = np.arange(len(at))
    begin = np.flatnonzero(first)[np.cumsum(first) - 1]
    before = place - begin  # visits of the item
    gaps = np.maximum(before, 1)
    known = np.zeros((COLUMNS, len(at)), dtype=np.float32)
    known[0], known[1], known[FIXED] = np.log1p(before + 1), before == 0, before + 1
    gap, days = (session - session[begin]) / gaps, (ts - ts[begin]) / DAY_US / gaps
    known[2], known[3] = np.log1p(gap), np.log1p(HOURS * days) / LOG_HOURS
    known[FIXED + 1], known[FIXED + 2], known[FIXED + 3] = gap, days, session
    passed = np.diff(session, prepend=0), np.diff(ts, prepend=0) / DAY_US
    for number, rate in enumerate(SESSION_RATES + DAY_RATES):
        since = passed[0 if number < len(SESSION_RATES) else 1]
        keeps = np.where(first, 0.0, np.exp(-np.where(first, 0, since) / rate))
        known[DECAYED + number] = np.log(_decayed(keeps, int(before.max(initial=0)) + 1))
    return visit, _Visits(_days(ts), known)


def _decayed(keeps: NDArray[np.float64], longest: int) -> NDArray[np.float64]:
    """c[i] = 1 + keeps[i] c[i-1], in as many steps as `longest`, the longest run, has digits.

    keeps is 0 where a run begins, so what a longer run needs adds exact zeros to a shorter one.
    """
    total, factor, step = np.ones_like(keeps), keeps.copy(), 1
    while step < longest:
        total[step:] += factor[step:] * total[:-step]
        factor[step:] = factor[step:] * factor[:-step]
        step *= 2
    return total
