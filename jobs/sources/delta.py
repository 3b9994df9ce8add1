"""A log that is a Delta table of others: the data files of its newest version.

The ledger knows which of them were read, so a run reads the rows that were added since the last one.
A data file never changes. What others do to the table becomes this:

 * rows that were added are new lines;
 * UPDATE, MERGE and DELETE write files anew: the rows in them that are as before are duplicates,
   changed ones are new events beside the old ones, and rows that were deleted stay here;
 * OPTIMIZE has all rows read once more, as duplicates.
"""

from __future__ import annotations

import os

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from jobs.core.errors import SourceError
from jobs.core.landing_globs import DAY_FIELD
from jobs.lake.filesystem import MAGIC, data_path, rust_uri
from jobs.lake.landed import absolute


def files_of(landing: str) -> list[tuple[str, int, int]]:
    """The data files of the table: (path, bytes, modified ms), sorted.

    Raises:
        SourceError: `landing` is not a Delta table, or one whose files are not its rows.
    """
    table, folder = _opened(landing), absolute(landing).rstrip("/")
    features = {*(table.protocol().reader_features or ())}
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise SourceError(
            f"source.landing = {landing!r} has column mapping, so its files have other names for its "
            "columns: have the table written without it (delta.columnMapping.mode = none)"
        )
    if "deletionVectors" in features and pa.table(table.deletion_vectors()).num_rows:
        raise SourceError(
            f"source.landing = {landing!r} has deletion vectors: deleted rows are still in its files. "
            f"Have them removed: REORG TABLE delta.`{folder}` APPLY (PURGE)"
        )
    adds = pa.table(table.get_add_actions()).to_pylist()
    return sorted(
        (data_path(folder, one["path"]), int(one["size_bytes"]), _ms(one["modification_time"]))
        for one in adds
    )


def schema_of(landing: str) -> pa.Schema:
    """The table's columns that are in its files: those that it is parted by are in their paths."""
    table = _opened(landing)
    parted = set(table.metadata().partition_columns)
    return pa.schema(
        [one for one in pa.schema(table.schema().to_arrow()) if one.name not in parted]
    )


def _opened(landing: str) -> DeltaTable:
    folder = absolute(landing).rstrip("/")
    if MAGIC.search(landing) or DAY_FIELD.search(landing):
        raise SourceError(
            f"source.landing = {landing!r}: with format = 'delta' it is the folder of a table, without "
            "a pattern"
        )
    if not DeltaTable.is_deltatable(rust_uri(folder)):
        raise SourceError(
            f"source.landing = {landing!r} is not a Delta table (from {os.getcwd()}): name the folder "
            "that has _delta_log, or set source.format to how the files are written"
        )
    try:
        return DeltaTable(rust_uri(folder))
    except DeltaError as error:
        first = str(error).splitlines()[0][:300]
        raise SourceError(f"source.landing = {landing!r} cannot be opened: {first}") from error


def _ms(moment: object) -> int:
    """delta-rs gives times, older versions of it numbers."""
    stamp = getattr(moment, "timestamp", None)
    return round(stamp() * 1000) if stamp else int(moment)  # type: ignore[call-overload,no-any-return]
