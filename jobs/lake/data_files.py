"""Data files of a table, as its log has them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow.parquet as pq

from jobs.lake import filesystem


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
