"""Sessions cut under the gap rule, in Arrow: one slice of time, or the events around a change."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import SESSIONS
from jobs.lake import filesystem

if TYPE_CHECKING:
    pass
from jobs.lake.time_slices import CLOCK, read

SPARE = "spare"  # the events put aside, one file a slice


@dataclass(frozen=True)
class Cut:
    """What a cut needs of the rule, and of the tables: all that a task is sent."""

    gap_us: int
    max_session_us: int
    max_session_events: int
    fields: tuple[str, ...]
    """Of an event in a session, in their order."""
    events: dict[str, str]
    sessions: dict[str, str]
    """Columns and their types, of `bronze.events` and `silver.sessions`."""


def in_order(events: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort events by user, and within a user by the total order of the gap rule.

    Returns:
        Places of the rows in their order, and of the rows so ordered the user (any number that
        tells users apart) and the time in microseconds.
    """
    users = pc.dictionary_encode(events["user_id"].combine_chunks())
    codes = users.indices.to_numpy(zero_copy_only=False)
    times = events["event_ts"].combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
    order = np.lexsort((times, codes))
    codes, times = codes[order], times[order]
    same = (codes[1:] == codes[:-1]) & (times[1:] == times[:-1])
    if same.any():
        tied = np.zeros(len(order), bool)
        tied[1:] |= same
        tied[:-1] |= same
        run = np.cumsum(np.concatenate([[True], ~same]))
        at = np.flatnonzero(tied)
        rows = events.select(["tie_break", "event_id"]).take(pa.array(order[at]))
        keys = pa.table(
            {
                "run": run[at], "without": pc.is_null(rows["tie_break"]),
                "tie_break": rows["tie_break"], "event_id": rows["event_id"],
            }
        )  # fmt: skip
        sorted_ties = pc.sort_indices(
            keys, [(name, "ascending") for name in keys.column_names]
        ).to_numpy()
        order[at] = order[at][sorted_ties]
    return order, codes, times


def session_id(user: str, first_event: str) -> str:
    """As `jobs.silver.cut_spark.session_id`, one at a time."""
    text = f"{len(user)}:{user}/{first_event}"
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def cut(
    events: pa.Table, how: Cut, low: int | None = None, high: int | None = None
) -> tuple[pa.Table, pa.Table]:
    """Cut the events of one slice of time.

    Args:
        events: `user_id` and the fields of an event; all events with low <= time < high.
        low, high: the slice's edges in microseconds; None: nothing lies beyond.

    Returns:
        The sessions, and the events of those that may go on beyond an edge.
    """
    if not events.num_rows:
        return arrow_schema(how.sessions).empty_table(), events
    order, codes, times = in_order(events)
    opens = np.concatenate([[True], (codes[1:] != codes[:-1]) | (np.diff(times) > how.gap_us)])
    first = np.flatnonzero(opens)
    size = np.diff(np.append(first, len(order)))
    start, end = times[first], times[first + size - 1]
    beyond = np.zeros(len(first), bool)
    if low is not None:
        beyond |= start - low <= how.gap_us
    if high is not None:
        beyond |= high - end <= how.gap_us
    spare = events.take(pa.array(order[np.repeat(beyond, size)]))
    if beyond.any():
        order = order[np.repeat(~beyond, size)]
        start, end, size = start[~beyond], end[~beyond], size[~beyond]
    rows = events.take(pa.array(order)).combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(size)]).astype(np.int32)
    heads = rows.select(["user_id", "event_id"]).take(pa.array(offsets[:-1]))
    users, ids = heads["user_id"].to_pylist(), heads["event_id"].to_pylist()
    schema = arrow_schema(how.sessions)
    fields = [rows[name].combine_chunks() for name in how.fields]
    struct = pa.StructArray.from_arrays(fields, fields=list(schema.field("events").type.value_type))
    runaway = np.full(len(size), None, object)
    runaway[size > how.max_session_events] = "events"
    runaway[end - start > how.max_session_us] = "hours"
    started = pa.array(start, pa.int64()).cast(CLOCK)
    sessions = pa.Table.from_arrays(
        [
            pa.array([session_id(*one) for one in zip(users, ids, strict=True)], pa.string()),
            heads["user_id"].combine_chunks(),
            started,
            pa.array(end, pa.int64()).cast(CLOCK),
            started.cast(pa.timestamp("us")).cast(pa.date32()),
            pa.array(size, pa.int32()),
            pa.array(runaway, pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets), struct, type=schema.field("events").type),
        ],
        schema=schema,
    )
    return sessions.take(pc.sort_indices(sessions["start_ts"])), spare


REPORT_DDL = "path string, rows long, spare string, spared long"


def worker(
    how: Cut, folder: str, aside: str
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """What a task does with its slices, as `frame` has them; see `REPORT_DDL`."""
    columns = {name: how.events[name] for name in ("user_id", *how.fields)}

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
