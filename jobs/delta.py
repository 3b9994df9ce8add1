"""What the jobs need of Delta and of the file system: versions, progress, feeds, commits, texts.

Progress is recorded in the tables' own commits and nowhere else: a derived table's commit carries
`txnAppId = <source>/<target><-<input>` and `txnVersion` = the input version that it consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

    # -- snapshots --------------------------------------------------------------------------

    def _snapshot(self, table: Table) -> Any:
        log = self.spark._jvm.org.apache.spark.sql.delta.DeltaLog.forTable(
            self.spark._jsparkSession, self.path(table)
        )
        none = self.spark._jvm.scala.Option.empty()
        return log.update(False, none, none)

    def version(self, table: Table) -> int | None:
        """The table's newest version; None: there is no such table yet."""
        version = int(self._snapshot(table).version())
        return None if version < 0 else version

    def consumed(self, target: Table, of: Table) -> int | None:
        """The version of `of` that `target` was last made from; None: never."""
        if self.version(target) is None:
            return None
        found = self._snapshot(target).transactions().get(self.app_id(target, of))
        return int(found.get()) if found.isDefined() else None

    def app_id(self, target: Table, of: Table) -> str:
        return f"{self.source}/{target.full_name}<-{of.full_name}"

    def guard(self, table: Table) -> str:
        """The `txnAppId` by which writers of a table without an input table exclude each other."""
        return f"{self.source}/{table.full_name}"

    def property(self, table: Table, name: str) -> str | None:
        found = self._snapshot(table).metadata().configuration().get(name)
        return str(found.get()) if found.isDefined() else None

    def set_property(self, table: Table, name: str, value: str) -> None:
        self.spark.sql(
            f"ALTER TABLE delta.`{self.path(table)}` SET TBLPROPERTIES ('{name}' = {_quoted(value)})"
        )

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(self.path(table))

    def rows(self, table: Table) -> int:
        """Rows of the newest version, from file statistics where they are there."""
        return self.read(table).count()

    def create(self, table: Table, properties: dict[str, str] | None = None) -> bool:
        """Make the table, empty, if there is none. Returns whether it was made."""
        if self.version(table) is not None:
            return False
        values = PROPERTIES | table.properties | (properties or {})
        if table.feed:
            values["delta.enableChangeDataFeed"] = "true"
        texts = ", ".join(f"'{name}' = {_quoted(value)}" for name, value in values.items())
        self.spark.sql(
            f"CREATE TABLE IF NOT EXISTS delta.`{self.path(table)}` ({table.ddl}) USING delta "
            f"COMMENT {_quoted(table.doc)} TBLPROPERTIES ({texts})"
        )
        return True

    # -- changes ----------------------------------------------------------------------------

    def changes(self, table: Table, after: int, upto: int) -> DataFrame:
        """Rows of the change data feed of the versions in (after, upto]; empty if there are none.

        Raises:
            FeedGone: the feed no longer reaches back to `after`.
        """
        if after >= upto:
            return self.read(table, upto).where("false").withColumns(
                {"_change_type": F.lit(""), "_commit_version": F.lit(0).cast("long")}
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
        now = self.version(table)
        if now == since:
            return False
        history = self.spark.sql(f"DESCRIBE HISTORY delta.`{self.path(table)}`")
        quiet = ["OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "CLUSTER BY"]
        moved = history.where((F.col("version") > since) & ~F.col("operation").isin(quiet))
        return moved.limit(1).count() > 0

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
        last = self.spark.sql(f"DESCRIBE HISTORY delta.`{self.path(table)}`")
        ours = last.where((F.col("version") > base) & (F.col("userMetadata") == run_id))
        version = ours.agg(F.max("version")).first()
        if version is None or version[0] is None:
            raise Conflict(f"{table.full_name} was changed by another run since version {base}")
        return int(version[0])

    @contextmanager
    def transaction(
        self, target: Table, app_id: str, version: int, run_id: str
    ) -> Iterator[None]:
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
        from delta.tables import DeltaTable

        match = F.lit(True)
        for name in table.key:
            match = match & (F.col(f"t.{name}") == F.col(f"s.{name}"))
        if within is not None:
            match = match & within
        put = {name: f"s.{name}" for name in table.columns}
        keep = f"NOT s.{delete}" if delete else "true"
        target = DeltaTable.forPath(self.spark, self.path(table))
        merge = target.alias("t").merge(rows.alias("s"), match)
        if delete:
            merge = merge.whenMatchedDelete(f"s.{delete}")
        merge = merge.whenMatchedUpdate(set=put).whenNotMatchedInsert(keep, values=put)
        merge.execute()

    # -- texts on any file system -------------------------------------------------------------

    def _hadoop(self, path: str) -> tuple[Any, Any]:
        where = self.spark._jvm.org.apache.hadoop.fs.Path(path)
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
