"""Sessions of programs, recognised by their events alone: too many in a minute, or too many without a pause.

A session is flagged `rate` if some sixty seconds of it have more events than a bound (the last one is
less than sixty seconds after the first), and `no_pause` if more events than another bound follow each
other without a pause that is longer than `pause_us`. Both look at windows, not at means: a mean over a
session of three events within a second would flag people, and one over a program's day would miss it.

As in `session_rule`, whoever makes flags (`flags`) and whoever audits them (`flagged`, `sql`) take them
from here, and the second does not evaluate what the first does. The flags are in
`silver.sessions.runaway`, behind those of `session_rule`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Flags = NDArray[np.object_]

MINUTE_US = 60_000_000
RATE, NO_PAUSE = "rate", "no_pause"


@dataclass(frozen=True, kw_only=True)
class BehaviourRule:
    """What programs do and people do not.

    events_per_minute: more events in some sixty seconds are a program's; None: not asked.
    events_without_pause: more events without a pause are; None: not asked.
    pause_us: microseconds; a pause is longer than this.
    """

    events_per_minute: int | None = None
    events_without_pause: int | None = None
    pause_us: int = 0

    def behind(self, flags: Flags, times: Ints, count: Ints) -> Flags:
        """Flags of sessions, those that another rule left open by this one.

        Args:
            flags: of each session, None: none.
            times: microseconds, of the events of one session after another, in order.
            count: how many each session has; at least one.
        """
        found: Flags = np.where(flags == None, self.flags(times, count), flags)  # noqa: E711
        return found

    def flags(self, times: Ints, count: Ints) -> Flags:
        """Of each session its flag, or None, by the times from event to event."""
        found = np.full(len(count), None, object)
        first = np.cumsum(count) - count
        owner = np.repeat(np.arange(len(count)), count)
        if (most := self.events_without_pause) is not None:
            begins = np.ones(len(times), bool)
            begins[1:] = times[1:] - times[:-1] > self.pause_us
            begins[first] = True
            run = np.flatnonzero(begins)
            size = np.diff(np.append(run, len(times)))
            found[owner[run[size > most]]] = NO_PAUSE
        if (most := self.events_per_minute) is not None and len(times) > most:
            close = times[most:] - times[:-most] < MINUTE_US
            close &= owner[most:] == owner[:-most]
            found[owner[:-most][close]] = RATE
        return found

    def flagged(self, flags: Flags, times: Ints, count: Ints) -> Bools:
        """Whether each flag is what the events say, where it is one of this rule or None; by counts
        in windows, where `flags` goes by distances.

        Args:
            flags, times, count: as `behind` takes them; other flags are not looked at.
        """
        fast = self._most(self._in_a_minute(times, count), count, self.events_per_minute)
        steady = self._most(self._since_pause(times, count), count, self.events_without_pause)
        by_flag = {RATE: fast, NO_PAUSE: steady & ~fast, None: ~fast & ~steady}
        found = np.ones(len(flags), bool)
        for flag, holds in by_flag.items():
            found &= (flags != flag) | holds
        return found

    @staticmethod
    def _most(counts: Ints, count: Ints, bound: int | None) -> Bools:
        """Whether the largest number of each session exceeds a bound."""
        if bound is None or not len(count):
            return np.zeros(len(count), bool)
        largest: Bools = np.maximum.reduceat(counts, np.cumsum(count) - count) > bound
        return largest

    @staticmethod
    def _in_a_minute(times: Ints, count: Ints) -> Ints:
        """Of each event, how many of its session are in the sixty seconds that end with it."""
        # (One line of time for all sessions, in which no two of them share a minute.)
        step = np.full(len(times), MINUTE_US, np.int64)
        step[1:] = np.minimum(np.diff(times), MINUTE_US)
        step[np.cumsum(count) - count] = MINUTE_US
        line = np.cumsum(step)
        return np.arange(len(line)) - np.searchsorted(line, line - MINUTE_US, "right") + 1

    def _since_pause(self, times: Ints, count: Ints) -> Ints:
        """Of each event, how many of its session there are since the last pause, itself counted."""
        at = np.arange(len(times))
        after = np.zeros(len(times), bool)
        after[1:] = times[:-1] + self.pause_us < times[1:]
        after[np.cumsum(count) - count] = True
        return at - np.maximum.accumulate(np.where(after, at, 0)) + 1

    def sql(self, events: str) -> str:
        """Spark SQL: a session's flag, or null.

        Args:
            events: an array of structs with `event_ts`, in order.
        """
        cases = []
        if self.events_per_minute is not None:
            since = f"unix_micros(get({events}, i - {self.events_per_minute}).event_ts)"
            near = f"coalesce(unix_micros(e.event_ts) - {since} < {MINUTE_US}, false)"
            cases.append(
                f"WHEN exists(transform({events}, (e, i) -> {near}), x -> x) THEN '{RATE}'"
            )
        if self.events_without_pause is not None:
            before = f"unix_micros(get({events}, i - 1).event_ts)"
            pause = f"coalesce(unix_micros(e.event_ts) - {before} > {self.pause_us}, true)"
            run = f"aggregate(transform({events}, (e, i) -> {pause}), " + (
                "named_struct('now', 0, 'most', 0), (a, p) -> named_struct('now', "
                "if(p, 1, a.now + 1), 'most', greatest(a.most, if(p, 1, a.now + 1))), a -> a.most)"
            )
            cases.append(f"WHEN {run} > {self.events_without_pause} THEN '{NO_PAUSE}'")
        return f"CASE {' '.join(cases)} END"


def without(flags: Flags) -> Flags:
    """Flags of another rule: those of this one are None."""
    found = flags.copy()
    found[(flags == RATE) | (flags == NO_PAUSE)] = None
    return found
