"""Counting and numbering items: Spark and Arrow say the same of generated nights.

Some items of a catalogue have no row yet; of these some have events in the night.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql import functions as F

from jobs.core.arrow_types import arrow_schema
from jobs.core.plan import idle
from jobs.core.source_file import load_source
from jobs.core.tables import EVENTS, ITEMS
from jobs.gold import items
from jobs.lake.context import Context
from jobs.lake.delta import Lake

T = datetime(2024, 5, 1, tzinfo=UTC)
CAME = arrow_schema({n: EVENTS.columns[n] for n in ("item_id", "event_ts", "exposed_with")})
Rows = list[dict[str, Any]]


def known(drawn: random.Random) -> pa.Table:
    """`gold.items` before the night: some only shown, some of the same time, one without a time
    (its events are gone)."""
    rows = [
        {"item_id": f"i{number}", "item_index": place + 1, "event_count": drawn.choice([0, 1, 7]),
         "first_seen_ts": T + timedelta(hours=drawn.randrange(5))}
        for place, number in enumerate(drawn.sample(range(30), 15))
    ]  # fmt: skip
    rows[3]["first_seen_ts"] = None
    return pa.Table.from_pylist(rows, schema=arrow_schema(ITEMS.columns))


def night(drawn: random.Random) -> pa.Table:
    """Events of known items and new ones, from before and after what is known; many of one time."""

    def some() -> list[str] | None:
        return drawn.choice([None, [], [f"i{drawn.randrange(40)}" for _ in range(3)]])

    rows = [
        {"item_id": f"i{drawn.randrange(35)}", "exposed_with": some(),
         "event_ts": T + timedelta(hours=drawn.randrange(-3, 9))}
        for _ in range(drawn.choice([1, 20, 60]))
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=CAME)


def assert_files_say_the_same(folder: Path, came: pa.Table, by_spark: Any) -> None:
    """What tasks write of the events' files is, added up, what Spark says of the events."""
    for number, part in enumerate((came.slice(0, 7), came.slice(7))):
        pq.write_table(part, folder / f"{number}.parquet", row_group_size=5)
    task = items.Seen(str(folder / "seen"))
    paths = [one["path"] for number in (0, 1) for one in task(f"{folder}/{number}.parquet")]
    written = pa.concat_tables([pq.read_table(path) for path in paths])
    assert written.schema.equals(arrow_schema(items.SEEN_TYPES))
    summed = written.group_by("item_id").aggregate([("event_ts", "min"), ("count", "sum")])
    told = {row["item_id"]: (row["event_ts_min"], row["count_sum"]) for row in summed.to_pylist()}
    rows = by_spark.where("first_seen_ts IS NOT NULL").toArrow().to_pylist()
    assert told == {row["item_id"]: (row["first_seen_ts"], row["event_count"]) for row in rows}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_items_are_counted_and_numbered_alike(
    spark: Any, tmp_path: Path, seed: int, first: bool
) -> None:
    """Args: first: whether no item had a row before."""
    drawn = random.Random(seed)
    before, came = known(drawn), night(drawn)
    before = before.slice(0, 0) if first else before
    highest = pc.max(before["item_index"]).as_py() or 0
    listed_only = [f"i{number}" for number in range(25, 45)]
    listed_only = [one for one in listed_only if one not in before["item_id"].to_pylist()]
    unseen = items.unseen_sightings(
        spark.createDataFrame([(one,) for one in listed_only], ["item_id"])
    )
    seen = items.summarised(items.sightings(spark.createDataFrame(came)).unionByName(unseen))
    by_spark = items.updated(
        spark.createDataFrame(before.to_pylist(), ITEMS.ddl), seen.withColumn("whole", F.lit(first)),
        highest,
    )  # fmt: skip
    by_arrow = items.grown(before, items.seen_in(came, pa.array(listed_only, pa.string())))
    assert by_arrow.num_rows and by_arrow["item_index"].null_count == 0

    assert_files_say_the_same(tmp_path, came, seen)

    def listed(table: pa.Table) -> Rows:
        rows: Rows = table.cast(arrow_schema(ITEMS.columns)).sort_by("item_id").to_pylist()
        return rows

    assert listed(by_spark.toArrow()) == listed(by_arrow)
    new = by_arrow.filter(pc.greater(by_arrow["item_index"], highest)).sort_by("item_index")
    never = new["first_seen_ts"].to_pylist().count(None)
    assert 0 < never < new.num_rows
    order = [
        (first or datetime.max.replace(tzinfo=UTC), item)
        for first, item in zip(
            new["first_seen_ts"].to_pylist(), new["item_id"].to_pylist(), strict=True
        )
    ]
    assert order == sorted(order) and {one for _, one in order} >= set(listed_only)
    assert new["item_index"].to_pylist() == list(range(highest + 1, highest + 1 + len(order)))


SOURCE = """
[source]
name = "shop"
landing = "landing/*.csv"
format = "csv"
[columns]
user_id = "user"
item_id = "item"
event_ts = "ts"
[time]
unit = "s"
"""


def no_spark() -> Any:
    raise AssertionError("Spark is not needed")


def test_the_first_rows_are_published_without_spark(tmp_path: Path) -> None:
    """Items of two data files, and of a catalogue: one of them has events, one has none."""
    rows = [
        {"item_id": item, "exposed_with": shown, "event_ts": T + timedelta(hours=hour)}
        for item, shown, hour in [("b", ["c"], 2), ("a", None, 1), ("b", [], 0), ("c", ["a"], 5)]
    ]
    came = pa.Table.from_pylist(rows, schema=CAME)
    lake = Lake(no_spark, str(tmp_path / "lake"), "shop")
    lake.create(ITEMS)
    (tmp_path / "shop.toml").write_text(SOURCE)
    context = Context(load_source(str(tmp_path / "shop.toml")), lake, None, "night")
    candidate = context.candidate(ITEMS)
    for number, part in enumerate((came.slice(0, 3), came.slice(3))):
        pq.write_table(part, tmp_path / f"{number}.parquet")
        items.Seen(candidate.path(items.SEEN))(f"{tmp_path}/{number}.parquet")
    manifest = items.ItemsManifest(idle("items"), 0, 0)
    items.fill_first(context, candidate, manifest, pa.array(["z", "c"], pa.string()))
    assert manifest.staged is not None and manifest.rows == 4
    lake.commit(ITEMS, manifest.staged, 0, lake.app_id(ITEMS, EVENTS), 0, context.run_id)
    found = lake.table_of(ITEMS, 1, list(ITEMS.columns)).sort_by("item_index").to_pylist()
    assert [tuple(row[name] for name in ITEMS.columns) for row in found] == [
        ("b", 1, T, 2),
        ("a", 2, T + timedelta(hours=1), 1),
        ("c", 3, T + timedelta(hours=2), 1),
        ("z", 4, None, 0),
    ]
