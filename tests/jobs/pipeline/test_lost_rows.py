"""Rows that vanished without a commit that says so: the next run stops before it publishes, and the command
that it names mends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

from jobs.core.errors import AuditFailed
from jobs.core.plan import Thresholds
from jobs.core.tables import EVENTS, FINGERPRINTS, ITEMS, SEQUENCES, SESSIONS, Table
from tests.jobs.lake.test_foreign_changes import state, third
from tests.support.others import Saved, check_derived
from tests.support.spark_tools import Workshop

RUN = "0123456789abcdef" * 2
SPARK = Thresholds(fingerprinted_rows=-1)


@pytest.fixture(scope="module")
def saved(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(spark, tmp_path_factory.mktemp("lost"))


@pytest.fixture(scope="module")
def undisturbed(saved: Saved) -> dict[str, Any]:
    shop = saved.again()
    third(shop)
    shop.run()
    return state(shop)


@pytest.fixture
def shop(saved: Saved) -> Iterator[Workshop]:
    yield saved.again()


def lose(shop: Workshop, table: Table, moves: bool = True) -> None:
    """Two rows less, in a commit that pretends to be ours."""
    path = table.path(str(shop.lake_root), "clicks")
    found = DeltaTable(path)
    rows = found.to_pyarrow_table()
    by = CommitProperties(
        custom_metadata={"userMetadata": RUN},
        app_transactions=[Transaction(f"clicks/{table.full_name}", found.version() + 1)],
    )
    write_deltalake(found, rows.slice(2), mode="overwrite", commit_properties=by)
    if not moves:
        log = Path(f"{path}/_delta_log/{found.version():020}.json")
        log.write_text(log.read_text().replace('"dataChange":true', '"dataChange":false'))


def versions(shop: Workshop) -> list[int]:
    return [shop.version(table) for table in (SESSIONS, SEQUENCES)]


@pytest.mark.parametrize(
    ("table", "limits"),
    [
        pytest.param(SESSIONS, None, marks=pytest.mark.slow, id="sessions"),
        pytest.param(SEQUENCES, None, marks=pytest.mark.long, id="sequences"),
        pytest.param(SEQUENCES, SPARK, marks=pytest.mark.long, id="sequences, read by Spark"),
    ],
)
def test_a_loss_stops_the_run_and_a_rebuild_mends_it(
    shop: Workshop, undisturbed: dict[str, Any], table: Table, limits: Thresholds | None
) -> None:
    shop.thresholds = limits
    lose(shop, table)
    third(shop)
    before = versions(shop)
    with pytest.raises(
        AuditFailed, match=rf"{table.full_name} version \d+ has \d+ events fewer"
    ) as red:
        shop.run()
    assert str(red.value).endswith("python -m jobs run --source clicks --rebuild")
    if table is SESSIONS:
        assert versions(shop) == before
    assert shop.version(SEQUENCES) == before[1]
    shop.run(options={"rebuild": True})
    assert state(shop) == undisturbed
    check_derived(shop)
    shop.run("validate")
    assert shop.run().read == 0
    shop.thresholds = None


@pytest.mark.slow
def test_a_night_without_news_sees_it_too(shop: Workshop) -> None:
    lose(shop, SESSIONS)
    with pytest.raises(AuditFailed, match=r"silver\.sessions version \d+ has \d+ events fewer"):
        shop.run()


@pytest.mark.slow
def test_bronze_that_lost_rows_is_read_again(shop: Workshop, undisturbed: dict[str, Any]) -> None:
    lose(shop, EVENTS, moves=False)
    with pytest.raises(AuditFailed, match=r"has 2 events more .* --reload --rebuild$"):
        shop.run()
    third(shop)
    shop.run(options={"reload": True, "rebuild": True})
    assert state(shop) == undisturbed
    check_derived(shop)
    assert shop.run().read == 0


@pytest.mark.slow
def test_a_publication_that_loses_rows_ends_red(
    shop: Workshop, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged is not what was audited: seen at the end of the job, before gold reads it."""
    from jobs.silver import sessionize

    third(shop)
    publish = sessionize.change

    def lossy(*given: Any) -> None:
        publish(*given)
        lose(shop, SESSIONS)

    before = shop.version(SEQUENCES)
    with monkeypatch.context() as patch:
        patch.setattr(sessionize, "change", lossy)
        with pytest.raises(AuditFailed, match=r"silver\.sessions version \d+ has \d+ events fewer"):
            shop.run()
    assert shop.version(SEQUENCES) == before
    shop.run(options={"rebuild": True})
    assert state(shop) == undisturbed


@pytest.mark.long
def test_changed_users_alone_are_balanced(shop: Workshop, undisturbed: dict[str, Any]) -> None:
    """`gold.sequences` changed in place, by MERGE; a wrong row of `ops.fingerprints` meanwhile."""
    shop.thresholds = replace(Thresholds(), few_bytes=-1, rewritten_share=2)
    third(shop)
    DeltaTable(FINGERPRINTS.path(str(shop.lake_root), "clicks")).update({"events": "events + 1"})
    notes = shop.run().notes
    shop.thresholds = None
    assert any("ops.fingerprints:" in note and "made again" in note for note in notes)
    assert not any("not compared" in note for note in notes)
    assert state(shop) == undisturbed
    assert shop.version(ITEMS) > 0
    shop.run("validate", options={"table": FINGERPRINTS.full_name})
