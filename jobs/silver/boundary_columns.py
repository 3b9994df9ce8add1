"""What `sessions.boundary` says of sessions, as columns that the suite reads in Spark.

The expression has no rendering in Spark SQL. Where the suite has to name what is wrong, DuckDB
evaluates it in Spark's Python workers, of the sessions as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from expectations.session_rule import SessionRule
from jobs.audit.arrow_columns import continues
from jobs.core.source_file import Source
from jobs.core.tables import SESSIONS
from jobs.records.boundary import VALUES, Boundary, boundary_of
from jobs.silver.cut_nightly import values_of

ADDED = "boundary_inside boolean, boundary_before boolean"
"""Whether the boundary parts two events inside the session; and the session from the user's one
before it."""


def with_boundaries(sessions: DataFrame, source: Source) -> DataFrame:
    """Sessions with the columns `ADDED`, where the source has a boundary."""
    return told(sessions, source.sessions.session_rule, boundary_of(source))


def told(sessions: DataFrame, rule: SessionRule, boundary: Boundary | None) -> DataFrame:
    """As `with_boundaries`."""
    if boundary is None:
        return sessions
    names = list(SESSIONS.columns)
    by_user = Window.partitionBy("user_id").orderBy(F.expr(rule.sql.order_key("get(events, 0)")))
    before = {
        f"_{name}": F.lag(F.try_element_at(name, F.lit(-1))).over(by_user)
        for name in ("events", VALUES)
    }
    found = sessions.select(*names).withColumns(before)

    def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = pa.Table.from_batches([batch])
            for name, column in added(rows, boundary).items():
                rows = rows.append_column(name, column)
            rows = rows.drop_columns([f"_{name}" for name in ("events", VALUES)])
            yield from rows.combine_chunks().to_batches()

    return found.mapInArrow(work, f"{SESSIONS.ddl}, {ADDED}")


def added(rows: pa.Table, boundary: Boundary) -> dict[str, pa.Array]:
    """The columns `ADDED`.

    Args:
        rows: sessions; `_events`, `_boundary_values`: of the last event of the one before.
    """
    lists = rows["events"].combine_chunks()
    count = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    events = {name: pc.list_flatten(lists).field(name) for name in boundary.ours}
    last = {name: rows["_events"].combine_chunks().field(name) for name in boundary.ours}
    if boundary.log:
        events[VALUES] = values_of(rows[VALUES], count)
        last[VALUES] = rows[f"_{VALUES}"].combine_chunks()
    owner = np.repeat(np.arange(len(count)), count)
    inside = np.zeros(len(count), bool)
    at = np.flatnonzero(continues(count)) if len(owner) else np.zeros(0, np.int64)
    pairs = ({n: one.take(pa.array(to)) for n, one in events.items()} for to in (at, at + 1))
    inside[owner[at][boundary.opens(*pairs)]] = True
    first = pa.array(np.cumsum(count) - count, mask=count == 0)
    opens = boundary.opens(last, {name: one.take(first) for name, one in events.items()})
    return {"boundary_inside": pa.array(inside), "boundary_before": pa.array(opens)}
