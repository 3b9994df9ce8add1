"""Data files of a table: what the log tells of them, and what a commit must tell."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import pyarrow.parquet as pq

from jobs import files

LONGEST_STATISTIC = 64
"""Characters; bounds of longer texts prune nothing worth their bytes in the log."""


@dataclass(frozen=True)
class DataFile:
    """A data file of a table, as the table's log has it."""

    path: str
    told: dict[str, Any]

    @property
    def rows(self) -> int:
        return int(self.told.get("num_records") or 0)

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
    """`rows` of a Parquet file, and Delta's statistics of it as JSON, from its footer."""
    with files.open_seekable(path) as stream:
        meta = pq.ParquetFile(stream).metadata
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    unknown = set()
    for group in range(meta.num_row_groups):
        for place in range(meta.num_columns):
            column = meta.row_group(group).column(place)
            name, found = column.path_in_schema, column.statistics
            if found is None or not found.has_min_max:
                if found is None or found.null_count < column.num_values:
                    unknown.add(name)
                continue
            if isinstance(found.max, (str, datetime, date, int)):
                low[name] = min(low.get(name, found.min), found.min)
                high[name] = max(high.get(name, found.max), found.max)
    known = [
        name for name in low
        if name not in unknown and "." not in name and len(str(high[name])) <= LONGEST_STATISTIC
    ]  # fmt: skip
    stats = {
        "numRecords": meta.num_rows,
        "minValues": {name: _statistic(low[name]) for name in known},
        "maxValues": {name: _statistic(high[name]) for name in known},
    }
    return {"rows": meta.num_rows, "stats": json.dumps(stats)}


def _statistic(value: Any) -> Any:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%S.%f}Z" if value.year >= 1000 else None
    return value.isoformat() if isinstance(value, date) else value
