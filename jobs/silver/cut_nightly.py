"""The sessions around changes, cut again in Arrow: the nights.

Under the gap rule only the sessions within reach of a user's changes can change (`near`). Where more
parts events than silence, neighbours may be within the gap of each other, and not all of them within
reach: whatever no silence parts from a change is cut again (`Stretches`). Where silence does not
part events (native ids), it is what lies between the last session before a user's changes and the
first one after (`Edges`).
Tasks look for them by the bounds of each data file's sessions; what they find is small, is cut
together with what came, and compared with what was, in one process, or by slices of users in Spark
(`jobs/silver/cut_spark.py`).

Decision 8 in docs/design/decisions.md.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from expectations.session_rule import SessionRule
from jobs.core.arrays import run_starts
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import SESSIONS
from jobs.lake import filesystem
from jobs.lake.change_feed import CAME, CHANGED, CHANGES, NEW, RETIRED, SAME, TYPE, VERSION, is_put
from jobs.lake.time_slices import CLOCK, micros
from jobs.records.boundary import VALUES
from jobs.silver.cut_arrow import EVENT_FIELDS, Cut, cut, numbers

NEAR_DDL = "path string"
CHANGE_DDL = (
    f"{SESSIONS.ddl}, change string, merged boolean, relinked boolean, old_event_count int, "
    "_start_ts timestamp, _end_ts timestamp"
)
"""Rows of a candidate: what the table is to have, and what it had. `relinked`: whether it has, or had,
an event that is another person's now."""


def near(rows: pa.Table, keys: pa.Table, rule: SessionRule) -> np.ndarray:
    """Which sessions are within the reach of what changed of their user: bool[N].

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
    columns: tuple[str, ...] = tuple(SESSIONS.columns)
    fields: tuple[str, ...] = EVENT_FIELDS
    """What is wanted of a session, and of its events."""

    def __call__(self, path: str) -> list[dict[str, Any]]:
        keys = filesystem.read_parquet(self.keys)
        with filesystem.data_file(path) as file:
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
            leaves = leaves_of(file, self.columns, self.fields)
            found = file.read_row_groups(inside, leaves, use_threads=False)
        found = found.filter(pa.array(wanted)).combine_chunks()
        out = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        filesystem.write_parquet(out, found)
        return [{"path": out}]


def leaves_of(
    file: filesystem.DataParquet, columns: Collection[str], fields: Collection[str]
) -> list[str]:
    """Some columns of a file of sessions, and some fields of their events, as a reader names them."""
    schema = file.metadata.schema
    places = [schema.column(at).path.split(".") for at in range(file.metadata.num_columns)]
    return [
        ".".join(place)
        for place in places
        if (place[3] in fields if place[0] == "events" else place[0] in columns)
    ]


FAR = 2**62  # beyond all times


@dataclass(frozen=True)
class Edges:
    """A task: of a file of `silver.sessions` and each user with changes, the last session's end
    before the first change, and the first session's start after the last one, as a file: `user_id,
    lo, hi`. The native rule's: between these two, sessions may interleave anew."""

    keys: str
    """A Parquet file: as `keys_of` makes it."""
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        keys = filesystem.read_parquet(self.keys)
        rows = filesystem.read_parquet(path, ["user_id", "start_ts", "end_ts"])
        users = pc.dictionary_encode(rows["user_id"].combine_chunks())
        place = pc.index_in(users.dictionary, keys["user_id"].combine_chunks()).fill_null(-1)
        of = place.to_numpy(zero_copy_only=False)[users.indices.to_numpy(zero_copy_only=False)]
        start, end = micros(rows["start_ts"])[of >= 0], micros(rows["end_ts"])[of >= 0]
        of = of[of >= 0]
        lo, hi = (keys[name].to_numpy() for name in ("lo", "hi"))
        before, after = end < lo[of], start > hi[of]
        low, high = np.full(len(lo), -FAR), np.full(len(lo), FAR)
        np.maximum.at(low, of[before], end[before])
        np.minimum.at(high, of[after], start[after])
        found = pa.table({"user_id": keys["user_id"], "lo": low, "hi": high})
        found = found.filter(pa.array((low > -FAR) | (high < FAR)))
        if not found.num_rows:
            return []
        out = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        filesystem.write_parquet(out, found)
        return [{"path": out}]


@dataclass(frozen=True)
class Stretches:
    """A task: of a file of `silver.sessions`, when each session was of users with changes, as a file:
    `user_id, lo, hi`."""

    keys: str
    """A Parquet file: as `spans_of` makes it."""
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        users = filesystem.read_parquet(self.keys, ["user_id"])["user_id"].combine_chunks()
        rows = filesystem.read_parquet(path, ["user_id", "start_ts", "end_ts"])
        rows = rows.filter(pc.is_in(rows["user_id"], users))
        if not rows.num_rows:
            return []
        out = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        filesystem.write_parquet(
            out, spans_of(rows["user_id"], rows["start_ts"], rows["end_ts"]).combine_chunks()
        )
        return [{"path": out}]


def stretched(keys: pa.Table, stored: list[pa.Table], rule: SessionRule) -> pa.Table:
    """`keys`, each as far as no silence parts it from stored sessions; spans of one user do not
    overlap.

    Args:
        keys, stored: `user_id, lo, hi` of changes, and of the sessions of their users.
    """
    spans = pa.concat_tables([keys, *stored]).combine_chunks()
    if not spans.num_rows:
        return keys
    users = pc.dictionary_encode(spans["user_id"].combine_chunks())
    owner = users.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    lo, hi = (spans[name].to_numpy() for name in ("lo", "hi"))
    order = np.lexsort((lo, owner))
    owner, lo, hi = owner[order], lo[order], hi[order]
    # The latest end so far of each user: of pairs (user, time) as numbers, times by their rank.
    times, rank = np.unique(hi, return_inverse=True)
    latest = times[np.maximum.accumulate(owner * len(times) + rank) - owner * len(times)]
    parted = (owner[1:] != owner[:-1]) | rule.arrays.silent(latest[:-1], lo[1:])
    first = np.concatenate([[0], np.flatnonzero(parted) + 1])
    last = np.append(first[1:], len(lo)) - 1
    changed = np.logical_or.reduceat(order < keys.num_rows, first)
    names = users.dictionary.take(pa.array(owner[first]))
    found = pa.table({"user_id": names, "lo": lo[first], "hi": latest[last]})
    return found.filter(pa.array(changed))


def widened(keys: pa.Table, edges: list[pa.Table]) -> pa.Table:
    """`keys`, each user's span as far as the `Edges` of all files; FAR where there is no session."""
    none = {"lo": np.full(keys.num_rows, -FAR), "hi": np.full(keys.num_rows, FAR)}
    every = pa.concat_tables([pa.table({"user_id": keys["user_id"], **none}), *edges])
    found = every.group_by("user_id").aggregate([("lo", "max"), ("hi", "min")])
    return found.rename_columns(["user_id", "lo", "hi"])


def reached(
    keys: pa.Table, rule: SessionRule, path: str, folder: str, ask: Callable[[Any], list[pa.Table]]
) -> pa.Table:
    """How far what is near changes may reach: `user_id, lo, hi`, as `near` takes it.

    Args:
        keys: changes, as `near` takes them; a user once, where silence does not part sessions.
        path: where `keys` are written; folder: for the files of tasks.
        ask: the answers of a task over all files of `silver.sessions`.
    """
    if rule.by_silence:
        return keys
    if rule.silence_parts:
        return stretched(keys, ask(Stretches(path, folder)), rule)
    if rule.split:  # (who knows where a whole session begins)
        return widened(keys, [])
    return widened(keys, ask(Edges(path, folder)))


def net(feed: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The change per event over several commits: the first pre-image and the last post-image.

    Args:
        feed: the change feed: `user_id`, the fields of an event, and the columns `TYPE`, `VERSION`.

    Returns:
        Events that went, and events that came. One that was replaced is in both; one that is what
        it was, in none.
    """
    came = pc.is_in(feed[TYPE], pa.array(CAME)).combine_chunks()
    events = feed.drop_columns([TYPE, VERSION])
    if pc.all(came).as_py() is not False:
        return events.slice(0, 0), events
    is_came = came.to_numpy(zero_copy_only=False)
    number = numbers(feed["event_id"])
    order = np.lexsort((is_came, feed[VERSION].to_numpy(), number))
    begins = run_starts(number[order])
    first, last = order[begins], order[np.append(begins[1:], True)]
    was, now = ~is_came[first], is_came[last]  # it was there if its first change took it away
    both = np.flatnonzero(was & now)
    pairs = [events.take(pa.array(at[both])).combine_chunks() for at in (first, last)]
    same = np.ones(len(both), bool)
    for name in events.column_names:
        same &= _alike(*(rows[name].combine_chunks() for rows in pairs))
    was[both[same]] = now[both[same]] = False
    return events.take(pa.array(first[was])), events.take(pa.array(last[now]))


def _alike(one: Any, other: Any) -> np.ndarray:
    """bool[N]: whether two columns say the same, row by row: texts, numbers, times, or lists."""
    if not pa.types.is_list(one.type):
        equal = pc.fill_null(pc.equal(one, other), False)
        both_null = pc.and_(pc.is_null(one), pc.is_null(other))
        told: np.ndarray = pc.or_(equal, both_null).to_numpy(zero_copy_only=False)
        return told
    sizes = [pc.list_value_length(rows) for rows in (one, other)]
    alike = _alike(*sizes)
    at = np.flatnonzero(alike)
    size = sizes[0].fill_null(0).to_numpy(zero_copy_only=False)[at]
    elements = (rows.take(pa.array(at)).flatten() for rows in (one, other))
    wrong = np.repeat(at, size)[~_alike(*elements)]
    alike[wrong] = False
    return alike


def relinked(gone: pa.Table, came: pa.Table) -> pa.Array:
    """The ids of the events that are another person's now, of changes as `net` has them."""
    ids = came["event_id"].combine_chunks()
    place = pc.index_in(ids, gone["event_id"].combine_chunks())
    before = gone["user_id"].combine_chunks().take(place)
    return ids.filter(pc.fill_null(pc.not_equal(before, came["user_id"].combine_chunks()), False))


def recut(
    old: pa.Table, gone: pa.Table, came: pa.Table, how: Cut, moved: pa.Array | None = None
) -> pa.Table:
    """What becomes of the sessions near some changes, as rows of `CHANGE_DDL`.

    Args:
        old: rows of `silver.sessions`.
        gone, came: `user_id` and the fields of an event, as `net` has them.
        moved: the events that are another person's now; None: as `gone` and `came` say.

    Returns:
        The sessions that are new, changed (another row under the same id) or retired (gone).
    """
    schema = arrow_schema({"user_id": "string"} | {name: how.events[name] for name in how.reads})
    count = pc.list_value_length(old["events"].combine_chunks()).to_numpy(zero_copy_only=False)
    parent = pa.array(np.repeat(np.arange(old.num_rows), count))
    nested = pc.list_flatten(old["events"]).combine_chunks()
    columns = [old["user_id"].combine_chunks().take(parent)]
    columns += [nested.field(name) for name in how.fields]
    if len(how.reads) > len(how.fields):
        columns.append(values_of(old[VALUES], count))
    kept = pa.Table.from_arrays(columns, schema=schema)
    if gone.num_rows:
        lost = pc.is_in(kept["event_id"], gone["event_id"].combine_chunks())
        kept = kept.filter(pc.invert(lost))
    arrived = came.select(schema.names).cast(schema)
    new, _ = cut(pa.concat_tables([kept, arrived]).combine_chunks(), how)
    was = pc.index_in(new["session_id"], old["session_id"].combine_chunks())
    merged, same = _compared(new, was, nested, count, arrived["event_id"].combine_chunks())
    change = pc.if_else(pc.is_null(was), NEW, pc.if_else(same, SAME, CHANGED))
    moved = relinked(gone, came) if moved is None else moved
    rows = new.append_column("change", change).append_column("merged", merged)
    rows = rows.append_column("relinked", _having(new, moved))
    before = pc.fill_null(old["event_count"].take(was), 0)
    rows = rows.append_column("old_event_count", before.cast(pa.int32()))
    for name in ("start_ts", "end_ts"):
        rows = rows.append_column(f"_{name}", old[name].take(was))
    rows = rows.filter(pc.not_equal(rows["change"], SAME))
    retired = old.filter(pc.invert(pc.is_in(old["session_id"], new["session_id"].combine_chunks())))
    told = {
        "change": pa.repeat(pa.scalar(RETIRED), retired.num_rows),
        "merged": pa.repeat(pa.scalar(False), retired.num_rows),
        "relinked": _having(retired, moved),
        "old_event_count": retired["event_count"],
        "_start_ts": retired["start_ts"],
        "_end_ts": retired["end_ts"],
    }
    for name, column in told.items():
        retired = retired.append_column(name, column)
    whole = arrow_schema(dict(one.split(" ", 1) for one in _parts(CHANGE_DDL)))
    changed = pa.concat_tables([part.select(whole.names).cast(whole) for part in (rows, retired)])
    return changed.sort_by("start_ts")


def values_of(lists: pa.ChunkedArray, count: np.ndarray) -> pa.Array:
    """The boundary values of all events of some sessions, null for sessions that have none.

    Args:
        count: events of each session.
    """
    lists = lists.combine_chunks()
    there = pc.equal(pc.list_value_length(lists), pa.array(count, pa.int32()))
    there = pc.fill_null(there, False).to_numpy(zero_copy_only=False)
    of_event = np.repeat(there, count)
    place = np.cumsum(of_event) - 1
    flat = pc.list_flatten(lists.filter(pa.array(there)))
    return (
        flat.take(pa.array(place, mask=~of_event)) if len(flat) else pa.nulls(len(place), flat.type)
    )


def as_sessions(rows: pa.Table) -> pa.Table:
    """Rows of data files with all columns of `silver.sessions`; null where earlier versions wrote
    none."""
    schema = arrow_schema(SESSIONS.columns)
    for one in schema:
        if one.name not in rows.column_names:
            rows = rows.append_column(one, pa.nulls(rows.num_rows, one.type))
    return rows.select(schema.names).cast(schema)


def _having(sessions: pa.Table, ids: pa.Array) -> pa.Array:
    """bool[N]: whether a session has one of some events."""
    nothing: pa.Array = pa.repeat(pa.scalar(False), sessions.num_rows)
    if not len(ids) or not sessions.num_rows:
        return nothing
    lists = sessions["events"].combine_chunks()
    hit = pc.is_in(pc.list_flatten(lists).field("event_id"), ids)
    count = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    of = np.repeat(np.arange(len(count)), count)
    found = np.zeros(len(count), bool)
    found[of[hit.to_numpy(zero_copy_only=False)]] = True
    return pa.array(found)


def _parts(ddl: str) -> list[str]:
    """The columns of a DDL; the commas inside a type part nothing."""
    from jobs.core.arrow_types import split

    return [one.strip() for one in split(ddl)]


def _compared(
    new: pa.Table, was: Any, nested: Any, sizes: np.ndarray, arrived: pa.Array
) -> tuple[pa.Array, pa.Array]:
    """Of each new session whether it holds events of two or more old ones, and whether it is the
    old one of its id, event for event.

    Args:
        was: the old session of the same id, or null.
        nested, sizes: events of the old sessions, one session after another, and how many each has.
        arrived: ids of the events that came: none of an old session, though it may have had the id.
    """
    if not new.num_rows:
        return pa.array([], pa.bool_()), pa.array([], pa.bool_())
    lists = new["events"].combine_chunks()
    ids = pc.list_flatten(lists).field("event_id")
    place = pc.index_in(ids, value_set=nested.field("event_id"))
    place = pc.if_else(pc.is_in(ids, arrived), pa.scalar(None, pa.int32()), place)
    at = place.fill_null(-1).to_numpy(zero_copy_only=False)
    begin = np.concatenate([[0], np.cumsum(sizes)])
    owner = np.where(at < 0, -1, np.searchsorted(begin, at, side="right") - 1)
    count = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    first = np.cumsum(count) - count
    highest = np.maximum.reduceat(owner, first)
    lowest = np.minimum.reduceat(np.where(owner < 0, len(sizes), owner), first)
    # The same if it has as many events, and each at its place in the old one.
    old = was.fill_null(-1).to_numpy()
    known = old >= 0
    same = known & (count == np.append(sizes, 0)[old])
    expected = np.arange(len(ids)) + np.repeat(begin[old] - first, count)
    same &= np.logical_and.reduceat(at == expected, first)
    return pa.array((highest >= 0) & (lowest < highest)), pa.array(same)


def counted(changed: pa.Table) -> dict[str, int]:
    """The counts of a candidate; see `CHANGE_DDL`."""
    put = changed.filter(is_put(changed))
    by_change = {
        name: int(pc.sum(pc.equal(changed["change"], name)).as_py() or 0) for name in CHANGES
    }
    starts = [micros(changed[name].drop_null()) for name in ("start_ts", "_start_ts")]
    times = np.concatenate(starts)
    return by_change | {
        "rows": changed.num_rows,
        "merged": int(pc.sum(put["merged"]).as_py() or 0),
        "relinked": int(pc.sum(changed["relinked"]).as_py() or 0),
        "runaways": put.num_rows - put["runaway"].null_count,
        "events_after": int(pc.sum(put["event_count"]).as_py() or 0),
        "events_before": int(pc.sum(changed["old_event_count"]).as_py() or 0),
        "lo_us": int(times.min()) if len(times) else 0,
        "hi_us": int(times.max()) if len(times) else 0,
    }
