"""Sessions cut in Arrow: one slice of time (the gap rule), or all that some users' sessions need."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from expectations.session_rule import SessionRule
from jobs.core.arrays import rows_at, stretches
from jobs.core.arrow_types import arrow_schema
from jobs.core.source_file import Source
from jobs.core.tables import EVENTS, SESSIONS
from jobs.lake import filesystem
from jobs.lake.time_slices import CLOCK, micros, read
from jobs.records.boundary import VALUES, Boundary, boundary_of

EVENT_FIELDS = (
    "event_id", "event_ts", "item_id", "event_type", "value", "feedback", "tie_break",
    "source_session_id", "exposed_with",
)  # fmt: skip
SPARE = "spare"  # the events put aside, one file a slice


@dataclass(frozen=True)
class Cut:
    """What a cut needs of the rule, and of the tables: all that a task is sent."""

    rule: SessionRule
    fields: tuple[str, ...]
    """Of an event in a session, in their order."""
    events: dict[str, str]
    sessions: dict[str, str]
    """Columns and their types, of `bronze.events` and `silver.sessions`."""
    boundary: Boundary | None = None
    """The expression of which the rule says that there is one."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of an event that are read, beside its user."""
        return (*self.fields, *(self.boundary.stored if self.boundary else ()))


def cut_of(rule: SessionRule, boundary: Boundary | None = None) -> Cut:
    """The cut of our tables by a rule."""
    assert rule.boundary == (boundary is not None), "the expression of the rule"
    return Cut(
        rule=rule, fields=EVENT_FIELDS, events=EVENTS.columns, sessions=SESSIONS.columns,
        boundary=boundary,
    )  # fmt: skip


def cut_for(source: Source) -> Cut:
    """The cut of a source's tables."""
    return cut_of(source.sessions.session_rule, boundary_of(source))


def in_order(events: pa.Table, rule: SessionRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort events by user, and within a user by the total order.

    Returns:
        Places of the rows in their order, and of the rows so ordered the user (any number that
        tells users apart) and the time in microseconds.
    """
    codes = numbers(events["user_id"])
    times = events["event_ts"].combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)

    def ties(places: np.ndarray) -> dict[str, Any]:
        rows = events.select(rule.ties).take(pa.array(places))
        return {name: rows[name] for name in rule.ties}

    order = rule.arrays.order(codes, times, ties)
    return order, codes[order], times[order]


def numbers(texts: pa.ChunkedArray) -> np.ndarray:
    """A number for each text; -1 for null."""
    coded = pc.dictionary_encode(texts.combine_chunks())
    codes: np.ndarray = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes


def cut(
    events: pa.Table, how: Cut, low: int | None = None, high: int | None = None
) -> tuple[pa.Table, pa.Table]:
    """Cut the events of one slice of time.

    Args:
        events: `user_id` and the fields of an event; all events with low <= time < high.
        low, high: the slice's edges in microseconds; None: nothing lies beyond.

    Returns:
        The sessions by their start, and the events of those that may go on beyond an edge.
    """
    if not events.num_rows:
        return arrow_schema(how.sessions).empty_table(), events
    rule = how.rule.arrays
    order, codes, times = in_order(events, how.rule)
    native = numbers(events["source_session_id"])[order] if how.rule.native else None
    opens = rule.opens(codes, times, native, apart(events, order, how.boundary))
    first = np.flatnonzero(opens)
    size = np.diff(np.append(first, len(order)))
    start, end = times[first], times[first + size - 1]
    beyond = np.zeros(len(first), bool)
    for edge in (low, high):
        if edge is not None:
            beyond |= rule.near(start, end, edge, edge)
    spare = rows_at(events, order[np.repeat(beyond, size)])
    if beyond.any():
        order = order[np.repeat(~beyond, size)]
        start, end, size = start[~beyond], end[~beyond], size[~beyond]
    # (Events are moved once, into the order of the sessions' starts: moving sessions costs more.)
    by = np.argsort(start, kind="stable")
    rows = rows_at(events, order[stretches((np.cumsum(size) - size)[by], size[by])])
    return _sessions_of(rows, how, start[by], end[by], size[by]), spare


def _sessions_of(
    rows: pa.Table, how: Cut, start: np.ndarray, end: np.ndarray, size: np.ndarray
) -> pa.Table:
    """The table of sessions whose events are `rows`, one session after another.

    Args:
        start, end: int64[S], microseconds.
        size: int64[S], events of each session.
    """
    rule = how.rule.arrays
    offsets = np.concatenate([[0], np.cumsum(size)]).astype(np.int32)
    heads = rows.select(["user_id", "event_id"]).take(pa.array(offsets[:-1]))
    users, ids = heads["user_id"].to_pylist(), heads["event_id"].to_pylist()
    schema = arrow_schema(how.sessions)
    fields = [rows[name].combine_chunks() for name in how.fields]
    struct = pa.StructArray.from_arrays(fields, fields=list(schema.field("events").type.value_type))
    started = pa.array(start, pa.int64()).cast(CLOCK)
    flags = rule.runaway(end - start, size)
    if (behaviour := how.rule.behaviour) is not None:
        flags = behaviour.behind(flags, micros(rows["event_ts"]), size)
    listed = pa.array(offsets)
    values = pa.nulls(len(start), pa.list_(pa.string()))
    if how.boundary is not None and how.boundary.log:
        values = pa.ListArray.from_arrays(listed, rows[VALUES].combine_chunks())
    return pa.Table.from_arrays(
        [
            pa.array(rule.session_ids(users, ids), pa.string()),
            heads["user_id"].combine_chunks(),
            started,
            pa.array(end, pa.int64()).cast(CLOCK),
            started.cast(pa.timestamp("us")).cast(pa.date32()),
            pa.array(size, pa.int32()),
            pa.array(flags, pa.string()),
            pa.ListArray.from_arrays(listed, struct, type=schema.field("events").type),
            values.cast(schema.field(VALUES).type),
        ],
        schema=schema,
    )


def apart(
    events: pa.Table, order: np.ndarray, boundary: Boundary | None
) -> NDArray[np.bool_] | None:
    """What the boundary says of each event, in an order, and the next one; None: there is none."""
    if boundary is None:
        return None
    rows = events.select(boundary.columns).take(pa.array(order)).combine_chunks()
    before, after = (
        {name: some[name] for name in boundary.columns}
        for some in (rows.slice(0, max(0, len(order) - 1)), rows.slice(1))
    )
    return boundary.opens(before, after)


REPORT_DDL = "path string, rows long, spare string, spared long"


def worker(
    how: Cut, folder: str, aside: str
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """What a task does with its slices, as `frame` has them; see `REPORT_DDL`."""
    columns = {name: how.events[name] for name in ("user_id", *how.reads)}

    def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for one in batch.to_pylist():
                name = f"part-{uuid.uuid4().hex}.parquet"
                events = read(one["paths"], columns, one["low"], one["high"])
                sessions, spare = cut(events, how, one["low"], one["high"])
                filesystem.write_parquet(f"{folder}/{name}", sessions, SESSIONS.group)
                if spare.num_rows:
                    filesystem.write_parquet(f"{aside}/{name}", spare)
                yield pa.RecordBatch.from_pydict(
                    {
                        "path": [f"{folder}/{name}"], "rows": [sessions.num_rows],
                        "spare": [f"{aside}/{name}" if spare.num_rows else None],
                        "spared": [spare.num_rows],
                    },
                    schema=pa.schema([
                        ("path", pa.string()), ("rows", pa.int64()), ("spare", pa.string()),
                        ("spared", pa.int64()),
                    ]),
                )  # fmt: skip

    return work
