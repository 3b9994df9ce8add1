"""Which columns the file of a rejected line had when the line was read.

A line of a CSV is known by the order of its file's columns, and a file may be delivered again with
another order. Rejects therefore keep theirs (`file_columns`). Those of version 0.1.0 have none: the
ledger's columns are taken where the ledger's reading of the file is the one that rejected the line,
and those of all other lines are not known: they are left as they are rather than guessed at.
"""

from __future__ import annotations

from collections import defaultdict

import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.tables import FILES, RUNS
from jobs.lake.delta import Lake


def _micros(column: pa.ChunkedArray) -> list[int | None]:
    us: list[int | None] = pc.cast(column, pa.int64()).to_pylist()
    return us


class Ledger:
    """What `ops.files` and `ops.runs` say of the readings of files."""

    def __init__(self, lake: Lake) -> None:
        files = lake.small(FILES).select(["file", "columns", "batch", "read_ts"])
        rows = files.to_pylist()
        self.columns: dict[str, dict[str, str]] = {
            row["file"]: dict(row["columns"] or ()) for row in rows
        }
        """Of each file, as it was when last read: its columns with their kinds."""
        read_us = dict(zip(files["file"].to_pylist(), _micros(files["read_ts"]), strict=True))
        runs = lake.small(RUNS).select(["batch", "job", "step", "started_ts"])
        started: defaultdict[str, list[int]] = defaultdict(list)
        for row, began in zip(runs.to_pylist(), _micros(runs["started_ts"]), strict=True):
            if row["job"] in ("ingest", "run") and row["step"] in ("compute", "all") and began:
                started[row["batch"]].append(began)
        self._readings: dict[str, set[int | None]] = {}
        for row in rows:
            # Steps of one run are processes of their own: the one that read began before the one
            # that wrote the ledger.
            until = read_us[row["file"]] or 0
            before = [began for began in started[row["batch"]] if began <= until]
            self._readings[row["file"]] = {until, max(before, default=None)}

    def columns_then(self, file: str, first_seen_us: int | None) -> list[str] | None:
        """A file's columns, in order, when it had a line rejected; None: not known."""
        if first_seen_us is None or first_seen_us not in self._readings.get(file, ()):
            return None
        return list(self.columns[file])
