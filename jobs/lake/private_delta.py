"""Commits that Delta's public interfaces do not make: all that relies on the protocol itself.

delta-rs puts files in, or takes all out; what takes some out and puts others in is committed here by
Delta's own `OptimisticTransaction`, called in the JVM. Data files, their statistics and the change
feed's files are our own Parquet. Nobody promises any of it but the protocol (PROTOCOL.md of
delta-io/delta), of which this relies on (`tests/jobs/lake/test_private_delta.py` asserts each):

 * Data files. They may lie in any folder below the table whose name does not begin with `_` or `.`;
   a file that no commit names is no part of the table. Their columns have the Parquet types of the
   table's schema (`arrow_schema`: int32 for int, microseconds UTC for timestamp, date32 for date).
 * Add, remove. A commit is one set of actions, in force together or not at all. `remove` names a
   file by the path that its `add` had; the file stays readable at older versions.
 * Statistics. `stats` of an add: `numRecords`; `nullCount`, `minValues` and `maxValues` of a column.
   A column that is left out may have anything. Bounds are bounds, no value need be equal to one.
 * Change data files. They lie in `_change_data`; their rows are the table's columns and
   `_change_type` (insert, update_preimage, update_postimage, delete). A reader of the feed takes a
   commit's change files where there are any, instead of what its adds and removes say.
   A `cdc` action has `dataChange` false, and its files are no part of the table.
 * Transaction identifiers. `txn` of an application: the newest version is the one in force.
 * Commits are numbered without holes, and no number is given twice: of two writers that read the
   same version one commits, and the other is told.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.core.arrow_types import arrow_schema
from jobs.lake import filesystem
from jobs.lake.change_feed import AFTER, BEFORE, TYPE
from jobs.lake.data_files import DataFile

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from pyspark.sql import SparkSession

CHANGE_FEED = "_change_data"
LONGEST_STATISTIC = 64
"""Characters; bounds of longer texts prune nothing worth their bytes in the log."""

Entry = dict[str, Any]
"""A staged data file: `path` (below the table), `size`, `modified_ms`, `rows`, `stats`."""


# -- commits --------------------------------------------------------------------------------------


def add_files(
    table: DeltaTable, entries: list[Entry], app_id: str, version: int, run_id: str, overwrite: bool
) -> None:
    """Make staged files part of a table in one commit; or put them in place of all there are."""
    from deltalake import CommitProperties, Transaction  # (tasks do without)
    from deltalake.transaction import AddAction

    actions = [
        AddAction(one["path"], one["size"], {}, one["modified_ms"], True, one["stats"])
        for one in entries
    ]
    table.create_write_transaction(
        actions, "overwrite" if overwrite else "append", table.schema(),
        commit_properties=CommitProperties(
            custom_metadata={"userMetadata": run_id},
            app_transactions=[Transaction(app_id, version)],
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Swap:
    """Data files to take out and staged ones to put in, with the change feed's files."""

    path: str
    """The table's folder or URI."""
    app_id: str
    version: int
    old: list[DataFile] = field(default_factory=list)
    new: list[Entry] = field(default_factory=list)
    feed: list[str] = field(default_factory=list)

    def actions(self) -> list[dict[str, Any]]:
        """The commit, action by action."""
        now = int(time.time() * 1000)
        actions: list[dict[str, Any]] = [{"txn": {"appId": self.app_id, "version": self.version}}]
        for gone in self.old:
            actions.append({"remove": {
                "path": gone.told["path"], "deletionTimestamp": now, "dataChange": True,
                "extendedFileMetadata": True, "partitionValues": {},
                "size": gone.told["size_bytes"],
            }})  # fmt: skip
        for one in self.new:
            actions.append({"add": {
                "path": one["path"], "partitionValues": {}, "size": one["size"],
                "modificationTime": one["modified_ms"], "dataChange": True, "stats": one["stats"],
            }})  # fmt: skip
        for path in self.feed:
            below = path.removeprefix(f"{self.path}/")
            cdc = {"path": below, "partitionValues": {}, "size": filesystem.size(path)}
            actions.append({"cdc": cdc | {"dataChange": False}})
        return actions

    def commit(self, spark: SparkSession, seen: int) -> bool:
        """One commit, on version `seen`; False: the table has a newer one, nothing was done.

        Delta's own conflict errors are raised where another writer is faster from here on.
        """
        jvm: Any = spark._jvm
        delta = jvm.org.apache.spark.sql.delta
        listed = jvm.java.util.ArrayList()
        for action in self.actions():
            listed.add(delta.actions.Action.fromJson(json.dumps(action)))
        converters = jvm.scala.jdk.javaapi.CollectionConverters
        operation = getattr(getattr(delta, "DeltaOperations$ManualUpdate$"), "MODULE$")
        session: Any = spark._jsparkSession
        transaction = delta.DeltaLog.forTable(session, self.path).startTransaction()
        if transaction.readVersion() != seen:
            return False
        transaction.commit(converters.asScala(listed).toSeq(), operation)
        return True


# -- rows replaced by their key -------------------------------------------------------------------
#
# What Delta's MERGE does, without its join, its two passes over whole rows and its planning: the
# keys are known, so each task looks at the key column of one file and leaves it alone if there is
# none of them. New rows come in files of their own.

DDL = "old string, new string, feed string"


def _with_type(rows: pa.Table, change: pa.ChunkedArray, words: dict[str, str]) -> pa.Table:
    kinds = pa.array(list(words), pa.string())
    said = pa.array(list(words.values()), pa.string()).take(pc.index_in(change, kinds))
    return rows.append_column(TYPE, said)


@dataclass(frozen=True)
class Rewrite:
    """A task: a data file, without the rows of the keys; nothing, if it has none of them."""

    columns: dict[str, str]
    key: str
    keys: str
    """A Parquet file: the key, and its `change` (changed, retired)."""
    folder: str
    """Of the new files."""
    feed: str | None
    """Of the change feed's files; None: the table has none."""
    group: int | None
    """Rows of a row group; None: the writer's."""

    def __call__(self, path: str) -> list[dict[str, Any]]:
        keys = filesystem.read_parquet(self.keys)
        place = pc.index_in(filesystem.read_parquet(path, [self.key])[self.key], keys[self.key])
        if place.null_count == len(place):
            return []
        schema = arrow_schema(self.columns)
        rows = filesystem.read_parquet(path, schema.names).cast(schema)
        hit = pc.is_valid(place)
        kept = rows.filter(pc.invert(hit))
        new, told = None, None
        if kept.num_rows:
            new = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
            filesystem.write_parquet(new, kept, self.group)
        if self.feed is not None:
            told = f"{self.feed}/cdc-{uuid.uuid4().hex}.parquet"
            change = keys["change"].take(place.drop_null())
            filesystem.write_parquet(told, _with_type(rows.filter(hit), change, BEFORE))
        return [{"old": path, "new": new, "feed": told}]


@dataclass(frozen=True)
class Put:
    """A task: a file of a candidate, with a column `change`, as a data file of the table."""

    columns: dict[str, str]
    folder: str
    feed: str | None

    def __call__(self, path: str) -> list[dict[str, Any]]:
        schema = arrow_schema(self.columns)
        rows = filesystem.read_parquet(path, [*schema.names, "change"])
        rows = rows.filter(pc.is_in(rows["change"], pa.array(list(AFTER))))
        if not rows.num_rows:
            return []
        new = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        put, told = rows.select(schema.names).cast(schema), None
        filesystem.write_parquet(new, put)
        if self.feed is not None:
            told = f"{self.feed}/cdc-{uuid.uuid4().hex}.parquet"
            filesystem.write_parquet(told, _with_type(put, rows["change"], AFTER))
        return [{"old": None, "new": new, "feed": told}]


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
        "numRecords": meta.num_rows, "minValues": {}, "maxValues": {}, "nullCount": {}
    }  # fmt: skip
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
