"""`jobs maintain`: smaller and no other tables, and what somebody still needs is kept."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from jobs.core.errors import SettingsError
from jobs.core.plan import Thresholds
from jobs.core.tables import EVENTS, ITEMS, RUNS, SEQUENCES, SESSIONS, Table
from jobs.ops import maintain, model_registry
from jobs.ops.explain import explain
from jobs.pipeline.steps import record, run_job
from tests.support.others import data_files
from tests.support.spark_tools import Workshop

T = 1_700_000_000
DAY = 86_400


def night(shop: Workshop, number: int) -> None:
    """Ten users come every night, each a little later in the same session as the night before."""
    rows = [f"u{user},i{(user + number) % 9},{T + number * 600}" for user in range(10)]
    shop.land(f"{number}.csv", "\n".join(["user,item,ts", *rows]) + "\n")
    shop.run()


@pytest.mark.slow
def test_smaller_and_nothing_else(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Workshop(spark, tmp_path)
    for number in range(2):
        night(shop, number)
    contents = {table: shop.rows(table) for table in (EVENTS, SESSIONS, ITEMS, SEQUENCES)}
    first = 1  # version 0 is empty
    pinned_rows = DeltaTable(shop.lake.path(SEQUENCES), version=first).to_pyarrow_table().num_rows
    staged = Path(shop.lake.path(EVENTS)) / "staged-killed" / "part-0.parquet"
    staged.parent.mkdir()
    staged.write_bytes(b"x" * 4096)
    abandoned = Path(shop.lake.folder("_candidates", "killed"))
    abandoned.mkdir(parents=True)
    (abandoned / "rows.parquet").write_bytes(b"x" * 1000)
    inspected = Path(shop.lake.folder("_candidates", "failed-last-week"))
    shutil.copytree(abandoned, inspected)
    for place in (staged, staged.parent, abandoned, abandoned / "rows.parquet"):
        os.utime(place, (time.time() - 40 * DAY,) * 2)

    kept = maintain.maintain(shop.context(), 30, {first: ["shop/1"]})
    assert not staged.exists() and not abandoned.exists() and inspected.exists()
    assert kept["tables"]["bronze.events"]["files_before"] == 2
    assert kept["tables"]["bronze.events"]["files_after"] == 1
    assert kept["freed_bytes"] == 4096 + 1000  # of the tables' own files, all are young
    assert DeltaTable(shop.lake.path(SESSIONS), version=1).to_pyarrow_table().num_rows == 10

    time.sleep(0.1)
    gone = maintain.maintain(shop.context(), 0, {first: ["shop/1"], 10**6: ["elsewhere/1"]})
    assert gone["tables"]["gold.sequences"]["kept_versions"] == [first]
    assert gone["freed_bytes"] > 10_000
    assert {table: shop.rows(table) for table in contents} == contents
    pinned = DeltaTable(shop.lake.path(SEQUENCES), version=first).to_pyarrow_table()
    assert pinned.num_rows == pinned_rows == 10
    with pytest.raises(Exception, match=r"not found|No such file"):
        DeltaTable(shop.lake.path(SESSIONS), version=1).to_pyarrow_table()
    (session,) = [row for row in contents[SESSIONS] if row["user_id"] == "u3"]
    told = explain(str(shop.lake_root), shop.source, session["session_id"])
    assert len(told["events"]) == 2 and not told["session"]["retired"]
    assert told["changes_from_version"] > 1
    with pytest.raises(SettingsError, match=r"'nobody' is not in .*, such as [0-9a-f]{8}"):
        explain(str(shop.lake_root), shop.source, "nobody")

    # Nothing downstream runs again, and the next night goes on as if nothing had been.
    versions = [shop.version(table) for table in contents]
    capsys.readouterr()
    assert shop.run().read == 0
    said = capsys.readouterr().out
    assert all(f"{job}: started" in said for job in ("ingest", "sessionize", "items", "sequences"))
    assert [shop.version(table) for table in contents] == versions
    night(shop, 2)
    (session,) = [row for row in shop.rows(SESSIONS) if row["user_id"] == "u3"]
    assert session["event_count"] == 3 and len(shop.rows(SESSIONS)) == 10
    assert {len(row["item_index"]) for row in shop.rows(SEQUENCES)} == {3}


@pytest.mark.long
def test_packed_files_have_small_row_groups(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A night reads the row groups that it touches: packing must not melt them into one."""
    shop = Workshop(spark, tmp_path)
    night(shop, 0)
    shop.land("1.csv", "user,item,ts\n" + "".join(f"v{n},i1,{T + DAY}\n" for n in range(10)))
    shop.run()
    monkeypatch.setattr(maintain, "ALL", (replace(SESSIONS, group=4),))
    done = maintain.maintain(shop.context(), 30, {})["tables"]["silver.sessions"]
    assert (done["files_before"], done["files_after"]) == (2, 1)
    (file,) = data_files(shop.lake.path(SESSIONS))
    groups = pq.ParquetFile(file).metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [4, 4, 4, 4, 4]


@pytest.mark.slow
def test_what_was_not_consumed_is_kept(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    night(shop, 0)
    shop.land("1.csv", f"user,item,ts\nu1,i1,{T + 600}\n")
    shop.run("ingest")
    shop.run("sessionize")  # sequences have not read what changed
    done = maintain.maintain(shop.context(), 0, {})
    assert done["tables"]["silver.sessions"]["kept_hours"] >= 1
    assert done["tables"]["gold.sequences"]["kept_hours"] == 0
    shop.run("items")
    result = shop.run("sequences")
    assert result.tables and "anew" not in " ".join(result.notes)
    assert {row["user_id"]: len(row["item_index"]) for row in shop.rows(SEQUENCES)}["u1"] == 2


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.long
def test_where_the_feed_is_gone_tables_are_made_anew(
    spark: Any, tmp_path: Path, many: bool
) -> None:
    """Somebody else's vacuum knows nothing of who has read what."""
    shop = Workshop(spark, tmp_path)
    if many:
        shop.thresholds = Thresholds(
            few_moved=-1, recut_events=-1, counted_rows=-1, changed_sessions=-1
        )
    night(shop, 0)
    shop.land("1.csv", f"user,item,ts\nu1,new,{T + 600}\nu77,i1,{T + 90_000}\n")
    shop.run("ingest")

    def lose(table: Table) -> None:
        """Pack the table and remove every file that only older versions name."""
        found = shop.table(table)
        found.optimize.compact()
        found.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)

    lose(EVENTS)
    cut = shop.run("sessionize")
    assert "made anew" in " ".join(cut.notes)
    assert (cut.sessions_new, cut.sessions_changed, cut.sessions_retired) == (1, 1, 0)
    assert "counted anew" in " ".join(shop.run("items").notes)
    lose(SESSIONS)
    assert "made anew" in " ".join(shop.run("sequences").notes)
    names = {row["item_index"]: row["item_id"] for row in shop.rows(ITEMS)}
    rows = {row["user_id"]: row for row in shop.rows(SEQUENCES)}
    assert len(rows) == 11 and len(names) == 10
    assert [names[index] for index in rows["u1"]["item_index"]] == ["i1", "new"]
    assert rows["u77"]["session_ordinal"] == [1]


@pytest.mark.slow
def test_it_does_not_clean_under_another_run(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    night(shop, 0)
    other = shop.context()
    record(other, "run", "all", run_job(shop.context(), "items", "all", {}), 0.0, "running")
    with pytest.raises(SettingsError, match=r"--keep-days is under 1.*run \(run .*killed"):
        maintain.maintain(shop.context(), 0.5, {})
    assert maintain.maintain(shop.context(), 1, {})["tables"][RUNS.full_name]["files_after"] == 1


def test_pins_are_those_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pins, where = model_registry.registry_pins("clicks")
    assert pins == {} and "MLFLOW_TRACKING_URI is not set" in where
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(SettingsError, match=r"does not answer.*nothing was removed"):
        model_registry.registry_pins("clicks")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    from models.registry import tracking

    client, _ = tracking.connect("clicks")
    client.create_registered_model("clicks")
    for version in ("7", "7", "9"):
        client.create_model_version("clicks", str(tmp_path), tags={"table_version": version})
    client.create_model_version("clicks", str(tmp_path))
    pins, _ = model_registry.registry_pins("clicks")
    assert pins == {7: ["clicks/2", "clicks/1"], 9: ["clicks/3"]}
