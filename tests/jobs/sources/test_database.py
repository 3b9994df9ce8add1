"""A table of a database: which rows a run brings into the landing, without Spark."""

from __future__ import annotations

import uuid
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bronze import landing
from jobs.core import crash_points
from jobs.core.errors import SourceError
from jobs.core.source_file import load_source
from jobs.core.tables import FILES
from jobs.sources import database
from jobs.sources.database_rows import Column, Mark, array_of, before, together
from tests.support.database_tools import Shop
from tests.support.spark_tools import Workshop


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def workshop(folder: Path, toml: str) -> Workshop:
    return Workshop(None, folder, toml)


def fetched(work: Workshop) -> tuple[list[Any], list[str]]:
    """What the next run brings: the ids of the new rows, file by file, and the notes."""
    there = set(work.landing.iterdir())
    notes = landing.fetch(work.context())
    new = sorted(set(work.landing.iterdir()) - there)
    return [pq.read_table(one)["id"].to_pylist() for one in new], notes


def test_a_run_brings_the_rows_that_are_new(shop: Shop, tmp_path: Path) -> None:
    work = workshop(tmp_path, shop.toml())
    assert fetched(work) == ([], [])
    shop.sell(2, 1, 3)
    assert fetched(work) == ([[1, 2, 3]], [])
    assert fetched(work) == ([], [])
    shop.sell(4)
    shop.sell(3, user="bob")  # (of one value with a row that was read: no row is lost at an edge)
    [[first, second]] = fetched(work)[0]
    assert (first, second) == (3, 4)


def test_a_row_that_is_committed_late_is_found_within_the_lag(shop: Shop, tmp_path: Path) -> None:
    work = workshop(tmp_path, shop.toml(lag=5))
    shop.sell(10, 20)
    assert fetched(work) == ([[10, 20]], [])
    shop.sell(15, 14)
    assert fetched(work) == ([[15]], [])  # 14 is farther back
    assert fetched(work) == ([], [])
    work.describe(shop.toml(lag=6))
    assert fetched(work) == ([[14]], [])


def test_what_a_run_brought_is_known_without_its_files(shop: Shop, tmp_path: Path) -> None:
    """A landing may be cleared: the ledger has the names."""
    work = workshop(tmp_path, shop.toml())
    shop.sell(1, 2)
    fetched(work)
    [path] = work.landing.iterdir()
    work.lake.create(FILES)
    named = {"file": str(path), "size": 1, "modified_ms": 1, "read_ts": datetime.now(UTC)}
    work.lake.put_small(FILES, [tuple(named.get(one) for one in FILES.columns)])
    path.unlink()
    shop.sell(3)
    assert fetched(work) == ([[2, 3]], [])  # (2 is a duplicate: what it was is not known)


def test_a_run_that_was_killed_goes_on_behind_its_last_file(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CHUNK", 2)
    monkeypatch.setattr(database, "FILE_ROWS", 4)
    work = workshop(tmp_path, shop.toml())
    shop.sell(*range(1, 12))
    with monkeypatch.context() as patch:
        patch.setattr(crash_points, "point", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fetched(work)
    assert len(list(work.landing.iterdir())) == 1
    cut = work.land("_rows-id-n6-killed-0.parquet", b"PAR1")
    assert fetched(work) == ([[10, 11], [5, 6, 7, 8, 9]], [])
    ids = [one for file in work.landing.iterdir() for one in pq.read_table(file)["id"].to_pylist()]
    assert sorted(ids) == list(range(1, 12)) and not cut.exists()


def test_a_retry_of_a_batch_overwrites_nothing(shop: Shop, tmp_path: Path) -> None:
    work = workshop(tmp_path, shop.toml(lag=5))
    for one in (10, 9):  # the second is committed late: the largest value is the first's, again
        shop.sell(one)
        landing.fetch(work.context(batch="night"))
    ids = [pq.read_table(one)["id"].to_pylist() for one in sorted(work.landing.iterdir())]
    assert ids == [[10], [9]]


def test_a_table_that_was_emptied_is_noticed(shop: Shop, tmp_path: Path) -> None:
    work = workshop(tmp_path, shop.toml())
    shop.sell(10)
    fetched(work)
    shop.run("DELETE FROM events")
    shop.sell(1)
    ids, [note] = fetched(work)
    assert ids == [] and "has id up to 1, and rows up to 10 were read before" in note


def test_nulls_and_times_far_ahead_are_said_and_keep_nothing_from_being_read(
    shop: Shop, tmp_path: Path
) -> None:
    work = workshop(tmp_path, shop.toml())
    shop.sell(1)
    shop.run("INSERT INTO events (item) VALUES ('x')")
    ids, [note] = fetched(work)
    assert ids == [[1]] and note.startswith("jdbc.table = 'events' has rows in which id is null")
    now = datetime(2024, 6, 1, 12, tzinfo=UTC)
    far = datetime(9999, 12, 31, tzinfo=UTC)
    assert database.latest(far, now) == now + timedelta(days=1)
    assert database.latest(far.replace(tzinfo=None), now) == datetime(2024, 6, 2, 12)
    assert database.latest(far.date(), now) == date(2024, 6, 2)
    assert database.latest(now, now) == now and database.latest(7, now) == 7


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"incremental_column": "idd"}, "'idd': jdbc.table = 'events' has no such column: did you mean 'id'?"),
        ({"incremental_column": "zzz"}, "no such column: it has id, user, item, at"),
        ({"incremental_column": "item"}, "'item', and the table was read by 'id' before: name that one"),
        ({"table": "nowhere"}, "jdbc.table = 'nowhere' cannot be read: no such table: nowhere"),
        ({"url": "sqlite:///nowhere.db"}, "there is no file 'nowhere.db'"),
        ({"url": "somewhere"}, "jdbc.url = 'somewhere' is no address of a database: write"),
        ({"url": "dbase://me@there/x"}, "needs a driver that is not installed"),
        ({"password_env": "NO_SUCH_PW"}, "jdbc.password_env = 'NO_SUCH_PW': this environment variable"),
        ({"password_file": "/nowhere/pw"}, "jdbc.password_file = '/nowhere/pw' cannot be read: No such"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(shop: Shop, tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    work = workshop(tmp_path, shop.toml())
    shop.sell(1)
    fetched(work)
    work.describe(shop.toml(**keys))
    with pytest.raises(SourceError) as error:
        fetched(work)
    assert says in str(error.value)


def test_a_column_of_texts_orders_and_has_no_lag(shop: Shop, tmp_path: Path) -> None:
    work = workshop(tmp_path, shop.toml(incremental_column="at"))
    shop.sell(1, 2)
    assert fetched(work) == ([[1, 2]], [])
    shop.sell(3)
    assert fetched(work) == ([[3]], [])
    work.describe(shop.toml(incremental_column="at", lag=60))
    with pytest.raises(SourceError, match=r"jdbc.lag = 60: .* is text in jdbc.table"):
        fetched(work)


def test_a_query_is_sql_of_the_database(shop: Shop, tmp_path: Path) -> None:
    asked = "SELECT id, user, item || ':x 12:30 %' AS item, at FROM events WHERE item LIKE 'i%';"
    work = workshop(tmp_path, shop.toml(table=None, query=asked, url=f"jdbc:sqlite:{shop.path}"))
    shop.sell(1)
    assert fetched(work) == ([[1]], [])
    [path] = work.landing.iterdir()
    assert pq.read_table(path)["item"].to_pylist() == ["i1:x 12:30 %"]


URLS = ("postgresql://me:s3cret@db/x", "mysql://me:s3c/r3t@db/x", "postgresql://db/x?password=s3cret",
        "mssql://db;user=me;PWD=s3cret")  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_a_password_in_the_source_file_is_refused_and_not_repeated(
    shop: Shop, tmp_path: Path, url: str
) -> None:
    work = workshop(tmp_path, shop.toml(url=url))
    with pytest.raises(SourceError, match=r"jdbc.url has a password: take it out") as error:
        load_source(str(work.file))
    assert "s3c" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('table = \'events\'', "", "name the log under jdbc.table, or select it by jdbc.query"),
        ('format = "jdbc"', 'format = "csv"', "[jdbc] is for source.format = 'jdbc'"),
        ('format = "jdbc"', 'format = "jdbc"\nredelivery = "replace"', "rows of a database are written once"),
        ('landing = "{landing}"', 'landing = "{landing}/*.parquet"', "the folder where the rows that were read"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together(
    shop: Shop, tmp_path: Path, old: str, new: str, says: str
) -> None:
    toml = shop.toml(table="events")
    assert old in toml
    work = workshop(tmp_path, toml.replace(old, new))
    with pytest.raises(SourceError) as error:
        landing.fetch(work.context())
    assert says in str(error.value)


PARIS = timezone(timedelta(hours=2))


@pytest.mark.parametrize(
    ("value", "lag", "wanted"),
    [
        (7, 2.5, 4), (-7, 0, -7), (2.5, 1, 1.5), (Decimal("2.50"), 0.5, Decimal("2.0")),
        (datetime(2024, 6, 1, 10, 0, 0, 5), 60, datetime(2024, 6, 1, 9, 59, 0, 5)),
        (datetime(2024, 6, 1, 10, tzinfo=UTC), 1, datetime(2024, 6, 1, 9, 59, 59, tzinfo=UTC)),
        (date(2024, 6, 1), 3600, date(2024, 5, 31)), ("2024-06", 0, "2024-06"),
    ],
)  # fmt: skip
def test_a_file_is_named_by_its_largest_value(value: Any, lag: float, wanted: Any) -> None:
    assert before(value, lag) == wanted
    name = Mark("at the time", value).name("hand-2024", 3)
    found = Mark.of(f"/lake/{name}")
    assert found is not None and found.value == value and type(found.value) is type(value)
    assert found.is_of("at the time") and not found.is_of("id")
    assert Mark.of("/lake/clicks.parquet") is None


def test_times_of_any_zone_are_one_time_in_a_name() -> None:
    there = Mark("at", datetime(2024, 6, 1, 12, tzinfo=PARIS)).name("b", 0)
    assert there == "rows-at-z20240601T100000.000000-b-0.parquet"


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        ([1, None], pa.int64(), [1, None]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([2**70, 1], pa.string(), [str(2**70), "1"]),
        ([None], pa.null(), [None]),
        ([Decimal("1.50"), None], pa.string(), ["1.50", None]),
        ([datetime(2024, 6, 1, 12, tzinfo=PARIS)], pa.timestamp("us", "UTC"), [datetime(2024, 6, 1, 10, tzinfo=UTC)]),
        ([datetime(2024, 6, 1)], pa.timestamp("us"), [datetime(2024, 6, 1)]),
        ([date(2024, 6, 1)], pa.date32(), [date(2024, 6, 1)]),
        ([["a", None], None], pa.list_(pa.string()), [["a", None], None]),
        ([[{"a": 1}]], pa.string(), ['[{"a": 1}]']),
        ([{"ä": 1}], pa.string(), ['{"ä": 1}']),
        ([uuid.UUID(int=1)], pa.string(), [str(uuid.UUID(int=1))]),
        ([memoryview(b"x")], pa.binary(), [b"x"]),
        ([True, None], pa.bool_(), [True, None]),
        ([1, "a"], pa.string(), ["1", "a"]),
    ],
)  # fmt: skip
def test_values_keep_what_they_say(values: list[Any], kind: pa.DataType, stored: list[Any]) -> None:
    array = array_of(Column("x"), values)
    assert array.type == kind and array.to_pylist() == stored


def test_a_declared_scale_is_the_type_of_a_number() -> None:
    array = array_of(Column("x", scale=2), [Decimal("1.5"), 3, None])
    assert array.type == pa.decimal128(38, 2)
    nan = array_of(Column("x", scale=2), [Decimal("NaN")])
    assert nan.to_pylist() == ["NaN"]


def test_chunks_of_other_types_are_one_file() -> None:
    tables = [pa.table({"x": pa.array(one)}) for one in ([None], [1], [2.5])]
    assert together(tables)["x"].to_pylist() == [None, 1.0, 2.5]
    assert together([*tables, pa.table({"x": ["a"]})])["x"].to_pylist() == [None, "1", "2.5", "a"]
    assert together(tables[:1])["x"].type == pa.null()
