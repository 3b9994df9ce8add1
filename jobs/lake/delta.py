"""What the jobs need of Delta and of the file system: versions, progress, feeds, commits, texts.

Progress is recorded in the tables' own commits and nowhere else: a derived table's commit carries
`txnAppId = <source>/<target><-<input>` and `txnVersion` = the input version that it consumed.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute
from deltalake import CommitProperties, DeltaTable, Schema, Transaction, WriterProperties
from deltalake.exceptions import DeltaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import Conflict
from jobs.core.tables import EVENTS, PERSON_EVENTS, SESSIONS, Table
from jobs.lake import change_feed, features, filesystem, private_delta
from jobs.lake.commits import commits
from jobs.lake.data_files import DataFile, staging
from jobs.lake.delta_errors import TableRefused, conflicts, feed_gone, retried
from jobs.lake.filesystem import rust_uri
from jobs.lake.time_slices import Spans


class Lake:
    """The tables of one source.

    Args:
        start: gives the Spark session. Called when first needed: many a step (a publish that
            appends, a night that found nothing) is done without.
        root: folder or URI of the lake.
        source: the source's name, its folder in the lake.
    """

    def __init__(self, start: Callable[[], SparkSession], root: str, source: str) -> None:
        self._start, self.root, self.source = start, root.rstrip("/"), source
        self.compared: dict[tuple[str, int, int], bool] = {}
        """What `foreign_rows.same_rows` found: table, the two versions, the answer."""
        self._own: set[str] = set()
        """Tables whose data files all lie below them."""

    @cached_property
    def spark(self) -> SparkSession:
        return self._start()

    # -- places -----------------------------------------------------------------------------

    def path(self, table: Table) -> str:
        return table.path(self.root, self.source)

    def folder(self, *parts: str) -> str:
        """A folder of this source that is no published table (its name starts with `_`)."""
        return "/".join([self.root, self.source, *parts])

    # -- snapshots: read by delta-rs, milliseconds without a Spark job ---------------------------

    def open(self, table: Table) -> DeltaTable | None:
        """The table as it is now; None: there is no such table yet.

        Raises:
            TableRefused: it cannot be opened, or it is a shallow clone.
        """
        path = self.path(table)
        if not DeltaTable.is_deltatable(rust_uri(path)):
            return None
        try:
            found = DeltaTable(rust_uri(path))
        except DeltaError as error:
            if "catalog-managed" in str(error):
                raise TableRefused(self._of_catalog(table)) from error
            raise TableRefused(
                f"{table.full_name} cannot be opened: {str(error).splitlines()[0][:300]}. If its log is "
                f"damaged, restore {path}/_delta_log from a backup"
            ) from error
        if path not in self._own:
            self._refuse_clone(table, found)
            self._own.add(path)
        return found

    def _of_catalog(self, table: Table) -> str:
        """What to say of a table that is catalog-managed."""
        path, again = self.path(table), ": the next run rebuilds it"
        if table.layer == "bronze":
            again = f", and read all landing files again: python -m jobs run --source {self.source} --reload"
        return (
            f"{table.full_name} is catalog-managed: a catalog makes its commits, and neither engine can write "
            "it here. Nothing was written. Put a copy of the table from before in its place, or delete "
            f"{path}{again}"
        )

    def _refuse_clone(self, table: Table, found: DeltaTable) -> None:
        """Raises: TableRefused: data files are in another table, where we may neither pack nor remove
        them, and delta-rs does not read them."""
        there = features.elsewhere(found)
        if not there:
            return
        place = f"{table.layer}/{table.name}"
        of, first = there[0].partition(f"/{place}/")[0] + f"/{place}", there[0]
        if not re.match(r"\w+://\w", of):  # (an object store's tools take its URIs as they are)
            of, first = (re.sub(r"^file:/*", "/", filesystem.data_name(one)) for one in (of, first))
        path, origin = shlex.quote(self.path(table)), shlex.quote(of)
        raise TableRefused(
            f"{table.full_name} is a shallow clone: {len(there):,} of its data files are in another table, "
            f"the first is {first}. delta-rs cannot read them. Nothing was written. Use a copy of the "
            f"whole table: rm -r {path} && cp -r {origin} {path} (on an object store, its own tool)"
        )

    def version(self, table: Table) -> int | None:
        """The table's newest version; None: there is no such table yet."""
        found = self.open(table)
        return None if found is None else int(found.version())

    def consumed(self, target: Table, of: Table) -> int | None:
        """The version of `of` that `target` was last made from; None: never."""
        found = self.open(target)
        return None if found is None else found.transaction_version(self.app_id(target, of))

    def app_id(self, target: Table, of: Table) -> str:
        return target.app_id(self.source, of)

    def session_events(self) -> Table:
        """The table that sessions are cut from: that of people's events, where there is one."""
        return EVENTS if self.version(PERSON_EVENTS) is None else PERSON_EVENTS

    def sessions_cut_from(self) -> int | None:
        """The version of `bronze.events` that the sessions have read up to, or a later one; None: there
        are no sessions."""
        of = self.session_events()
        used = self.consumed(SESSIONS, of)
        return used if of is EVENTS or used is None else self.consumed(of, EVENTS)

    def guard(self, table: Table) -> str:
        """The `txnAppId` by which writers of a table exclude each other; its version is that of our
        last commit (or a little older), whatever others restored since."""
        return f"{self.source}/{table.full_name}"

    def property(self, table: Table, name: str) -> str | None:
        found = self.open(table)
        return None if found is None else found.metadata().configuration.get(name)

    def rows(self, table: Table) -> int:
        """Rows of the newest version, from file statistics."""
        found = self.open(table)
        return 0 if found is None else _rows(found)

    def bytes(self, table: Table) -> int:
        """Size of the newest version's data files."""
        found = self.open(table)
        sizes = pa.table(found.get_add_actions())["size_bytes"] if found else None
        return 0 if sizes is None else int(pa.compute.sum(sizes).as_py() or 0)

    def grown(self, table: Table, after: int | None) -> int:
        """By how many rows the table has grown since a version; all, where it is forgotten."""
        found = self.open(table)
        if found is None:
            return 0
        now = _rows(found)
        if after is None:
            return now
        try:
            found.load_as_version(after)
        except DeltaError:
            return now
        return now - _rows(found)

    def told(self, table: Table) -> dict[str, Any]:
        """`path`, `version` and `rows`, as a job's answer has them."""
        return {
            "path": self.path(table),
            "version": self.version(table),
            "rows": self.rows(table),
        }

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(self.path(table))

    def history(self, table: Table, since: int) -> list[dict[str, Any]]:
        """Commits above a version, newest first."""
        found = self.open(table)
        if found is None:
            return []
        count = int(found.version()) - since
        return found.history(count) if count > 0 else []

    def create(
        self, table: Table, properties: dict[str, str] | None = None, *, upgrade: bool = True
    ) -> bool:
        """Make the table, empty, if there is none. Returns whether it was made.

        Args:
            upgrade: whether one that an earlier version made gets the columns that it lacks. That
                is a version of the table: not for a run that may find nothing to do.
        """
        if self.version(table) is not None:
            if upgrade:
                self._add_columns(table)
            return False
        DeltaTable.create(
            rust_uri(self.path(table)),
            Schema.from_arrow(arrow_schema(table.columns)),
            mode="ignore",
            description=table.doc,
            configuration=_properties(table, properties) | MERGED,
            raise_if_key_not_exists=False,
        )
        return True

    def _add_columns(self, table: Table) -> None:
        """Add the declared columns that the table lacks; they are null in the rows it has."""

        def attempt(_: int) -> None:
            found = self.open(table)
            assert found is not None
            there = {one.name for one in found.schema().fields}
            declared = Schema.from_arrow(arrow_schema(table.columns)).fields
            lacking = [one for one in declared if one.name not in there]
            if lacking and self.only_spark(table):
                kinds = ", ".join(f"{one.name} {table.columns[one.name]}" for one in lacking)
                self._alter(table, f"ADD COLUMNS ({kinds})")
            elif lacking:
                with conflicts(table):
                    found.alter.add_columns(lacking)

        retried(5, attempt)

    def set_property(self, table: Table, name: str, value: str) -> None:
        def attempt(_: int) -> None:
            found = self.open(table)
            assert found is not None
            if self.only_spark(table):
                self._alter(table, f"SET TBLPROPERTIES ('{name}' = '{value}')")
                return
            with conflicts(table):
                found.alter.set_table_properties({name: value}, raise_if_not_exists=False)

        retried(5, attempt)

    def _alter(self, table: Table, what: str) -> None:
        with conflicts(table):
            self.spark.sql(f"ALTER TABLE delta.`{self.path(table)}` {what}")

    def purge_vectors(self, table: Table, run_id: str) -> bool:
        """Write the files anew whose rows are deleted by deletion vectors only; moves no row. Returns
        whether there were any."""
        found = self.open(table)
        if found is None or not features.has_vectors(found):
            return False
        # (Delta reads no deletion vectors where it does not choose files by statistics.)
        skipping, conf = "spark.databricks.delta.stats.skipping", self.spark.conf
        before = conf.get(skipping, "true")
        conf.set(skipping, "true")
        try:
            with self.userdata(run_id), conflicts(table):
                self.spark.sql(f"REORG TABLE delta.`{self.path(table)}` APPLY (PURGE)")
        finally:
            conf.set(skipping, before or "true")
        return True

    def missing_files(self, table: Table) -> list[str]:
        """The data files that the newest version names and that are not there."""
        found = self.open(table)
        return [] if found is None else _removed(found.repair(dry_run=True))

    def drop_missing(self, table: Table, run_id: str) -> None:
        """Take data files that are not there out of the table (delta-rs's FSCK)."""
        found = self.open(table)
        assert found is not None
        by = CommitProperties(custom_metadata={"userMetadata": run_id})
        with conflicts(table):
            found.repair(dry_run=False, commit_properties=by)

    # -- changes ----------------------------------------------------------------------------

    def changes(self, table: Table, after: int, upto: int) -> DataFrame:
        """Rows of the change data feed of the versions in (after, upto]; empty if there are none.

        Raises:
            FeedGone: the feed no longer reaches back to `after`. Reading the rows may raise it
                too, inside `feed_gone`.
        """
        if after >= upto:
            return (
                self.read(table, upto)
                .where("false")
                .withColumns(
                    {change_feed.TYPE: F.lit(""), change_feed.VERSION: F.lit(0).cast("long")}
                )
            )
        with feed_gone(table, after, upto):
            feed = (
                self.spark.read.format("delta")
                .option("readChangeFeed", "true")
                .option("startingVersion", after + 1)
                .option("endingVersion", upto)
                .load(self.path(table))
            )
        return feed.drop("_commit_timestamp")

    def changed_rows(self, table: Table, since: int) -> bool:
        """Whether rows of the table have moved since a version (compaction moves none)."""
        newest = self.version(table)
        found = () if newest is None else commits(self.path(table), since, newest)
        return any(one.moves for one in found)

    def unchanged(self, table: Table, base: int) -> DeltaTable:
        """The table as it is now.

        Raises:
            Conflict: another run changed it since `base`.
        """
        found = self.open(table)
        assert found is not None
        if self.changed_rows(table, base):
            raise Conflict(f"{table.full_name} was changed by another run since version {base}")
        return found

    # -- commits ----------------------------------------------------------------------------

    def stage(
        self, table: Table, rows: DataFrame, run_id: str, others: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Write rows as data files of the table that no version names yet; `commit` makes them
        part of it without touching them again, and VACUUM takes those that nobody committed.

        Args:
            others: columns that are not ours.

        Returns:
            One entry a file: `path` (below the table), `size`, `modified_ms`, `rows`, `stats`.
        """
        folder = staging(run_id)
        place = f"{self.path(table)}/{folder}"
        rows.select(*table.columns, *others).write.parquet(place)
        return self.entries(table, folder)

    def entries(
        self, table: Table, folder: str, paths: list[str] | None = None
    ) -> list[dict[str, Any]]:
        """The files of a folder below the table, as `stage` tells them.

        Args:
            paths: those that count; None: all. (Attempts that Spark gave up leave files, too.)
        """
        place = f"{self.path(table)}/{folder}"
        wanted = None if paths is None else {path.rpartition("/")[2] for path in paths}
        return [
            {"path": f"{folder}/{info.base_name}", "size": info.size,
             "modified_ms": info.mtime_ns // 1_000_000, **private_delta.statistics(f"{place}/{info.base_name}")}
            for info in filesystem.listed(place)
            if wanted is None or info.base_name in wanted
        ]  # fmt: skip

    def file_uris(self, table: Table, version: int) -> list[str]:
        """The data files of a version."""
        return [one.path for one in self.files_of(table, version)]

    def files_of(self, table: Table, version: int) -> list[DataFile]:
        """The data files of a version, with what the log says of them."""
        found = DeltaTable(rust_uri(self.path(table)), version=version)
        rows = pa.table(found.get_add_actions(flatten=True)).to_pylist()
        root = self.path(table)
        return [DataFile(filesystem.data_path(root, row["path"]), row) for row in rows]

    def table_of(self, table: Table, version: int, columns: list[str]) -> pa.Table:
        """Some columns of a version, read without Spark."""
        found = DeltaTable(rust_uri(self.path(table)), version=version)
        return filesystem.rows_of(found).to_table(columns=columns)

    def changes_few(self, table: Table, after: int, upto: int, columns: list[str]) -> pa.Table:
        """Columns of the change feed of the versions in (after, upto], read without Spark.

        Raises:
            FeedGone: the feed no longer reaches back to `after`.
        """
        found = self.open(table)
        assert found is not None
        if features.only_spark_reads_feed(found):
            with feed_gone(table, after, upto):
                feed = self.changes(table, after, upto).select(*columns).toArrow()
            return self._as_declared(table, feed, columns)
        with feed_gone(table, after, upto):
            reader = found.load_cdf(
                starting_version=after + 1, ending_version=upto, columns=columns
            )
            return self._as_declared(table, pa.table(reader), columns)

    def _as_declared(self, table: Table, feed: pa.Table, columns: list[str]) -> pa.Table:
        # (What comes are string views, which few functions take.)
        of_feed = {change_feed.TYPE: "string", change_feed.VERSION: "bigint"}
        types = {name: (table.columns | of_feed)[name] for name in columns}
        return feed.select(columns).cast(arrow_schema(types)).combine_chunks()

    def staged(self, table: Table, entries: list[dict[str, Any]]) -> DataFrame:
        """Staged files, read by Spark."""
        paths = [f"{self.path(table)}/{one['path']}" for one in entries if one["rows"]]
        if not paths:
            return self.read(table).limit(0)
        return self.spark.read.schema(table.ddl).parquet(*paths)

    def commit(
        self, table: Table, entries: list[dict[str, Any]], base: int, app_id: str, version: int,
        run_id: str, overwrite: bool = False,
    ) -> None:  # fmt: skip
        """Append staged files in one commit, as a compare-and-set; or put them in place of all
        there are.

        The commit carries `app_id` and `version`, by which two writers exclude each other: Delta
        lets blind appends of both through otherwise.

        Raises:
            Conflict: another run changed the table since `base`, or the files are gone.
        """
        entries = [one for one in entries if one["rows"]]
        self._all_staged(table, entries)
        found = self.unchanged(table, base)
        if self.only_spark(table):
            self._commit_by_spark(table, entries, base, app_id, version, run_id, overwrite)
            return
        by = self._progress(table, base, app_id, version, run_id)
        with conflicts(table):
            private_delta.add_files(found, entries, by, overwrite)

    def only_spark(self, table: Table) -> bool:
        """Whether the table has a feature with which delta-rs cannot write it."""
        found = self.open(table)
        return found is not None and bool(features.only_spark_writes(found))

    def _commit_by_spark(
        self, table: Table, entries: list[dict[str, Any]], base: int, app_id: str, version: int,
        run_id: str, overwrite: bool,
    ) -> None:  # fmt: skip
        """`commit` by Spark, which writes the rows of the staged files once more.

        Its commits carry one name: that of the guard, where it is another, comes with a commit of no
        rows.
        """
        rows = self.spark.createDataFrame([], table.ddl)
        if entries:
            paths = [f"{self.path(table)}/{one['path']}" for one in entries]
            rows = self.spark.read.parquet(*paths)
        self._write_by_spark(table, rows, base, app_id, version, run_id, overwrite)
        if app_id != self.guard(table):
            self.mark(table, base, run_id)

    def mark(self, table: Table, base: int, run_id: str) -> None:
        """Say by `guard` that a commit upon version `base` was ours, where Spark made it: its commits
        carry one name only. Not where others committed after it, who are to be noticed."""
        newest = self.version(table)
        assert newest is not None
        since = commits(self.path(table), base, newest)
        if all(one.run_id is not None or not one.moves for one in since):
            with suppress(Conflict):
                self.commit(table, [], newest, self.guard(table), newest + 1, run_id)

    def _write_by_spark(
        self, table: Table, rows: DataFrame, base: int, app_id: str, version: int, run_id: str,
        overwrite: bool,
    ) -> None:  # fmt: skip
        mode = "overwrite" if overwrite else "append"
        with self.transaction(table, app_id, version, run_id):
            rows.write.format("delta").mode(mode).save(self.path(table))
        newest = self.version(table)
        assert newest is not None
        # (Delta skips, without a word, what another run has committed under this name and version.)
        if not any(one.run_id == run_id for one in commits(self.path(table), base, newest)):
            raise Conflict(f"{table.full_name} was changed by another run since version {base}")

    def _progress(
        self, table: Table, base: int, app_id: str, version: int, run_id: str
    ) -> CommitProperties:
        """What a commit upon version `base` carries: whose it is, and what it consumed."""
        consumed = {self.guard(table): base + 1} | {app_id: version}
        return CommitProperties(
            custom_metadata={"userMetadata": run_id},
            app_transactions=[Transaction(*one) for one in consumed.items()],
        )

    def _all_staged(self, table: Table, entries: list[private_delta.Entry]) -> None:
        """Raises: Conflict: a staged file is gone."""
        for one in entries:
            if not filesystem.exists(f"{self.path(table)}/{one['path']}"):
                raise Conflict(f"{table.full_name}: the staged file {one['path']} was removed")

    @contextmanager
    def userdata(self, run_id: str) -> Iterator[None]:
        """Commits inside carry the run's id."""
        self.spark.conf.set("spark.databricks.delta.commitInfo.userMetadata", run_id)
        try:
            yield
        finally:
            self.spark.conf.unset("spark.databricks.delta.commitInfo.userMetadata")

    @contextmanager
    def transaction(self, target: Table, app_id: str, version: int, run_id: str) -> Iterator[None]:
        """Commits inside carry what they consumed. Unset after: it would reach later writes.

        Delta skips, silently, a commit whose `version` is not above the last one of its `app_id`:
        one that makes the table anew from the same input goes without.
        """
        conf, found = self.spark.conf, self.open(target)
        last = found.transaction_version(app_id) if found else None
        if last is None or last < version:
            conf.set("spark.databricks.delta.write.txnAppId", app_id)
            conf.set("spark.databricks.delta.write.txnVersion", str(version))
        try:
            with self.userdata(run_id), conflicts(target):
                yield
        finally:
            conf.unset("spark.databricks.delta.write.txnAppId")
            conf.unset("spark.databricks.delta.write.txnVersion")

    def replace(self, table: Table, rows: DataFrame, properties: dict[str, str]) -> None:
        """Put other rows and other properties in place of the table's own, in one commit.

        Args:
            rows: the table's columns, and those of others that it is to have.
        """
        writer = rows.writeTo(f"delta.`{self.path(table)}`").using("delta")
        for name, value in _properties(table, properties).items():
            writer = writer.tableProperty(name, value)
        writer.createOrReplace()

    def upsert(
        self, table: Table, rows: pa.Table | pa.RecordBatchReader, base: int, app_id: str,
        version: int, run_id: str, spans: Spans | None = None,
    ) -> None:  # fmt: skip
        """Put rows into the table by its key, in one commit, as a compare-and-set: by delta-rs's
        MERGE, without a JVM. It holds the rows in memory, and one after another the files that may
        have their keys.

        Args:
            rows: the table's columns. Those whose column `gone` is true, or whose `change` is
                retired, are removed.
            app_id, version: the progress that the commit carries, also if no row changes.
            spans: where the stored rows of these keys lie, by the column `order`; without: anywhere.

        Raises:
            Conflict: another run changed the table since `base`.
        """
        found = self.unchanged(table, base)
        with conflicts(table):
            if MERGED.items() - found.metadata().configuration.items():
                found.alter.set_table_properties(MERGED, raise_if_not_exists=False)
        seen = found.version()
        by = self._progress(table, base, app_id, version, run_id)
        _merge(table, found, rows, spans, by)
        if found.version() == seen:  # (a MERGE that changes no row commits nothing)
            self.commit(table, [], base, app_id, version, run_id)

    def merge(self, table: Table, rows: DataFrame, spans: Spans | None = None) -> None:
        """`upsert` by Spark's MERGE, for any number of rows; inside `transaction`."""
        from delta.tables import DeltaTable as SparkDeltaTable

        target = SparkDeltaTable.forPath(self.spark, self.path(table)).alias("t")
        merge = target.merge(rows.alias("s"), _match(table, spans, "timestamp_micros"))
        put, gone = _put(table), _gone(rows.columns)
        if gone:
            merge = merge.whenMatchedDelete(gone)
        keep = f"NOT ({gone})" if gone else None
        merge.whenMatchedUpdate(set=put).whenNotMatchedInsert(keep, values=put).execute()

    # -- operations tables: small, written by delta-rs alone ----------------------------------

    def small(self, table: Table) -> pa.Table:
        """A small table whole, as Arrow."""
        found = self.open(table)
        return (
            filesystem.rows_of(found).to_table()
            if found
            else arrow_schema(table.columns).empty_table()
        )

    def put_small(self, table: Table, rows: list[tuple[Any, ...]]) -> None:
        """Put rows into an operations table, in place of those of the same key."""
        schema = arrow_schema(table.columns)
        columns = zip(*rows, strict=True)
        arrays = [pa.array(one, field.type) for one, field in zip(columns, schema, strict=True)]
        self._merge_small(table, pa.Table.from_arrays(arrays, schema=schema))

    def drop_small(self, table: Table, rows: pa.Table) -> None:
        """Remove rows from an operations table."""
        gone = pa.repeat(pa.scalar(True), rows.num_rows)
        self._merge_small(table, rows.select(list(table.columns)).append_column("gone", gone))

    def _merge_small(self, table: Table, batch: pa.Table) -> None:
        def attempt(_: int) -> None:
            found = self.open(table)
            assert found is not None
            if self.only_spark(table):
                with conflicts(table):
                    more = ", gone boolean" if "gone" in batch.column_names else ""
                    self.merge(table, self.spark.createDataFrame(batch, table.ddl + more))
                return
            _merge(table, found, batch)

        retried(5, attempt)


# -- rows put by their key: the words of MERGE, for delta-rs and for Spark -------------------------


def _match(table: Table, spans: Spans | None, micros: str) -> str:
    """Which stored row `t` a row `s` stands for.

    Args:
        spans: literals, so that files are left out by their statistics.
        micros: the engine's function that makes a time of microseconds.
    """
    same = " AND ".join(f"t.{name} = s.{name}" for name in table.key)
    if not spans:
        return same
    [time] = table.order
    inside = " OR ".join(
        f"t.{time} >= {micros}({first}) AND t.{time} <= {micros}({last})" for first, last in spans
    )
    return f"{same} AND ({inside})"


def _put(table: Table) -> dict[str, str]:
    return {name: f"s.{name}" for name in table.columns}


def _gone(columns: list[str]) -> str | None:
    """Which rows `s` are removed; None: none."""
    if "gone" in columns:
        return "s.gone"
    return f"s.change = '{change_feed.RETIRED}'" if "change" in columns else None


def _merge(
    table: Table,
    found: DeltaTable,
    rows: pa.Table | pa.RecordBatchReader,
    spans: Spans | None = None,
    by: CommitProperties | None = None,
) -> None:
    """delta-rs's MERGE, on the version that is open.

    The source is streamed: else delta-rs writes its first and last key into the log as a condition
    of the commit, and a key may be a person.

    Raises:
        Conflict: another commit was faster.
    """
    put, gone = _put(table), _gone(rows.schema.names)
    merge = found.merge(
        rows, _match(table, spans, "to_timestamp_micros"), source_alias="s", target_alias="t",
        streamed_exec=True, commit_properties=by,
        writer_properties=WriterProperties(compression="SNAPPY", max_row_group_size=table.group),
    )  # fmt: skip
    if gone:
        merge = merge.when_matched_delete(gone)
    merge = merge.when_matched_update(put)
    merge = merge.when_not_matched_insert(put, f"NOT ({gone})" if gone else None)
    with conflicts(table):
        merge.execute()


PROPERTIES = {
    # delta-rs cannot read tables with deletion vectors, and copy-on-write was no slower here.
    "delta.enableDeletionVectors": "false",
    # Blind appends of two runs must conflict, not interleave.
    "delta.isolationLevel": "Serializable",
}

MERGED = {"delta.targetFileSize": str(8 * 2**20)}
"""delta-rs's MERGE writes the rows of all files that it changes into files of at most this many
bytes, one old file after another. In files of its default, 100 MiB, rows of many days come together,
and each night writes all of them anew (LAB_LOG.md). Spark does not know this property."""


def _properties(table: Table, more: dict[str, str] | None) -> dict[str, str]:
    """Delta's properties of a table."""
    feed = {"delta.enableChangeDataFeed": "true"} if table.feed else {}
    return PROPERTIES | feed | table.properties | (more or {})


QUIET = {
    "OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "CLUSTER BY", "CREATE TABLE",
    "ADD COLUMN", "ADD COLUMNS", "REORG", "UNSET TBLPROPERTIES", "CHANGE COLUMN", "RENAME COLUMN",
    "ADD CONSTRAINT", "DROP CONSTRAINT", "UPGRADE PROTOCOL", "DROP FEATURE",
}  # fmt: skip
"""Operations of Delta's history that move no rows."""


def _removed(told: dict[str, Any]) -> list[str]:
    """The files that a repair names. (They come as JSON.)"""
    files = told["files_removed"]
    return list(json.loads(files) if isinstance(files, str) else files)


def _rows(table: DeltaTable) -> int:
    counts = pa.table(table.get_add_actions(flatten=True))["num_records"]
    if counts.null_count:  # written by another engine, without statistics
        return int(table.count())
    return int(pa.compute.sum(counts).as_py() or 0)
