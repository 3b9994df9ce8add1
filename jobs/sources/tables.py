"""Logs that are tables of others: which files they are, and which columns."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.core.source_file import Source
from jobs.lake import filesystem
from jobs.lake.landed import absolute
from jobs.sources import delta, iceberg
from jobs.sources.database_rows import Mark

FILES_OF = {"delta": delta.files_of, "iceberg": iceberg.files_of}
"""By format: the data files of the table in a landing (path, bytes, modified ms)."""


def schema_of(source: Source) -> pa.Schema | None:
    """The columns of the table that the log is; None: it is none. A file that was written before a column was
    added lacks it, and its rows have null there."""
    landing = source.source.landing
    if source.source.format == "delta":
        return delta.schema_of(landing)
    if source.source.format == "iceberg":
        return iceberg.schema_of(landing)
    if source.source.format == "jdbc":
        return _of_newest_rows(landing)
    return None


def _of_newest_rows(landing: str) -> pa.Schema | None:
    """The columns of a database's table when it was read last."""
    files = [one for one in filesystem.glob(absolute(landing)) if Mark.of(one[0]) is not None]
    if not files:
        return None
    newest = max(files, key=lambda one: (one[2], one[0]))[0]
    with filesystem.open_seekable(newest) as stream:
        return pq.read_schema(stream)
