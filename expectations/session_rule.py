"""The session rule: what orders a user's events, where a session ends, how it is named and flagged.

There are two renderings: `SessionRule.sql` for Spark SQL, `SessionRule.arrays` for flat
arrays of events. Whoever cuts or checks sessions takes it from here. Rows that one rendering cut are
audited by the other one, or by what only compares (`near`, `belong`, `rise`, `flagged`), never by the
text that cut them. Each is compared with another engine (tests/expectations).

Registered models ship this file: it needs NumPy, and pyarrow only where it is given Arrow's arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, kw_only=True)
class SessionRule:
    """A session rule.

    native: neighbours belong together if the log says the same id of a session of both; if it says
        none of both, as without it. Else: if the silence between them is at most `gap_us`.
    gap_us: microseconds, as `max_session_us`.
    max_session_us, max_session_events: a session that is longer, or has more events, is runaway.
    behaviour: what else is runaway, by its events (`behaviour_rule`); None: nothing.
    """

    native: bool
    gap_us: int
    max_session_us: int = UNBOUNDED
    max_session_events: int = UNBOUNDED
    behaviour: BehaviourRule | None = None

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
        """Whether two neighbours in the order, a before b, belong to one session."""
        near = f"unix_micros({b}.event_ts) - unix_micros({a}.event_ts) <= {self.rule.gap_us}"
        if not self.rule.native:
            return near
        one, other = f"{a}.source_session_id", f"{b}.source_session_id"
        return (
            f"(CASE WHEN {one} IS NULL AND {other} IS NULL THEN {near} "
            f"ELSE coalesce({one} = {other}, false) END)"
        )

    def session_id(self, user: str, first_event: str) -> str:
        """A session is named by its user and its first event, and by nothing else."""
        text = f"concat(cast(length({user}) AS string), ':', {user}, '/', {first_event})"
        return f"left(sha2({text}, 256), {ID_DIGITS})"

    def runaway(self, span_us: str, count: str) -> str:
        """Which bound a session exceeds, or null."""
        return (
            f"CASE WHEN {span_us} > {self.rule.max_session_us} THEN 'hours' "
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
        self, owner: NDArray[Any], times: NDArray[Any], native: NDArray[Any] | None = None
    ) -> Bools:
        """bool[N]: which events open a session.

        Args:
            owner, times: of events in order.
            native: under the native rule, a number for each id of a session; of null below 0.
        """
        together = ~self.silent(times[:-1], times[1:])
        if self.rule.native:
            assert native is not None, "the native rule reads ids of sessions"
            one, other = native[:-1], native[1:]
            together = np.where((one < 0) & (other < 0), together, one == other)
        opens = np.ones(len(times), bool)
        opens[1:] = ~together | (owner[1:] != owner[:-1])
        return opens

    def silent(self, before: Any, after: Any) -> Any:
        """Whether the silence from one time to another is longer than the gap."""
        return after - before > self.rule.gap_us

    def session_ids(self, users: Iterable[str], first_events: Iterable[str]) -> list[str]:
        """As `Sql.session_id`."""
        texts = (f"{len(u)}:{u}/{first}" for u, first in zip(users, first_events, strict=True))
        return [hashlib.sha256(text.encode("utf-8")).hexdigest()[:ID_DIGITS] for text in texts]

    def runaway(self, span_us: Ints, count: Ints) -> NDArray[np.object_]:
        """Of each session which bound it exceeds, or None."""
        found = np.full(len(count), None, object)
        found[count > self.rule.max_session_events] = "events"
        found[span_us > self.rule.max_session_us] = "hours"
        return found

    def flagged(self, flags: NDArray[np.object_], span_us: Ints, count: Ints) -> Bools:
        """Whether each flag (None: null) is what the bounds say; by flag, where `runaway` goes by
        bound."""
        short, few = span_us <= self.rule.max_session_us, count <= self.rule.max_session_events
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
        return np.where(none, near, same)


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
