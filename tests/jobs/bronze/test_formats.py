"""Logs of many formats through ingestion: columns, times, rejects that are read again, nights."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs.core.errors import SchemaError, SourceError
from jobs.core.source_file import load_source
from jobs.core.tables import EVENTS, REJECTS
from tests.support.spark_tools import CLICKS, Workshop

pytestmark = pytest.mark.slow

T = 1_717_236_000  # 2024-06-01 10:00:00 UTC
MOMENT = datetime(2024, 6, 1, 10, tzinfo=UTC)
WARN = '[quality]\non_exceed = "warn"\n'


def toml(form: str, columns: str = "", time: str = 'unit = "s"', source: str = "") -> str:
    made = CLICKS.replace("*.csv", "*").replace('"csv"', f'"{form}"\n{source}')
    made = made.replace('unit = "s"', time)
    return (
        made
        if not columns
        else made.replace('user_id = "user"\nitem_id = "item"\nevent_ts = "ts"', columns)
    )


def found(shop: Workshop) -> dict[str, tuple[str, datetime]]:
    return {row["item_id"]: (row["user_id"], row["event_ts"]) for row in shop.rows(EVENTS)}


IIS = """#Software: Microsoft Internet Information Services 10.0
#Fields: date time cs-uri-stem c-ip sc-bytes
2024-06-01 10:00:00 /p/1 203.0.113.1 7
2024-06-01 10:00:00 /p/2 203.0.113.1 -
2024-06-01 10:00:00 /p/3 - seven
"""
IIS_COLUMNS = (
    'user_id = "c-ip"\nitem_id = "cs-uri-stem"\nevent_ts = ["date", "time"]\nvalue = "sc-bytes"'
)


def test_extended_logs_and_their_rejects(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, toml("w3c", IIS_COLUMNS, "") + WARN)
    shop.land("u_ex240601.log", IIS)
    other = "#Fields: date time sc-bytes cs-uri-stem c-ip\n2024-06-01 10:00:00 "
    shop.land(
        "u_ex240602.log", f"{other}9 /q/1 203.0.113.1\n2024-06-01 10:00:00 x /q/2 203.0.113.2\n"
    )
    result = shop.run("ingest")
    assert (result.read, result.events_new) == (5, 3)
    assert result.rejects == {"missing_user_id": 1, "bad_value": 1}
    assert found(shop) == {f"/{n}": ("203.0.113.1", MOMENT) for n in ("p/1", "p/2", "q/1")}
    # A stored line is read by the columns that its file had.
    shop.describe(toml("w3c", IIS_COLUMNS.rpartition("\n")[0], "") + WARN)
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (2, 1)
    assert found(shop)["/q/2"] == ("203.0.113.2", MOMENT)
    assert [row["file_columns"][-1] for row in shop.rows(REJECTS)] == ["sc-bytes"]


def test_json_over_many_lines(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(
        spark,
        tmp_path,
        toml("json", 'user_id = "who.id"\nitem_id = "item"\nevent_ts = "ts"') + WARN,
    )
    rows: list[dict[str, Any]] = [
        {"who": {"id": f"u{n}"}, "item": f"i{n}", "ts": T + n} for n in range(3)
    ]
    rows.append({"who": {"id": "u9"}, "item": "i9", "ts": "2024-06-01T10:00:00Z"})
    shop.land("a.json", json.dumps(rows, indent=2))
    first = shop.run("ingest")
    assert (first.read, first.events_new, first.rejects) == (4, 3, {"bad_event_ts": 1})
    shop.describe(
        toml(
            "json",
            'user_id = "who.id"\nitem_id = "item"\nevent_ts = "ts"',
            'unit = ["s", "iso8601"]',
        )
    )
    assert shop.run("replay-rejects").events_new == 1
    assert found(shop)["i9"] == ("u9", MOMENT)
    shop.land("b.json", json.dumps(rows[:2]) + "[" + json.dumps(rows[2]))  # an array that goes on
    assert shop.run("ingest").duplicates == 3


def avro(path: Path, rows: list[dict[str, Any]]) -> None:
    fields = [
        {"name": "user", "type": ["null", "string"]}, {"name": "item", "type": "string"},
        {"name": "ts", "type": {"type": "long", "logicalType": "timestamp-millis"}},
    ]  # fmt: skip
    schema = fastavro.parse_schema({"type": "record", "name": "e", "fields": fields})
    with path.open("wb") as out:
        fastavro.writer(out, schema, rows)


@pytest.mark.parametrize("form", ["avro", pytest.param("orc", marks=pytest.mark.long)])
def test_avro_and_orc(
    spark: Any, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.core.settings import settings
    from jobs.forget import forget

    monkeypatch.setenv("SESSIONMILL_ID_KEY", "k" * 40)
    settings.cache_clear()
    shop = Workshop(spark, tmp_path, toml(form))
    rows = [{"user": "ann", "item": "a", "ts": MOMENT}, {"user": "bob", "item": "b", "ts": MOMENT},
            {"user": None, "item": "c", "ts": MOMENT}]  # fmt: skip
    path = shop.landing / f"log.{form}"
    if form == "avro":
        avro(path, rows)
    else:
        orc.write_table(pa.Table.from_pylist(rows), path)
    try:
        result = shop.run()
        assert (result.read, result.events_new, result.rejects) == (3, 2, {"missing_user_id": 1})
        assert found(shop) == {"a": ("ann", MOMENT), "b": ("bob", MOMENT)}
        [reject] = shop.rows(REJECTS)
        assert json.loads(reject["raw"]) == {"item": "c", "ts": "2024-06-01T10:00:00.000000Z"}
        shop.describe(toml(form, 'user_id = "item"\nitem_id = "item"\nevent_ts = "ts"'))
        assert shop.run("replay-rejects").events_new == 1
        shop.describe(toml(form))
        forget.forget(shop.context(), "ann")
        assert set(found(shop)) == {"b", "c"}
        again = Workshop(spark, tmp_path / "2", toml(form))
        again.land(path.name, path.read_bytes())
        assert again.run("ingest").read == 2
        assert shop.run("ingest").read == 0
    finally:
        settings.cache_clear()


def delta_rows(*names: str) -> pa.Table:
    return pa.table({"user": ["u"] * len(names), "item": names, "ts": pa.array([MOMENT] * len(names), pa.timestamp("us", "UTC")),
                     "day of": ["1 June"] * len(names)})  # fmt: skip


def test_a_delta_table_by_version(spark: Any, tmp_path: Path) -> None:
    table = str(tmp_path / "theirs")
    columns = 'user_id = "user"\nitem_id = "item"\nevent_ts = "ts"\nevent_type = "day of"'
    shop = Workshop(spark, tmp_path, toml("delta", columns).replace("{landing}/*", table))
    with pytest.raises(SourceError, match=r"is not a Delta table .*_delta_log"):
        shop.run("ingest")
    write_deltalake(table, delta_rows("a", "b"), partition_by=["day of"])
    write_deltalake(table, delta_rows("gone"), mode="append")
    DeltaTable(table).delete("item = 'gone'")  # its file is still there
    first = shop.run("ingest")
    assert (first.read, first.events_new) == (2, 2) and set(found(shop)) == {"a", "b"}
    assert {row["event_type"] for row in shop.rows(EVENTS)} == {"1 June"}
    assert shop.run("ingest").read == 0
    write_deltalake(table, delta_rows("c"), mode="append")
    second = shop.run("ingest")
    assert (second.read, second.events_new) == (1, 1)
    # An update is a new event beside the old one; what is deleted there stays here.
    DeltaTable(table).update(predicate="item = 'a'", updates={"item": "'z'"})
    third = shop.run("ingest")
    assert (third.read, third.events_new, third.duplicates) == (2, 1, 1)
    DeltaTable(table).delete("item = 'c'")
    assert shop.run("ingest").read == 0
    DeltaTable(table).optimize.compact()
    packed = shop.run("ingest")
    assert packed.events_new == 0 and set(found(shop)) == {"a", "b", "c", "z"}
    for pattern in (f"{table}/*", table + "/{day}"):
        shop.describe(toml("delta").replace("{landing}/*", pattern))
        with pytest.raises(SourceError, match="it is the folder of a table, without a pattern"):
            shop.run("ingest")


def test_a_column_that_a_delta_table_got_later_is_null_before(spark: Any, tmp_path: Path) -> None:
    """Also where something is computed of it; a column that the table does not have is said."""
    table = str(tmp_path / "theirs")
    write_deltalake(table, delta_rows("a"), partition_by=["day of"])
    more = delta_rows("b", "c").append_column("price", pa.array([2.5, None]))
    more = more.append_column("shop", pa.array([{"town": "Ghent"}, None]))
    write_deltalake(table, more, mode="append", schema_mode="merge")
    columns = 'user_id = "user"\nitem_id = "item"\nevent_ts = "ts"\nvalue = "price"\nevent_type = '
    plain = toml("delta", f'{columns}"shop.town"').replace("{landing}/*", table)
    values = {"a": (None, None), "b": (2.5, "Ghent"), "c": (None, None)}
    for number, text in enumerate(
        (plain, plain.replace('"shop.town"', '{ sql = "lower(upper(shop.town))" }'))
    ):
        shop = Workshop(spark, tmp_path / str(number), text)
        assert shop.run("ingest").events_new == 3
        told = {row["item_id"]: (row["value"], row["event_type"]) for row in shop.rows(EVENTS)}
        assert told == {
            item: (value, town.lower() if town and number else town)
            for item, (value, town) in values.items()
        }
    shop.describe(plain.replace('value = "price"', 'value = "prize"'))
    DeltaTable(table).optimize.compact()
    with pytest.raises(SchemaError, match=r"'prize'.*Did you mean 'price'"):
        shop.run("ingest")


def test_a_parquet_log_whose_writer_changed(spark: Any, tmp_path: Path) -> None:
    columns = 'user_id = "user"\nitem_id = "item"\nevent_ts = "ts"\nsource_session_id = "day"\nevent_id = "id"'
    shop = Workshop(spark, tmp_path, toml("parquet", columns))
    ids = iter(range(100))

    def land(day: int, user: Any, item: Any, ts: Any) -> None:
        path = shop.landing / f"day=2024-06-0{day}" / "a.parquet"
        path.parent.mkdir()
        id_ = pa.array([uuid.UUID(int=next(ids)).bytes for _ in ts], pa.uuid())
        pq.write_table(pa.table({"user": user, "item": item, "ts": ts, "id": id_}), path)

    times = [MOMENT, MOMENT]
    land(1, pa.array([1, 2]), pa.array(["a", "b"]), pa.array(times, pa.timestamp("us", "UTC")))
    assert shop.run("ingest").events_new == 2
    land(
        2,
        pa.array([3.0, None]),
        pa.array(["c", "d"], pa.large_string()),
        pa.array(times, pa.timestamp("ns", "UTC")),
    )
    land(
        3,
        pa.array([5, 6], pa.int32()),
        pa.array(["e", "f"]).dictionary_encode(),
        pa.array(times, pa.timestamp("ms", "Europe/Paris")),
    )
    land(4, pa.nulls(2), pa.array(["g", "h"]), pa.array(times, pa.timestamp("us", "UTC")))
    second = shop.run("ingest")
    assert (second.read, second.events_new, second.rejects) == (6, 3, {"missing_user_id": 3})
    assert found(shop) == {
        item: (user, MOMENT) for item, user in (("a", "1"), ("b", "2"), ("c", "3"), ("e", "5"), ("f", "6"))
    }  # fmt: skip
    assert {row["source_session_id"] for row in shop.rows(EVENTS)} == {
        f"2024-06-0{n}" for n in (1, 2, 3)
    }
    assert str(uuid.UUID(int=0)) in {row["event_id"] for row in shop.rows(EVENTS)}
    # What is another meaning is refused as ever.
    land(5, pa.array(["7", "8"]), pa.array(["i", "j"]), pa.array(times, pa.timestamp("us", "UTC")))
    with pytest.raises(SchemaError, match=r"column 'user' .* is string, in earlier files it was"):
        shop.run("ingest")


# -- times ----------------------------------------------------------------------------------------


def times_of(spark: Any, folder: Path, source: str, rows: list[str]) -> dict[str, datetime]:
    shop = Workshop(spark, folder, source)
    shop.land(
        "a.csv", "user,item,d,ts\n" + "".join(f"u,i{n},{row}\n" for n, row in enumerate(rows))
    )
    shop.run("ingest")
    return {item: moment for item, (_, moment) in found(shop).items()}


def test_times_of_two_columns_and_of_several_units(spark: Any, tmp_path: Path) -> None:
    two = CLICKS.replace('event_ts = "ts"', 'event_ts = ["d", "ts"]') + WARN
    iso = two.replace('unit = "s"', 'zone = "Europe/Paris"')
    rows = [
        "2024-06-01,12:00:00",
        "2024-06-01,12:00",
        "2024-06-01,",
        ",12:00",
        "2024-06-01,10:00:00Z",
    ]
    got = times_of(spark, tmp_path / "a", iso, rows)
    assert got == dict.fromkeys(("i0", "i1", "i4"), MOMENT)
    added = two.replace('unit = "s"', 'unit = ["iso8601", "dd.MM.yyyy"]\noffset = "ms"')
    got = times_of(
        spark,
        tmp_path / "b",
        added,
        ["2024-06-01,36000000", "01.06.2024,36000000.0", "2024-06-01,x"],
    )
    assert got == {"i0": MOMENT, "i1": MOMENT}
    units = 'unit = ["s", "ms", "iso8601", "dd/MM/yyyy HH:mm:ss"]'
    several = CLICKS.replace('unit = "s"', units) + WARN
    rows = [
        f",{T}",
        f",{T}000",
        ",2024-06-01T12:00:00+02:00",
        ",01/06/2024 10:00:00",
        ",17",
        ",soon",
    ]
    assert times_of(spark, tmp_path / "c", several, rows) == {f"i{n}": MOMENT for n in range(4)}
    backwards = several.replace('["s", "ms"', '["ms", "s"')
    assert times_of(spark, tmp_path / "d", backwards, rows) == {f"i{n}": MOMENT for n in range(4)}


def test_seconds_among_milliseconds_stop_the_run(spark: Any, tmp_path: Path) -> None:
    ms = CLICKS.replace('unit = "s"', 'unit = "ms"')
    shop = Workshop(spark, tmp_path, ms)
    head, good = "user,item,ts\n", [f"u,i{n},{T + n}000\n" for n in range(60)]
    path = shop.land("a.csv", head + "".join([*good, f"u,x,{T}\n", f"u,y,{T}.5\n"]))
    assert shop.run("ingest").events_new == 62  # one in thirty: bad lines, and no unit
    shop.land("b.csv", head + "".join([*good[:38], f"u,x,{T + 1}\n", f"u,y,{T + 1}.5\n"]))
    with pytest.raises(SchemaError) as error:
        shop.run("ingest")
    said = str(error.value)
    assert (
        "b.csv: 2 of its 40 times seem to be in s, and time.unit = 'ms': the first is in line 40"
        in said
    )
    assert "time.unit = ['ms', 's']" in said and str(path) not in said
    # A whole file of the other unit, alone and beside files of the right one.
    shop.land("b.csv", head + f"u,z,{T}\n")
    with pytest.raises(
        SchemaError, match=r"b\.csv: time\.unit = 'ms', and its times seem to be in s"
    ):
        shop.run("ingest")
    shop.land("c.csv", head + good[3])
    with pytest.raises(SchemaError, match=r"b\.csv: 1 of its 1 times seem to be in s"):
        shop.run("ingest")
    shop.describe(ms.replace('"ms"', '["ms", "s"]'))
    assert shop.run("ingest").events_new == 1
    assert {row["event_ts"].year for row in shop.rows(EVENTS) if row["item_id"] == "z"} == {2024}


@pytest.mark.parametrize(
    ("columns", "time", "said"),
    [
        ('event_ts = ["a"]', "", "columns.event_ts"),
        ('event_ts = ["a", "b"]', 'unit = "ms"', "are joined by a blank, which is not a number"),
        ('event_ts = "a"', 'offset = "ms"', "time.offset = 'ms' is the unit of a second column"),
        ('event_ts = "a"', 'unit = ["s", "s"]', "write one or more units, each once"),
        ('event_ts = "a"', 'unit = ["s", "sooner"]', "use s, ms, us"),
    ],
)
def test_times_that_make_no_sense_are_refused(
    tmp_path: Path, columns: str, time: str, said: str
) -> None:
    path = tmp_path / "log.toml"
    path.write_text(CLICKS.replace('event_ts = "ts"', columns).replace('unit = "s"', time))
    with pytest.raises(SourceError) as error:
        load_source(str(path))
    assert said in str(error.value)


def test_day_and_month_in_each_other_s_place_are_said(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, CLICKS.replace('"s"', '"MM/dd/yyyy HH:mm:ss"'))
    rows = [f"u,i{day},{day:02}/06/2024 10:00:00\n" for day in range(1, 11)]
    shop.land("a.csv", "user,item,ts\n" + "".join(rows))
    [note] = shop.run("ingest").notes
    assert "10 days from 2024-01-06 to 2024-10-06" in note and "'dd/MM/yyyy HH:mm:ss'" in note


def test_times_in_the_future_are_said(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, CLICKS.replace('unit = "s"', 'unit = "iso8601"'))
    shop.land("a.csv", "user,item,ts\nu,i,2024-06-01\nu,j,2099-06-01\n")
    [note] = shop.run("ingest").notes
    assert "the newest time of these lines is in the future (2099-06-01 00:00:00 UTC)" in note
