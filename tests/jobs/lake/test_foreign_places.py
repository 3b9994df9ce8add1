"""Tables in another place than they were, or with files missing: clones, copies, cleaned logs and feeds,
data files that are gone. The next night is as without, or stops and names what helps."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from jobs.core.tables import (
    ALL,
    EVENTS,
    ITEMS,
    REJECTS,
    SEQUENCES,
    SESSIONS,
    Table,
)
from jobs.lake.delta_errors import TableRefused
from jobs.ops import maintain
from tests.jobs.lake.test_foreign_changes import but, path_of, state, third
from tests.support.others import DAY, DERIVED, HEADER, Saved, T, act, check_derived
from tests.support.spark_tools import Workshop


@pytest.fixture(scope="module")
def saved(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(spark, tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def undisturbed(saved: Saved) -> dict[str, Any]:
    shop = saved.again()
    third(shop)
    shop.run()
    check_derived(shop)
    return state(shop)


@pytest.fixture
def shop(saved: Saved) -> Iterator[Workshop]:
    home = saved.shop.lake_root
    yield saved.again()
    saved.shop.lake_root = home


def files(folder: Path) -> dict[str, int]:
    return {
        str(one.relative_to(folder)): one.stat().st_size
        for one in folder.rglob("*")
        if one.is_file()
    }


# -- clones and copies ----------------------------------------------------------------------------


def cloned(shop: Workshop, *tables: Table) -> Path:
    """The lake in another place, some tables of it shallow clones; its former place."""
    origin, place = shop.lake_root, shop.folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(origin, place)
    for table in tables:
        there = table.path(str(place), "clicks")
        shutil.rmtree(there)
        shop.spark.sql(
            f"CREATE TABLE delta.`{there}` SHALLOW CLONE delta.`{table.path(str(origin), 'clicks')}`"
        )
    shop.lake_root = place
    return origin


def every(shop: Workshop) -> list[Table]:
    return [one for one in ALL if DeltaTable.is_deltatable(one.path(str(shop.lake_root), "clicks"))]


@pytest.mark.parametrize("which", but(("one", "every")))
def test_a_shallow_clone_is_refused_and_a_copy_is_none(
    shop: Workshop, undisturbed: dict[str, Any], which: str
) -> None:
    tables = every(shop) if which == "every" else [SESSIONS]
    origin = cloned(shop, *tables)
    before = files(origin)
    third(shop)
    there = files(shop.lake_root) if which == "every" else {}
    with pytest.raises(
        TableRefused, match=r"is a shallow clone: .*Nothing was written.*cp -r"
    ) as red:
        shop.run()
    if there:  # (not even the record of the run)
        assert files(shop.lake_root) == there
    with pytest.raises(TableRefused, match="is a shallow clone"):
        maintain.maintain(shop.context(), 0, {})
    assert files(origin) == before
    if which == "one":
        said = str(red.value).partition("Use a copy of the whole table: ")[2]
        subprocess.run(["bash", "-ec", said.partition(" (on")[0]], check=True)
    else:
        for table in tables:
            shutil.rmtree(path_of(shop, table))
            shutil.copytree(path_of_origin(origin, table), path_of(shop, table))
    shop.run()
    assert state(shop) == undisturbed
    check_derived(shop)
    assert files(origin) == before


def path_of_origin(origin: Path, table: Table) -> Path:
    return Path(table.path(str(origin), "clicks"))


@pytest.mark.long
def test_there_is_no_deep_clone(shop: Workshop) -> None:
    """(Delta's own has none; who has one, has other engines. A copy of the folder is one.)"""
    there = shop.folder / "deep"
    with pytest.raises(Exception, match=r"(?i)deep|syntax|clone"):
        shop.spark.sql(f"CREATE TABLE delta.`{there}` DEEP CLONE delta.`{path_of(shop, ITEMS)}`")


@pytest.mark.long
@pytest.mark.parametrize("table", (ITEMS, SESSIONS, SEQUENCES), ids=lambda one: one.name)
def test_an_older_copy_of_a_derived_table_is_made_good(
    shop: Workshop, undisturbed: dict[str, Any], table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    back = 1  # after the first night
    for log in (path_of(shop, table) / "_delta_log").glob("*.json"):
        if int(log.stem) > back:
            log.unlink()
    third(shop)
    shop.run()
    check_derived(shop)
    if table is not SEQUENCES:
        assert (
            f"{table.full_name} is at version {back}, but a run before" in capsys.readouterr().out
        )
    if table is not ITEMS:
        assert state(shop) == undisturbed
    assert shop.run().read == 0
    assert "older copy" not in capsys.readouterr().out


# -- cleaned logs and feeds -------------------------------------------------------------------------


def log_cleaned(shop: Workshop) -> None:
    for table in (EVENTS, REJECTS, *DERIVED):
        found = DeltaTable(str(path_of(shop, table)))
        found.create_checkpoint()
        for log in (path_of(shop, table) / "_delta_log").glob("*.json"):
            if int(log.stem) < found.version():
                log.unlink()


def feed_vacuumed(shop: Workshop) -> None:
    """Changes that nobody has read yet are gone."""
    shop.run("ingest")
    act(shop, EVENTS, "update", "spark")
    for table in (EVENTS, SESSIONS):
        found = DeltaTable(str(path_of(shop, table)))
        found.optimize.compact()
        shop.spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
        shop.spark.sql(f"VACUUM delta.`{path_of(shop, table)}` RETAIN 0 HOURS")
        shop.spark.conf.unset("spark.databricks.delta.retentionDurationCheck.enabled")
        shutil.rmtree(path_of(shop, table) / "_change_data", ignore_errors=True)


@pytest.mark.long
@pytest.mark.parametrize("cleaned", [log_cleaned, feed_vacuumed], ids=lambda one: one.__name__)
def test_what_was_cleaned_away_is_done_without(
    shop: Workshop, undisturbed: dict[str, Any], cleaned: Callable[[Workshop], None]
) -> None:
    third(shop)
    cleaned(shop)
    shop.run()
    check_derived(shop)
    if cleaned is log_cleaned:
        assert state(shop) == undisturbed
    assert shop.run().read == 0


# -- partitions -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("table", (EVENTS, SESSIONS, SEQUENCES), ids=lambda one: one.name)
def test_a_table_that_others_partitioned_is_refused(
    shop: Workshop, undisturbed: dict[str, Any], table: Table
) -> None:
    path, by = str(path_of(shop, table)), table.key[0]
    by = {EVENTS: "event_date", SESSIONS: "start_date"}.get(table, by)
    rows = shop.spark.read.format("delta").load(path)
    kept = shop.spark.createDataFrame(rows.collect(), rows.schema)
    writer = kept.write.format("delta").mode("overwrite").option("overwriteSchema", "true")
    writer.partitionBy(by).save(path)
    third(shop)
    versions = {one: shop.version(one) for one in DERIVED}
    with pytest.raises(
        TableRefused, match=rf"{table.full_name} was partitioned by {by} by another"
    ) as red:
        shop.run()
    assert versions[table] == shop.version(table) if table in versions else True
    shop.spark.sql(str(red.value).partition("in Spark: ")[2])
    shop.run()
    assert state(shop) == undisturbed
    check_derived(shop)


# -- times between two milliseconds ---------------------------------------------------------------


@pytest.mark.long
def test_statistics_in_milliseconds_lose_no_row(spark: Any, tmp_path: Path) -> None:
    """Spark's statistics of times end at milliseconds; events lie between two of them."""
    from tests.support.spark_tools import CLICKS

    shop = Workshop(spark, tmp_path, CLICKS.replace('unit = "s"', 'unit = "us"'))
    start = T * 1_000_000

    def night(number: int) -> str:
        return HEADER + "".join(
            f"u{user},i{number},{start + user * DAY * 1_000_000 + number * 60_000_000 + 999}\n"
            for user in range(4)
        )

    shop.land("1.csv", night(1))
    shop.run()
    for table in (EVENTS, SESSIONS):
        [key] = table.key
        spark.sql(f"UPDATE delta.`{path_of(shop, table)}` SET {key} = {key}")
    shop.land("2.csv", night(2) + night(1).removeprefix(HEADER))
    result = shop.run()
    assert (result.events_new, result.duplicates) == (4, 4)
    assert result.sessions_new == 0 and len(shop.rows(SESSIONS)) == 4
    check_derived(shop)
