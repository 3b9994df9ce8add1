"""Whether the rows of a table are those of an earlier version, in our columns, whoever wrote since.

Data files never change. So only the files that one of the two versions has and the other has not are
compared: in this process, or by Spark where they are many bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pyspark.sql import functions as F

from jobs.core.arrow_types import arrow_schema
from jobs.core.plan import Thresholds
from jobs.core.tables import Table
from jobs.lake import features, filesystem
from jobs.lake.data_files import DataFile
from jobs.lake.delta import Lake
from jobs.lake.filesystem import rust_uri

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

UNREADABLE = (DeltaError, OSError, pa.ArrowException, KeyError, ValueError)
"""What reading a version raises whose log or files are gone."""


def rows_at(lake: Lake, table: Table, version: int) -> pa.Table | None:
    """The rows of a version in our columns, in the order of the key; None: it cannot be read any
    more."""
    try:
        return _in_order(table, lake.table_of(table, version, list(table.columns)))
    except UNREADABLE:
        return None


def _in_order(table: Table, rows: pa.Table) -> pa.Table:
    rows = rows.cast(arrow_schema(table.columns))
    return rows.sort_by([(name, "ascending") for name in table.key]).combine_chunks()


def same_rows(lake: Lake, table: Table, good: int, newest: int) -> bool:
    """Whether two versions of a table have the same rows in our columns; not known counts as no."""
    asked = (table.full_name, good, newest)
    if asked not in lake.compared:
        lake.compared[asked] = _same_rows(lake, table, good, newest)
    return lake.compared[asked]


def _same_rows(lake: Lake, table: Table, good: int, newest: int) -> bool:
    try:
        then, now = (_Version(lake, table, version) for version in (good, newest))
        then.files, now.files = then.beside(now), now.beside(then)
        if then.rows != now.rows:
            return False
        if max(then.bytes, now.bytes) <= Thresholds.compared_bytes:
            return bool(then.in_this_process().equals(now.in_this_process()))
    except UNREADABLE:
        return False
    return _same_in_spark(then.in_spark(), now.in_spark())


class _Version:
    """A version of a table, or some files of it.

    Raises:
        DeltaError, ValueError: its log is gone, or it has rows that deletion vectors delete.
    """

    def __init__(self, lake: Lake, table: Table, version: int) -> None:
        self.lake, self.table = lake, table
        self.found = DeltaTable(rust_uri(lake.path(table)), version=version)
        if features.has_vectors(self.found):
            raise ValueError("deletion vectors")
        self.files = {one.told["path"]: one for one in lake.files_of(table, version)}

    def beside(self, other: _Version) -> dict[str, DataFile]:
        """The files that the other version does not have."""
        return {path: one for path, one in self.files.items() if path not in other.files}

    @property
    def rows(self) -> int:
        return sum(one.rows for one in self.files.values())

    @property
    def bytes(self) -> int:
        return sum(int(one.told["size_bytes"]) for one in self.files.values())

    def in_this_process(self) -> pa.Table:
        data = filesystem.rows_of(self.found)
        names = {filesystem.data_name(told) for told in self.files}
        parts = [one for one in data.get_fragments() if one.path in names]
        if len(parts) != len(self.files):
            raise KeyError(f"{self.found.table_uri}: other names of files")
        part = ds.FileSystemDataset(parts, data.schema, data.format, data.filesystem)
        return _in_order(self.table, part.to_table(columns=list(self.table.columns)))

    def in_spark(self) -> DataFrame:
        paths = [one.path for one in self.files.values()]
        return self.lake.spark.read.schema(self.table.ddl).parquet(*paths)


def _same_in_spark(then: DataFrame, now: DataFrame) -> bool:
    """Whether two frames of as many rows have the same ones. (Spark compares no maps.)"""
    maps = [name for name, kind in then.dtypes if kind.startswith("map")]
    entries = {name: F.array_sort(F.map_entries(name)) for name in maps}
    return then.withColumns(entries).exceptAll(now.withColumns(entries)).isEmpty()
