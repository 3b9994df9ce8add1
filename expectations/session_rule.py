"""The session rule: what orders a user's events, where a session ends, how it is named and flagged.

There are two renderings: `SessionRule.sql` for Spark SQL, `SessionRule.arrays` for flat
arrays of events. Whoever cuts or checks sessions takes it from here. Rows that one rendering cut are
audited by the other one, or by what only compares (`near`, `belong`, `rise`, `flagged`), never by the
text that cut them. Each is compared with another engine (tests/expectations).

Registered models ship this file: it needs NumPy, and pyarrow only where it is given Arrow's arrays.

Decisions 1 and 4 in docs/design/decisions.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # (registered models, which ship this file, flag no sessions)
    from expectations.behaviour_rule import BehaviourRule

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Ties = Mapping[str, Any]
"""Columns of some events by name, of `SessionRule.ties`: Arrow arrays, or lists with None for null.
One that is left out decides nothing."""

ID_DIGITS = 32  # of the 64 of SHA-256
UNBOUNDED = 2**63 - 1
SECOND_US, DAY_US, DAY_S = 1_000_000, 86_400_000_000, 86_400
FIRST_DAY, LAST_DAY = -719_161, 2_932_895
"""Days since 1970 of which a clock can be asked: the second one that Python knows, and the last but
one."""
MANY_DAYS = 100_000


@dataclass(frozen=True, kw_only=True)
class SessionRule:
    """A session rule.

    native: neighbours belong together if the log says the same id of a session of both; if it says
        none of both, as without it. Else: if the silence between them is at most `gap_us`.
    gap_us: microseconds, as `max_session_us`.
    max_session_us, max_session_events: a session that is longer, or has more events, is runaway.
    behaviour: what else is runaway, by its events (`behaviour_rule`); None: nothing.
    native_gap: under the native rule, a silence of more than `gap_us` parts events of one id, too.
    midnight: a time zone (IANA): events on different days there do not belong together.
    split: a session longer than `max_session_us` is not runaway, but cut: the first piece has the
        events up to `max_session_us` after its first one, the second those up to twice that, and so
        on; pieces without an event are none.
    boundary: an expression on two neighbours, evaluated elsewhere, parts them, too.
    """

    native: bool
    gap_us: int
    max_session_us: int = UNBOUNDED
    max_session_events: int = UNBOUNDED
    behaviour: BehaviourRule | None = None
    native_gap: bool = False
    midnight: str | None = None
    split: bool = False
    boundary: bool = False

    @property
    def by_silence(self) -> bool:
        """Whether silence alone parts sessions."""
        return not (self.native or self.midnight or self.split or self.boundary)

    @property
    def silence_parts(self) -> bool:
        """Whether a silence of more than the gap parts events, whatever else is said of them."""
        return not self.native or self.native_gap

    @property
    def apart_in_time(self) -> bool:
        """Whether a user's session ends before the next one begins: no two share a moment."""
        return not (self.native or self.boundary)

    @property
    def longest_us(self) -> int:
        """A longer session is runaway."""
        return UNBOUNDED if self.split else self.max_session_us

    @property
    def ties(self) -> tuple[str, ...]:
        """What orders a user's events of equal time, column by column, nulls last; `event_id` is
        never null, so the order is total."""
        return (*(("source_session_id",) if self.native else ()), "tie_break", "event_id")

    @property
    def sql(self) -> Sql:
        return Sql(self)

    @property
    def arrays(self) -> Arrays:
        return Arrays(self)


@dataclass(frozen=True)
class Sql:
    """The rule as texts of Spark SQL."""

    rule: SessionRule

    @property
    def order_columns(self) -> tuple[str, ...]:
        """The total order of a user's events, as columns to sort by, nulls last."""
        return ("event_ts", *self.rule.ties)

    def order_key(self, row: str) -> str:
        """The total order as a struct that compares by it."""
        keys = [f"{row}.event_ts"]
        for name in self.rule.ties:
            nulls_last = [] if name == "event_id" else [f"{row}.{name} IS NULL"]
            keys += [*nulls_last, f"{row}.{name}"]
        return f"struct({', '.join(keys)})"

    def belong(self, a: str, b: str) -> str:
        """Whether two neighbours in the order, a before b, belong to one session; pieces of one that
        is split do, and what `boundary` says is not looked at."""
        near = f"unix_micros({b}.event_ts) - unix_micros({a}.event_ts) <= {self.rule.gap_us}"
        parts = [near]
        if self.rule.native:
            one, other = f"{a}.source_session_id", f"{b}.source_session_id"
            same = f"coalesce({one} = {other}, false)"
            same = f"({near} AND {same})" if self.rule.native_gap else same
            parts = [f"(CASE WHEN {one} IS NULL AND {other} IS NULL THEN {near} ELSE {same} END)"]
        if self.rule.midnight is not None:
            parts.append(f"{self.local_day(f'{a}.event_ts')} = {self.local_day(f'{b}.event_ts')}")
        return f"({' AND '.join(parts)})" if len(parts) > 1 else parts[0]

    def local_day(self, time: str) -> str:
        """The date of a time in the zone of `midnight`."""
        return f"to_date(from_utc_timestamp({time}, '{self.rule.midnight}'))"

    def piece(self, since: str, time: str) -> str:
        """How many microseconds after `since`, the first time of a whole session, the piece begins
        in which a time is."""
        after = f"greatest(unix_micros({time}) - unix_micros({since}) - 1, 0)"
        return f"({after} - {after} % {self.rule.max_session_us})"

    def session_id(self, user: str, first_event: str) -> str:
        """A session is named by its user and its first event, and by nothing else."""
        text = f"concat(cast(length({user}) AS string), ':', {user}, '/', {first_event})"
        return f"left(sha2({text}, 256), {ID_DIGITS})"

    def runaway(self, span_us: str, count: str) -> str:
        """Which bound a session exceeds, or null."""
        return (
            f"CASE WHEN {span_us} > {self.rule.longest_us} THEN 'hours' "
            f"WHEN {count} > {self.rule.max_session_events} THEN 'events' END"
        )


@dataclass(frozen=True)
class Arrays:
    """The rule over flat arrays. Times are int64 in microseconds."""

    rule: SessionRule

    def order(
        self, owner: NDArray[Any], times: NDArray[Any], ties: Callable[[Ints], Ties] | None = None
    ) -> Ints:
        """Places of events by owner, and within one by the total order.

        Args:
            owner: a number for each user.
            ties: gives `rule.ties` of the events at some places. It is asked only for events of
                equal time, because sorting texts costs most. What it leaves equal stays in the
                order that it is in; None: all of it.
        """
        order = np.lexsort((times, owner))
        owner, times = owner[order], times[order]
        same = (owner[1:] == owner[:-1]) & (times[1:] == times[:-1])
        if ties is not None and same.any():
            tied = np.zeros(len(order), bool)
            tied[1:] |= same
            tied[:-1] |= same
            at = np.flatnonzero(tied)
            moment = np.cumsum(np.concatenate([[True], ~same]))[at]
            found = ties(order[at])
            keys = [found[name] for name in self.rule.ties if name in found]
            order[at] = order[at][_sorted(moment, keys)]
        return order

    def rise(self, before: Ties, after: Ties) -> Bools:
        """Whether events come after others of equal time; by comparing, where `order` sorts.

        Args:
            before, after: all of `rule.ties`, Arrow arrays.
        """
        import pyarrow.compute as pc

        risen: Any = False
        for name in reversed(self.rule.ties):
            one, other = before[name], after[name]
            equal = pc.or_(
                pc.and_(pc.is_null(one), pc.is_null(other)),
                pc.fill_null(pc.equal(one, other), False),
            )
            less = pc.fill_null(pc.less(one, other), pc.and_(pc.is_valid(one), pc.is_null(other)))
            risen = pc.or_(less, pc.and_(equal, risen))
        found: Bools = risen.to_numpy(zero_copy_only=False)
        return found

    def opens(
        self,
        owner: NDArray[Any],
        times: NDArray[Any],
        native: NDArray[Any] | None = None,
        apart: Bools | None = None,
    ) -> Bools:
        """bool[N]: which events open a session.

        Args:
            owner, times: of events in order.
            native: under the native rule, a number for each id of a session; of null below 0.
            apart: bool[N - 1]: what `boundary` says of each event and the next one; None: nothing.
        """
        rule = self.rule
        together = ~self.silent(times[:-1], times[1:])
        if rule.native:
            assert native is not None, "the native rule reads ids of sessions"
            one, other = native[:-1], native[1:]
            same = (one == other) & together if rule.native_gap else one == other
            together = np.where((one < 0) & (other < 0), together, same)
        if rule.midnight is not None:
            day = local_clock(times, rule.midnight) // DAY_US
            together &= day[1:] == day[:-1]
        if rule.boundary and apart is not None:
            together &= ~apart
        opens = np.ones(len(times), bool)
        opens[1:] = ~together | (owner[1:] != owner[:-1])
        if rule.split:
            first = np.flatnonzero(opens)
            since = np.repeat(times[first], np.diff(np.append(first, len(times))))
            piece = self.pieces(since, times)
            opens[1:] |= piece[1:] != piece[:-1]
        return opens

    def pieces(self, since: Any, times: Any) -> Any:
        """The number, from 0, of the piece in which times are, of sessions that are split.

        Args:
            since: the first time of the whole session of each.
        """
        return np.maximum(times - since - 1, 0) // self.rule.max_session_us

    def silent(self, before: Any, after: Any) -> Any:
        """Whether the silence from one time to another is longer than the gap."""
        return after - before > self.rule.gap_us

    def session_ids(self, users: Iterable[str], first_events: Iterable[str]) -> list[str]:
        """As `Sql.session_id`."""
        return [
            hashlib.sha256(f"{len(user)}:{user}/{first}".encode()).hexdigest()[:ID_DIGITS]
            for user, first in zip(users, first_events, strict=True)
        ]

    def runaway(self, span_us: Ints, count: Ints) -> NDArray[np.object_]:
        """Of each session which bound it exceeds, or None."""
        found = np.full(len(count), None, object)
        found[count > self.rule.max_session_events] = "events"
        found[span_us > self.rule.longest_us] = "hours"
        return found

    def flagged(self, flags: NDArray[np.object_], span_us: Ints, count: Ints) -> Bools:
        """Whether each flag (None: null) is what the bounds say; by flag, where `runaway` goes by
        bound."""
        short, few = span_us <= self.rule.longest_us, count <= self.rule.max_session_events
        by_flag = {"hours": ~short, "events": short & ~few, None: short & few}
        found = np.zeros(len(flags), bool)
        for flag, holds in by_flag.items():
            found |= (flags == flag) & holds
        return found

    def reach(self, start: Any, end: Any) -> tuple[Any, Any]:
        """The first and the last time at which an event may be that belongs to a session of the
        gap rule from `start` to `end`, or makes it belong to another."""
        return start - self.rule.gap_us, end + self.rule.gap_us

    def near(self, start: Any, end: Any, low: Any, high: Any) -> Any:
        """Whether something from `low` to `high` is within the reach of a session: if not, then
        neither changes the other. The gap rule's; (low = high: at one time)."""
        first, last = self.reach(start, end)
        return (first <= high) & (low <= last)

    def belong(self, near: Any, one: Any = None, other: Any = None) -> Any:
        """Whether events, or sessions of one id each, belong together: bool[N]. It compares the ids
        themselves, where `opens` numbers them.

        Args:
            near: whether they are near in time: decides where neither has an id.
            one, other: under the native rule, Arrow arrays: their ids of a session, or hashes of
                them; null: none.
        """
        if not self.rule.native:
            return near
        import pyarrow.compute as pc

        none = pc.and_(pc.is_null(one), pc.is_null(other))
        same = pc.fill_null(pc.equal(one, other), False)
        if self.rule.native_gap:
            return near & np.asarray(pc.or_(none, same))
        return np.where(none, near, same)

    def same_day(self, before: Any, after: Any) -> Any:
        """Whether times are on one day of `midnight`'s zone: bool[N]. By the clock that is left
        until the day's end, where `opens` numbers days."""
        if self.rule.midnight is None:
            return np.ones(len(before), bool)
        one, other = (local_clock(times, self.rule.midnight) for times in (before, after))
        clock = one % DAY_US + (other - one)
        return (clock >= 0) & (clock < DAY_US)

    def in_pieces(self, opens: Bools, start: Ints, end: Ints) -> Bools:
        """Whether each of some sessions, in order, is in one piece of its whole session, and in a
        later one than the session before it. By pieces' ends, where `opens` goes by `pieces`.

        Args:
            opens: which of them begin a whole session.
        """
        first = np.flatnonzero(opens)
        since = np.repeat(start[first], np.diff(np.append(first, len(opens))))
        size = self.rule.max_session_us
        low, high = (np.maximum(-((since - times) // size), 1) for times in (start, end))
        found: Bools = low == high
        found[1:] &= opens[1:] | (high[:-1] < low[1:])
        return found


def local_clock(times: NDArray[Any], zone: str) -> Ints:
    """What clocks in a zone show at some times (us, UTC), as microseconds since 1970 there."""
    if not len(times):
        return np.zeros(0, np.int64)
    first, last = int(times.min()) // DAY_US, int(times.max()) // DAY_US
    if last - first <= MANY_DAYS:
        begins, offsets = _offsets(zone, first, last)
        return np.asarray(times + offsets[np.searchsorted(begins, times, "right") - 1])
    local = np.empty(len(times), np.int64)  # (times that lie centuries apart)
    for chunk in np.unique(times // (MANY_DAYS * DAY_US)):
        at = np.flatnonzero(times // (MANY_DAYS * DAY_US) == chunk)
        local[at] = local_clock(times[at], zone)
    return local


@lru_cache(64)
def _offsets(zone: str, first: int, last: int) -> tuple[Ints, Ints]:
    """From when on a zone's clocks are how far from UTC (us), from one day since 1970 to another.

    Clocks are asked at the beginning of each day, and where they changed on a day, for the second:
    no zone changes them twice on one day.
    """
    clock = ZoneInfo(zone)

    def offset(second: int) -> int:
        second = min(max(second, FIRST_DAY * DAY_S), LAST_DAY * DAY_S)
        there = datetime.fromtimestamp(second, UTC).astimezone(clock).utcoffset()
        assert there is not None
        return there.days * DAY_S + there.seconds

    now = offset(first * DAY_S)
    begins, offsets = [first * DAY_S], [now]
    for day in range(first, last + 1):
        low, high = day * DAY_S, (day + 1) * DAY_S
        then = offset(high)
        if then == now:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if offset(middle) == now else (low, middle)
        begins.append(high)
        offsets.append(then)
        now = then
    return np.array(begins) * SECOND_US, np.array(offsets) * SECOND_US


def _sorted(moment: Ints, keys: list[Any]) -> Ints:
    """Places by moment and keys, nulls last; what is equal keeps its order."""
    if all(hasattr(key, "null_count") for key in keys):
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = {"moment": moment} | {str(n): key for n, key in enumerate(keys)}
        names = [(name, "ascending", "at_end") for name in columns]
        return np.asarray(pc.sort_indices(pa.table(columns), sort_keys=names), dtype=np.int64)
    rows = list(zip(moment.tolist(), *([(one is None, one) for one in key] for key in keys)))
    return np.array(sorted(range(len(rows)), key=rows.__getitem__), dtype=np.int64)
