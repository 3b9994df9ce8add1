"""`bronze.events` -> `gold.items`: every item ever seen, shown, or in the catalogue, numbered once
and for good.

`item_index` starts at 1 and is append-only: new items of one commit are numbered by
`first_seen_ts, item_id`, so a model trained last week still means the same items. What a catalogue
says of them goes along (`jobs/gold/item_attributes.py`). Its items without any event have a row, too:
`event_count` 0, and no `first_seen_ts` until something happens; they are numbered last.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.core import crash_points
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import SettingsError
from jobs.core.plan import Algorithm, ItemsFacts, Plan, Publish, earlier, idle, items_plan
from jobs.core.tables import EVENTS, ITEMS, NUMBERING, SEQUENCES
from jobs.gold import item_attributes
from jobs.lake import filesystem, foreign, foreign_columns
from jobs.lake.change_feed import CAME, GONE, TYPE, only_came
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.data_files import staging
from jobs.lake.delta_errors import FeedGone, feed_gone
from jobs.lake.manifest import Manifest, Staged
from jobs.lake.tasks import run
from jobs.lake.time_slices import CLOCK


@dataclass
class ItemsManifest(Manifest):
    """What the steps of `items` tell each other."""

    base: int
    """The version of `gold.items` that the candidate was computed from."""
    upto: int
    """The version of `bronze.events` that it read up to."""
    empty: bool = False
    """Whether there is nothing to publish."""
    rows: int = 0
    notes: list[str] = field(default_factory=list)
    staged: Staged | None = None
    """The first rows of all; others are the candidate's part `items`."""
    attributes: item_attributes.Added | None = None
    renumbered: bool = False
    """Whether the numbers that were given before are not known any more."""

    @staticmethod
    def plan_of_old(old: dict[str, Any]) -> Plan:
        if old["empty"]:
            return idle("items")
        return earlier("items", Publish.MERGE if old.get("staged") is None else Publish.APPEND)


UNSEEN = "unseen"  # the candidate's part: items of the catalogue that have no row
NO_EVENTS = arrow_schema({n: EVENTS.columns[n] for n in ("item_id", "event_ts", "exposed_with")})


def unseen_sightings(rows: DataFrame) -> DataFrame:
    """Items of the catalogue as `sightings`, which happened at no time."""
    return rows.select(
        "item_id", F.lit(None).cast("timestamp").alias("event_ts"), F.lit(0).alias("count")
    )


def sightings(events: DataFrame, count: int = 1) -> DataFrame:
    """Events and exposures as `item_id, event_ts, count`: an exposure counts nothing."""
    own = events.select("item_id", "event_ts", F.lit(count).alias("count"))
    shown = events.select(
        F.explode("exposed_with").alias("item_id"), "event_ts", F.lit(0).alias("count")
    )
    return own.unionByName(shown)


def summarised(seen: DataFrame) -> DataFrame:
    """One row an item: `item_id, first_seen_ts, event_count`."""
    return seen.groupBy("item_id").agg(
        F.min("event_ts").alias("first_seen_ts"), F.sum("count").cast("bigint").alias("event_count")
    )


SEEN = "seen"  # the candidate's part: what each data file of the events has of its items
SEEN_TYPES = {"item_id": "string", "event_ts": "timestamp", "count": "bigint"}
SEEN_COLUMNS = ["item_id", "event_ts", "exposed_with"]


def seen_in(came: pa.Table, unseen: pa.Array) -> pa.Table:
    """One row an item of events and exposures: `sightings` and `summarised`, in Arrow.

    Args:
        came: `item_id, event_ts, exposed_with` of the events.
        unseen: items that happened at no time.

    Returns:
        `item_id`, `event_ts_min` (us) and `count_sum`.
    """
    came = came.combine_chunks()
    times = came["event_ts"].combine_chunks().cast(CLOCK).cast(pa.int64())
    shown = came["exposed_with"].combine_chunks()
    place = pc.list_parent_indices(shown)
    seen = pa.table(
        {
            "item_id": pa.chunked_array(
                [came["item_id"].combine_chunks(), pc.list_flatten(shown), unseen], pa.string()
            ),
            "event_ts": pa.chunked_array(
                [times, times.take(place), pa.nulls(len(unseen), pa.int64())]
            ),
            "count": np.repeat([1, 0], [came.num_rows, len(place) + len(unseen)]),
        }
    )
    return summed(seen)


def summed(seen: pa.Table) -> pa.Table:
    """`summarised`, in Arrow.

    Args:
        seen: `SEEN_TYPES`.

    Returns:
        `item_id`, `event_ts_min` and `count_sum`.
    """
    return seen.group_by("item_id", use_threads=False).aggregate(
        [("event_ts", "min"), ("count", "sum")]
    )


@dataclass(frozen=True)
class Seen:
    """A task: a data file of `bronze.events` -> a file of `SEEN_TYPES`, one row an item of a row group.

    (Spark reads the file twice for it, events and exposures: LAB_LOG.md.)
    """

    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        none, found = pa.nulls(0, pa.string()), []
        with filesystem.data_file(path) as file:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number, SEEN_COLUMNS, use_threads=False)
                found.append(seen_in(rows, none))
        if not found:
            return []
        seen = pa.concat_tables(found).select(["item_id", "event_ts_min", "count_sum"])
        seen = seen.rename_columns(["item_id", "event_ts", "count"]).cast(arrow_schema(SEEN_TYPES))
        out = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        filesystem.write_parquet(out, seen)
        return [{"path": out}]


def all_seen(context: Context, candidate: Candidate, upto: int) -> DataFrame:
    """`sightings` of all events of a version, each data file's items once or a few times."""
    lake = context.lake
    paths, number = lake.file_uris(EVENTS, upto), lake.rows(EVENTS)
    spark = context.tasks(context.thresholds.tasks(number))
    run(spark, Seen(candidate.path(SEEN)), paths, "path string", "string")
    candidate.adopt(SEEN, ", ".join(f"{name} {kind}" for name, kind in SEEN_TYPES.items()))
    return with_unseen(candidate.part(SEEN), candidate)


def updated(items: DataFrame, seen: DataFrame, highest: int) -> DataFrame:
    """Rows of `gold.items` that change.

    Args:
        items: the table as it is.
        seen: the change, per item: `item_id, first_seen_ts` (earliest new sighting, or null)`,
            event_count` (difference), and `whole`: the row says all there is, not a difference.
        highest: the highest `item_index` given so far.
    """
    old = items.select(
        "item_id",
        F.col("item_index").alias("_index"),
        F.col("first_seen_ts").alias("_first"),
        F.col("event_count").alias("_count"),
    )
    both = seen.join(old, "item_id", "left")
    first = F.when(F.col("whole"), F.coalesce("first_seen_ts", "_first")).otherwise(
        F.least("first_seen_ts", "_first")
    )
    count = F.when(F.col("whole"), F.coalesce("event_count", F.lit(0))).otherwise(
        F.coalesce("_count", F.lit(0)) + F.col("event_count")
    )
    both = both.withColumns({"_new_first": first, "_new_count": count.cast("bigint")})
    changed = both.where(
        F.col("_index").isNull()
        | ~F.col("_new_first").eqNullSafe(F.col("_first"))
        | (F.col("_new_count") != F.col("_count"))
    )
    fresh = F.col("_index").isNull()
    order = Window.partitionBy(fresh).orderBy(F.col("_new_first").asc_nulls_last(), "item_id")
    number = F.row_number().over(order)
    return changed.select(
        "item_id",
        F.coalesce("_index", number + F.lit(highest)).cast("int").alias("item_index"),
        F.col("_new_first").alias("first_seen_ts"),
        F.col("_new_count").alias("event_count"),
    )


def change_of(feed: DataFrame, events: DataFrame, candidate: Candidate) -> DataFrame:
    """What a change feed, and what is new in the catalogue, means per item. Items that lost an event
    are counted anew from `events` (their earliest sighting may be gone); an item whose events vanish
    keeps its row."""
    came = with_unseen(sightings(feed.where(F.col(TYPE).isin(*CAME))), candidate)
    if feed.where(F.col(TYPE).isin(*GONE)).isEmpty():
        return summarised(came).withColumn("whole", F.lit(False))
    gone = sightings(feed.where(F.col(TYPE).isin(*GONE)), -1)
    lost = gone.select("item_id").distinct()
    grown = summarised(came.join(lost, "item_id", "left_anti")).withColumn("whole", F.lit(False))
    anew = summarised(sightings(events).join(F.broadcast(lost), "item_id", "left_semi"))
    anew = lost.join(anew, "item_id", "left").withColumn("whole", F.lit(True))
    return grown.unionByName(anew)


def compute(context: Context) -> Candidate:
    lake = context.lake
    if lake.version(EVENTS) is None:
        raise SettingsError(
            f"there is no table at {lake.path(EVENTS)}: run python -m jobs ingest --source "
            f"{context.source.name} first"
        )
    foreign.make_ready(context, EVENTS, ITEMS)
    foreign.refuse_loss(context, EVENTS)
    lake.create(ITEMS)
    candidate = context.candidate(ITEMS)
    upto, base = lake.version(EVENTS), lake.version(ITEMS)
    after = lake.consumed(ITEMS, EVENTS)
    assert upto is not None and base is not None
    manifest = ItemsManifest(idle("items"), base, upto)
    anew, manifest.notes = foreign.to_make_anew(context, ITEMS, EVENTS, upto)
    manifest.attributes = item_attributes.compute(context)
    unseen = find_unseen(context, candidate, manifest)
    manifest.empty = after == upto and not anew and not len(unseen)
    # (A table that was deleted gives other numbers than those that the sequences have.)
    manifest.renumbered = after is None and lake.rows(SEQUENCES) > 0
    if anew:
        recount(context, candidate, manifest)
    elif not manifest.empty:
        facts = ItemsFacts(
            items=lake.rows(ITEMS),
            events=lake.rows(EVENTS),
            grown=lake.grown(EVENTS, after),
            whole=after is None,
        )
        count(context, candidate, manifest, facts, unseen)
    if manifest.empty and after is not None and (lake.sessions_cut_from() or 0) > after:
        # Events were updated, and no item differs: sequences wait for items that have read them.
        manifest.empty, manifest.staged = False, []
    context.decide(manifest.plan)
    candidate.save(manifest)
    crash_points.point("items.computed")
    return candidate


def find_unseen(context: Context, candidate: Candidate, manifest: ItemsManifest) -> pa.Array:
    """Ids of the catalogue that have no row yet; the candidate's part `unseen` has them, too."""
    ids = item_attributes.item_ids(context, manifest.attributes)
    numbered = context.lake.table_of(ITEMS, manifest.base, ["item_id"])["item_id"]
    ids = ids.filter(pc.invert(pc.is_in(ids, numbered.cast(pa.string()).combine_chunks())))
    if len(ids):
        manifest.notes.append(f"the catalogue has {len(ids):,} items that had no row in gold.items")
        rows = pa.table({"item_id": ids})
        filesystem.write_parquet(f"{candidate.path(UNSEEN)}/part-0.parquet", rows)
        candidate.adopt(UNSEEN, "item_id string")
    return ids


def with_unseen(seen: DataFrame, candidate: Candidate) -> DataFrame:
    """Sightings, and the items of the catalogue that have no row yet."""
    if not candidate.has(UNSEEN):
        return seen
    return seen.unionByName(unseen_sightings(candidate.part(UNSEEN)))


def recount(context: Context, candidate: Candidate, manifest: ItemsManifest) -> None:
    """Make all rows anew: the numbers are those of the last version before others changed it."""
    lake = context.lake
    found = foreign.changed(lake, ITEMS)
    good = manifest.base if found is None else found.good
    events = lake.rows(EVENTS)
    facts = ItemsFacts(items=0, events=events, grown=events, whole=True)
    plan = items_plan(facts, context.thresholds)
    manifest.plan = replace(plan, publish=Publish.REPLACE)
    context.decide(manifest.plan)
    context.enter(manifest.plan.engine)
    if foreign.rows_at(lake, ITEMS, good) is not None:
        old = lake.read(ITEMS, good)
    else:
        manifest.renumbered = True
        manifest.notes.append(
            f"gold.items version {good} cannot be read any more: items were numbered again, and models "
            "trained before use other numbers"
        )
        old = lake.read(ITEMS).where("false")
    seen = summarised(all_seen(context, candidate, manifest.upto))
    rows = recounted(old.select(*ITEMS.columns), seen)
    manifest.staged = lake.stage(ITEMS, rows.coalesce(1), context.run_id)
    manifest.rows = sum(one["rows"] for one in manifest.staged)


def recounted(old: DataFrame, seen: DataFrame) -> DataFrame:
    """All rows of `gold.items`: items keep their numbers, and those that nobody sees any more their
    rows.

    Args:
        old: the table as it was.
        seen: of each item with events or exposures, or that is new in the catalogue, `item_id,
            first_seen_ts, event_count`.
    """
    seen = seen.select(
        "item_id", F.col("first_seen_ts").alias("_first"), F.col("event_count").alias("_count")
    )
    both = old.drop("event_count").join(seen, "item_id", "full_outer")
    both = both.withColumn("first_seen_ts", F.coalesce("_first", "first_seen_ts"))
    highest = old.agg(F.coalesce(F.max("item_index"), F.lit(0))).first()
    assert highest is not None
    fresh = F.col("item_index").isNull()
    order = Window.partitionBy(fresh).orderBy(F.col("first_seen_ts").asc_nulls_last(), "item_id")
    number = F.coalesce("item_index", F.row_number().over(order) + F.lit(highest[0]))
    return both.select(
        "item_id",
        number.cast("int").alias("item_index"),
        "first_seen_ts",
        F.coalesce("_count", F.lit(0)).cast("bigint").alias("event_count"),
    )


def count(
    context: Context,
    candidate: Candidate,
    manifest: ItemsManifest,
    facts: ItemsFacts,
    unseen: pa.Array,
) -> None:
    """Make the rows that change, each way giving over to the next where it cannot.

    Args:
        unseen: items of the catalogue that have no row yet.
    """
    lake, upto = context.lake, manifest.upto
    after = lake.consumed(ITEMS, EVENTS)
    manifest.plan = items_plan(facts, context.thresholds)
    if manifest.plan.path is Algorithm.COUNT_ARROW:
        assert after is not None
        feed = inserts_of(context, after, upto)
        if feed is not None:
            context.decide(manifest.plan)
            items = lake.table_of(ITEMS, manifest.base, list(ITEMS.columns))
            rows = grown(items, seen_in(feed, unseen))
            filesystem.write_parquet(candidate.path("items") + "/part-0.parquet", rows)
            candidate.adopt("items", ITEMS.ddl)
            settle(manifest, rows.num_rows)
            return
        facts = replace(facts, only_inserts=False)
        manifest.plan = items_plan(facts, context.thresholds)
    context.decide(manifest.plan)
    context.enter(manifest.plan.engine)
    events = lake.read(EVENTS, upto)
    if after is not None:
        try:
            with feed_gone(EVENTS, after, upto):
                change = change_of(lake.changes(EVENTS, after, upto), events, candidate)
                fill(context, candidate, manifest, change)
            return
        except FeedGone as gone:
            manifest.notes.append(f"the change feed is gone, items are counted anew ({gone})")
            if lake.rows(ITEMS):
                recount(context, candidate, manifest)
                return
            manifest.plan = items_plan(replace(facts, whole=True), context.thresholds)
            context.decide(manifest.plan)
    seen = all_seen(context, candidate, upto)
    if not facts.items and 0 < candidate.row_count(SEEN) <= context.thresholds.counted_rows:
        fill_first(context, candidate, manifest, unseen)
        return
    whole = summarised(seen).withColumn("whole", F.lit(True))
    fill(context, candidate, manifest, whole)


def inserts_of(context: Context, after: int, upto: int) -> pa.Table | None:
    """What the change feed has of the events that came; None if some went, or delta-rs cannot read
    it."""
    columns = ["item_id", "event_ts", "exposed_with", TYPE]
    if after == upto:
        return NO_EVENTS.empty_table()
    try:
        feed = context.lake.changes_few(EVENTS, after, upto, columns)
    except FeedGone:
        return None
    return feed if only_came(feed) else None


def fill_first(
    context: Context, candidate: Candidate, manifest: ItemsManifest, unseen: pa.Array
) -> None:
    """Write the first rows where they will stay, made in this process of what tasks saw.

    Args:
        unseen: items of the catalogue.
    """
    lake, folder = context.lake, staging(context.run_id)
    seen = candidate.arrow(SEEN, list(SEEN_TYPES))
    times = seen["event_ts"].cast(CLOCK).cast(pa.int64())
    seen = seen.set_column(seen.column_names.index("event_ts"), "event_ts", times)
    never = [unseen, pa.nulls(len(unseen), pa.int64()), pa.array(np.zeros(len(unseen), np.int64))]
    seen = pa.concat_tables([seen, pa.Table.from_arrays(never, schema=seen.schema)])
    rows = grown(arrow_schema(ITEMS.columns).empty_table(), summed(seen))
    filesystem.write_parquet(f"{lake.path(ITEMS)}/{folder}/part-0.parquet", rows)
    manifest.staged = lake.entries(ITEMS, folder)
    settle(manifest, rows.num_rows)


def settle(manifest: ItemsManifest, rows: int) -> None:
    """Args: rows: how many change."""
    manifest.rows = rows
    if not rows:
        manifest.empty, manifest.plan = True, idle("items")


def grown(items: pa.Table, seen: pa.Table) -> pa.Table:
    """Rows of `gold.items` that change when events come: `updated`, in Arrow.

    Args:
        items: the table as it is.
        seen: `item_id`, `event_ts_min` (us) and `count_sum` of the events that came, and of items of
            the catalogue that have no row yet.
    """
    schema = arrow_schema(ITEMS.columns)
    items = items.select(schema.names).cast(schema).combine_chunks()
    at = pc.index_in(seen["item_id"], items["item_id"].combine_chunks()).combine_chunks()
    first, count = items["first_seen_ts"].cast(pa.int64()).take(at), items["event_count"].take(at)
    earliest = pc.min_element_wise(seen["event_ts_min"], first)
    total = pc.add(seen["count_sum"], pc.fill_null(count, 0))
    new = pc.is_null(at)
    moved = pc.or_(
        new, pc.or_(pc.not_equal(total, count), pc.fill_null(pc.less(earliest, first), True))
    )
    rows = pa.table(
        {"item_id": seen["item_id"], "item_index": items["item_index"].take(at),
         "first_seen_ts": earliest, "event_count": total}
    ).filter(pc.fill_null(moved, True))  # fmt: skip
    fresh = rows.filter(pc.is_null(rows["item_index"]))
    fresh = fresh.sort_by([("first_seen_ts", "ascending"), ("item_id", "ascending")])
    highest = pc.max(items["item_index"]).as_py() or 0
    numbers = pa.array(np.arange(highest + 1, highest + 1 + fresh.num_rows), pa.int32())
    fresh = fresh.set_column(1, "item_index", numbers)
    old = rows.filter(pc.is_valid(rows["item_index"]))
    return pa.concat_tables([part.cast(schema) for part in (old, fresh)])


def fill(
    context: Context, candidate: Candidate, manifest: ItemsManifest, change: DataFrame
) -> None:
    """Write the rows that change; the first ones where they will stay."""
    lake = context.lake
    items = lake.read(ITEMS, manifest.base)
    if manifest.plan.publish is Publish.APPEND:
        rows = updated(items, change, 0).coalesce(1)
        manifest.staged = lake.stage(ITEMS, rows, context.run_id)
        settle(manifest, sum(one["rows"] for one in manifest.staged))
        return
    highest = items.agg(F.max("item_index")).first()
    assert highest is not None
    candidate.write("items", updated(items, change, highest[0]).coalesce(1))
    settle(manifest, candidate.row_count("items"))


def publish(context: Context, candidate: Candidate) -> Result:
    """Raises: Conflict: another run changed `gold.items` since the candidate was computed."""
    lake, manifest = context.lake, candidate.manifest(ItemsManifest)
    context.decide(manifest.plan)
    result = Result(notes=manifest.notes, tables_in={EVENTS.full_name: manifest.upto})
    item_attributes.publish(context, manifest.attributes, result)
    if not manifest.empty:
        consumed, base, upto = lake.app_id(ITEMS, EVENTS), manifest.base, manifest.upto
        if manifest.renumbered:
            lake.set_property(ITEMS, NUMBERING, context.run_id)
        if manifest.staged is not None and manifest.plan.publish is Publish.REPLACE:
            foreign_columns.replace_rows(context, ITEMS, manifest.staged, base, consumed, upto)
        elif manifest.staged is not None:
            lake.commit(ITEMS, manifest.staged, base, consumed, upto, context.run_id)
        else:
            context.upsert(ITEMS, candidate, "items", base, consumed, upto)
        crash_points.point("items.published")
    foreign.answer(context, ITEMS, EVENTS)
    result.tables[ITEMS.full_name] = lake.told(ITEMS)
    return result
