"""Data files of a table: what the log tells of them, and what a commit must tell."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from typing import Any

import pyarrow.parquet as pq

from jobs.lake import filesystem

LONGEST_STATISTIC = 64
"""Characters; bounds of longer texts prune nothing worth their bytes in the log."""


@dataclass(frozen=True)
class DataFile:
    """A data file of a table, as the table's log has it."""

    path: str
    told: dict[str, Any]

    @property
    def rows(self) -> int:
        """From the log; from the file's footer where the log does not know."""
        told = self.told.get("num_records")
        return int(self._footer_rows if told is None else told)

    @cached_property
    def _footer_rows(self) -> int:
        with filesystem.open_seekable(self.path) as stream:
            return int(pq.ParquetFile(stream).metadata.num_rows)

    def first_us(self, column: str) -> int:
        """The lowest time (us) of a column; the beginning of time where the log does not know."""
        lowest = self.told.get(f"min.{column}")
        return -(2**63) if lowest is None else int(lowest.timestamp() * 1000) * 1000 - 1000

    def last_us(self, column: str) -> int:
        """The highest time (us) of a column; the end of time where the log does not know."""
        highest = self.told.get(f"max.{column}")
        if highest is None:
            return 2**63 - 1
        # (The log keeps milliseconds.)
        return int(highest.timestamp() * 1000 + 1) * 1000


def staging(run_id: str) -> str:
    """A new folder for staged files, below their table."""
    return f"staged-{run_id}-{uuid.uuid4().hex[:8]}"


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
    # (Floats have no bounds: what is no number is beyond all of them.)
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
