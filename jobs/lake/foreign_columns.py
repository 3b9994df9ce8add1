"""Columns that others added to a table: rows that are written anew keep what others wrote in them.

MERGE sets our columns and leaves the others (`Lake.upsert`). Where all rows are put in place of the
old ones, a row takes the others' columns from the old row of its key; a row of a new key has nulls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.tables import Table
from jobs.lake import features, filesystem
from jobs.lake.context import Context
from jobs.lake.data_files import staging
from jobs.lake.manifest import Staged

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def names_of(context: Context, table: Table) -> list[str]:
    """The columns of a table that are not ours, without those that are computed from others."""
    found = context.lake.open(table)
    fields = [] if found is None else found.schema().fields
    return [
        one.name
        for one in fields
        if one.name not in table.columns and features.GENERATED not in one.metadata
    ]


def replace_rows(
    context: Context, table: Table, staged: Staged, base: int, app_id: str, version: int
) -> None:
    """Put staged files in place of all rows, in one commit, with the columns of others.

    Args:
        base: the table's version that the files were computed from.
        app_id, version: the progress that the commit carries.

    Raises:
        Conflict: another run changed the table since `base`.
    """
    lake = context.lake
    if (names := names_of(context, table)) and lake.rows(table):
        lake.unchanged(table, base)
        rows = sum(one["rows"] for one in staged)
        few = context.thresholds.in_one_process(max(rows, lake.rows(table)), lake.bytes(table))
        beside = _in_this_process if few else _in_spark
        staged = beside(context, table, staged, base, names)
    lake.commit(table, staged, base, app_id, version, context.run_id, overwrite=True)


def kept(context: Context, table: Table, rows: DataFrame, base: int) -> DataFrame:
    """Rows with the columns of others, for Spark to write."""
    if not (names := names_of(context, table)):
        return rows
    old = context.lake.read(table, base).select(*table.key, *names).dropDuplicates(list(table.key))
    return rows.join(old, list(table.key), "left").select(*table.columns, *names)


def _in_spark(
    context: Context, table: Table, staged: Staged, base: int, names: list[str]
) -> Staged:
    lake = context.lake
    context.enter(context.thresholds.whole_tables())
    rows = kept(context, table, lake.staged(table, staged), base)
    order = table.order or table.key
    parts = max(1, len(staged))
    rows = rows.repartitionByRange(parts, *order).sortWithinPartitions(*order)
    return lake.stage(table, rows, context.run_id, names)


def _in_this_process(
    context: Context, table: Table, staged: Staged, base: int, names: list[str]
) -> Staged:
    lake, root = context.lake, context.lake.path(table)
    old = filesystem.usual(lake.table_of(table, base, [*table.key, *names])).combine_chunks()
    if all(old[name].null_count == old.num_rows for name in names):
        return staged
    known, folder = _keys(table, old), staging(context.run_id)
    for number, one in enumerate(staged):
        rows = filesystem.read_parquet(f"{root}/{one['path']}")
        place = pc.index_in(_keys(table, rows), value_set=known)
        for name in names:
            rows = rows.append_column(name, old[name].combine_chunks().take(place))
        filesystem.write_parquet(f"{root}/{folder}/part-{number:05d}.parquet", rows, table.group)
    return lake.entries(table, folder)


def _keys(table: Table, rows: pa.Table) -> pa.Array:
    """Each row's key as one text."""
    columns = [rows[name].combine_chunks().cast(pa.string()) for name in table.key]
    if len(columns) == 1:
        return columns[0]
    lengths = [pc.utf8_length(one).cast(pa.string()) for one in columns]
    return pc.binary_join_element_wise(*lengths, *columns, "/")
