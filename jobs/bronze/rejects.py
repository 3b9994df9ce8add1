"""Lines that make no event, rejected or left out: found, compared with those that the tables have,
published."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.bronze import redelivery
from jobs.bronze.manifest import IngestManifest, version_of
from jobs.core.errors import Conflict
from jobs.core.tables import FILES, FILTER_REASONS, FILTERED, REJECTS, Table
from jobs.lake import foreign, time_slices
from jobs.lake.context import Candidate, Context
from jobs.lake.delta_errors import retried
from jobs.lake.manifest import Staged
from jobs.records.records import FileFacts


@dataclass(frozen=True)
class Aside:
    """Lines that make no event, in a table of their own.

    Args:
        part: the candidate's part that has them; `<part>_staged` and `<part>_changed` are the
            manifest's.
    """

    table: Table
    part: str

    def staged(self, manifest: IngestManifest) -> Staged | None:
        found: Staged | None = getattr(manifest, f"{self.part}_staged")
        return found

    def changed(self, manifest: IngestManifest) -> int:
        return int(getattr(manifest, f"{self.part}_changed"))

    def counts(self, manifest: IngestManifest) -> dict[str, int]:
        found: dict[str, int] = getattr(manifest, self.part)
        return found


REJECTED = Aside(REJECTS, "rejects")
LEFT_OUT = Aside(FILTERED, "filtered")


def left_out(column: str = "reason") -> Column:
    """Whether a line is left out by `source.keep` or `[bots]`."""
    return F.coalesce(F.col(column).isin(*FILTER_REASONS), F.lit(False))


def unusable(candidate: Candidate) -> DataFrame:
    """The candidate's lines that make no event, late ones among them, with their reasons; without
    those that are left out."""
    lines = candidate.part("lines").where(F.col("reason").isNotNull() & ~left_out())
    if not candidate.has("judged"):
        return lines
    late = candidate.part("judged").where("late").withColumn("reason", F.lit("late"))
    return lines.unionByName(late, allowMissingColumns=True)


def filtered(candidate: Candidate) -> DataFrame:
    """The candidate's lines that are left out."""
    return candidate.part("lines").where(left_out())


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


def count_lines(candidate: Candidate, manifest: IngestManifest, aside: Aside = REJECTED) -> None:
    counted = pc.value_counts(candidate.arrow(aside.part, ["reason"])["reason"]).to_pylist()
    setattr(manifest, aside.part, {row["values"]: row["counts"] for row in counted})


def fill_aside(
    context: Context, candidate: Candidate, manifest: IngestManifest, aside: Aside = REJECTED
) -> None:
    """Find the lines that the table does not have yet, and what changes among those it has."""
    lake, key = context.lake, list(REJECTS.key)
    base = manifest.base[aside.table.full_name]
    rows = candidate.part(aside.part).dropDuplicates(key)
    if lake.rows(aside.table):
        paths = manifest.files
        known = lake.read(aside.table, base).where(F.col("file").isin(paths))
        changed = changed_lines(context, candidate, rows, base, manifest, aside.table)
        candidate.write(f"{aside.part}-changed", changed)
        setattr(manifest, f"{aside.part}_changed", candidate.row_count(f"{aside.part}-changed"))
        rows = rows.join(known.select(*key), key, "left_anti")
    stored = aside is REJECTED or context.source.source.keep_filtered
    if aside.counts(manifest) and stored:
        staged = lake.stage(aside.table, rows.coalesce(1), context.run_id)
        setattr(manifest, f"{aside.part}_staged", staged)


def changed_lines(
    context: Context, candidate: Candidate, rejects: DataFrame, base: int, manifest: IngestManifest,
    table: Table,
) -> DataFrame:  # fmt: skip
    """Stored lines of this run's files that go (`gone`) or are described otherwise: rejects, or (so are
    all words here to be read) lines that were left out.

    Those go that came good: their lines are events or duplicates now. So do those of a reading
    that no run finished (it failed, or was killed), if this reading does not repeat them: under
    another encoding, or other columns of a Parquet file, the same line has another text. Those that
    are repeated take the reason and the columns that hold now. Of a file that takes the place of
    what it was, all go that it does not have any more.
    """
    lake, key, paths = context.lake, list(REJECTS.key), manifest.files
    known = lake.read(table, base).where(F.col("file").isin(paths)).select(*table.columns)
    # (A line that is left out is no reject any more, and the other way round.)
    stays = left_out() if table is FILTERED else F.col("reason").isNotNull() & ~left_out()
    good = candidate.part("lines").where(~stays).select(*key)
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
    replaced = redelivery.whole_files(context, candidate, manifest)
    left = unfinished.select(*known.columns).unionByName(known.where(F.col("file").isin(replaced)))
    left = left.join(rejects.select(*key), key, "left_anti")
    gone = known.join(good, key, "left_semi").unionByName(left).dropDuplicates(key)
    now = rejects.select(
        *key, F.col("reason").alias("now_reason"), F.col("file_columns").alias("now_columns")
    )
    other = known.join(now, key).where(
        "NOT (reason <=> now_reason AND file_columns <=> now_columns)"
    )
    other = other.withColumns({"reason": F.col("now_reason"), "file_columns": F.col("now_columns")})
    return (
        gone.select(*table.columns)
        .withColumn("gone", F.lit(True))
        .unionByName(other.select(*table.columns).withColumn("gone", F.lit(False)))
    )


def publish_aside(
    context: Context, candidate: Candidate, manifest: IngestManifest, aside: Aside = REJECTED
) -> None:
    """Append the lines that the table does not have yet."""
    lake, table = context.lake, aside.table
    if not aside.staged(manifest):
        return

    def attempt(_: int) -> None:
        staged = aside.staged(manifest) or []
        if not sum(one["rows"] for one in staged):
            return
        base = manifest.base[table.full_name]
        guard = lake.guard(table)
        try:
            lake.commit(table, staged, base, guard, base + 1, context.run_id)
        except Conflict:
            # Another run's lines came in between: ours are compared with them once more.
            if not manifest.reload:
                foreign.refuse_loss(context, table)
            manifest.base[table.full_name] = version_of(context, table)
            context.enter(manifest.plan.engine)
            fill_aside(context, candidate, manifest, aside)
            raise

    retried(3, attempt)


def clear_aside(
    context: Context, candidate: Candidate, manifest: IngestManifest, aside: Aside = REJECTED
) -> None:
    """Lines of this batch that are events or duplicates now leave the table."""
    if not aside.changed(manifest):
        return
    change_lines(context, candidate, f"{aside.part}-changed", aside.table)


def change_lines(context: Context, candidate: Candidate, part: str, table: Table) -> None:
    """Put a part of the candidate into a table of lines; other runs' lines are left as they are."""

    def attempt(_: int) -> None:
        lake, base = context.lake, version_of(context, table)
        context.upsert(table, candidate, part, base, lake.guard(table), base + 1)

    retried(3, attempt)
