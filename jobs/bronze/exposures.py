"""`[exposures]`: what was shown, from a second file, found by columns that the log has too.

A promotion says that an item was on display in a store in a week, an impression that a page showed
it; neither says with which event. Every line of the log whose columns match takes what matches as
its `exposed_with`, the most prominent first and `most` at most. Files of this kind are large (one
store's week of a grocer has thousands of rows), so what is kept is chosen, without chance:
 * by `prominence`: the place of a row's values in the lists of the source file, column by column;
   a value that no list has comes last;
 * then by a hash of match and item, so that it is not always the same items that stay [ours].

Lines are joined when they are read. An event's id says nothing of its exposures: a line that comes
again after they have changed is a duplicate and keeps what it had.
"""

from __future__ import annotations

import json
import os

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.core.errors import SchemaError, SourceError
from jobs.core.plan import Engine
from jobs.core.source_events import ExposuresPart
from jobs.lake import filesystem
from jobs.lake.context import Candidate, Context
from jobs.lake.landed import landed
from jobs.reading.typed_events import link_of

ROW_BYTES = 8  # about, of Parquet: only to tell many rows from few
COUNTED = "exposures.json"
TEXT = ("string", "int", "bigint", "smallint", "tinyint", "date")


def files_of(context: Context, part: ExposuresPart) -> dict[str, int]:
    """The files that say what was shown, and their bytes.

    Raises:
        SourceError: there are none.
    """
    files = landed(part.landing, context.day, context.source.sessions.lateness_days)
    found = {path: size for path, size, _ in files}
    if not found:
        raise SourceError(
            f"exposures.landing = {part.landing!r} matches no file (from {os.getcwd()}): correct "
            "it, or put its files there before the log is read: a line gets its exposures when it is "
            "first read"
        )
    return found


def read(spark: SparkSession, part: ExposuresPart, paths: list[str]) -> DataFrame:
    """The named columns of the files, as texts.

    Raises:
        SchemaError: a column is not there, or is none of texts, whole numbers or dates.
    """
    if part.format == "csv":
        # (By default a second file whose columns lie in another order is read by the first's names.)
        rows = spark.read.csv(
            paths, header=True, sep=part.delimiter, quote='"', escape='"', enforceSchema=False
        )
    elif part.format == "jsonl":
        rows = spark.read.json(paths, primitivesAsString=True)
    else:
        rows = spark.read.parquet(*paths)
    kinds = dict(rows.dtypes)
    for name in (part.item_id, *part.match.values(), *part.prominence):
        if name not in kinds:
            raise SchemaError(
                f"{paths[0]}: column {name!r} of [exposures] is not there: it has "
                f"{', '.join(kinds)}. Correct the name or exposures.delimiter, or deliver it again"
            )
        if kinds[name] not in TEXT:
            raise SchemaError(
                f"{paths[0]}: column {name!r} of [exposures] is {kinds[name]}, and is compared as "
                "text: write it as text, whole numbers or dates"
            )
    return rows


def unusable(part: ExposuresPart) -> Column:
    """Whether a row names no item, or lacks what it would be found by."""
    item = F.col(f"`{part.item_id}`").cast("string")
    lacks = item.isNull() | (item == "")
    for name in part.match.values():
        lacks |= F.col(f"`{name}`").isNull()
    return lacks


def chosen(rows: DataFrame, part: ExposuresPart, links: DataFrame | None = None) -> DataFrame:
    """`link, shown`: of each match the `most` most prominent items, once each.

    Args:
        links: leave out what matches none of these.
    """
    place, places = F.lit(0), 1
    for name, values in part.prominence.items():
        listed = F.array(*(F.lit(value) for value in values)).cast("array<string>")
        found = F.array_position(listed, F.col(f"`{name}`").cast("string"))
        found = F.when(found > 0, found - 1).otherwise(len(values))
        place, places = place * (len(values) + 1) + found, places * (len(values) + 1)
    theirs = [F.col(f"`{name}`").cast("string") for name in part.match.values()]
    rows = rows.where(~unusable(part)).select(
        link_of(theirs).alias("link"),
        F.col(f"`{part.item_id}`").cast("string").alias("item"),
        place.alias("place"),
    )
    if links is not None:
        rows = rows.join(links, "link", "left_semi")
    order = Window.partitionBy("link").orderBy("place", F.xxhash64("link", "item"), "item")
    # An item is in at most `places` places: the best items' best rows are among so many, and
    # Spark drops the others before it sends any.
    ranked = rows.withColumn("rank", F.dense_rank().over(order))
    rows = ranked.where(F.col("rank") <= part.most * places)
    rows = rows.groupBy("link", "item").agg(F.min("place").alias("place"))
    kept = rows.withColumn("nth", F.row_number().over(order)).where(F.col("nth") <= part.most)
    listed = F.array_sort(F.collect_list(F.struct("nth", "item")))
    return kept.groupBy("link").agg(listed["item"].alias("shown"))


def joined(context: Context, candidate: Candidate, lines: DataFrame, engine: Engine) -> DataFrame:
    """Typed lines with what was shown; as they are without `[exposures]`.

    Args:
        engine: the lines'; another one if there are many rows of exposures.

    Raises:
        SourceError, SchemaError: the files of exposures are not there, or not as described.
    """
    part = context.source.exposures
    if part is None:
        return lines
    there = files_of(context, part)
    if engine is not Engine.COMPILED:
        engine = context.thresholds.spark(sum(there.values()) // ROW_BYTES)
    rows = read(context.enter(engine), part, sorted(there))
    counted = rows.agg(F.count("*").alias("rows"), F.count_if(unusable(part)).alias("unusable"))
    filesystem.write_text(candidate.path(COUNTED), json.dumps(counted.collect()[0].asDict()))
    lines = candidate.write("unjoined", lines)
    links = lines.select("link").distinct()
    found = lines.join(chosen(rows, part, links), "link", "left")
    return found.withColumn("exposed_with", F.col("shown")).drop("shown")


def told(context: Context, candidate: Candidate) -> list[str]:
    """How many of the lines read found something that was shown, and what said nothing."""
    part = context.source.exposures
    if part is None:
        return []
    lines = candidate.part("lines").where("reason IS NULL")
    some = F.count_if(F.size("exposed_with") > 0)
    counted = lines.agg(F.count("*").alias("lines"), some.alias("some")).first()
    assert counted is not None
    notes = [
        f"exposures: {counted['some']:,} of {counted['lines']:,} lines match what "
        f"{part.landing} shows"
    ]
    shown = json.loads(filesystem.read_text(candidate.path(COUNTED)))
    if shown["unusable"]:
        needed = ", ".join([part.item_id, *part.match.values()])
        notes.append(
            f"exposures: {shown['unusable']:,} of {shown['rows']:,} rows lack one of {needed}: "
            "skipped"
        )
    return notes
