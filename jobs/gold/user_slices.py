"""`gold.sequences` by slices of users, in Arrow: all of it, or as much as changed.

Two rounds of tasks. `gather` takes some files of `silver.sessions` and writes the sessions that are
wanted as one Arrow file, one record batch a slice of users. `weave` takes one slice: its sessions
from all those files, put in order, and the rows of the table that they continue. Few tasks run
where the job runs, without a JVM; many run in Spark.

Spark's own way (take every event out, look items up, collect and sort a list a user, compare with
the stored lists element by element) took several times as long (LAB_LOG.md).
"""

from __future__ import annotations

import bisect
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from expectations.feedback_rule import FEEDBACK
from expectations.session_rule import SessionRule
from jobs.core.arrays import array_at, rows_at, run_starts, stretches
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import SEQUENCES
from jobs.lake import filesystem
from jobs.lake.change_feed import CHANGED
from jobs.lake.time_slices import CLOCK

EVER = np.iinfo(np.int64).max
SAMPLED_FILES = 16  # ours: from so many files of sessions the slices' edges are taken
OF_EVENTS = ("event_ts", "item_id", "feedback", "exposed_with")
GROUP_POSITIONS = 200_000  # ours: a row group's, so that a slice reads little more than its own

Edges = list[str]
"""User ids at which a slice begins, rising; the first slice has no edge."""


def edges_in(users: pa.ChunkedArray, count: int) -> Edges:
    """Edges that part these users, one entry a row of theirs, into slices of about equal size."""
    ordered = users.take(pc.sort_indices(users))
    places = [len(ordered) * part // count for part in range(1, count)]
    return sorted(set(ordered.take(places).to_pylist())) if len(ordered) else []


def edges_of_sessions(paths: list[str], count: int) -> Edges:
    """Edges from a sample of the files of `silver.sessions`."""
    chosen = paths[:: max(1, len(paths) // SAMPLED_FILES)] if count > 1 else []
    found = []
    for path in chosen:
        with filesystem.data_file(path) as file:
            if file.num_row_groups:
                found.append(file.read_row_group(0, columns=["user_id"])["user_id"])
    if not found:
        return []
    return edges_in(pa.chunked_array([one for many in found for one in many.chunks]), count)


def edges_of_users(paths: list[str], count: int) -> Edges:
    """Edges from the files of `gold.sequences`, which is laid out by user."""
    if count < 2 or not paths:
        return []
    return edges_in(_table(paths, ["user_id"])["user_id"], count)


# -- the first round ------------------------------------------------------------------------------


def read_sessions(path: str, since_us: int | None, ties: tuple[str, ...]) -> pa.Table:
    """The sessions of a file that are not runaway, without those of row groups that start before
    `since_us`; of their events, what `gold.sequences` needs."""
    with filesystem.data_file(path) as file:
        meta = file.metadata
        columns, starts = ["user_id", "start_ts", "runaway"], 0
        for at in range(meta.num_columns):
            place = meta.schema.column(at).path.split(".")
            if place[0] == "events" and place[3] in OF_EVENTS + ties:
                columns.append(".".join(place))
            if place == ["start_ts"]:
                starts = at
        groups = []
        for number in range(meta.num_row_groups):
            known = meta.row_group(number).column(starts).statistics
            last = known.max if known is not None and known.has_min_max else None
            if since_us is None or last is None or _us(last) >= since_us:
                groups.append(number)
        rows = file.read_row_groups(groups, columns=columns, use_threads=False)
    return rows.filter(pc.is_null(rows["runaway"])).combine_chunks()


def _us(moment: Any) -> int:
    return int(pa.scalar(moment, CLOCK).cast(pa.int64()).as_py())


def item_indices(ids: pa.Array, items: pa.Table) -> pa.Array:
    """`item_index` of each id; null: `gold.items` does not have it."""
    if not len(ids):
        return pa.nulls(0, pa.int32())
    coded = pc.dictionary_encode(ids)
    places = pc.index_in(coded.dictionary, value_set=items["item_id"].combine_chunks())
    known = items["item_index"].combine_chunks().take(places)
    return known.take(coded.indices)


def strands(sessions: pa.Table, items: pa.Table, ties: tuple[str, ...]) -> pa.Table:
    """One row a session: who and when, what orders it, and its positions as parallel lists."""
    lists = sessions["events"].combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    count = pc.list_value_length(lists)
    offsets = pa.array(np.concatenate([[0], np.cumsum(count)]).astype(np.int32))
    events = lists.flatten()
    assert events.null_count == 0, "an event that is null"
    # (A null list as an empty one: `fill_null` of lists takes half of all this.)
    shown = events.field("exposed_with")
    shown_count = pc.list_value_length(shown).fill_null(0)
    shown_offsets = pa.array(np.concatenate([[0], np.cumsum(shown_count)]).astype(np.int32))
    exposed = pa.ListArray.from_arrays(shown_offsets, item_indices(shown.flatten(), items))
    feedback = pc.index_in(events.field("feedback"), value_set=pa.array(FEEDBACK)).cast(pa.int8())
    first = events.take(offsets[:-1]) if ties else None
    made = {
        "user_id": sessions["user_id"].combine_chunks(),
        "start_us": sessions["start_ts"].combine_chunks().cast(CLOCK).cast(pa.int64()),
        **({} if first is None else {name: first.field(name) for name in ties}),
        "item_index": pa.ListArray.from_arrays(
            offsets, item_indices(events.field("item_id"), items)
        ),
        "event_us": pa.ListArray.from_arrays(
            offsets, events.field("event_ts").cast(CLOCK).cast(pa.int64())
        ),
        "feedback": pa.ListArray.from_arrays(offsets, feedback),
        "exposed_items": pa.ListArray.from_arrays(offsets, exposed),
    }
    return pa.table(made)


@dataclass(frozen=True)
class Gather:
    """The first round's task: files of sessions -> one Arrow file, a record batch a slice."""

    edges: Edges
    items: tuple[str, ...]
    """Data files of `gold.items`."""
    folder: str
    rule: SessionRule
    since: str | None = None
    """A Parquet file of `user_id`, `since_us`: only these users' sessions that start then or
    later are wanted; None: all are."""

    def __call__(self, paths: list[str]) -> list[dict[str, Any]]:
        items = _table(self.items, ["item_id", "item_index"])
        since = None if self.since is None else filesystem.read_parquet(self.since)
        earliest = None if since is None else pc.min(since["since_us"]).as_py()
        made = []
        # (Else no two sessions of a user start at the same time.)
        ties = () if self.rule.apart_in_time else self.rule.ties
        for path in paths:
            sessions = read_sessions(path, earliest, ties)
            users = pc.dictionary_encode(sessions["user_id"].combine_chunks())
            codes = users.indices.to_numpy(zero_copy_only=False)
            if since is not None:
                place = pc.index_in(users.dictionary, since["user_id"].combine_chunks())
                begin = since["since_us"].take(place).fill_null(EVER).to_numpy()
                start = sessions["start_ts"].combine_chunks().cast(CLOCK).cast(pa.int64())
                wanted = start.to_numpy(zero_copy_only=False) >= begin[codes]
                sessions, codes = sessions.filter(pa.array(wanted)), codes[wanted]
            number = np.array(
                [bisect.bisect_right(self.edges, user) for user in users.dictionary.to_pylist()],
                dtype=np.int64,
            )[codes]
            if sessions.num_rows:
                order = np.argsort(number, kind="stable")
                # (What is moved is numbers then, not texts.)
                found = strands(sessions.combine_chunks(), items, ties)
                made.append((rows_at(found, order), number[order]))
        if not made:
            return []
        out = f"{self.folder}/{uuid.uuid4().hex}.arrow"
        with (
            filesystem.open_new(out) as stream,
            pa.ipc.new_file(stream, made[0][0].schema) as writer,
        ):
            for part in range(len(self.edges) + 1):
                rows = [table.slice(*_range(number, part)) for table, number in made]
                whole = pa.concat_tables(rows).combine_chunks()
                batches = whole.to_batches()
                writer.write_batch(batches[0] if batches else _nothing(whole.schema))
        return [{"path": out}]


def _range(number: np.ndarray, part: int) -> tuple[int, int]:
    low, high = np.searchsorted(number, [part, part + 1])
    return int(low), int(high - low)


def _nothing(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.nulls(0, kind) for kind in schema.types], schema=schema)


def _table(paths: Iterable[str], columns: list[str]) -> pa.Table:
    """Some columns of data files."""
    return pa.concat_tables([filesystem.read_parquet(path, columns) for path in paths])


# -- the second round -----------------------------------------------------------------------------


@dataclass
class Positions:
    """Positions of many users, each user's together: `users` rising, `count` of each, and arrays."""

    users: pa.Array
    count: np.ndarray
    arrays: dict[str, Any]
    """item_index, event_ts (us), session_ordinal, feedback (code), exposed_items: one a position."""


def in_order(sessions: pa.Table, rule: SessionRule) -> Positions:
    """Sessions as `strands` has them, put in order and numbered from 1."""
    users = pc.dictionary_encode(sessions["user_id"].combine_chunks())
    rank = np.empty(len(users.dictionary), np.int64)
    rank[pc.sort_indices(users.dictionary).to_numpy()] = np.arange(len(rank))
    codes = rank[users.indices.to_numpy(zero_copy_only=False)]
    start = sessions["start_us"].to_numpy()

    def ties(places: np.ndarray) -> dict[str, Any]:
        return {name: sessions[name].take(pa.array(places)) for name in rule.ties}

    order = rule.arrays.order(codes, start, ties)
    sessions, codes = rows_at(sessions, order), codes[order]
    first = np.flatnonzero(run_starts(codes))
    number = np.diff(np.append(first, len(codes)))
    ordinal = np.arange(len(codes)) - np.repeat(first, number) + 1
    size = pc.list_value_length(_chunk(sessions["item_index"])).to_numpy()
    named = {
        name: _chunk(sessions[name]).flatten()
        for name in ("item_index", "event_us", "feedback", "exposed_items")
    }
    return Positions(
        users=_chunk(sessions["user_id"]).take(pa.array(first)),
        count=np.add.reduceat(size, first).astype(np.int64),
        arrays={
            "item_index": named["item_index"],
            "event_ts": named["event_us"],
            "session_ordinal": pa.array(np.repeat(ordinal, size).astype(np.int32)),
            "feedback": named["feedback"],
            "exposed_items": named["exposed_items"],
        },
    )


def _chunk(column: Any) -> Any:
    """A column as one array."""
    made = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return made.chunk(0) if isinstance(made, pa.ChunkedArray) else made


def of_rows(rows: pa.Table) -> Positions:
    """Rows of `gold.sequences`, as positions."""
    order = pc.sort_indices(rows["user_id"]).to_numpy()
    if (np.diff(order) < 0).any():  # (files are laid out by user: lists are moved only if need be)
        rows = rows.take(pa.array(order))
    rows = rows.combine_chunks()
    flat = {name: _chunk(rows[name]).flatten() for name in rows.column_names if name != "user_id"}
    flat["event_ts"] = flat["event_ts"].cast(CLOCK).cast(pa.int64())
    known = flat["feedback"].cast(pa.string())
    flat["feedback"] = pc.index_in(known, value_set=pa.array(FEEDBACK)).cast(pa.int8())
    count = pc.list_value_length(_chunk(rows["item_index"])).to_numpy(zero_copy_only=False)
    return Positions(_chunk(rows["user_id"]), count.astype(np.int64), flat)


def spliced(stored: Positions, tails: Positions, since: pa.Table) -> Positions:
    """The stored positions before each user's first change, and the new ones from there on.

    Where sessions are apart in time, one that did not change, and starts before one that did, ends
    before it starts: so positions before the first change of a user are the same positions.

    Args:
        since: `user_id`, `since_us`: the start of the first session that changed, was or is there;
            the lowest number where all of a user is new.
    """
    place = pc.index_in(stored.users, since["user_id"].combine_chunks())
    change = since["since_us"].take(place).fill_null(EVER).to_numpy()
    end = np.cumsum(stored.count)
    keep = stored.arrays["event_ts"].to_numpy() < np.repeat(change, stored.count)
    kept = np.diff(np.concatenate([[0], np.cumsum(keep)])[np.concatenate([[0], end])])
    # Users of both, in order, and how many positions each brings.
    users = pa.concat_arrays([stored.users, tails.users]).unique()
    users = users.take(pc.sort_indices(users))
    size = np.zeros((len(users), 2), np.int64)
    begin = np.zeros((len(users), 2), np.int64)
    for side, part, count in ((0, stored, kept), (1, tails, tails.count)):
        at = pc.index_in(part.users, users).to_numpy(zero_copy_only=False)
        size[at, side] = count
        begin[at, side] = np.cumsum(part.count) - part.count + side * int(stored.count.sum())
    # (What is kept of a user is the beginning of what was stored.)
    length = size.ravel()
    source = pa.array(stretches(begin.ravel(), length))
    last = np.zeros(len(users), np.int64)
    headed = size[:, 0] > 0
    ordinals = stored.arrays["session_ordinal"].to_numpy()
    last[headed] = ordinals[(begin[:, 0] + size[:, 0] - 1)[headed]]
    arrays = {
        name: array_at(pa.concat_arrays([stored.arrays[name], tails.arrays[name]]), source)
        for name in stored.arrays
    }
    more = np.repeat(np.stack([np.zeros_like(last), last], axis=1).ravel(), length)
    arrays["session_ordinal"] = pa.array(
        (arrays["session_ordinal"].to_numpy() + more).astype(np.int32)
    )
    total = size.sum(axis=1)
    there = total > 0
    return Positions(users.filter(pa.array(there)), total[there], arrays)


def to_rows(positions: Positions) -> pa.Table:
    """Rows of `gold.sequences`."""
    schema = arrow_schema(SEQUENCES.columns)
    offsets = pa.array(np.concatenate([[0], np.cumsum(positions.count)]).astype(np.int32))
    flat = dict(positions.arrays)
    flat["event_ts"] = flat["event_ts"].cast(CLOCK)
    flat["feedback"] = pa.DictionaryArray.from_arrays(flat["feedback"], pa.array(FEEDBACK)).cast(
        pa.string()
    )
    lists = [
        pa.ListArray.from_arrays(offsets, flat[field.name]).cast(field.type)
        for field in schema
        if field.name != "user_id"
    ]
    return pa.Table.from_arrays([positions.users.cast(pa.string()), *lists], schema=schema)


@dataclass(frozen=True)
class Weave:
    """The second round's task: one slice of users -> one file of `gold.sequences`.

    Its answer says `path` (None: no row), `rows`, `positions`, and in `gone` the users that have no
    row any more.
    """

    edges: Edges
    gathered: tuple[str, ...]
    folder: str
    rule: SessionRule
    stored: tuple[str, ...] = ()
    """Data files of the rows that are continued."""
    since: str | None = None
    """As `Gather.since`."""
    changed_only: bool = False
    """Write only the rows of users that changed."""

    def __call__(self, number: int) -> list[dict[str, Any]]:
        low = self.edges[number - 1] if number else None
        high = self.edges[number] if number < len(self.edges) else None
        sessions = self._sessions(number)
        tails = (
            in_order(sessions, self.rule) if sessions is not None and sessions.num_rows else None
        )
        gone: list[str] = []
        if self.since is None:
            woven = tails
        else:
            since = _between(filesystem.read_parquet(self.since), low, high)
            woven, gone = self._continued(tails, since, low, high)
        if woven is None or not len(woven.users):
            return [{"path": None, "rows": 0, "positions": 0, "gone": gone}]
        path = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        rows = to_rows(woven)
        if self.changed_only:
            rows = rows.append_column("change", pa.repeat(pa.scalar(CHANGED), rows.num_rows))
        each = max(1, GROUP_POSITIONS * rows.num_rows // max(1, int(woven.count.sum())))
        filesystem.write_parquet(path, rows, each)
        return [
            {"path": path, "rows": rows.num_rows, "positions": int(woven.count.sum()), "gone": gone}
        ]

    def _sessions(self, number: int) -> pa.Table | None:
        found = []
        for path in self.gathered:
            with filesystem.open_seekable(path) as stream:
                found.append(pa.ipc.open_file(stream).get_batch(number))
        return pa.Table.from_batches(found).combine_chunks() if found else None

    def _continued(
        self, tails: Positions | None, since: pa.Table, low: str | None, high: str | None
    ) -> tuple[Positions | None, list[str]]:
        """The rows of the slice as they are from now on, and the users who lost theirs."""
        schema = arrow_schema(SEQUENCES.columns)
        rows = schema.empty_table()
        if self.stored:
            system, _ = filesystem.located(self.stored[0])
            places = [filesystem.located(path)[1] for path in self.stored]
            data = ds.dataset(places, schema=schema, format="parquet", filesystem=system)
            rows = _rows_between(data, low, high)
        if self.changed_only:
            rows = rows.filter(pc.is_in(rows["user_id"], since["user_id"].combine_chunks()))
        stored = of_rows(rows)
        nothing = in_order_of_none() if tails is None else tails
        woven = spliced(stored, nothing, since)
        lost = stored.users.filter(pc.invert(pc.is_in(stored.users, woven.users)))
        return woven, lost.to_pylist()


def in_order_of_none() -> Positions:
    """No positions."""
    kinds = {"item_index": pa.int32(), "event_ts": pa.int64(), "session_ordinal": pa.int32(),
             "feedback": pa.int8(), "exposed_items": pa.list_(pa.int32())}  # fmt: skip
    arrays = {name: pa.nulls(0, kind) for name, kind in kinds.items()}
    return Positions(pa.nulls(0, pa.string()), np.zeros(0, np.int64), arrays)


def _bounds(low: str | None, high: str | None) -> ds.Expression | None:
    inside = None if low is None else ds.field("user_id") >= low
    if high is None:
        return inside
    below = ds.field("user_id") < high
    return below if inside is None else inside & below


def _rows_between(data: ds.Dataset, low: str | None, high: str | None) -> pa.Table:
    bounds = _bounds(low, high)
    if bounds is None:
        return data.to_table(use_threads=False)
    found = filesystem.matching(data, bounds, ["user_id"])
    return pa.concat_tables([data.schema.empty_table(), *found])


def _between(users: pa.Table, low: str | None, high: str | None) -> pa.Table:
    bounds = _bounds(low, high)
    return users if bounds is None else users.filter(bounds)


# -- what tasks answer, and take -------------------------------------------------------------------

GATHERED_DDL = "path string"
WOVEN_DDL = "path string, rows bigint, positions bigint, gone array<string>"


def in_groups(sizes: list[tuple[str, int]], most: int) -> list[list[str]]:
    """Files in groups of about `most` events each: (path, events)."""
    groups: list[list[str]] = []
    filled = most
    for path, size in sizes:
        if filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += size
    return groups
