"""Keeps a lake small and quick: nights' small files are packed, what no version needs is removed.

Done by delta-rs, without a JVM; by Spark where delta-rs cannot write the table, or where it may have
deletion vectors, whose files delta-rs's VACUUM takes for rubbish. Packing keeps the order of files, so
that neighbouring nights stay neighbours and file statistics prune as before; it moves no row, and
nothing downstream runs again.
That order was measured against Z-orders, which make one user's sessions quicker to find and the
next night a quarter dearer (benchmarks/README.md).

What is never removed, however old: files of versions of `gold.sequences` that a registered model
names as the data it was trained on, what a derived table has not yet consumed of its input's change
feed, and the version of a table before others changed it, until the next run has answered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from deltalake import CommitProperties, DeltaTable, WriterProperties
from deltalake.exceptions import DeltaError
from pyarrow import fs

from jobs.audit import balance, fingerprint_table
from jobs.core.errors import SettingsError, counted
from jobs.core.tables import (
    ALL,
    EVENTS,
    FINGERPRINTS,
    ITEMS,
    PERSON_EVENTS,
    RECOMMENDATIONS,
    RUNS,
    SEQUENCES,
    SESSIONS,
    Table,
)
from jobs.lake import features, filesystem, foreign
from jobs.lake.context import Context
from jobs.lake.delta import QUIET, Lake
from jobs.lake.delta_errors import conflicts

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CONSUMERS = {
    EVENTS: (SESSIONS, PERSON_EVENTS, ITEMS),
    PERSON_EVENTS: (SESSIONS,),
    SESSIONS: (SEQUENCES,),
}
# Larger files make a night dearer, which writes anew the files that its late events touch
# (benchmarks/layout.py); what is larger already stays as it is.
TARGET_BYTES = 32 * 2**20


def maintain(context: Context, keep_days: float, pinned: Mapping[int, list[str]]) -> dict[str, Any]:
    """Pack and clean every table of a source, and what killed runs left, and remove the
    fingerprints of files that the next runs do not ask for.

    Args:
        keep_days: what was removed from the tables since is kept, and can be read by version.
        pinned: versions of `gold.sequences` to keep for ever, with what needs them.

    Returns:
        `freed_bytes`; `tables`: for each one `files_before`, `files_after`, `removed_files`,
        `freed_bytes`, `kept_hours`, `kept_versions`; `candidates`: folders removed.

    Raises:
        SettingsError: under a day, while another run may be writing.
    """
    if keep_days < 1:
        _alone(context)
    tables = {}
    for table in (*(one for one in ALL if one is not FINGERPRINTS), FINGERPRINTS):
        if table is FINGERPRINTS:  # the last: now it is known which files are left
            fingerprint_table.prune(context, balance.needed(context))
        found = context.lake.open(table)
        if found is not None:
            keep = set(pinned) if table is SEQUENCES else set()
            keep |= _to_repair(context.lake, table)
            tables[table.full_name] = _tend(context, table, found, keep_days, sorted(keep))
    candidates = _abandoned(context, keep_days)
    freed = sum(one["freed_bytes"] for one in [*tables.values(), *candidates])
    return {"freed_bytes": freed, "tables": tables, "candidates": candidates}


def _to_repair(lake: Lake, table: Table) -> set[int]:
    """The version before others changed a table, from which the next run repairs it; empty: they did
    not, or its log is gone."""
    for one in foreign.standing(lake, table)[:1]:
        with suppress(DeltaError):
            lake.file_uris(table, one.version - 1)
            return {one.version - 1}
    return set()


def _alone(context: Context) -> None:
    """Files of a run that is writing are named by no version: only their age protects them."""
    since = datetime.now(UTC) - timedelta(days=1)
    for run in context.lake.small(RUNS).to_pylist():
        if (
            run["outcome"] == "running"
            and run["run_id"] != context.run_id
            and run["started_ts"] > since
        ):
            raise SettingsError(
                f"--keep-days is under 1, and {run['job']} (run {run['run_id']}) has been running since "
                f"{run['started_ts']:%Y-%m-%d %H:%M} UTC, or was killed: files that it is writing "
                "could be removed. Use --keep-days 1 or more, or wait until no other run is active"
            )


def listed(context: Context) -> set[str]:
    """The model versions whose lists are in gold.recommendations."""
    found = context.lake.open(RECOMMENDATIONS)
    if found is None:
        return set()
    rows = filesystem.rows_of(found).to_table(columns=["model_version"])
    return set(rows["model_version"].unique().to_pylist())


def _tend(
    context: Context, table: Table, found: DeltaTable, keep_days: float, keep: list[int]
) -> dict[str, Any]:
    by_run = CommitProperties(custom_metadata={"userMetadata": context.run_id})
    before = len(found.file_uris())
    context.lake.purge_vectors(table, context.run_id)
    if context.lake.only_spark(table) or features.VECTORS in features.named(found):
        return _tend_by_spark(context, table, keep_days, keep, before)
    with conflicts(table):
        found.optimize.compact(
            target_size=TARGET_BYTES,
            writer_properties=WriterProperties(max_row_group_size=table.group),
            commit_properties=by_run,
        )
    keep = [version for version in keep if version <= found.version()]
    hours = math.ceil(max(keep_days * 24, _unconsumed_hours(context, table, found)))
    how: dict[str, Any] = {
        "retention_hours": hours,
        "enforce_retention_duration": False,
        "full": True,
        "keep_versions": keep or None,
    }
    sizes = _sizes(found, found.vacuum(dry_run=True, **how))
    removed = found.vacuum(dry_run=False, commit_properties=by_run, **how) if sizes else []
    return {
        "files_before": before,
        "files_after": len(found.file_uris()),
        "removed_files": len(removed),
        "freed_bytes": sum(sizes),
        "kept_hours": hours,
        "kept_versions": keep,
    }


def _tend_by_spark(
    context: Context, table: Table, keep_days: float, keep: list[int], before: int
) -> dict[str, Any]:
    """`_tend` by Spark's OPTIMIZE and VACUUM. VACUUM looks at no other files than those that delta-rs
    would remove (which knows the versions to keep), and leaves those of them that are in use."""
    lake, name = context.lake, f"delta.`{context.lake.path(table)}`"
    settings = {
        "spark.databricks.delta.optimize.minFileSize": str(TARGET_BYTES),
        "spark.databricks.delta.optimize.maxFileSize": str(TARGET_BYTES),
        "spark.databricks.delta.retentionDurationCheck.enabled": "false",
    }
    with set_for_now(context.spark, settings), lake.userdata(context.run_id), conflicts(table):
        context.spark.sql(f"OPTIMIZE {name}")
        found = lake.open(table)
        assert found is not None
        keep = [version for version in keep if version <= found.version()]
        hours = math.ceil(max(keep_days * 24, _unconsumed_hours(context, table, found)))
        names = found.vacuum(hours, True, False, full=True, keep_versions=keep or None)
        there = _files(lake.path(table), names)
        if there:
            columns = "path string, length bigint, isDir boolean, modificationTime bigint"
            context.spark.createDataFrame(there, columns).createOrReplaceTempView(INVENTORY)
            files = f"(SELECT * FROM {INVENTORY})"
            context.spark.sql(f"VACUUM {name} USING INVENTORY {files} RETAIN {hours} HOURS")
            context.spark.catalog.dropTempView(INVENTORY)
    left = {path for path, *_ in _files(lake.path(table), names)}
    gone = [size for path, size, *_ in there if path not in left]
    return {
        "files_before": before,
        "files_after": len(found.file_uris()),
        "removed_files": len(gone),
        "freed_bytes": sum(gone),
        "kept_hours": hours,
        "kept_versions": keep,
    }


INVENTORY = "sessionmill_inventory"


@contextmanager
def set_for_now(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
    """Settings of a session, for what is done inside."""
    for name, value in settings.items():
        spark.conf.set(name, value)
    try:
        yield
    finally:
        for name in settings:
            spark.conf.unset(name)


def _files(place: str, names: list[str]) -> list[tuple[str, int, bool, int]]:
    """Those of some files below a table that are there, as VACUUM takes them."""
    if not names:
        return []
    system, inner = filesystem.located(place)
    base = inner.rstrip("/")
    # (As Hadoop writes it: it must be the table's own beginning.)
    root = place.rstrip("/") if "://" in place else f"file:{base}"
    infos = system.get_file_info([f"{base}/{name}" for name in names])
    return [
        (
            root + info.path.removeprefix(base),
            int(info.size or 0),
            False,
            (info.mtime_ns or 0) // 1_000_000,
        )
        for info in infos
        if info.type == fs.FileType.File
    ]


def _unconsumed_hours(context: Context, table: Table, found: DeltaTable) -> float:
    """Since when a derived table has not read this one's changes; 0: all have read everything."""
    waiting = [
        commit["timestamp"]
        for consumer in CONSUMERS.get(table, ())
        if consumer is not SESSIONS or table is context.lake.session_events()
        # One that has consumed nothing starts from the whole table.
        if (consumed := context.lake.consumed(consumer, table)) is not None
        for commit in context.lake.history(table, consumed)
        if commit.get("operation") not in QUIET
    ]
    return (time.time() * 1000 - min(waiting)) / 3_600_000 + 1 if waiting else 0.0


def _sizes(found: DeltaTable, names: list[str]) -> list[int]:
    """Bytes of files below a table."""
    if not names:
        return []
    system, inner = filesystem.located(found.table_uri)
    infos = system.get_file_info([f"{inner.rstrip('/')}/{name}" for name in names])
    return [info.size or 0 for info in infos]


def _abandoned(context: Context, keep_days: float) -> list[dict[str, Any]]:
    """Remove the candidates of runs that were killed or failed their audit, once they are old."""
    lake, since = context.lake, datetime.now(UTC) - timedelta(days=keep_days)
    system, inner = filesystem.located(lake.folder("_candidates"))
    removed = []
    for batch in system.get_file_info(fs.FileSelector(inner, allow_not_found=True)):
        below = system.get_file_info(fs.FileSelector(batch.path, recursive=True))
        newest = max((one.mtime for one in [batch, *below] if one.mtime), default=None)
        if batch.type == fs.FileType.Directory and newest is not None and newest < since:
            system.delete_dir(batch.path)
            freed = sum(one.size or 0 for one in below if one.type == fs.FileType.File)
            if freed:  # an ended run leaves an empty folder
                removed.append({"batch": batch.base_name, "freed_bytes": freed})
    return removed


def in_words(source: str, done: dict[str, Any]) -> str:
    """What was done, for a person."""
    lines = [
        f"maintain {source}: {size(done['freed_bytes'])} freed, "
        f"{counted(sum(one['removed_files'] for one in done['tables'].values()), 'file')} removed, "
        f"{counted(len(done['candidates']), 'abandoned candidate')} removed. {done['registry']}."
    ]
    if done["refits"]:
        lines.append(f"  old refits removed from the registry: versions {done['refits']}")
    for name, one in done["tables"].items():
        kept = f", versions {one['kept_versions']} kept" if one["kept_versions"] else ""
        lines.append(
            f"  {name}: {counted(one['files_before'], 'file')} -> {one['files_after']}; "
            f"{one['removed_files']} unneeded ones removed, {size(one['freed_bytes'])}; what was "
            f"replaced less than {one['kept_hours'] / 24:.3g} days ago is kept{kept}"
        )
    return "\n".join(lines)


def size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
