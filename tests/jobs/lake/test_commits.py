"""What the log says of others: every operation of delta-rs, and commits that say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Schema, Transaction, write_deltalake

from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import ITEMS, RUNS, Table
from jobs.lake import foreign
from jobs.lake.commits import commits
from jobs.lake.delta import Lake

RUN = "0123456789abcdef" * 2
QUIET = ("compact", "z-order", "vacuum", "column", "property", "constraint")
STATEMENTS = ("delete", "update", "merge", "append", "overwrite", "overwrite part", "restore")


def no_spark() -> Any:
    raise AssertionError("Spark was started")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """`gold.items` after two commits of ours: three items, versions 1 and 2."""
    lake = Lake(no_spark, str(tmp_path), "clicks")
    lake.create(ITEMS)
    ours(lake, rows("a", "b"))
    ours(lake, rows("c"))
    return lake


def rows(*names: str) -> pa.Table:
    columns = {
        "item_id": names, "item_index": [ord(one) for one in names],
        "first_seen_ts": [0] * len(names), "event_count": [1] * len(names),
    }  # fmt: skip
    return pa.table(columns, schema=arrow_schema(ITEMS.columns))


def ours(lake: Lake, put: pa.Table, mode: Any = "append") -> None:
    base = lake.version(ITEMS) or 0
    by = CommitProperties(
        custom_metadata={"userMetadata": RUN},
        app_transactions=[Transaction(lake.guard(ITEMS), base + 1)],
    )
    write_deltalake(lake.path(ITEMS), put, mode=mode, commit_properties=by)


def act(lake: Lake, what: str) -> None:
    path = lake.path(ITEMS)
    table = DeltaTable(path)
    if what == "compact":
        table.optimize.compact()
    elif what == "z-order":
        table.optimize.z_order(["item_id"])
    elif what == "vacuum":
        table.optimize.compact()
        table.vacuum(0, dry_run=False, enforce_retention_duration=False)
    elif what == "column":
        table.alter.add_columns([deltalake.Field("theirs", "string")])
    elif what == "property":
        table.alter.set_table_properties({"a.b": "c"}, raise_if_not_exists=False)
    elif what == "constraint":
        table.alter.add_constraint({"counted": "event_count >= 0"})
    elif what == "delete":
        table.delete("item_id = 'a'")
    elif what == "update":
        table.update({"event_count": "7"}, predicate="item_id = 'a'")
    elif what == "merge":
        merge = table.merge(rows("a", "z"), "t.item_id = s.item_id", "s", "t")
        merge.when_matched_update({"event_count": "9"}).when_not_matched_insert_all().execute()
    elif what == "append":
        write_deltalake(path, rows("z"), mode="append")
    elif what == "overwrite":
        write_deltalake(path, rows("z"), mode="overwrite")
    elif what == "overwrite part":
        part = rows("a").set_column(3, "event_count", pa.array([5]))
        write_deltalake(path, part, mode="overwrite", predicate="item_id = 'a'")
    elif what == "restore":
        table.restore(1)


@pytest.mark.parametrize("what", QUIET)
def test_what_moves_no_row_is_no_change(lake: Lake, what: str) -> None:
    act(lake, what)
    [*_, last] = commits(lake.path(ITEMS), 2, DeltaTable(lake.path(ITEMS)).version())
    assert not last.moves and foreign.changed(lake, ITEMS) is None
    assert not lake.changed_rows(ITEMS, 2)


@pytest.mark.parametrize("what", STATEMENTS)
def test_a_change_is_told_until_a_commit_of_ours(lake: Lake, what: str) -> None:
    act(lake, what)
    act(lake, "compact")
    found = foreign.changed(lake, ITEMS)
    assert found is not None and found.good == 2
    name = {"append": "WRITE", "overwrite": "WRITE", "overwrite part": "WRITE"}.get(
        what, what.upper()
    )
    assert found.in_words().startswith(
        f"gold.items was changed by another writer: version 3 ({name} by delta-rs"
    )
    assert foreign.is_loss(found.commit) == (what in ("overwrite", "overwrite part", "restore"))
    ours(lake, rows("a", "b", "c"), "overwrite")
    assert foreign.changed(lake, ITEMS) is None


def test_a_restore_to_our_last_version_takes_back_what_others_did(lake: Lake) -> None:
    act(lake, "delete")
    act(lake, "restore")
    DeltaTable(lake.path(ITEMS)).restore(2)
    assert list(foreign.moved(lake, ITEMS, 2)) == [] and foreign.changed(lake, ITEMS) is None


def test_columns_of_others_may_be_filled(lake: Lake) -> None:
    act(lake, "column")
    DeltaTable(lake.path(ITEMS)).update({"theirs": "'x'"})
    assert len(list(foreign.moved(lake, ITEMS, 2))) == 1
    assert foreign.changed(lake, ITEMS) is None


def test_restoring_takes_no_progress_back(lake: Lake) -> None:
    act(lake, "restore")
    assert foreign.last_known(lake, ITEMS) == 2


def rewritten(lake: Lake, version: int, edit: Any) -> None:
    file = Path(lake.path(ITEMS), "_delta_log", f"{version:020}.json")
    actions = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(one) + "\n" for one in edit(actions)))


def test_a_commit_that_says_nothing_counts_as_a_change(lake: Lake) -> None:
    act(lake, "append")
    rewritten(lake, 3, lambda actions: [one for one in actions if "commitInfo" not in one])
    found = foreign.changed(lake, ITEMS)
    assert found is not None
    assert found.commit.in_words() == "version 3 (no operation given by an unknown writer)"


def test_a_commit_whose_file_is_gone_counts_as_a_change(lake: Lake) -> None:
    act(lake, "append")
    DeltaTable(lake.path(ITEMS)).create_checkpoint()
    Path(lake.path(ITEMS), "_delta_log", f"{3:020}.json").unlink()
    found = foreign.changed(lake, ITEMS)
    assert found is not None and found.commit.in_words() == "version 3 (its log file is gone)"


def test_of_an_earlier_version_the_last_run_tells_and_else_nobody(tmp_path: Path) -> None:
    lake = Lake(no_spark, str(tmp_path), "clicks")
    DeltaTable.create(lake.path(ITEMS), Schema.from_arrow(arrow_schema(ITEMS.columns)))
    write_deltalake(lake.path(ITEMS), rows("a", "b"), mode="append")
    act(lake, "delete")
    assert foreign.last_known(lake, ITEMS) is None and foreign.changed(lake, ITEMS) is None
    lake.create(RUNS)
    lake.put_small(RUNS, [run(RUNS, "one", "ok", 1), run(RUNS, "two", "AuditFailed", 2)])
    assert foreign.last_known(lake, ITEMS) == 1
    found = foreign.changed(lake, ITEMS)
    assert found is not None and found.commit.version == 2


def run(table: Table, name: str, outcome: str, version: int) -> tuple[Any, ...]:
    told = {"run_id": name, "outcome": outcome, "tables_out": [(ITEMS.full_name, version)]}
    return tuple(told.get(column) for column in table.columns)
