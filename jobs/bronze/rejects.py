"""Lines that make no event: found, held against those that the table has, published."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.bronze.manifest import IngestManifest, version_of
from jobs.core.errors import Conflict
from jobs.core.tables import FILES, REJECTS
from jobs.lake import foreign, time_slices
from jobs.lake.context import Candidate, Context
from jobs.lake.delta_errors import retried
from jobs.reading.records import FileFacts


def unusable(candidate: Candidate) -> DataFrame:
    """The candidate's lines that make no event, late ones among them, with their reasons."""
    lines = candidate.part("lines").where("reason IS NOT NULL")
    if not candidate.has("judged"):
        return lines
    late = candidate.part("judged").where("late").withColumn("reason", F.lit("late"))
    return lines.unionByName(late, allowMissingColumns=True)


def columns_of_files(facts: list[FileFacts]) -> Column:
    """Per line, the columns of its file in order, where that is a CSV."""
    files_with: dict[tuple[str, ...], list[str]] = {}
    for one in facts:
        if one.header:
            files_with.setdefault(tuple(one.header), []).append(one.file)
    # Most often the files of a run agree: one branch, or a few.
    found = F.lit(None).cast("array<string>")
    for header, paths in files_with.items():
        names = F.array(*map(F.lit, header))
        found = F.when(F.col("file").isin(paths), names).otherwise(found)
    return found


def count_rejects(candidate: Candidate, manifest: IngestManifest) -> None:
    counted = candidate.part("rejects").groupBy("reason").count().collect()
    manifest.rejects = {row["reason"]: row["count"] for row in counted}


def fill_rejects(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Find the rejects that the table does not have yet, and what changes among those it has."""
    lake, key = context.lake, list(REJECTS.key)
    base = manifest.base[REJECTS.full_name]
    rejects = candidate.part("rejects").dropDuplicates(key)
    if lake.rows(REJECTS):
        paths = manifest.files
        known = lake.read(REJECTS, base).where(F.col("file").isin(paths))
        changed = changed_rejects(context, candidate, rejects, base, paths)
        candidate.write("rejects-changed", changed)
        manifest.rejects_changed = candidate.row_count("rejects-changed")
        rejects = rejects.join(known.select(*key), key, "left_anti")
    if manifest.rejects:
        manifest.rejects_staged = lake.stage(REJECTS, rejects.coalesce(1), context.run_id)


def changed_rejects(
    context: Context, candidate: Candidate, rejects: DataFrame, base: int, paths: list[str]
) -> DataFrame:
    """Stored rejects of this run's files that go (`gone`) or are told of otherwise.

    Those go that came good: their lines are events or duplicates now. So do those of a reading
    that no run finished (it failed, or was killed), if this reading does not repeat them: under
    another encoding, or other columns of a Parquet file, the same line has another text. Those that
    are repeated take the reason and the columns that hold now.
    """
    lake, key = context.lake, list(REJECTS.key)
    known = lake.read(REJECTS, base).where(F.col("file").isin(paths)).select(*REJECTS.columns)
    good = candidate.part("lines").where("reason IS NULL").select(*key)
    good = good.join(rejects.select(*key), key, "left_anti")
    read = {
        row["file"]: time_slices.micros_of(row["read_ts"])
        for row in lake.small(FILES).select(["file", "read_ts"]).to_pylist()
    }
    rows = [(file, read.get(file)) for file in paths]
    finished = F.broadcast(context.spark.createDataFrame(rows, "file string, read_us bigint"))
    unfinished = known.join(finished, "file").where(
        "read_us IS NULL OR unix_micros(first_seen_ts) > read_us"
    )
    left = unfinished.join(rejects.select(*key), key, "left_anti").select(*known.columns)
    gone = known.join(good, key, "left_semi").unionByName(left).dropDuplicates(key)
    now = rejects.select(
        *key, F.col("reason").alias("now_reason"), F.col("file_columns").alias("now_columns")
    )
    other = known.join(now, key).where(
        "NOT (reason <=> now_reason AND file_columns <=> now_columns)"
    )
    other = other.withColumns({"reason": F.col("now_reason"), "file_columns": F.col("now_columns")})
    return (
        gone.select(*REJECTS.columns)
        .withColumn("gone", F.lit(True))
        .unionByName(other.select(*REJECTS.columns).withColumn("gone", F.lit(False)))
    )


def publish_rejects(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Append the rejects that the table does not have yet."""
    lake = context.lake
    if not manifest.rejects_staged:
        return

    def attempt(_: int) -> None:
        staged = manifest.rejects_staged or []
        if not sum(one["rows"] for one in staged):
            return
        base = manifest.base[REJECTS.full_name]
        guard = lake.guard(REJECTS)
        try:
            lake.commit(REJECTS, staged, base, guard, base + 1, context.run_id)
        except Conflict:
            # Another run's rejects came in between: ours are compared with them once more.
            if not manifest.reload:
                foreign.refuse_loss(context, REJECTS)
            manifest.base[REJECTS.full_name] = version_of(context, REJECTS)
            context.enter(manifest.plan.engine)
            fill_rejects(context, candidate, manifest)
            raise

    retried(3, attempt)


def clear_rejects(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Lines of this batch that are events or duplicates now leave `bronze.rejects`."""
    if not manifest.rejects_changed:
        return
    change_rejects(context, candidate, "rejects-changed")


def change_rejects(context: Context, candidate: Candidate, part: str) -> None:
    """Put a part of the candidate into `bronze.rejects`; other runs' rejects are left as they are."""

    def attempt(_: int) -> None:
        lake, base = context.lake, version_of(context, REJECTS)
        context.upsert(REJECTS, candidate, part, base, lake.guard(REJECTS), base + 1)

    retried(3, attempt)
