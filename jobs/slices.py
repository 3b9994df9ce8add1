"""Whole tables by slices of time, in Arrow: first loads of events, and all sessions anew.

Events are brought together by time, once; in a slice, exact duplicates are neighbours.

A session is local in time, and `bronze.events` lies in files by time. So each Spark task takes one
slice of time, sorts its events by user, cuts them where a silence is longer than `gap_s`, and
writes a data file of `silver.sessions`. Only the sessions that come within `gap_s` of a slice's
edge may go on in the next slice: their events are put aside and cut together at the end.

A cut by Spark's own window functions moves and sorts all rows twice: by user to cut them, by time
to lay them out.
"""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from jobs import files
from jobs.arrow import arrow_schema
from jobs.tables import SESSIONS
from jobs.tasks import shared_out

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

CLOCK = pa.timestamp("us", "UTC")
SLICE_EVENTS = 1_000_000
"""Ours: about as many events as a task holds at a time."""

SMALLEST_SLICE = 50_000  # ours: under so many events a second task is not worth its start


def size_of(events: int, cores: int) -> int:
    """About how many of so many events a slice should have."""
    return max(SMALLEST_SLICE, min(SLICE_EVENTS, events // cores + 1))


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


# -- one slice ------------------------------------------------------------------------------------


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
    """As `jobs.cut.session_id`, one at a time."""
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


def without_repeats(events: pa.Table) -> tuple[pa.Table, int]:
    """Sort the lines of one slice of time by time, and keep one of each event: of lines that are
    one event, the first by file and line.

    Args:
        events: `event_id` (equal ids have equal times), `event_ts`, `file`, `line`, and others.

    Returns:
        The events, and how many lines were repeats.
    """
    times = events["event_ts"].combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
    order = np.argsort(times, kind="stable")
    times = times[order]
    same = times[1:] == times[:-1]
    tied = np.zeros(len(order), bool)
    tied[1:] |= same
    tied[:-1] |= same
    at = np.flatnonzero(tied)
    keep = np.ones(len(order), bool)
    if len(at):
        rows = events.select(["event_id", "file", "line"]).take(pa.array(order[at]))
        run = np.cumsum(np.concatenate([[True], ~same]))[at]
        keys = [("run", "ascending"), *((name, "ascending") for name in rows.column_names)]
        places = pc.sort_indices(rows.append_column("run", pa.array(run)), keys)
        order[at] = order[at][places.to_numpy()]
        ids = pc.dictionary_encode(rows["event_id"].take(places).combine_chunks()).indices
        codes = ids.to_numpy(zero_copy_only=False)
        keep[at[1:]] = (codes[1:] != codes[:-1]) | (np.diff(run) > 0)
    return events.take(pa.array(order[keep])), int((~keep).sum())


# -- the slices of a table ------------------------------------------------------------------------


EVENT_BYTES = 1024
"""Ours: an event of more bytes counts as several. Most have a quarter of it."""


def extents(paths: list[str]) -> list[tuple[str, int, int, int]]:
    """Path, first and last time (us) and size of each row group, from the files' footers; row
    groups in which no row has a time are left out. The size is the number of rows, or that of
    `EVENT_BYTES` if those are more: a slice of long texts has fewer rows.

    Of a file without statistics the times are read.
    """

    def of(path: str) -> list[tuple[str, int, int, int]]:
        found = []
        with files.open_seekable(path) as stream:
            file = pq.ParquetFile(stream)
            meta = file.metadata
            place = meta.schema.names.index("event_ts")
            for at in range(meta.num_row_groups):
                group = meta.row_group(at)
                known = group.column(place).statistics
                if known is not None and known.null_count == group.num_rows:
                    continue
                if known is not None and known.has_min_max:
                    ends = (known.min, known.max)
                else:
                    times = file.read_row_group(at, ["event_ts"], use_threads=False)["event_ts"]
                    least = pc.min_max(times.cast(CLOCK)).as_py()
                    ends = (least["min"], least["max"])
                if ends[0] is not None:
                    size = max(group.num_rows, group.total_byte_size // EVENT_BYTES)
                    found.append((path, micros_of(ends[0]), micros_of(ends[1]), size))
        return found

    with ThreadPoolExecutor(8) as pool:
        return [one for many in pool.map(of, paths) for one in many]


def micros_of(moment: Any) -> int:
    return int(pa.scalar(moment, CLOCK).cast(pa.int64()).as_py())


def slices(
    known: list[tuple[str, int, int, int]], size: int
) -> list[tuple[int | None, int | None, list[str]]]:
    """Edges of slices of about `size` events, where row groups begin, with the files of each."""
    edges: list[int] = []
    began, filled = None, 0
    for _, low, _, rows in sorted(known, key=lambda one: one[1]):
        began = low if began is None else began
        if filled >= size and low > began:
            edges.append(low)
            began, filled = low, 0
        filled += rows
    found: list[tuple[int | None, int | None, list[str]]] = []
    for start, stop in itertools.pairwise([None, *edges, None]):
        inside = {
            path
            for path, first, last, _ in known
            if (stop is None or first < stop) and (start is None or last >= start)
        }
        found.append((start, stop, sorted(inside)))
    return found


def parted(
    known: list[tuple[str, int, int, int]], size: int
) -> list[tuple[int | None, int | None, list[str]]] | None:
    """`slices`, where files lie in time so that each reads little more than its own rows; or None."""
    found = slices(known, size)
    at_most = 2 * size
    for low, high, _ in found:
        rows = sum(
            rows
            for _, first, last, rows in known
            if (high is None or first < high) and (low is None or last >= low)
        )
        if rows > at_most:
            return None
    return found


def read(
    paths: list[str],
    columns: dict[str, str],
    low: int | None,
    high: int | None,
    where: ds.Expression | None = None,
) -> pa.Table:
    """The rows of a slice. Row groups beyond its edges are not read.

    Args:
        columns: those that are read, with their types; `event_ts` among them.
        where: what else must hold of a row.
    """
    schema = arrow_schema(columns)
    if not paths:
        return schema.empty_table()
    inside = where
    for bound, compare in ((low, "__ge__"), (high, "__lt__")):
        if bound is not None:
            found = getattr(ds.field("event_ts"), compare)(pa.scalar(bound, pa.int64()).cast(CLOCK))
            inside = found if inside is None else inside & found
    system, _ = files.located(paths[0])
    places = [files.located(path)[1] for path in paths]
    data = ds.dataset(places, schema=schema, format="parquet", filesystem=system)
    return data.to_table(filter=inside, use_threads=False).combine_chunks()


@dataclass(frozen=True)
class AtTimes:
    """A task: of a file of `bronze.events`, the events at some times, in the columns asked for.

    Ids are hashes that no codec shortens: two thirds of the table's bytes. Where they follow from
    other columns, they are better made again for the few events found than read for all.
    """

    times: str
    """A Parquet file: `event_ts`, rising, each once."""
    columns: tuple[str, ...]
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        wanted = micros(files.read_parquet(self.times)["event_ts"])
        found = []
        with files.open_seekable(path) as stream:
            file = pq.ParquetFile(stream)
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number, ["event_ts"], use_threads=False)
                hit = at_times(micros(rows["event_ts"]), wanted)
                if len(hit):
                    rows = file.read_row_group(number, list(self.columns), use_threads=False)
                    found.append(rows.take(pa.array(hit)))
        if not found:
            return []
        out = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        files.write_parquet(out, pa.concat_tables(found))
        return [{"path": out}]


def at_times(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64[N]: the places at which `times` has one that is wanted (rising, each once)."""
    if not len(times):
        return np.zeros(0, np.int64)
    low, high = np.searchsorted(wanted, [times.min(), times.max() + 1])
    near = wanted[low:high]  # few: they stay in the cache
    if not len(near):
        return np.zeros(0, np.int64)
    place = np.minimum(np.searchsorted(near, times), len(near) - 1)
    return np.flatnonzero(near[place] == times)


def micros(times: pa.ChunkedArray) -> np.ndarray:
    """Times in microseconds since 1970."""
    made: np.ndarray = times.cast(CLOCK).cast(pa.int64()).to_numpy()
    return made


def bounds(rows: DataFrame, column: str, parts: int) -> list[int]:
    """Times (us) that part the rows into as many slices of about equal size."""
    from pyspark.sql import functions as F

    shares = [part / parts for part in range(1, parts)]
    found = rows.agg(F.percentile_approx(F.unix_micros(column), shares)).first() if shares else None
    return sorted(set(found[0] or [])) if found is not None else []


def by_time(rows: DataFrame, column: str, edges: list[int]) -> DataFrame:
    """One partition a slice of time, so that file statistics prune.

    `repartitionByRange` would sample its input first, that is, make it twice.
    """
    from pyspark.sql import functions as F

    time = F.unix_micros(column)
    place = sum((F.when(time >= edge, 1).otherwise(0) for edge in edges), F.lit(0))
    return rows.repartitionById(len(edges) + 1, place)


LISTED = "exposed_with_listed"


def without_null_lists(events: DataFrame) -> DataFrame:
    """Null lists as empty ones, told by a column of their own: a null list costs Spark's way to
    Python time in proportion to its place in the batch (LAB_LOG.md)."""
    from pyspark.sql import functions as F

    shown = F.col("exposed_with")
    return events.withColumn(LISTED, shown.isNotNull()).withColumn(
        "exposed_with", F.coalesce(shown, F.array().cast("array<string>"))
    )


def with_null_lists(events: pa.Table) -> pa.Table:
    at = events.column_names.index("exposed_with")
    lists = pc.if_else(events[LISTED], events["exposed_with"], None)
    return events.set_column(at, "exposed_with", lists)


LAID_DDL = "path string, rows long, repeats long"


@dataclass(frozen=True)
class Layer:
    """Writes the lines of one slice of time as one file of `bronze.events`."""

    columns: dict[str, str]
    """Of `bronze.events`, with their types."""
    folder: str
    when: datetime
    """`ingest_ts` of the events."""

    @property
    def lines(self) -> dict[str, str]:
        """The columns of a line that are read."""
        own = {n: kind for n, kind in self.columns.items() if not n.startswith("ingest_")}
        return own | {"file": "string", "line": "bigint", "reason": "string"}

    def lay(self, lines: pa.Table) -> pa.RecordBatch:
        """Writes one file; returns a row of `LAID_DDL`.

        A file's name is made up anew by each attempt, so that two attempts never write the same.
        """
        events, repeats = without_repeats(lines)
        path = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        stamps = pa.array([self.when], CLOCK).take(pa.array(np.zeros(events.num_rows, np.int8)))
        events = events.append_column("ingest_file", events["file"])
        events = events.append_column("ingest_ts", stamps)
        schema = arrow_schema(self.columns)
        files.write_parquet(path, events.select(schema.names).cast(schema))
        return pa.RecordBatch.from_pydict(
            {"path": [path], "rows": [events.num_rows], "repeats": [repeats]}
        )

    def of_lines(self, batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        """For `mapInArrow` over lines of which each partition is a slice."""
        lines = list(batches)
        if lines:
            # (Rows are taken from one chunk many times faster than from many.)
            yield self.lay(with_null_lists(pa.Table.from_batches(lines).combine_chunks()))

    def of_files(self, batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        """For `mapInArrow` over slices, as `frame` has them, of files of lines."""
        usable = (ds.field("line") > 0) & ds.field("reason").is_null()
        for batch in batches:
            for one in batch.to_pylist():
                lines = read(one["paths"], self.lines, one["low"], one["high"], usable)
                if lines.num_rows:
                    yield self.lay(lines)


def frame(spark: SparkSession, parts: list[tuple[int | None, int | None, list[str]]]) -> DataFrame:
    """Slices as work to do: `low`, `high`, `paths`."""
    return shared_out(spark, list(parts), "low long, high long, paths array<string>")


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
                files.write_parquet(f"{folder}/{name}", sessions, SESSIONS.group)
                if spare.num_rows:
                    files.write_parquet(f"{aside}/{name}", spare)
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
