"""Tables that others changed so that the jobs can neither read nor write them: refused by name, with
what helps; and what is told from the log alone. No JVM."""

from __future__ import annotations

import json
import shlex
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deltalake import DeltaTable, Field, write_deltalake
from deltalake.schema import PrimitiveType

from jobs import cli
from jobs.core.errors import SettingsError, TableLost
from jobs.core.plan import Thresholds
from jobs.core.settings import settings
from jobs.core.tables import EVENTS, ITEMS, NUMBERING, RUNS, SESSIONS
from jobs.lake import features, foreign, foreign_rows
from jobs.lake.delta import Lake
from jobs.lake.delta_errors import TableRefused
from jobs.lake.spark import check_versions
from tests.jobs.lake.test_commits import RUN, no_spark, ours, rewritten, rows, run


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """`gold.items` after two commits of ours: versions 1 and 2, a data file each."""
    made = Lake(no_spark, str(tmp_path / "a läke"), "clicks")
    made.create(ITEMS)
    ours(made, rows("a", "b"))
    ours(made, rows("c"))
    return made


def again(lake: Lake) -> Any:
    """The context of another run, in another process."""
    anew = Lake(no_spark, lake.root, lake.source)
    return SimpleNamespace(lake=anew, run_id=RUN, source=SimpleNamespace(name=lake.source))


def file_of(lake: Lake, version: int) -> Path:
    """The data file that a version added."""
    log = Path(lake.path(ITEMS), "_delta_log", f"{version:020}.json").read_text().splitlines()
    [path] = [json.loads(one)["add"]["path"] for one in log if "add" in json.loads(one)]
    return Path(lake.path(ITEMS), path)


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["file://", ""])
def test_a_shallow_clone_is_refused(lake: Lake, scheme: str) -> None:
    path = lake.path(ITEMS)
    shutil.copytree(path, path + "-origin/gold/items")

    def elsewhere(actions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for one in actions:
            if "add" in one:
                one["add"]["path"] = f"{scheme}{path}-origin/gold/items/{one['add']['path']}"
        return actions

    rewritten(lake, 2, elsewhere)
    with pytest.raises(TableRefused) as red:
        again(lake).lake.rows(ITEMS)
    said = str(red.value)
    assert said.startswith(
        "gold.items is a shallow clone: 1 of its data files are in another table"
    )
    there, copied = shlex.quote(path), shlex.quote(f"{path}-origin/gold/items")
    assert f"rm -r {there} && cp -r {copied} {there} " in said


@pytest.mark.parametrize("feature", ["catalogManaged", "catalogOwned-preview"])
def test_a_table_of_a_catalog_is_refused(lake: Lake, feature: str) -> None:
    def managed(actions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [feature, "inCommitTimestamp"]
        protocol = {"minReaderVersion": 3, "minWriterVersion": 7}
        return [
            *actions,
            {"protocol": protocol | {"readerFeatures": [feature], "writerFeatures": names}},
        ]

    rewritten(lake, 2, managed)
    with pytest.raises(
        TableRefused, match=r"^gold\.items is catalog-managed.*Nothing was written.*delete"
    ):
        foreign.make_ready(again(lake), ITEMS)


def test_partitions_of_others_are_refused(lake: Lake) -> None:
    write_deltalake(
        lake.path(ITEMS), rows("a", "b"), mode="overwrite", schema_mode="overwrite",
        partition_by=["item_index"],
    )  # fmt: skip
    with pytest.raises(
        TableRefused,
        match=r"gold\.items was partitioned by item_index by another writer: version 3 \(WRITE by "
        r"delta-rs.*RESTORE TABLE delta\.`.*/gold/items` TO VERSION AS OF 2$",
    ):
        foreign.make_ready(again(lake), ITEMS)
    DeltaTable(lake.path(ITEMS)).restore(2)
    foreign.make_ready(again(lake), ITEMS)
    assert foreign.changed(lake, ITEMS) is None


@pytest.mark.parametrize(
    ("of_spark", "of_delta", "says"),
    [
        ("4.0.1", "4.4.0", r"Spark 4\.1\.x is needed, found 4\.0\.1: run `make setup`, or give spark-submit"),
        ("4.10.0", "4.4.0", r"Spark 4\.1\.x is needed, found 4\.10\.0"),
        ("4.1.4", "4.5.1", r"Delta 4\.4\.x is needed, found 4\.5\.1: .*delta-spark_4\.1_2\.13:4\.4\.0"),
    ],
)  # fmt: skip
def test_another_version_of_an_engine_is_refused(of_spark: str, of_delta: str, says: str) -> None:
    check_versions("4.1.9", "4.4.3-SNAPSHOT")
    with pytest.raises(SettingsError, match=says):
        check_versions(of_spark, of_delta)


# -- who writes -----------------------------------------------------------------------------------


def test_spark_writes_what_rows_have_to_satisfy(lake: Lake) -> None:
    assert not lake.only_spark(ITEMS)
    DeltaTable(lake.path(ITEMS)).alter.add_constraint({"named": "item_id <> ''"})
    assert features.checked(DeltaTable(lake.path(ITEMS))) == ["named"]
    assert lake.only_spark(ITEMS)


def test_spark_writes_computed_and_required_columns(lake: Lake) -> None:
    theirs = {"name": "theirs", "type": "string", "nullable": True, "metadata": {}}

    def column(**more: Any) -> None:
        def edit(actions: list[dict[str, Any]]) -> list[dict[str, Any]]:
            for one in actions:
                if "metaData" in one:
                    schema = json.loads(one["metaData"]["schemaString"])
                    schema["fields"] = [*schema["fields"][: len(ITEMS.columns)], theirs | more]
                    one["metaData"]["schemaString"] = json.dumps(schema)
            return actions

        rewritten(lake, 0, edit)

    column()
    assert not again(lake).lake.only_spark(ITEMS)
    column(nullable=False)
    assert again(lake).lake.only_spark(ITEMS)
    column(metadata={"delta.generationExpression": "upper(item_id)"})
    assert again(lake).lake.only_spark(ITEMS)


# -- missing files, older copies ------------------------------------------------------------------


def test_missing_files_are_found_and_taken_out(lake: Lake) -> None:
    assert lake.missing_files(ITEMS) == []
    gone = file_of(lake, 2)
    gone.unlink()
    assert lake.missing_files(ITEMS) == [gone.name]
    lake.drop_missing(ITEMS, RUN)
    assert lake.missing_files(ITEMS) == []
    assert [row["item_id"] for row in lake.table_of(ITEMS, 3, ["item_id"]).to_pylist()] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("repaired", [False, True])
def test_reading_again_begins_without_missing_files(lake: Lake, repaired: bool) -> None:
    """(Of any table: of `bronze.events` it is done.)"""
    context = again(lake)
    assert foreign.begin_reading_again(context, ITEMS) == []
    assert lake.property(ITEMS, foreign.REPLACED) is None
    file_of(lake, 2).unlink()
    if repaired:
        DeltaTable(lake.path(ITEMS)).repair()
    notes = foreign.begin_reading_again(context, ITEMS)
    assert len(notes) == (not repaired)
    with pytest.raises(TableLost, match=r"did not finish\. Run it again: .*--reload"):
        foreign.refuse_loss(context, ITEMS)
    foreign.end_reading_again(context, ITEMS)
    assert lake.property(ITEMS, foreign.REPLACED) == RUN


def told(lake: Lake, *versions: int) -> None:
    lake.create(RUNS)
    start = [datetime(2026, 1, 1 + day, tzinfo=UTC) for day in range(len(versions))]
    place = list(RUNS.columns).index("started_ts")
    reports = [list(run(RUNS, f"run-{number}", "ok", one)) for number, one in enumerate(versions)]
    for one, time in zip(reports, start, strict=True):
        one[place] = time
    lake.put_small(RUNS, [tuple(one) for one in reports])


def test_an_older_copy_of_the_items_is_told_to_their_readers(lake: Lake, capsys: Any) -> None:
    told(lake, 1, 2)
    foreign.make_ready(again(lake), ITEMS)
    assert lake.property(ITEMS, NUMBERING) is None
    Path(lake.path(ITEMS), "_delta_log", f"{2:020}.json").unlink()
    foreign.make_ready(again(lake), ITEMS)
    assert lake.property(ITEMS, NUMBERING) == RUN
    assert (
        "gold.items is at version 1, but a run before reported version 2" in capsys.readouterr().out
    )


def test_a_table_that_was_made_anew_is_no_older_copy(lake: Lake) -> None:
    told(lake, 9, 2)
    foreign.make_ready(again(lake), ITEMS)
    assert lake.property(ITEMS, NUMBERING) is None


def test_readers_of_sessions_learn_of_an_older_copy(lake: Lake) -> None:
    lake.create(SESSIONS)
    lake.set_property(SESSIONS, foreign.OLDER_COPY, "a run")
    context = again(lake)
    anew, notes = foreign.to_make_anew(context, ITEMS, SESSIONS, 1)
    assert anew and "silver.sessions was replaced" in notes[0]
    foreign.answer(context, ITEMS, SESSIONS)
    assert foreign.to_make_anew(context, ITEMS, SESSIONS, 1) == (False, [])


# -- rows are compared file by file ---------------------------------------------------------------


def test_only_files_that_others_replaced_are_compared(lake: Lake, monkeypatch: Any) -> None:
    path = lake.path(ITEMS)
    DeltaTable(path).alter.add_columns([Field("theirs", PrimitiveType("string"))])
    DeltaTable(path).update({"theirs": "'x'"}, predicate="item_id = 'c'")
    newest = lake.version(ITEMS)
    assert newest is not None
    # The file that they left alone is not read: it may be of any size, and it is gone here.
    monkeypatch.setattr(Thresholds, "compared_bytes", 2 * file_of(lake, 2).stat().st_size)
    aside = file_of(lake, 1).rename(Path(path).parent / "aside")
    assert foreign_rows.same_rows(lake, ITEMS, 2, newest)
    aside.rename(file_of(lake, 1))
    DeltaTable(path).update({"event_count": "7"}, predicate="item_id = 'c'")
    assert not foreign_rows.same_rows(lake, ITEMS, 2, newest + 1)
    assert lake.compared == {("gold.items", 2, newest): True, ("gold.items", 2, newest + 1): False}


def test_a_version_that_cannot_be_read_is_another(lake: Lake) -> None:
    DeltaTable(lake.path(ITEMS)).update({"event_count": "event_count"}, predicate="item_id = 'c'")
    file_of(lake, 2).unlink()
    assert not foreign_rows.same_rows(lake, ITEMS, 2, 3)
    assert not foreign_rows.same_rows(lake, ITEMS, 99, 3)


# -- the stack of an engine's error ---------------------------------------------------------------

SOURCE = """
[source]
name = "clicks"
landing = "nowhere/*.csv"
format = "csv"

[columns]
user_id = "user"
item_id = "item"
event_ts = "ts"

[time]
unit = "s"
"""


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command that an engine's error stops, with the lake at a place."""
    file = tmp_path / "source.toml"
    file.write_text(SOURCE)

    def fails(args: Any, source: Any) -> Any:
        cli.opened(args, source)
        raise FileNotFoundError(
            f"No such file: {tmp_path}/lake/clicks/silver/sessions/part-0.parquet"
        )

    def command(lake: str) -> int:
        monkeypatch.setenv("SESSIONMILL_LAKE", lake)
        monkeypatch.setitem(cli.WITHOUT_CANDIDATE, "rules", fails)
        settings.cache_clear()
        return cli.main(["rules", "--source", str(file)])

    yield command
    settings.cache_clear()


def test_stderr_has_the_sentence_and_where_the_stack_is(
    stopped: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(str(tmp_path / "a läke")) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("rules stopped: silver.sessions: file part-0.parquet is missing")
    [file] = (tmp_path / "a läke/clicks/_runs").rglob("rules.all.error.txt")
    assert second == f"The engine's stack is in {file}"
    assert "Traceback" in file.read_text() and "FileNotFoundError" in file.read_text()


def test_a_stack_that_cannot_be_kept_is_printed(
    stopped: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert stopped(str(tmp_path / "file")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_command_that_brings_missing_events_back_is_named() -> None:
    from jobs.lake.delta_errors import first_line

    place = EVENTS.path("/lake", "clicks")
    said = first_line(FileNotFoundError(f"No such file: {place}/part-0.parquet"))
    assert said is not None and said.startswith(
        "bronze.events: file part-0.parquet is missing. Restore the file from a backup. Without one read all "
        "landing files again: python -m jobs run --source clicks --reload. "
    )


@pytest.mark.parametrize(
    "words",
    [
        ["validate"],
        ["maintain"],
        ["replay-rejects"],
        ["replay-filtered"],
        ["forget", "--user", "u"],
    ],
)
def test_nothing_is_written_into_a_lake_without_the_sources_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str],
) -> None:  # fmt: skip
    (tmp_path / "source.toml").write_text(SOURCE)
    monkeypatch.setenv("SESSIONMILL_LAKE", str(tmp_path / "mistyped"))
    settings.cache_clear()
    assert cli.main([*words, "--source", str(tmp_path / "source.toml")]) == 1
    settings.cache_clear()
    said = capsys.readouterr().err
    assert said.startswith(f"{words[0]} stopped: there are no tables of ")
    assert str(tmp_path / "mistyped") in said and "python -m jobs run" in said
    assert not (tmp_path / "mistyped").exists()
