"""The balance of a lake, without a JVM: what is lost in silver or gold is seen, wherever it lay; what is
only written anew, or forgotten in `ops.fingerprints`, is no alarm."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

from jobs.audit import balance, fingerprint_table, fingerprints
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import AuditFailed
from jobs.core.source_file import load_source
from jobs.core.tables import EVENTS, FINGERPRINTS, PERSON_EVENTS, SEQUENCES, SESSIONS, Table
from jobs.lake import filesystem
from jobs.lake.context import Context
from jobs.lake.delta import Lake
from tests.support.others import data_files
from tests.support.spark_tools import CLICKS

RUN = "0123456789abcdef" * 2
START = datetime(2024, 3, 1, tzinfo=UTC)
Rows = list[dict[str, Any]]
TABLES = (EVENTS, SESSIONS, SEQUENCES)


def no_spark() -> Any:
    raise AssertionError("Spark was started")


class World:
    """A lake of two nights as the jobs would leave it: nine users, one of them with a runaway session."""

    def __init__(self, folder: Path) -> None:
        file = folder / "clicks.toml"
        file.write_text(CLICKS.replace("{landing}", str(folder)))
        self.lake = Lake(no_spark, str(folder / "lake"), "clicks")
        self.context = Context(load_source(str(file)), self.lake, None, "by-hand")
        self.sessions: list[Rows] = [
            [session(user, 24 * night + hour) for user in range(9) for hour in (0, 3)]
            for night in (0, 1)
        ]
        self.sessions[0][5]["runaway"] = "events"
        for night in self.sessions:
            self.append(EVENTS, [event for one in night for event in events_of(one)])
            self.append(SESSIONS, night, consumed=(EVENTS, self.lake.version(EVENTS)))
        every = [one for night in self.sessions for one in night]
        self.append(SEQUENCES, sequences_of(every), consumed=(SESSIONS, 2))

    def append(
        self, table: Table, rows: Rows, mode: Any = "append", consumed: Any = None, ours: bool = True,
        moves: bool = True,
    ) -> None:  # fmt: skip
        """A commit that is ours, or says so."""
        self.lake.create(table)
        base = self.lake.version(table) or 0
        by = [Transaction(self.lake.guard(table), base + 1)]
        if consumed:
            by.append(Transaction(self.lake.app_id(table, consumed[0]), consumed[1]))
        write_deltalake(
            self.lake.path(table), pa.Table.from_pylist(rows, arrow_schema(table.columns)), mode=mode,
            commit_properties=CommitProperties(
                custom_metadata={"userMetadata": RUN} if ours else {}, app_transactions=by
            ),
        )  # fmt: skip

    def files(self, table: Table) -> list[Path]:
        """Oldest first."""
        found = data_files(self.lake.path(table))
        return sorted(found, key=lambda one: one.stat().st_mtime_ns)

    def rows(self, table: Table) -> Rows:
        found: Rows = self.lake.small(table).to_pylist()
        return found

    def hold(self) -> list[str]:
        return [said for target in balance.DERIVED for said in balance.hold(self.context, target)]

    def refused(self, target: Table) -> str:
        with pytest.raises(AuditFailed) as red:
            balance.hold(self.context, target)
        return str(red.value)


def session(user: int, hour: int) -> dict[str, Any]:
    times = [START + timedelta(hours=hour, minutes=n, microseconds=user) for n in range(3)]
    made = [
        {"event_id": f"{user}-{time.isoformat()}", "event_ts": time, "item_id": "i",
         "feedback": "positive"}
        for time in times
    ]  # fmt: skip
    return {
        "session_id": f"{user}/{hour}", "user_id": f"u{user}", "start_ts": times[0],
        "end_ts": times[-1], "start_date": times[0].date(), "event_count": 3, "runaway": None,
        "events": made,
    }  # fmt: skip


def events_of(one: dict[str, Any]) -> Rows:
    return [event | {"user_id": one["user_id"]} for event in one["events"]]


def sequences_of(sessions: Rows) -> Rows:
    users: dict[str, dict[str, Any]] = {}
    for one in sessions:
        if one["runaway"] is None:
            row = users.setdefault(one["user_id"], {"user_id": one["user_id"], "event_ts": []})
            row["event_ts"] += [event["event_ts"] for event in one["events"]]
    return list(users.values())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no data file is read for its fingerprint."""
    nothing = {name: lambda path: pytest.fail(f"{path} was read") for name in fingerprints.OF_FILE}
    monkeypatch.setattr(fingerprint_table, "OF_FILE", nothing)


def test_a_balanced_lake_is_read_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.hold() == []
    stored = world.rows(FINGERPRINTS)
    assert {(row["table_name"], row["path"]) for row in stored} == {
        (table.full_name, path.name) for table in TABLES for path in world.files(table)
    }
    total = {table.full_name: 0 for table in TABLES}
    for row in stored:
        total[row["table_name"]] += row["events"]
    assert total == {EVENTS.full_name: 108, SESSIONS.full_name: 108, SEQUENCES.full_name: 105}
    assert sum(row["kept_events"] or 0 for row in stored) == 105
    version = world.lake.version(FINGERPRINTS)
    forbid_reading(monkeypatch)
    assert world.hold() == [] and world.lake.version(FINGERPRINTS) == version


# -- losses ---------------------------------------------------------------------------------------


def rewritten(
    world: World, table: Table, change: Callable[[Rows], Rows], moves: bool = True
) -> None:
    """The oldest file of a table written anew with other rows, in a commit that pretends to be ours."""
    old = world.files(table)[0]
    rows = change(filesystem.read_parquet(str(old)).to_pylist())
    found = DeltaTable(world.lake.path(table))
    put = pa.Table.from_pylist(rows, arrow_schema(table.columns))
    kept = [
        row
        for file in world.files(table)[1:]
        for row in filesystem.read_parquet(str(file)).to_pylist()
    ]
    put = pa.concat_tables([put, pa.Table.from_pylist(kept, put.schema)])
    by = CommitProperties(
        custom_metadata={"userMetadata": RUN},
        app_transactions=[Transaction(world.lake.guard(table), found.version() + 1)],
    )
    write_deltalake(found, put, mode="overwrite", commit_properties=by)
    if not moves:  # as OPTIMIZE says it
        log = Path(f"{world.lake.path(table)}/_delta_log/{found.version():020}.json")
        log.write_text(log.read_text().replace('"dataChange":true', '"dataChange":false'))


@pytest.mark.parametrize("known", [True, False], ids=["known before", "never looked at"])
def test_an_event_lost_in_an_old_file_of_sessions(world: World, known: bool) -> None:
    if known:
        world.hold()
    rewritten(
        world, SESSIONS, lambda rows: [*rows[1:], rows[0] | {"events": rows[0]["events"][:2]}]
    )
    said = world.refused(SESSIONS)
    assert said.startswith(
        "silver.sessions version 3 has 1 event fewer than the 108 events of bronze.events version 2, "
        "from which it was made"
    )
    assert said.endswith("python -m jobs run --source clicks --rebuild")


def test_a_session_lost_in_silver_and_one_that_stands_twice(world: World) -> None:
    rewritten(world, SESSIONS, lambda rows: rows[1:])
    assert "has 3 events fewer than the 108" in world.refused(SESSIONS)
    rewritten(world, SESSIONS, lambda rows: [*rows, *rows[:2]])
    said = world.refused(SESSIONS)
    assert "has 3 events more than the 108" in said and said.endswith("--reload --rebuild")


def test_a_user_lost_in_gold(world: World) -> None:
    world.hold()
    rewritten(world, SEQUENCES, lambda rows: rows[1:])
    assert balance.hold(world.context, SESSIONS) == []
    said = world.refused(SEQUENCES)
    assert said.startswith(
        "gold.sequences version 2 has 12 events fewer than the 105 events of silver.sessions version 2 "
        "that are in no runaway session"
    )
    assert said.endswith("python -m jobs run --source clicks --rebuild")


def test_events_that_others_lost_by_packing_bronze(world: World) -> None:
    """A commit that claims to move no row, and does: the newest version counts."""
    rewritten(world, EVENTS, lambda rows: rows[1:], moves=False)
    said = world.refused(SESSIONS)
    assert "has 1 event more than the 107 events of bronze.events version 3" in said
    assert "bronze.events lost them" in said and said.endswith("--reload --rebuild")


def test_users_and_times_count_not_only_the_number(world: World) -> None:
    def swapped(rows: Rows) -> Rows:
        return [*rows[1:], rows[0] | {"user_id": "nobody"}]

    rewritten(world, SESSIONS, swapped)
    assert "has as many events as the 108 events of bronze.events" in world.refused(SESSIONS)


def test_events_of_people_are_those_of_the_log_and_sessions_have_theirs(world: World) -> None:
    """Two visits of an anonymous id that belongs to u0, one that belongs to nobody."""
    log = [event for night in world.sessions for one in night for event in events_of(one)]
    for row in log[:6]:
        row |= {"user_id": None, "anonymous_id": "x"}
    log[6] |= {"user_id": None, "anonymous_id": "y"}
    world.append(EVENTS, log, mode="overwrite")
    people = [
        row | {"log_user_id": row["user_id"], "user_id": row["user_id"] or "anonymous:y"}
        for row in log
    ]
    for row in people[:6]:
        row["user_id"] = "u0"
    first = world.lake.version(EVENTS)
    world.append(PERSON_EVENTS, people, consumed=(EVENTS, first))
    assert world.lake.session_events() is PERSON_EVENTS
    assert balance.hold(world.context, PERSON_EVENTS) == []
    by_person: dict[str, Rows] = {}
    for row in people:
        by_person.setdefault(row["user_id"], []).append(row)
    made = [
        session(number, 0) | {"user_id": user, "events": events, "event_count": len(events)}
        for number, (user, events) in enumerate(by_person.items())
    ]
    world.append(SESSIONS, made, mode="overwrite", consumed=(PERSON_EVENTS, 1))
    assert balance.hold(world.context, SESSIONS) == []
    made[0]["user_id"] = "u1"
    world.append(SESSIONS, made, mode="overwrite", consumed=(PERSON_EVENTS, 1))
    assert "has as many events as the 108 events of silver.events version 1" in world.refused(
        SESSIONS
    )
    # Whose the log says that an event is counts, and its time; not whose it is by a link.
    rewritten(world, PERSON_EVENTS, lambda rows: [rows[0] | {"user_id": "u5"}, *rows[1:]])
    assert balance.hold(world.context, PERSON_EVENTS) == []
    rewritten(world, PERSON_EVENTS, lambda rows: [rows[0] | {"anonymous_id": "z"}, *rows[1:]])
    assert "has as many events as the 108 events of bronze.events" in world.refused(PERSON_EVENTS)
    rewritten(world, PERSON_EVENTS, lambda rows: rows[1:])
    assert "has 1 event fewer than the 108 events of bronze.events" in world.refused(PERSON_EVENTS)


@pytest.mark.parametrize("table", [SESSIONS, SEQUENCES], ids=lambda one: one.name)
def test_a_file_that_is_missing_or_damaged(world: World, table: Table) -> None:
    world.hold()
    path = world.files(table)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    said = world.refused(table)
    assert said.startswith(
        f"{table.full_name}: file {path.name} is damaged. It has {len(whole) - 20:,}"
    )
    path.unlink()
    said = world.refused(table)
    assert said.startswith(f"{table.full_name}: file {path.name} is missing. Restore the file from")
    assert said.endswith("python -m jobs run --source clicks --rebuild")


def test_a_missing_file_of_the_log_names_a_backup(world: World) -> None:
    world.files(EVENTS)[0].unlink()
    assert world.refused(SESSIONS).endswith("is missing. Restore the file from a backup")


# -- what is no loss ------------------------------------------------------------------------------


def test_rows_of_fingerprints_that_are_missing_are_made_again(world: World) -> None:
    world.hold()
    before = world.rows(FINGERPRINTS)
    for gone in ("table_name = 'silver.sessions'", "events > 0"):
        DeltaTable(world.lake.path(FINGERPRINTS)).delete(gone)
        assert world.hold() == []
        assert sorted(map(str, world.rows(FINGERPRINTS))) == sorted(map(str, before))


def test_a_wrong_row_is_corrected_and_no_alarm(world: World) -> None:
    world.hold()
    before = world.rows(FINGERPRINTS)
    DeltaTable(world.lake.path(FINGERPRINTS)).update(
        {"events": "events + 1"}, predicate="table_name = 'gold.sequences'"
    )
    assert world.hold() == [
        "ops.fingerprints: 1 rows were not what their files have. They were made again"
    ]
    assert sorted(map(str, world.rows(FINGERPRINTS))) == sorted(map(str, before))
    assert world.hold() == []


def test_a_wrong_row_hides_no_loss_that_it_does_not_fit(world: World) -> None:
    world.hold()
    rewritten(world, SESSIONS, lambda rows: rows[1:])
    DeltaTable(world.lake.path(FINGERPRINTS)).update(
        {"events": "events + 3"}, predicate="table_name = 'silver.sessions'"
    )
    assert "has 3 events fewer" in world.refused(SESSIONS)


def test_fingerprints_and_tables_that_were_restored(world: World) -> None:
    world.hold()
    rewritten(world, SESSIONS, lambda rows: rows[1:])
    world.refused(SESSIONS)
    DeltaTable(world.lake.path(SESSIONS)).restore(2)
    assert world.hold() == []
    DeltaTable(world.lake.path(FINGERPRINTS)).restore(1)
    assert world.hold() == []


@pytest.mark.parametrize("vacuumed", [False, True])
def test_files_that_others_packed(world: World, vacuumed: bool) -> None:
    world.hold()
    for table in TABLES:
        found = DeltaTable(world.lake.path(table))
        found.optimize.compact()
        if vacuumed:
            found.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    assert len(world.files(SESSIONS)) == 1 and world.hold() == []


def test_events_that_nobody_has_cut_yet(world: World) -> None:
    """Derived tables are held against the version that they were made from."""
    world.hold()
    world.append(EVENTS, events_of(session(1, 60)))
    assert world.hold() == []


def test_an_older_version_that_cannot_be_read_any_more_is_a_note(world: World) -> None:
    world.append(EVENTS, events_of(session(1, 60)))
    found = DeltaTable(world.lake.path(EVENTS))
    found.optimize.compact()
    found.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    [said] = balance.hold(world.context, SESSIONS)
    assert said == (
        "silver.sessions was not compared with bronze.events version 2, from which it was made: "
        "2 of its data files cannot be read any more"
    )


def test_rows_of_files_that_are_gone_are_removed(world: World) -> None:
    world.hold()
    before = len(world.rows(FINGERPRINTS))
    world.append(SEQUENCES, sequences_of(world.sessions[0] + world.sessions[1]), "overwrite",
                 (SESSIONS, 2))  # fmt: skip
    world.append(EVENTS, events_of(session(1, 60)))
    world.hold()
    assert len(world.rows(FINGERPRINTS)) == before + 1
    assert fingerprint_table.prune(world.context, balance.needed(world.context)) == 1
    assert {row["path"] for row in world.rows(FINGERPRINTS)} == {
        path.name for table in TABLES for path in world.files(table)
    } - {world.files(EVENTS)[-1].name}
    assert fingerprint_table.prune(world.context, balance.needed(world.context)) == 0
    assert world.hold() == []


def test_what_validate_says_of_the_table(world: World) -> None:
    held = {
        "rows_are_of_their_files": True, "people_balance": True, "sessions_balance": True,
        "sequences_balance": True,
    }  # fmt: skip
    world.hold()
    assert balance.validated(world.context) == (held, {})
    DeltaTable(world.lake.path(FINGERPRINTS)).update(
        {"digest_sum": "digest_sum + 1"}, predicate="table_name = 'bronze.events'"
    )
    wrong = {"rows_are_of_their_files": False}
    version = world.lake.version(FINGERPRINTS)
    assert balance.validated(world.context) == (held | wrong, {})
    rewritten(world, SEQUENCES, lambda rows: rows[1:])
    assert balance.validated(world.context) == (held | wrong | {"sequences_balance": False}, {})
    assert world.lake.version(FINGERPRINTS) == version


# -- fingerprints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_sums_agree_as_the_events_do(tmp_path: Path, seed: int) -> None:
    """Of files cut anywhere, in any order; held against counting users and times by hand."""
    drawn = random.Random(seed)
    log = [
        (drawn.choice(["u", "ü", "", "a" * 32, "user of any length"]), drawn.randrange(5) * 10**6)
        for _ in range(drawn.randrange(30))
    ]
    other = drawn.sample(log, len(log))
    for _ in range(drawn.randrange(3)):
        if other:
            at = drawn.randrange(len(other))
            other[at : at + 1] = drawn.choice(
                [
                    [],
                    [other[at]] * 2,
                    [drawn.choice(log)],
                    [(other[at][0], drawn.randrange(6) * 10**6)],
                ]
            )
    left = sum_of(tmp_path, drawn, EVENTS, log)
    for table in (EVENTS, SESSIONS, SEQUENCES):
        right = sum_of(tmp_path, drawn, table, other)
        assert (left == right) == (Counter(log) == Counter(other)), (log, other)


@pytest.mark.parametrize("table", TABLES, ids=lambda one: one.name)
def test_a_large_file_is_read_in_parts(
    world: World, monkeypatch: pytest.MonkeyPatch, table: Table
) -> None:
    file = world.files(table)[0]
    of_file = fingerprints.OF_FILE[table.full_name]
    whole = of_file(str(file))
    pq.write_table(pq.read_table(file), file, row_group_size=2)
    monkeypatch.setattr(fingerprints, "PART_BYTES", 1)
    assert of_file(str(file)) == whole


def sum_of(folder: Path, drawn: random.Random, table: Table, log: list[tuple[str, int]]) -> Any:
    """The sum of two files of a table with these events."""
    cut, rows = drawn.randrange(len(log) + 1), []
    for number, part in enumerate((log[:cut], log[cut:])):
        path = f"{folder}/{table.name}-{number}.parquet"
        users: dict[str, list[int]] = {}
        for user, time in part:
            users.setdefault(user, []).append(time)
        if table is EVENTS:
            made: Rows = [{"user_id": user, "event_ts": time} for user, time in part]
        elif table is SESSIONS:
            made = [
                {"user_id": user, "events": [{"event_ts": time}], "runaway": None}
                for user, time in part
            ]
        else:
            made = [{"user_id": user, "event_ts": times} for user, times in users.items()]
        filesystem.write_parquet(path, pa.Table.from_pylist(made, arrow_schema(table.columns)))
        rows += fingerprints.OF_FILE[table.full_name](path)
    return fingerprints.summed(fingerprints.table_of(rows))


def test_files_of_other_writers_say_the_same(tmp_path: Path) -> None:
    """Views of texts, lists of 64 bits, times of nanoseconds: what OPTIMIZE and MERGE may write."""
    rows = pa.Table.from_pylist(sequences_of([session(n, n) for n in range(4)]),
                                arrow_schema(SEQUENCES.columns))  # fmt: skip
    filesystem.write_parquet(f"{tmp_path}/ours.parquet", rows)
    theirs = rows.select(["user_id", "event_ts"])
    theirs = theirs.set_column(0, "user_id", theirs["user_id"].cast(pa.string_view()))
    theirs = theirs.set_column(
        1, "event_ts", theirs["event_ts"].cast(pa.large_list(pa.timestamp("us", "UTC")))
    )
    pq.write_table(theirs, f"{tmp_path}/theirs.parquet", row_group_size=1)
    found = [fingerprints.of_sequences(f"{tmp_path}/{name}.parquet") for name in ("ours", "theirs")]
    assert pc.all(pc.equal(*(fingerprints.table_of(one)["digest_sum"] for one in found))).as_py()
    assert found[0][0]["events"] == found[1][0]["events"] == 12
