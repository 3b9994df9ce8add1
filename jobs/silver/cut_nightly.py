"""The sessions around new events, cut again in Arrow: the gap rule's nights.

Only the sessions within `gap_s` of a user's changes can change (`near`). Tasks look for them by the
bounds of each data file's sessions; what they find is small, is cut together with what came, and
compared with what was, in one process. Events that went (forgotten, or replaced under a native id)
may split a session, and native sessions may interleave: those nights go through Spark SQL
(`jobs/silver/cut_spark.py`).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from expectations.session_rule import SessionRule
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import SESSIONS
from jobs.lake import filesystem
from jobs.lake.time_slices import CLOCK, micros
from jobs.silver.cut_arrow import Cut, cut

MOST_EVENTS = 2_000_000
"""Ours: so many new events are cut in one process; more in Spark."""
NEAR_DDL = "path string"
CHANGE_DDL = (
    f"{SESSIONS.ddl}, change string, merged boolean, old_event_count int, _start_ts timestamp, "
    "_end_ts timestamp"
)
"""Rows of a candidate: what the table is to have, and what it had."""


def near(rows: pa.Table, keys: pa.Table, rule: SessionRule) -> np.ndarray:
    """Which sessions stand within the reach of what changed of their user: bool[N].

    Args:
        rows: `user_id, start_ts, end_ts`.
        keys: `user_id, lo, hi`: when something changed, in microseconds. Spans of one user do not
            overlap.
    """
    users = pc.dictionary_encode(rows["user_id"].combine_chunks())
    codes = users.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    start, end = rule.arrays.reach(micros(rows["start_ts"]), micros(rows["end_ts"]))
    owner = pc.index_in(keys["user_id"], users.dictionary).combine_chunks()
    known = pc.is_valid(owner).to_numpy(zero_copy_only=False)
    if not known.any():
        return np.zeros(len(codes), bool)
    owner = owner.drop_null().to_numpy().astype(np.int64)
    lo, hi = (keys[name].to_numpy()[known] for name in ("lo", "hi"))
    # Of each session the first span of its user that does not end before it, in one search: of
    # pairs (user, time) as numbers, times by their rank.
    times = np.unique(hi)
    place = owner * (len(times) + 1) + np.searchsorted(times, hi)
    order = np.argsort(place)
    first = np.searchsorted(place[order], codes * (len(times) + 1) + np.searchsorted(times, start))
    there = first < len(order)
    at = order[np.where(there, first, 0)]
    found: np.ndarray = there & (owner[at] == codes) & (lo[at] <= end)
    return found


def keys_of(users: Any, first: Any, last: Any) -> pa.Table:
    """`user_id, lo, hi`: the first and last time (us) of each user's changes."""
    keys = spans_of(users, first, last)
    keys = keys.group_by("user_id").aggregate([("lo", "min"), ("hi", "max")])
    return keys.rename_columns(["user_id", "lo", "hi"])


def spans_of(users: Any, first: Any, last: Any) -> pa.Table:
    """`user_id, lo, hi`, in microseconds."""
    lo, hi = (times.cast(CLOCK).cast(pa.int64()) for times in (first, last))
    return pa.table({"user_id": users, "lo": lo, "hi": hi})


@dataclass(frozen=True)
class Near:
    """A task: of a file of `silver.sessions`, the sessions near the changes, as a file."""

    keys: str
    """A Parquet file: `user_id, lo, hi`, as `near` takes them."""
    rule: SessionRule
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        keys, schema = filesystem.read_parquet(self.keys), arrow_schema(SESSIONS.columns)
        with filesystem.open_seekable(path) as stream:
            file = pq.ParquetFile(stream)
            rows = file.read(["user_id", "start_ts", "end_ts"], use_threads=False)
            hit = near(rows.combine_chunks(), keys, self.rule)
            if not hit.any():
                return []
            # Whole sessions are read from the row groups that have one of them.
            meta = file.metadata
            size = np.array([meta.row_group(n).num_rows for n in range(meta.num_row_groups)])
            ends = np.cumsum(size)
            inside = [n for n in range(len(size)) if hit[ends[n] - size[n] : ends[n]].any()]
            wanted = np.concatenate([hit[ends[n] - size[n] : ends[n]] for n in inside])
            found = file.read_row_groups(inside, schema.names, use_threads=False)
        found = found.filter(pa.array(wanted)).combine_chunks().cast(schema)
        out = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        filesystem.write_parquet(out, found)
        return [{"path": out}]


def recut(old: pa.Table, came: pa.Table, how: Cut) -> pa.Table:
    """What becomes of the sessions near the events that came, as rows of `CHANGE_DDL`.

    Args:
        old: rows of `silver.sessions`.
        came: `user_id` and the fields of an event; none of them is in a session yet.

    Returns:
        The sessions that are new, changed (another row under the same id) or retired (gone).
    """
    schema = arrow_schema({"user_id": "string"} | {name: how.events[name] for name in how.fields})
    count = pc.list_value_length(old["events"].combine_chunks()).to_numpy(zero_copy_only=False)
    parent = pa.array(np.repeat(np.arange(old.num_rows), count))
    nested = pc.list_flatten(old["events"]).combine_chunks()
    columns = [old["user_id"].combine_chunks().take(parent)]
    columns += [nested.field(name) for name in how.fields]
    events = pa.concat_tables(
        [pa.Table.from_arrays(columns, schema=schema), came.select(schema.names).cast(schema)]
    ).combine_chunks()
    new, _ = cut(events, how)
    was = pc.index_in(new["session_id"], old["session_id"].combine_chunks())
    before = old["event_count"].take(was)
    # Events only came: a session with the same first event and as many of them is the same.
    change = pc.if_else(
        pc.is_null(was), "new", pc.if_else(pc.equal(before, new["event_count"]), "same", "changed")
    )
    rows = new.append_column("change", change).append_column("merged", _merged(new, nested, parent))
    rows = rows.append_column("old_event_count", pc.fill_null(before, 0).cast(pa.int32()))
    for name in ("start_ts", "end_ts"):
        rows = rows.append_column(f"_{name}", old[name].take(was))
    rows = rows.filter(pc.not_equal(rows["change"], "same"))
    gone = old.filter(pc.invert(pc.is_in(old["session_id"], new["session_id"].combine_chunks())))
    told = {
        "change": pa.repeat(pa.scalar("retired"), gone.num_rows),
        "merged": pa.repeat(pa.scalar(False), gone.num_rows),
        "old_event_count": gone["event_count"], "_start_ts": gone["start_ts"],
        "_end_ts": gone["end_ts"],
    }  # fmt: skip
    for name, column in told.items():
        gone = gone.append_column(name, column)
    whole = arrow_schema(dict(one.split(" ", 1) for one in _parts(CHANGE_DDL)))
    changed = pa.concat_tables([part.select(whole.names).cast(whole) for part in (rows, gone)])
    return changed.sort_by("start_ts")


def _parts(ddl: str) -> list[str]:
    """The columns of a DDL; the commas inside a type part nothing."""
    from jobs.core.arrow_types import split

    return [one.strip() for one in split(ddl)]


def _merged(new: pa.Table, nested: Any, parent: pa.Array) -> pa.Array:
    """Which sessions hold events of two or more old ones."""
    lists = new["events"].combine_chunks()
    ids = pc.list_flatten(lists).field("event_id")
    place = pc.index_in(ids, value_set=nested.field("event_id"))
    owner = parent.take(place).fill_null(-1).to_numpy(zero_copy_only=False)
    count = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    first = np.cumsum(count) - count
    if not len(first):
        return pa.array([], pa.bool_())
    highest = np.maximum.reduceat(owner, first)
    lowest = np.minimum.reduceat(np.where(owner < 0, len(owner), owner), first)
    return pa.array((highest >= 0) & (lowest < highest))


def counted(changed: pa.Table) -> dict[str, int]:
    """The counts of a candidate; see `CHANGE_DDL`."""
    put = changed.filter(pc.not_equal(changed["change"], "retired"))
    by_change = {
        name: int(pc.sum(pc.equal(changed["change"], name)).as_py() or 0)
        for name in ("new", "changed", "retired")
    }
    starts = [micros(changed[name].drop_null()) for name in ("start_ts", "_start_ts")]
    times = np.concatenate(starts)
    return by_change | {
        "rows": changed.num_rows,
        "merged": int(pc.sum(put["merged"]).as_py() or 0),
        "runaways": put.num_rows - put["runaway"].null_count,
        "events_after": int(pc.sum(put["event_count"]).as_py() or 0),
        "events_before": int(pc.sum(changed["old_event_count"]).as_py() or 0),
        "lo_us": int(times.min()) if len(times) else 0,
        "hi_us": int(times.max()) if len(times) else 0,
    }
