"""Others restore, delete, change and overwrite rows of every table, by delta-rs and by Spark.

Derived tables are made anew and equal what the oracle makes of `bronze.events`; single rows of
`bronze.events` that others changed are facts; what was restored or overwritten there stops the run,
which names the command that reads the landing again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from jobs.core.errors import SessionmillError, TableLost
from jobs.core.tables import EVENTS, ITEMS, REJECTS, SEQUENCES, SESSIONS, Table
from tests.support.others import (
    DERIVED,
    ENGINES,
    HEADER,
    STATEMENTS,
    THIRD,
    Saved,
    T,
    act,
    catalogue,
    check_derived,
    data_files,
)
from tests.support.spark_tools import Workshop

LOSSES = ("restore", "overwrite", "overwrite part")
FACTS = ("delete", "update", "merge")
BOTH = [pytest.param(one, marks=[pytest.mark.long] * (one == "spark")) for one in ENGINES]


def but(every: Iterable[str], *slow: str) -> list[Any]:
    """All of them; those that are not named are for the long runs."""
    return [
        pytest.param(one, marks=pytest.mark.slow if one in slow else pytest.mark.long)
        for one in every
    ]


MADE_BY = {SESSIONS: "sessionize", ITEMS: "items", SEQUENCES: "sequences"}


@pytest.fixture(scope="module")
def saved(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(spark, tmp_path_factory.mktemp("others"))


@pytest.fixture(scope="module")
def undisturbed(saved: Saved) -> dict[str, Any]:
    """The tables after three nights in which nobody else wrote."""
    shop = saved.again()
    third(shop)
    shop.run()
    check_derived(shop)
    return state(shop)


@pytest.fixture
def shop(saved: Saved) -> Iterator[Workshop]:
    yield saved.again()


def path_of(shop: Workshop, table: Table) -> Path:
    return Path(table.path(str(shop.lake_root), "clicks"))


def third(shop: Workshop) -> None:
    catalogue(shop.folder, 3)
    shop.land("3.csv", HEADER + THIRD)


def state(shop: Workshop, *tables: Table) -> dict[str, Any]:
    drop = ("ingest_file", "ingest_ts", "first_seen_ts", "known_from")
    return {
        one.full_name: shop.rows(one, drop=drop if one is not ITEMS else ())
        for one in tables or (EVENTS, REJECTS, *DERIVED)
    }


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("statement", but(STATEMENTS, "restore"))
def test_derived_tables_are_made_anew(
    shop: Workshop, undisturbed: dict[str, Any], statement: str, engine: str
) -> None:
    for table in DERIVED:
        act(shop, table, statement, engine)
    touched = {table: shop.version(table) for table in DERIVED}
    third(shop)
    notes = shop.run().notes
    for table in DERIVED:
        said = [
            note
            for note in notes
            if note.startswith(f"{table.full_name} was changed by another writer")
        ]
        assert len(said) == 1 and f"version {touched[table]} (" in said[0], notes
    assert state(shop) == undisturbed
    check_derived(shop)
    before = {table: shop.version(table) for table in DERIVED}
    assert not [note for note in shop.run().notes if "changed by another writer" in note]
    assert before == {table: shop.version(table) for table in DERIVED}


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("statement", but(FACTS, "delete"))
def test_what_others_do_to_single_events_is_a_fact(
    shop: Workshop, statement: str, engine: str
) -> None:
    act(shop, EVENTS, statement, engine)
    act(shop, REJECTS, statement, engine)
    after = state(shop, EVENTS, REJECTS)
    shop.run()
    assert state(shop, EVENTS, REJECTS) == after
    check_derived(shop)
    if engine == "delta-rs":  # their files are read again, because they have grown
        for name in ("1.csv", "2.csv"):
            shop.land(name, (shop.landing / name).read_text() + f"u8,i1,{T}\n")
        assert shop.run().events_new == 1
        wanted = [row["event_id"] for row in after[EVENTS.full_name]]
        assert set(wanted) < {row["event_id"] for row in shop.rows(EVENTS)}
        assert len(shop.rows(EVENTS)) == len(wanted) + 1
    third(shop)
    shop.run()
    check_derived(shop)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("statement", but(LOSSES, "restore"))
@pytest.mark.parametrize("table", (EVENTS, REJECTS), ids=lambda one: one.name)
def test_a_loss_stops_the_run_and_the_command_it_names_mends_it(
    shop: Workshop, undisturbed: dict[str, Any], table: Table, statement: str, engine: str
) -> None:
    act(shop, table, statement, engine)
    third(shop)
    versions = [shop.version(one) for one in DERIVED]
    for job in ("run", *(() if table is REJECTS else ("sessionize", "items")), "replay-rejects"):
        with pytest.raises(TableLost, match=rf"{table.full_name} was restored or overwritten"):
            shop.run(job)
    with pytest.raises(TableLost, match=r"python -m jobs run --source clicks --reload"):
        shop.run()
    assert versions == [shop.version(one) for one in DERIVED]
    shop.run(options={"reload": True})
    assert state(shop) == undisturbed
    check_derived(shop)
    assert shop.run().read == 0


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("stage", but(("sessionize", "items", "sequences")))
def test_before_each_stage(
    shop: Workshop, undisturbed: dict[str, Any], stage: str, engine: str
) -> None:
    """Of the tables that the stage reads or writes one is changed before it; another statement each
    time."""
    third(shop)
    jobs = ("ingest", "sessionize", "items", "sequences")
    for job in jobs[: jobs.index(stage)]:
        shop.run(job)
    reads = {"sessionize": SESSIONS, "items": ITEMS, "sequences": SESSIONS}
    act(shop, reads[stage], "restore" if stage != "items" else "delete", engine)
    if stage == "sequences":
        act(shop, ITEMS, "update", engine)
        with pytest.raises(
            SessionmillError, match=r"silver\.sessions was changed by another writer"
        ) as red:
            shop.run("sequences")
        assert "python -m jobs sessionize --source clicks" in str(red.value)
        shop.run("sessionize")
        with pytest.raises(SessionmillError, match="python -m jobs items --source clicks"):
            shop.run("sequences")
    for job in jobs[1:]:
        shop.run(job)
    assert state(shop) == undisturbed


@pytest.mark.slow
def test_in_one_run_an_input_that_changes_meanwhile_is_made_anew(
    shop: Workshop, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.gold import items

    third(shop)
    publish, times = items.publish, iter((SESSIONS, ITEMS))

    def published(*arguments: Any) -> Any:
        done = publish(*arguments)
        if (table := next(times, None)) is not None:
            act(shop, table, "delete", "delta-rs")
        return done

    monkeypatch.setattr(items, "publish", published)
    shop.run()
    assert state(shop) == undisturbed
    check_derived(shop)


@pytest.mark.long
@pytest.mark.parametrize("table", DERIVED, ids=lambda one: one.name)
def test_a_derived_table_that_was_deleted_is_made_anew(shop: Workshop, table: Table) -> None:
    shutil.rmtree(table.path(str(shop.lake_root), "clicks"))
    third(shop)
    shop.run()
    check_derived(shop)


@pytest.mark.long
def test_an_older_copy_of_the_events_stops_the_run(
    saved: Saved, shop: Workshop, undisturbed: dict[str, Any]
) -> None:
    path = EVENTS.path(str(shop.lake_root), "clicks")
    log = sorted((shop.lake_root / "clicks/bronze/events/_delta_log").glob("*.json"))
    log[-1].unlink()
    third(shop)
    with pytest.raises(TableLost, match=r"replaced by an older copy.*--reload"):
        shop.run()
    shop.run(options={"reload": True})
    assert state(shop) == undisturbed
    check_derived(shop)
    shutil.rmtree(path)
    with pytest.raises(TableLost, match="was deleted or replaced"):
        shop.run()
    shop.run(options={"reload": True})
    assert state(shop) == undisturbed


# -- files that are gone --------------------------------------------------------------------------


def lose(shop: Workshop, table: Table) -> None:
    data_files(path_of(shop, table))[0].unlink()


@pytest.mark.parametrize("repaired", but((False, True), False))
@pytest.mark.parametrize(
    "table", [EVENTS, pytest.param(REJECTS, marks=pytest.mark.long)], ids=lambda one: one.name
)
def test_missing_files_of_the_log_come_back_from_the_landing(
    shop: Workshop, undisturbed: dict[str, Any], table: Table, repaired: bool
) -> None:
    lose(shop, table)
    third(shop)
    if repaired:
        DeltaTable(str(path_of(shop, table))).repair()
        with pytest.raises(TableLost, match=r"restored or overwritten .*\(FSCK by .*--reload"):
            shop.run()
    notes = shop.run(options={"reload": True}).notes
    assert repaired or any(f"{table.full_name}: 1 data files are missing" in one for one in notes)
    assert state(shop) == undisturbed
    check_derived(shop)
    assert shop.run().read == 0


@pytest.mark.long
@pytest.mark.parametrize("table", DERIVED, ids=lambda one: one.name)
def test_a_derived_table_that_was_repaired_is_made_anew(shop: Workshop, table: Table) -> None:
    lose(shop, table)
    DeltaTable(str(path_of(shop, table))).repair()
    third(shop)
    notes = shop.run().notes
    assert any(one.startswith(f"{table.full_name} was changed by another writer") for one in notes)
    check_derived(shop)
