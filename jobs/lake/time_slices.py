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

import itertools
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs.core.arrow_types import arrow_schema
from jobs.lake import filesystem
from jobs.lake.tasks import shared_out

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

CLOCK = pa.timestamp("us", "UTC")
Spans = list[tuple[int, int]]
"""First and last times (us)."""


# -- one slice ------------------------------------------------------------------------------------


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
        with filesystem.data_file(path) as file:
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
    coded: Collection[str] = (),
) -> pa.Table:
    """The rows of a slice. Row groups beyond its edges are not read.

    Args:
        columns: those that are read, with their types; `event_ts` among them.
        where: what else must hold of a row.
        coded: texts of few values, which are read as dictionaries.
    """
    schema = arrow_schema(columns)
    for name in coded:
        at = schema.get_field_index(name)
        schema = schema.set(at, pa.field(name, pa.dictionary(pa.int32(), schema.types[at])))
    if not paths:
        return schema.empty_table()
    inside = where
    for bound, compare in ((low, "__ge__"), (high, "__lt__")):
        if bound is not None:
            found = getattr(ds.field("event_ts"), compare)(pa.scalar(bound, pa.int64()).cast(CLOCK))
            inside = found if inside is None else inside & found
    system, _ = filesystem.located(paths[0])
    places = [filesystem.located(path)[1] for path in paths]
    how = ds.ParquetFileFormat(read_options=ds.ParquetReadOptions(dictionary_columns=set(coded)))
    data = ds.dataset(places, schema=schema, format=how, filesystem=system)
    return data.to_table(filter=inside, use_threads=False).combine_chunks()


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


def spans(times: pa.ChunkedArray, most: int = 64) -> Spans:
    """Spans of time that hold all of some times (nulls left out), cut at the longest silences: what
    a MERGE has to look through. At most `most`, 64 for no better reason than that a condition
    should stay short. They are a millisecond wider, because logs may keep milliseconds.
    """
    known = np.unique(micros(times.drop_null()))
    longest = np.argsort(np.diff(known))[::-1][: most - 1]
    parts = np.split(known, np.sort(longest) + 1) if len(known) else []
    return [(int(part[0]) - 1000, int(part[-1]) + 1000) for part in parts]


def frame(spark: SparkSession, parts: list[tuple[int | None, int | None, list[str]]]) -> DataFrame:
    """Slices as work to do: `low`, `high`, `paths`."""
    return shared_out(spark, list(parts), "low long, high long, paths array<string>")
