"""The suite of `silver.sessions` over the arrays of data files."""

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
from jobs.silver.cut_nightly import leaves_of

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

    def __call__(self, path: str) -> list[dict[str, Any]]:
        rows = read_sessions(path, ("event_ts", *self.rule.ties))
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
        return [made | {"bounds": write_bounds(rows, self.rule, self.folder)}]

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


def read_sessions(path: str, fields: tuple[str, ...]) -> pa.Table:
    """What the checks need of a file of sessions; fields: of their events."""
    columns = (*BOUNDED, "start_date", "event_count", "runaway", "change")
    with filesystem.data_file(path) as file:
        return file.read(leaves_of(file, columns, fields), use_threads=False).combine_chunks()


BOUNDED = ("session_id", "user_id", "start_ts", "end_ts")
"""The columns that `write_bounds` reads; under the native rule it reads `events`, too."""


def write_bounds(rows: pa.Table, rule: SessionRule, folder: str) -> str:
    """Write what `sessions_apart` reads of sessions: hashes of their users and their ids, and their
    first and last times (us). Under the native rule also the log's id of each (null: none), and a
    hash of it.

    Args:
        rows: `BOUNDED`; under the native rule also `events`, each session's of one
            `source_session_id`.

    Returns:
        The file's path.
    """
    made: dict[str, Any] = {
        "user": words_of(one_array(rows["user_id"])), "id": words_of(one_array(rows["session_id"])),
        "start": micros_array(rows["start_ts"]), "end": micros_array(rows["end_ts"]),
    }  # fmt: skip
    if rule.native:
        lists = one_array(rows["events"])
        count = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        first = pa.array(np.cumsum(count) - count, mask=count == 0)
        names = lists.flatten().field("source_session_id").take(first)
        none = pc.is_null(names).to_numpy(zero_copy_only=False)
        made["native"] = pa.array(words_of(names.fill_null("")), mask=none)
        made["native_id"] = names
    path = f"{folder}/{uuid.uuid4().hex}.parquet"
    filesystem.write_parquet(path, pa.table(made))
    return path


def sessions_apart(bounds: list[str], rule: SessionRule) -> bool:
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
    if rule.native:
        order, rank = by_native_id(bounds, user, start, end)
    user, start, end = user[order], start[order], end[order]
    together = rule.arrays.near(start[:-1], end[:-1], start[1:], end[1:])
    rises = end[:-1] < start[1:]
    if rule.native:
        native = rows["native"].combine_chunks().take(pa.array(order))
        rank = rank[order]
        rises |= (end[:-1] == start[1:]) & (rank[:-1] < rank[1:])
        together = rule.arrays.belong(together, native[:-1], native[1:])
    if rule.midnight is not None:
        together &= rule.arrays.same_day(end[:-1], start[1:])
    other = user[1:] != user[:-1]
    if rule.split:
        whole = np.append(True, ~together | other)
        if not rule.arrays.in_pieces(whole, start, end).all():
            return False
        together = np.zeros(len(together), bool)  # (pieces of one whole session are apart)
    return bool(((rises & ~together) | other).all())


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
