"""The suite of `silver.sessions` over the arrays of data files.

Decision 4 in docs/design/decisions.md.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from expectations.behaviour_rule import without
from expectations.session_rule import SessionRule
from jobs.audit.arrow_columns import (
    continues,
    dates,
    distinct,
    fingerprint,
    micros_array,
    one_array,
    print_of,
    words_of,
)
from jobs.audit.fingerprints import NO_DIGEST, PRINT_DDL, of_session_rows, row_of
from jobs.lake import filesystem
from jobs.records.boundary import VALUES, Boundary
from jobs.silver.cut_nightly import leaves_of, values_of

SESSIONS_DDL = f"holds boolean, bounds string, {PRINT_DDL}"


@dataclass(frozen=True)
class SessionsHold:
    """A task: a file of sessions, of the table or of a candidate.

    Its answer says whether each session keeps the checks that speak of it alone, the print of the
    events, and, if they do, where the `bounds` of the sessions are (`write_bounds`); `file` is the
    file's row of `ops.fingerprints`, as JSON.
    """

    rule: SessionRule
    folder: str
    boundary: Boundary | None = None

    def __call__(self, path: str) -> list[dict[str, Any]]:
        fields = ("event_ts", *self.rule.ties, *(self.boundary.ours if self.boundary else ()))
        rows = read_sessions(path, fields, self.boundary.stored if self.boundary else ())
        if "change" in rows.column_names:
            rows = rows.filter(pc.not_equal(rows["change"], "retired")).combine_chunks()
        made: dict[str, Any] = {"holds": True, "bounds": None, **print_of(NO_DIGEST)}
        made["file"] = json.dumps(row_of(path, NO_DIGEST, NO_DIGEST.astype(bool)))
        if not rows.num_rows:
            return [made]
        lists = one_array(rows["events"])
        flat = lists.flatten()
        flat_columns = ("session_id", "user_id", "start_ts", "end_ts", "start_date", "event_count")
        if any(rows[name].null_count for name in flat_columns) or lists.null_count:
            return [made | {"holds": False}]
        if flat.null_count or any(flat.field(n).null_count for n in ("event_id", "event_ts")):
            return [made | {"holds": False}]
        count = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        if not self._hold(rows, flat, count):
            return [made | {"holds": False}]
        users = np.repeat(words_of(one_array(rows["user_id"])), count)
        made |= fingerprint(users, words_of(flat.field("event_id")))
        made["file"] = json.dumps(of_session_rows(path, rows, lists, flat.field("event_ts")))
        return [made | {"bounds": write_bounds(rows, self.rule, self.folder, self.boundary)}]

    def _hold(self, rows: pa.Table, flat: Any, count: np.ndarray) -> bool:
        if count.min() < 1 or not np.array_equal(count, rows["event_count"].to_numpy()):
            return False
        start, end = micros_array(rows["start_ts"]), micros_array(rows["end_ts"])
        times = micros_array(flat.field("event_ts"))
        first = np.cumsum(count) - count
        flags = one_array(rows["runaway"]).to_numpy(zero_copy_only=False)
        rule = self.rule.arrays
        if (behaviour := self.rule.behaviour) is not None:
            if not behaviour.flagged(flags, times, count).all():
                return False
            flags = without(flags)
        before, after = times[:-1], times[1:]
        together = rule.near(before, before, after, after)
        if self.rule.native:  # every id is that of its session's first event
            ids = flat.field("source_session_id")
            heads = ids.take(pa.array(np.repeat(first, count)))
            together = rule.belong(together, heads[1:], ids[1:])
        if self.rule.midnight is not None:
            together &= rule.same_day(before, after)
        inside = continues(count)
        if self.boundary is not None:
            if self.boundary.log and not _as_many(rows, count):
                return False
            together &= self._unparted(rows, flat, count, inside)
        if not (
            np.array_equal(times[first], start)
            and np.array_equal(times[first + count - 1], end)
            and dates(rows["start_ts"]).equals(one_array(rows["start_date"]))
            and rule.flagged(flags, end - start, count).all()
            and ((before <= after) & together)[inside].all()
        ):
            return False
        tied = np.flatnonzero(inside & (before == after))
        ties = (
            {n: flat.field(n).take(pa.array(at)) for n in self.rule.ties} for at in (tied, tied + 1)
        )
        return bool(rule.rise(*ties).all())

    def _unparted(
        self, rows: pa.Table, flat: Any, count: np.ndarray, inside: np.ndarray
    ) -> np.ndarray:
        """Whether the boundary parts no event from the next one: of those inside a session."""
        assert self.boundary is not None
        columns = {name: flat.field(name) for name in self.boundary.ours}
        if self.boundary.log:
            columns[VALUES] = values_of(rows[VALUES], count)
        at = np.flatnonzero(inside)
        pairs = ({n: one.take(pa.array(to)) for n, one in columns.items()} for to in (at, at + 1))
        found = np.ones(len(inside), bool)
        found[at] = ~self.boundary.opens(*pairs)
        return found


def _as_many(rows: pa.Table, count: np.ndarray) -> bool:
    """Whether each session has as many boundary values as events, or none."""
    if VALUES not in rows.column_names:
        return False
    values = pc.list_value_length(one_array(rows[VALUES]))
    return bool(pc.all(pc.equal(values, pa.array(count, pa.int32()))).as_py() is not False)


def read_sessions(path: str, fields: tuple[str, ...], more: tuple[str, ...] = ()) -> pa.Table:
    """What the checks need of a file of sessions, and more columns; fields: of their events."""
    columns = (*BOUNDED, "start_date", "event_count", "runaway", "change", *more)
    with filesystem.data_file(path) as file:
        return file.read(leaves_of(file, columns, fields), use_threads=False).combine_chunks()


BOUNDED = ("session_id", "user_id", "start_ts", "end_ts")
"""The columns that `write_bounds` reads; under the native rule it reads `events`, too."""


def write_bounds(
    rows: pa.Table, rule: SessionRule, folder: str, boundary: Boundary | None = None
) -> str:
    """Write what `sessions_apart` reads of sessions: hashes of their users and their ids, and their
    first and last times (us). Under the native rule also the log's id of each (null: none), and a
    hash of it. Where there is a boundary, also what it and the order read of the first event and of
    the last.

    Args:
        rows: `BOUNDED`; under the native rule also `events`, each session's of one
            `source_session_id`; with a boundary `events` and their `boundary_values`.

    Returns:
        The file's path.
    """
    made: dict[str, Any] = {
        "user": words_of(one_array(rows["user_id"])),
        "id": words_of(one_array(rows["session_id"])),
        "start": micros_array(rows["start_ts"]),
        "end": micros_array(rows["end_ts"]),
    }
    if rule.native:
        lists = one_array(rows["events"])
        count = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        first = pa.array(np.cumsum(count) - count, mask=count == 0)
        names = lists.flatten().field("source_session_id").take(first)
        none = pc.is_null(names).to_numpy(zero_copy_only=False)
        made["native"] = pa.array(words_of(names.fill_null("")), mask=none)
        made["native_id"] = names
    if boundary is not None:
        made |= ends_of(rows, rule, boundary)
    path = f"{folder}/{uuid.uuid4().hex}.parquet"
    filesystem.write_parquet(path, pa.table(made))
    return path


ENDS = ("first", "last")


def ends_of(rows: pa.Table, rule: SessionRule, boundary: Boundary) -> dict[str, Any]:
    """`first_<column>` and `last_<column>`: what the order and the boundary read of each session's
    first and last event."""
    lists = one_array(rows["events"])
    flat = lists.flatten()
    count = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    end = np.cumsum(count)
    columns = {name: flat.field(name) for name in (*rule.ties, *boundary.ours)}
    if boundary.log:
        columns[VALUES] = values_of(rows[VALUES], count)
    made: dict[str, Any] = {}
    for side, place in zip(ENDS, (end - count, end - 1), strict=True):
        at = pa.array(place, mask=count == 0)
        made |= {f"{side}_{name}": one.take(at) for name, one in columns.items()}
    return made


def sessions_apart(bounds: list[str], rule: SessionRule, boundary: Boundary | None = None) -> bool:
    """Whether neighbouring sessions of a user, by the files of their bounds, do not belong together
    and do not overlap in the total order, and all ids differ.

    True may be wrong with the probability of a collision of 64-bit hashes; so may False, and then
    Spark decides.
    """
    if not bounds:
        return True
    names = ["user", "id", "start", "end", *(["native"] if rule.native else [])]
    rows = pa.concat_tables([filesystem.read_parquet(path, names) for path in bounds])
    user, ids, start, end = (rows[name].to_numpy() for name in names[:4])
    if not distinct(ids):
        return False
    order, rank = np.lexsort((start, user)), np.zeros(0, np.int64)
    ends = None
    if boundary is not None:
        ends = Ends(bounds, rule, boundary)
        order = rule.arrays.order(user, start, ends.ties)
    elif rule.native:
        order, rank = by_native_id(bounds, user, start, end)
    user, start, end = user[order], start[order], end[order]
    together = rule.arrays.near(start[:-1], end[:-1], start[1:], end[1:])
    rises = end[:-1] < start[1:]
    if rule.native:
        native = rows["native"].combine_chunks().take(pa.array(order))
        if boundary is None:
            rank = rank[order]
            rises |= (end[:-1] == start[1:]) & (rank[:-1] < rank[1:])
        together = rule.arrays.belong(together, native[:-1], native[1:])
    if rule.midnight is not None:
        together &= rule.arrays.same_day(end[:-1], start[1:])
    other = user[1:] != user[:-1]
    if ends is not None:
        rises |= ends.rise(order, np.flatnonzero((end[:-1] == start[1:]) & ~other))
        together &= ~ends.parted(order, np.flatnonzero(together & ~other))
    if rule.split:
        whole = np.append(True, ~together | other)
        if not rule.arrays.in_pieces(whole, start, end).all():
            return False
        together = np.zeros(len(together), bool)  # (pieces of one whole session are apart)
    return bool(((rises & ~together) | other).all())


class Ends:
    """The first and last events of sessions, by the files of their bounds."""

    def __init__(self, bounds: list[str], rule: SessionRule, boundary: Boundary) -> None:
        self.rule, self.boundary = rule, boundary
        names = dict.fromkeys((*rule.ties, *boundary.columns))
        wanted = [f"{side}_{name}" for side in ENDS for name in names]
        self.rows = pa.concat_tables([filesystem.read_parquet(one, wanted) for one in bounds])
        self.rows = self.rows.combine_chunks()

    def take(self, side: str, names: tuple[str, ...], places: np.ndarray) -> dict[str, Any]:
        at = pa.array(places)
        return {n: one_array(self.rows[f"{side}_{n}"].take(at)) for n in names}

    def ties(self, places: np.ndarray) -> dict[str, Any]:
        return self.take("first", self.rule.ties, places)

    def pairs(
        self, names: tuple[str, ...], order: np.ndarray, at: np.ndarray
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The last event of some sessions in an order, and the first one of the next session."""
        return self.take("last", names, order[at]), self.take("first", names, order[at + 1])

    def rise(self, order: np.ndarray, at: np.ndarray) -> np.ndarray:
        """bool[N - 1]: whether the next session begins behind the end of one at the same time; of
        those asked."""
        found = np.zeros(max(0, len(order) - 1), bool)
        found[at] = self.rule.arrays.rise(*self.pairs(self.rule.ties, order, at))
        return found

    def parted(self, order: np.ndarray, at: np.ndarray) -> np.ndarray:
        """bool[N - 1]: whether the boundary parts a session from the next one; of those asked."""
        found = np.zeros(max(0, len(order) - 1), bool)
        found[at] = self.boundary.opens(*self.pairs(self.boundary.columns, order, at))
        return found


def by_native_id(
    bounds: list[str], user: np.ndarray, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sessions by user and by the total order of their first events, under the native rule.

    Where one begins at the time at which another ends or begins, the log's ids of both decide, null
    last: if they are equal, the two belong together, whatever comes behind in the order.

    Returns:
        Places of the sessions in their order; and the rank of each session's id among those of all
        sessions of which the time does not decide, 0 for the others.
    """
    order, rank = np.lexsort((end, start, user)), np.zeros(len(user), np.int64)
    touches = (user[order][1:] == user[order][:-1]) & (start[order][1:] <= end[order][:-1])
    at = np.unique(np.concatenate([order[1:][touches], order[:-1][touches]]))
    if not len(at):
        return order, rank
    names = pa.concat_tables([filesystem.read_parquet(path, ["native_id"]) for path in bounds])
    rank[at] = pc.rank(names["native_id"].take(pa.array(at)), tiebreaker="dense").to_numpy()
    return np.lexsort((rank, start, user)), rank
