"""What the jobs need of Delta and of the file system: versions, progress, feeds, commits, texts.

Progress is recorded in the tables' own commits and nowhere else: a derived table's commit carries
`txnAppId = <source>/<target><-<input>` and `txnVersion` = the input version that it consumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute
from deltalake import DeltaTable, Schema, write_deltalake
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.errors import Conflict, SessionmillError
from jobs.tables import Table

PROPERTIES = {
    # delta-rs cannot read tables with deletion vectors, and copy-on-write was no slower here.
    "delta.enableDeletionVectors": "false",
    # Blind appends of two runs must conflict, not interleave.
    "delta.isolationLevel": "Serializable",
}


class Lake:
    """The tables of one source, for one Spark session.

    Args:
        root: folder or URI of the lake.
        source: the source's name, its folder in the lake.
    """

    def __init__(self, spark: SparkSession, root: str, source: str) -> None:
        self.spark, self.root, self.source = spark, root.rstrip("/"), source

    # -- places -----------------------------------------------------------------------------

    def path(self, table: Table) -> str:
        return table.path(self.root, self.source)

    def folder(self, *parts: str) -> str:
        """A folder of this source that is no published table (its name starts with `_`)."""
        return "/".join([self.root, self.source, *parts])

    # -- snapshots: read by delta-rs, milliseconds without a Spark job ---------------------------

    def _open(self, table: Table) -> DeltaTable | None:
        path = self.path(table)
        if not DeltaTable.is_deltatable(_rust_uri(path)):
            return None
        return DeltaTable(_rust_uri(path))

    def version(self, table: Table) -> int | None:
        """The table's newest version; None: there is no such table yet."""
        found = self._open(table)
        return None if found is None else int(found.version())

    def consumed(self, target: Table, of: Table) -> int | None:
        """The version of `of` that `target` was last made from; None: never."""
        found = self._open(target)
        return None if found is None else found.transaction_version(self.app_id(target, of))

    def app_id(self, target: Table, of: Table) -> str:
        return f"{self.source}/{target.full_name}<-{of.full_name}"

    def guard(self, table: Table) -> str:
        """The `txnAppId` by which writers of a table without an input table exclude each other."""
        return f"{self.source}/{table.full_name}"

    def property(self, table: Table, name: str) -> str | None:
        found = self._open(table)
        return None if found is None else found.metadata().configuration.get(name)

    def set_property(self, table: Table, name: str, value: str) -> None:
        self.spark.sql(
            f"ALTER TABLE delta.`{self.path(table)}` SET TBLPROPERTIES ('{name}' = {_quoted(value)})"
        )

    def rows(self, table: Table) -> int:
        """Rows of the newest version, from file statistics."""
        found = self._open(table)
        if found is None:
            return 0
        counts = pa.table(found.get_add_actions(flatten=True))["num_records"]
        if counts.null_count:
            return self.read(table).count()
        return int(pa.compute.sum(counts).as_py() or 0)

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(self.path(table))

    def history(self, table: Table, since: int) -> list[dict[str, Any]]:
        """Commits above a version, newest first."""
        found = self._open(table)
        if found is None:
            return []
        count = int(found.version()) - since
        return found.history(count) if count > 0 else []

    def create(self, table: Table, properties: dict[str, str] | None = None) -> bool:
        """Make the table, empty, if there is none. Returns whether it was made."""
        if self.version(table) is not None:
            return False
        values = PROPERTIES | table.properties | (properties or {})
        if table.feed:
            values["delta.enableChangeDataFeed"] = "true"
        DeltaTable.create(
            _rust_uri(self.path(table)), Schema.from_arrow(arrow_schema(table)), mode="ignore",
            description=table.doc, configuration=values, raise_if_key_not_exists=False,
        )  # fmt: skip
        return True

    # -- changes ----------------------------------------------------------------------------

    def changes(self, table: Table, after: int, upto: int) -> DataFrame:
        """Rows of the change data feed of the versions in (after, upto]; empty if there are none.

        Raises:
            FeedGone: the feed no longer reaches back to `after`.
        """
        if after >= upto:
            return (
                self.read(table, upto)
                .where("false")
                .withColumns({"_change_type": F.lit(""), "_commit_version": F.lit(0).cast("long")})
            )
        try:
            feed = (
                self.spark.read.format("delta")
                .option("readChangeFeed", "true")
                .option("startingVersion", after + 1)
                .option("endingVersion", upto)
                .load(self.path(table))
            )
            return feed.drop("_commit_timestamp")
        except Exception as error:
            raise FeedGone(f"{table.full_name} versions {after + 1} to {upto}: {error}") from error

    def changed_rows(self, table: Table, since: int) -> bool:
        """Whether rows of the table have moved since a version (compaction moves none)."""
        return any(one.get("operation") not in QUIET for one in self.history(table, since))

    # -- commits ----------------------------------------------------------------------------

    def append(self, table: Table, rows: DataFrame, base: int, run_id: str) -> int:
        """Append as a compare-and-set on the table's version. Returns the new version.

        All writers use one `txnAppId` with `txnVersion = base + 1`: of two that computed from the
        same version, Delta lets one through; the other conflicts, or is skipped, which is seen by
        the commit's user metadata.

        Raises:
            Conflict: another run changed the table since `base`.
        """
        with conflicts(table):
            (
                rows.select(*table.columns)
                .write.format("delta").mode("append")
                .option("txnAppId", self.guard(table)).option("txnVersion", base + 1)
                .option("userMetadata", run_id)
                .save(self.path(table))
            )  # fmt: skip
        for commit in self.history(table, base):
            if run_id in str(commit.get("userMetadata")):
                return int(commit["version"])
        raise Conflict(f"{table.full_name} was changed by another run since version {base}")

    @contextmanager
    def transaction(self, target: Table, app_id: str, version: int, run_id: str) -> Iterator[None]:
        """Commits inside carry what they consumed. Unset after: it would reach later writes."""
        conf = self.spark.conf
        conf.set("spark.databricks.delta.write.txnAppId", app_id)
        conf.set("spark.databricks.delta.write.txnVersion", str(version))
        conf.set("spark.databricks.delta.commitInfo.userMetadata", run_id)
        try:
            with conflicts(target):
                yield
        finally:
            conf.unset("spark.databricks.delta.write.txnAppId")
            conf.unset("spark.databricks.delta.write.txnVersion")
            conf.unset("spark.databricks.delta.commitInfo.userMetadata")

    def merge(
        self, table: Table, rows: DataFrame, within: Column | None = None, delete: str | None = None
    ) -> None:
        """One MERGE by the table's key.

        Args:
            rows: the table's columns, and the boolean column named by `delete`, if any: rows
                where it is true are removed, all others put.
            within: a condition on `t.<column>` that every touched row of the table fulfils, so
                that file statistics prune.
        """
        from delta.tables import DeltaTable as SparkDeltaTable

        match = F.lit(True)
        for name in table.key:
            match = match & (F.col(f"t.{name}") == F.col(f"s.{name}"))
        if within is not None:
            match = match & within
        put = {name: f"s.{name}" for name in table.columns}
        keep = f"NOT s.{delete}" if delete else "true"
        target = SparkDeltaTable.forPath(self.spark, self.path(table))
        merge = target.alias("t").merge(rows.alias("s"), match)
        if delete:
            merge = merge.whenMatchedDelete(f"s.{delete}")
        merge = merge.whenMatchedUpdate(set=put).whenNotMatchedInsert(keep, values=put)
        merge.execute()

    # -- operations tables: small, written by delta-rs alone ----------------------------------

    def small(self, table: Table) -> pa.Table:
        """A small table whole, as Arrow."""
        found = self._open(table)
        return found.to_pyarrow_table() if found else arrow_schema(table).empty_table()

    def put_small(self, table: Table, rows: list[tuple[Any, ...]]) -> None:
        """Append rows to an operations table, or replace those of the same key."""
        schema = arrow_schema(table)
        columns = zip(*rows, strict=True)
        arrays = [pa.array(one, field.type) for one, field in zip(columns, schema, strict=True)]
        batch = pa.Table.from_arrays(arrays, schema=schema)
        match = " AND ".join(f"t.{name} = s.{name}" for name in table.key)
        found = self._open(table)
        assert found is not None
        if self.rows(table) == 0 or table.append_only:
            write_deltalake(found, batch, mode="append")
            return
        (
            found.merge(batch, match, source_alias="s", target_alias="t")
            .when_matched_update_all().when_not_matched_insert_all().execute()
        )  # fmt: skip

    # -- texts on any file system -------------------------------------------------------------

    def _hadoop(self, path: str) -> tuple[Any, Any]:
        jvm: Any = self.spark._jvm
        where = jvm.org.apache.hadoop.fs.Path(path)
        return where.getFileSystem(self.spark._jsc.hadoopConfiguration()), where

    def exists(self, path: str) -> bool:
        system, where = self._hadoop(path)
        return bool(system.exists(where))

    def read_text(self, path: str) -> str:
        system, where = self._hadoop(path)
        stream = system.open(where)
        try:
            return bytes(stream.readAllBytes()).decode("utf-8")
        finally:
            stream.close()

    def write_text(self, path: str, text: str) -> None:
        """Write a small file whole: under another name first, then renamed."""
        system, where = self._hadoop(path)
        partial = self._hadoop(path + ".partial")[1]
        stream = system.create(partial, True)
        stream.write(bytearray(text.encode("utf-8")))
        stream.close()
        system.delete(where, False)
        system.rename(partial, where)

    def remove(self, path: str) -> None:
        system, where = self._hadoop(path)
        system.delete(where, True)

    def glob(self, pattern: str) -> list[tuple[str, int, int]]:
        """Files under a folder, glob or URI: (path, bytes, modified ms), hidden ones left out."""
        system, where = self._hadoop(pattern)
        found: list[tuple[str, int, int]] = []

        def walk(statuses: Any) -> None:
            for status in statuses or []:
                path = status.getPath()
                if str(path.getName()).startswith(("_", ".")):
                    continue
                if status.isDirectory():
                    walk(system.listStatus(path))
                else:
                    uri = path.toUri()
                    shown = uri.getPath() if uri.getScheme() in (None, "file") else path.toString()
                    found.append((shown, int(status.getLen()), int(status.getModificationTime())))

        walk(system.globStatus(where))
        return sorted(found)


class FeedGone(SessionmillError):
    """The change data feed no longer reaches back far enough: rebuild from the whole table."""


QUIET = {
    "OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "CLUSTER BY", "CREATE TABLE",
}  # fmt: skip
"""Operations of Delta's history that move no rows."""


def _rust_uri(path: str) -> str:
    """delta-rs says s3:// where Hadoop says s3a://."""
    return re.sub(r"^s3[an]://", "s3://", path)


ARROW = {
    "string": pa.string(), "bigint": pa.int64(), "int": pa.int32(), "double": pa.float64(),
    "date": pa.date32(), "timestamp": pa.timestamp("us", "UTC"), "boolean": pa.bool_(),
}  # fmt: skip


def arrow_type(kind: str) -> pa.DataType:
    """A Spark SQL type as an Arrow type."""
    if kind in ARROW:
        return ARROW[kind]
    outer, inner = kind[: kind.index("<")], kind[kind.index("<") + 1 : -1]
    if outer == "array":
        return pa.list_(arrow_type(inner))
    parts = _split(inner)
    if outer == "map":
        return pa.map_(arrow_type(parts[0]), arrow_type(parts[1]))
    return pa.struct([(one.split(":", 1)[0], arrow_type(one.split(":", 1)[1])) for one in parts])


def _split(inner: str) -> list[str]:
    """Split at the commas that stand outside angle brackets."""
    parts, depth = [""], 0
    for char in inner:
        depth += (char == "<") - (char == ">")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def arrow_schema(table: Table) -> pa.Schema:
    return pa.schema([(name, arrow_type(kind)) for name, kind in table.columns.items()])


CONFLICTS = ("Concurrent", "ProtocolChanged", "MetadataChanged", "DELTA_CONCURRENT")


@contextmanager
def conflicts(table: Table) -> Iterator[None]:
    """Delta's many conflict errors as our one."""
    try:
        yield
    except Exception as error:
        if any(word in f"{type(error).__name__} {error}"[:600] for word in CONFLICTS):
            raise Conflict(f"{table.full_name} was changed by another run meanwhile") from error
        raise


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def retried(attempts: int, again: Callable[[int], Any]) -> Any:
    """Call `again(attempt)` until it raises no Conflict, at most `attempts` times."""
    for attempt in range(1, attempts + 1):
        try:
            return again(attempt)
        except Conflict:
            if attempt == attempts:
                raise
    raise AssertionError("unreachable")
