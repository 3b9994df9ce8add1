"""`tie_break = { order = "file" }`: events of one user and time in the order of file name and line.

`tie_break` is the line of the event's smallest delivery (by file name and line), plus the rank of
its file among the files of the events with that user and time, times 2^40: nearly always that rank
is 0. So the order is a function of the accepted lines, whatever their arrival, and what a stored
event's delivery was can be read back from `ingest_file` and `tie_break`. It is no part of an event's
id: a line that comes again in another file is the same event.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.core.arrays import run_starts
from jobs.core.tables import EVENTS
from jobs.lake.context import Context

LINE_BITS = 40
LAST_LINE = (1 << LINE_BITS) - 1
GROUP = ("user_id", "event_ts")


def line_of(tie_break: Column) -> Column:
    return tie_break.bitwiseAND(F.lit(LAST_LINE))


def placed(events: pa.Table) -> pa.Table:
    """Events with `tie_break`.

    Args:
        events: `user_id`, `event_ts`, `file`, `line` of their smallest deliveries, and others; all
            events of each user and time; in order of time.
    """
    line = events["line"].to_numpy()
    files = pc.unique(events["file"])
    rank = np.zeros(events.num_rows, np.int64)
    if len(files) > 1:
        times = events["event_ts"].combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
        names = pc.index_in(events["file"], files.take(pc.sort_indices(files))).to_numpy()
        users = pc.dictionary_encode(events["user_id"].combine_chunks()).indices.to_numpy()
        order = np.lexsort((names, users, times))
        group = run_starts(times[order], users[order])
        file = np.cumsum(group | run_starts(names[order]))
        rank[order] = file - file[group][np.cumsum(group) - 1]
    at = events.column_names.index("tie_break")
    return events.set_column(at, "tie_break", pa.array((rank << LINE_BITS) + line))


def regrouped(
    context: Context, events: DataFrame, base: int, gone: DataFrame | None = None
) -> DataFrame:
    """Events with `tie_break`, and the stored ones whose `tie_break` changes by them (`replaces`).

    Args:
        events: `EVENTS.columns`, `replaces`, `stored_ts`, and `line` of the smallest delivery: those
            that are new, or take the place of a stored one.
        base: the version of `bronze.events` that they were judged against.
        gone: `EVENTS.columns` of stored events that go.
    """
    key, native = list(GROUP), context.source.columns.event_id is not None
    events = events.withColumn("known", F.lit(None).cast("bigint"))
    if context.lake.rows(EVENTS):
        stored = context.lake.read(EVENTS, base).select(*EVENTS.columns)
        groups = events.select(*key)
        if gone is not None:
            groups = groups.unionByName(gone.select(*key))
        if native:  # an id may have left the user and time that it had
            old = stored.join(events.where("replaces").select("event_id"), "event_id", "left_semi")
            groups = groups.unionByName(old.select(*key))
        else:
            span = groups.agg(F.min("event_ts"), F.max("event_ts")).first()
            assert span is not None
            stored = stored.where(F.col("event_ts").between(*map(F.lit, span)))
        if gone is not None:
            stored = stored.join(gone.select("event_id"), "event_id", "left_anti")
        near = stored.where("tie_break IS NOT NULL").join(groups.distinct(), key, "left_semi")
        near = near.join(events.select("event_id"), "event_id", "left_anti")
        near = near.withColumns(
            {
                "replaces": F.lit(True),
                "stored_ts": F.col("event_ts"),
                "line": line_of(F.col("tie_break")),
                "known": F.col("tie_break"),
            }
        )
        events = events.unionByName(near)
    rank = F.dense_rank().over(Window.partitionBy(*key).orderBy("ingest_file")) - 1
    tie = F.shiftleft(rank.cast("bigint"), LINE_BITS) + F.col("line")
    events = events.withColumn("tie_break", tie)
    return events.where("known IS NULL OR known <> tie_break").drop("known", "line")
