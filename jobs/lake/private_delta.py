"""Commits that name data files: all that relies on Delta's protocol itself.

Data files and their statistics are our own Parquet; `add_files` makes them part of a table by
delta-rs's `create_write_transaction`. Nobody promises that such files are right but the protocol
(PROTOCOL.md of delta-io/delta), of which this relies on (`tests/jobs/lake/test_private_delta.py`
asserts each):

 * Data files. They may lie in any folder below the table whose name does not begin with `_` or `.`;
   a file that no commit names is no part of the table. Their columns have the Parquet types of the
   table's schema (`arrow_schema`: int32 for int, microseconds UTC for timestamp, date32 for date).
 * Statistics. `stats` of an add: `numRecords`; `nullCount`, `minValues` and `maxValues` of a column.
   A column that is left out may have anything. Bounds are bounds, no value need be equal to one.
 * Transaction identifiers. `txn` of an application: the newest version is the one in force.

Rows are replaced by their key by delta-rs's MERGE (`Lake.upsert`), a public interface.
"""

from __future__ import annotations

import json
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from jobs.lake import filesystem

if TYPE_CHECKING:
    from deltalake import CommitProperties, DeltaTable

LONGEST_STATISTIC = 64
"""Characters; bounds of longer texts prune nothing worth their bytes in the log."""

Entry = dict[str, Any]
"""A staged data file: `path` (below the table), `size`, `modified_ms`, `rows`, `stats`."""


def add_files(
    table: DeltaTable, entries: list[Entry], by: CommitProperties, overwrite: bool
) -> None:
    """Make staged files part of a table in one commit; or put them in place of all there are."""
    from deltalake.transaction import AddAction  # (tasks do without)

    actions = [
        AddAction(one["path"], one["size"], {}, one["modified_ms"], True, one["stats"])
        for one in entries
    ]
    table.create_write_transaction(
        actions,
        "overwrite" if overwrite else "append",
        table.schema(),
        commit_properties=by,
    )


# -- statistics -----------------------------------------------------------------------------------


def statistics(path: str) -> dict[str, Any]:
    """`rows` of a Parquet file, and Delta's statistics of it as JSON, from its footer.

    Of each flat column: `nullCount`, and bounds that no value is beyond. What the footer does not
    know is left out, which means that the file may contain anything: parquet-java, for one, keeps
    neither bounds nor the number of nulls of texts whose bounds take more than 4,096 bytes.
    """
    with filesystem.open_seekable(path) as stream:
        meta = pq.ParquetFile(stream).metadata
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    groups = [group for group in groups if group.num_rows]
    stats: dict[str, Any] = {
        "numRecords": meta.num_rows,
        "minValues": {},
        "maxValues": {},
        "nullCount": {},
    }
    for place in range(meta.num_columns):
        leaf = meta.schema.column(place)
        if leaf.max_repetition_level or "." in leaf.path:
            continue  # lists, maps and structs: a leaf's nulls are not the column's
        chunks = [group.column(place) for group in groups]
        nulls = _nulls(chunks)
        if nulls is None:
            # (delta-rs takes bounds without a number of nulls to mean that there are none.)
            continue
        stats["nullCount"][leaf.path] = nulls
        bounds = _bounds(chunks)
        if bounds is not None:
            stats["minValues"][leaf.path], stats["maxValues"][leaf.path] = bounds
    return {"rows": meta.num_rows, "stats": json.dumps(stats)}


def _nulls(chunks: list[Any]) -> int | None:
    """The nulls of a flat column; None: not known."""
    found = [one.statistics for one in chunks]
    if any(one is None or not one.has_null_count for one in found):
        return None
    return sum(int(one.null_count) for one in found)


def _bounds(chunks: list[Any]) -> tuple[Any, Any] | None:
    """The lowest and the highest value of a flat column, as Delta writes them; None: not known, or
    there is no value."""
    ends: list[Any] = []
    for chunk in chunks:
        found = chunk.statistics
        if found.null_count == chunk.num_values:
            continue
        if not found.has_min_max:
            return None
        try:
            ends += [found.min, found.max]
        except (ValueError, OverflowError):  # a time beyond Python's, a text that is cut in a sign
            return None
    # (Floats have no bounds: what is not a number is beyond all of them.)
    if not ends or isinstance(ends[0], bool) or not isinstance(ends[0], BOUNDED):
        return None
    low, high = min(ends), max(ends)
    if isinstance(low, str) and max(len(low), len(high)) > LONGEST_STATISTIC:
        return None
    return _statistic(low), _statistic(high)


BOUNDED = (str, datetime, date, int)


def _statistic(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    return value.isoformat() if isinstance(value, date) else value
