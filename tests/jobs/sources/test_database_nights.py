"""Logs that are tables of a database, through nights: SQLite, and PostgreSQL where there is one."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from jobs.core import crash_points
from jobs.core.errors import SchemaError, SourceError
from jobs.core.settings import settings
from jobs.core.tables import EVENTS, REJECTS, SESSIONS
from tests.support.database_tools import Shop, postgres_of_our_own
from tests.support.spark_tools import CLICKS, Workshop

pytestmark = pytest.mark.slow

MOVING = ("ingest_ts", "ingest_file", "first_seen_ts", "file", "line")


def as_file(spark: Any, folder: Path, shop: Shop) -> Workshop:
    """The same rows as a file, read in one night."""
    work = Workshop(spark, folder, CLICKS.replace('event_ts = "ts"', 'event_ts = "at"').replace('unit = "s"', ""))  # fmt: skip
    rows = shop.db.execute('SELECT "user", item, at FROM events').fetchall()
    lines = [",".join("" if one is None else one for one in row) for row in rows]
    work.land("all.csv", "\n".join(["user,item,at", *lines]) + "\n")
    work.run()
    return work


class Killed(Exception):
    pass


KILLS = ("ingest.extracted", "ingest.parsed", "ingest.events-published", "ingest.ledger-published")


def test_nights_of_a_table_end_as_one_night_of_a_file(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are appended and committed late, a row comes twice, and each night is killed somewhere."""
    shop = Shop(tmp_path)
    warn = '\n[quality]\non_exceed = "warn"\n'
    work = Workshop(spark, tmp_path / "nights", shop.toml(lag=10) + warn)
    shop.sell(0, 5)
    for night, name in enumerate(KILLS, 1):
        shop.sell(10 * night, 10 * night + 5, 10 * night - 7)  # (the last one late)
        shop.sell(10 * night + 6, user=None)
        with monkeypatch.context() as patch:

            def point(said: str, wanted: str = name) -> None:
                if said == wanted:
                    raise Killed(said)

            patch.setattr(crash_points, "point", point)
            with pytest.raises(Killed):
                work.run("ingest")
        work.run("ingest")
    versions = [work.version(table) for table in (EVENTS, REJECTS)]
    assert work.run().read == 0  # nothing is new
    assert [work.version(table) for table in (EVENTS, REJECTS)] == versions
    calm = as_file(spark, tmp_path / "calm", shop)
    for table in (EVENTS, SESSIONS):
        assert work.rows(table, MOVING) == calm.rows(table, MOVING)
    assert [row["reason"] for row in work.rows(REJECTS)] == ["missing_user_id"] * len(KILLS)
    # Once more from the files that were kept, whatever became of the database.
    shop.run("DELETE FROM events WHERE id < 20")
    assert work.run("ingest", options={"reload": True}).events_new == 0
    assert work.rows(EVENTS, MOVING) == calm.rows(EVENTS, MOVING)


def test_filters_replays_and_erasing_work_as_for_files(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.forget import forget

    shop = Shop(tmp_path)
    keep = shop.toml().replace("[jdbc]", "keep = \"item <> 'i3'\"\n\n[jdbc]")
    work = Workshop(spark, tmp_path / "nights", keep)
    shop.sell(1, 2, 3)
    shop.sell(4, user="bob")
    shop.sell(5, user=None)
    result = work.run("ingest")
    assert (result.read, result.events_new, result.filtered) == (5, 3, {"keep": 1})
    assert result.rejects == {"missing_user_id": 1}
    [reject] = work.rows(REJECTS)
    assert '"item":"i5"' in reject["raw"].replace(" ", "")
    work.describe(
        keep.replace('user_id = "user"', "user_id = { sql = \"coalesce(user, 'guest')\" }")
    )
    assert work.run("replay-rejects").events_new == 1
    monkeypatch.setenv("SESSIONMILL_ID_KEY", "k" * 40)
    settings.cache_clear()
    try:
        done = forget.forget(work.context(), "bob")
        assert (done["events"], done["landing_lines"], done["log_table"]) == (1, 1, "events")
        assert (
            "the table events of others, which is not changed: delete the rows"
            in forget.in_words(done)
        )
        assert work.run("ingest").read == 0
        assert {row["user_id"] for row in work.rows(EVENTS)} == {"ann", "guest"}
    finally:
        settings.cache_clear()


def test_a_column_that_is_gone_stops_the_night(spark: Any, tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    work = Workshop(spark, tmp_path / "nights", shop.toml())
    with pytest.raises(
        SourceError, match=r"jdbc.table = 'events' has no rows with a value in 'id'"
    ):
        work.run("ingest")
    shop.sell(1)
    work.run("ingest")
    shop.run("ALTER TABLE events RENAME COLUMN item TO sku")
    shop.run("INSERT INTO events VALUES (2, 'ann', 'i2', '2024-06-01')")
    with pytest.raises(
        SchemaError, match=r"no column 'item', which columns.item_id names; it has 'id', 'us"
    ):
        work.run("ingest")
    work.describe(shop.toml(table=None, query='SELECT id, "user", sku AS item, at FROM events'))
    result = work.run("ingest")  # (what the stopped night had kept is written anew)
    assert (result.read, result.events_new) == (1, 1)


LISTS = """
[source]
name = "clicks"
landing = "{landing}"
format = "jdbc"
explode = "items"

[jdbc]
url = "URL"
password_env = "SHOP_DB_PW"
table = "shop.baskets"
incremental_column = "updated"
lag = 3600

[columns]
user_id = "who"
item_id = "items"
event_ts = "at"
value = "price"
"""


def test_postgresql(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg2

    with postgres_of_our_own(tmp_path / "state") as url:
        secret = url.partition("sessionmill:")[2].partition("@")[0]
        server = psycopg2.connect(f"{url}/postgres")
        server.autocommit = True
        cursor = server.cursor()
        cursor.execute("CREATE SCHEMA shop")
        cursor.execute(
            "CREATE TABLE shop.baskets (who uuid, items text[], at timestamptz, "
            "price numeric(8, 2), total numeric, about jsonb, updated timestamp)"
        )

        def buy(minute: int, *skus: str) -> None:
            cursor.execute(
                "INSERT INTO shop.baskets VALUES ('00000000-0000-0000-0000-000000000001', %s, "
                "%s, 2.5, 7, '{\"a\": [1]}', %s)",
                (list(skus), f"2024-06-01 12:{minute}:00+02", f"2024-06-01 12:{minute}:00"),
            )

        address = f"{url.replace(':' + secret, '')}/postgres"
        work = Workshop(spark, tmp_path, LISTS.replace("URL", address))
        monkeypatch.setenv("SHOP_DB_PW", "wrong" + secret)
        with pytest.raises(SourceError, match="password authentication failed for user") as error:
            work.run("ingest")
        assert secret not in str(error.value)
        monkeypatch.setenv("SHOP_DB_PW", secret)
        buy(30, "a", "b")
        first = work.run("ingest")
        assert (first.read, first.events_new) == (2, 2)
        buy(40, "c")
        buy(10, "d")  # committed late
        second = work.run("ingest")
        assert (second.read, second.events_new) == (2, 2)
        assert work.run("ingest").read == 0
        rows = {row["item_id"]: row for row in work.rows(EVENTS)}
        assert set(rows) == {"a", "b", "c", "d"}
        assert rows["d"]["event_ts"] == datetime(2024, 6, 1, 10, 10, tzinfo=UTC)
        assert Decimal(str(rows["a"]["value"])) == Decimal("2.5")
        assert rows["a"]["user_id"] == "00000000-0000-0000-0000-000000000001"
        twice = LISTS.replace(
            'table = "shop.baskets"', 'query = "SELECT *, 1 AS who FROM shop.baskets"'
        )
        other = Workshop(spark, tmp_path / "other", twice.replace("URL", address))
        with pytest.raises(SourceError, match=r"jdbc.query has the column 'who' twice: rename one"):
            other.run("ingest")
        cursor.execute("ALTER TABLE shop.baskets ALTER updated TYPE timestamptz")
        with pytest.raises(SourceError, match=r"is a time in UTC .* and was a time \(2024-06-01"):
            work.run("ingest")
        server.close()
