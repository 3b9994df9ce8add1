"""What others do to the tables of a lake: the same statements by delta-rs and by Spark; and what the
tables derived from `bronze.events` have to be, whoever wrote to them."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from jobs.core.tables import (
    EVENTS,
    ITEM_ATTRIBUTES,
    ITEMS,
    REJECTS,
    SEQUENCES,
    SESSIONS,
    Table,
)
from jobs.lake import filesystem
from tests.support.oracle import expected_sequences, expected_sessions
from tests.support.spark_tools import CLICKS, Workshop

DERIVED = (SESSIONS, ITEMS, ITEM_ATTRIBUTES, SEQUENCES)
T, DAY = 1_700_000_000, 86_400
HEADER = "user,item,ts\n"
FIRST = "".join(
    f"u{user},i{item},{T + DAY * user + 60 * item}\n" for user in range(4) for item in range(5)
)
SECOND = f"u1,i9,{T + DAY + 300}\nu2,i1,{T + DAY}\nu7,i8,{T}\n,i1,{T}\n"
THIRD = f"u1,i5,{T + DAY + 200}\nu9,i7,{T}\nu3,i2,{T + 9 * DAY}\nu5,,{T}\n"


def toml(folder: Path) -> str:
    return (
        CLICKS
        + f"""
[items]
landing = "{folder}/catalogue/*.csv"
format = "csv"
id = "item"
categories = ["brand"]
"""
    )


def catalogue(folder: Path, night: int) -> None:
    rows = "".join(f"i{item},b{item * night}\n" for item in range(4 + night))
    (folder / "catalogue").mkdir(exist_ok=True)
    (folder / "catalogue" / "items.csv").write_text("item,brand\n" + rows)


class Saved:
    """A lake of two nights, to which it can be put back: versions 0 to 2 and later of each table."""

    def __init__(self, spark: Any, folder: Path, lake: str = "a läke") -> None:
        catalogue(folder, 1)
        self.shop = Workshop(spark, folder, toml(folder), lake=lake)
        self.shop.land("1.csv", HEADER + FIRST + "u4,i1,late\n")
        self.shop.run()
        catalogue(folder, 2)
        self.shop.land("2.csv", HEADER + SECOND)
        self.shop.run()
        self.copy = folder / "saved"
        shutil.copytree(self.shop.lake_root, self.copy)
        self.landed = {}
        for file in self.shop.landing.glob("*.csv"):
            self.landed[file.name] = folder / f"saved-{file.name}"
            shutil.copy2(file, self.landed[file.name])
        shutil.copytree(folder / "catalogue", folder / "saved-catalogue")

    def again(self) -> Workshop:
        shutil.rmtree(self.shop.lake_root)
        shutil.copytree(self.copy, self.shop.lake_root)
        for file in self.shop.landing.glob("*.csv"):
            file.unlink()
        for name, text in self.landed.items():  # (as old as they were: nothing is read again)
            shutil.copy2(text, self.shop.landing / name)
        shutil.rmtree(self.shop.folder / "catalogue")
        shutil.copytree(self.shop.folder / "saved-catalogue", self.shop.folder / "catalogue")
        return self.shop


# -- statements -----------------------------------------------------------------------------------

COLUMN = {  # a column of each table that others change, and to what
    EVENTS: ("item_id", "'i0'"), REJECTS: ("reason", "'late'"), SESSIONS: ("user_id", "'u0'"),
    ITEMS: ("event_count", "99"), ITEM_ATTRIBUTES: ("item_id", "'i0'"),
    SEQUENCES: ("user_id", "'u0'"),
}  # fmt: skip
STATEMENTS = ("restore", "delete", "update", "merge", "overwrite", "overwrite part")
ENGINES = ("delta-rs", "spark")


def data_files(path: str | Path) -> list[Path]:
    """Those of the newest version of the table in this folder. (delta-rs encodes the folder, too.)"""
    uris = DeltaTable(str(path)).file_uris()
    return [Path(unquote(one.removeprefix("file://"))) for one in uris]


def some(table: Table, path: str) -> str:
    """A condition that holds for about a third of the rows."""
    name = table.key[0]
    found = filesystem.rows_of(DeltaTable(path)).to_table(columns=[name])
    rows = sorted(set(found[name].to_pylist()))
    return f"{name} <= '{rows[len(rows) // 3]}'"


def restored_to(path: str) -> int:
    """The version before the last one that moved rows."""
    moved = [
        one["version"]
        for one in DeltaTable(path).history()
        if one["operation"] in ("WRITE", "MERGE")
    ]
    return int(max(moved)) - 1


def act(shop: Workshop, table: Table, statement: str, engine: str) -> None:
    """Do to a table what others do."""
    path = table.path(str(shop.lake_root), shop.source.name)
    by = by_delta_rs if engine == "delta-rs" else by_spark
    by(shop, table, path, statement)


def by_delta_rs(shop: Workshop, table: Table, path: str, statement: str) -> None:
    found, where, (column, value) = DeltaTable(path), some(table, path), COLUMN[table]
    rows = pa.table(found.to_pyarrow_table())
    name = table.key[0]
    bound = where.split("'")[1]
    part = rows.filter(pa.compute.less_equal(rows[name], bound))
    if statement == "restore":
        found.restore(restored_to(path))
    elif statement == "delete":
        found.delete(where)
    elif statement == "update":
        found.update({column: value}, predicate=where)
    elif statement == "merge":
        on = " AND ".join(f"t.{one} = s.{one}" for one in table.key)
        merge = found.merge(part, on, "s", "t").when_matched_update({column: value})
        merge.execute()
    elif statement == "overwrite":
        write_deltalake(path, rows.slice(0, 2), mode="overwrite")
    elif statement == "overwrite part":
        write_deltalake(path, part.slice(0, 1), mode="overwrite", predicate=where)


def by_spark(shop: Workshop, table: Table, path: str, statement: str) -> None:
    spark, where, (column, value) = shop.spark, some(table, path), COLUMN[table]
    name = f"delta.`{path}`"
    rows = spark.read.format("delta").load(path)
    if statement == "restore":
        spark.sql(f"RESTORE TABLE {name} TO VERSION AS OF {restored_to(path)}")
    elif statement == "delete":
        spark.sql(f"DELETE FROM {name} WHERE {where}")
    elif statement == "update":
        spark.sql(f"UPDATE {name} SET {column} = {value} WHERE {where}")
    elif statement == "merge":
        rows.where(where).createOrReplaceTempView("theirs")
        on = " AND ".join(f"t.{one} = s.{one}" for one in table.key)
        spark.sql(
            f"MERGE INTO {name} t USING theirs s ON {on} WHEN MATCHED THEN UPDATE SET {column} = {value}"
        )
    elif statement == "overwrite":
        kept = spark.createDataFrame(rows.limit(2).collect(), rows.schema)
        kept.write.format("delta").mode("overwrite").save(path)
    elif statement == "overwrite part":
        kept = spark.createDataFrame(rows.where(where).limit(1).collect(), rows.schema)
        writer = kept.write.format("delta").mode("overwrite").option("replaceWhere", where)
        writer.save(path)


# -- what has to be -------------------------------------------------------------------------------


def check_derived(shop: Workshop) -> None:
    """silver and gold are what the oracle makes of `bronze.events`."""
    events = pa.table(shop.table(EVENTS).to_pyarrow_table())
    rule = shop.source.sessions
    expected = expected_sessions(
        events, native=rule.rule != "gap", gap_s=rule.gap_s, max_hours=rule.max_session_hours,
        max_events=rule.max_session_events,
    )  # fmt: skip
    stored = [
        (row["session_id"], row["user_id"], [one["event_id"] for one in row["events"]])
        for row in shop.rows(SESSIONS)
    ]
    wanted = [(one["session_id"], one["user_id"], one["events"]) for one in expected]
    assert sorted(stored) == sorted(wanted)

    items = {row["item_index"]: row for row in shop.rows(ITEMS)}
    assert sorted(items) == list(range(1, len(items) + 1))
    times = defaultdict(list)
    for row in events.select(["item_id", "event_ts"]).to_pylist():
        times[row["item_id"]].append(row["event_ts"])
    found = {row["item_id"]: row for row in items.values()}
    assert len(found) == len(items) and times.keys() <= found.keys()
    for name, row in found.items():
        assert row["event_count"] == len(times[name]), name
        assert not times[name] or row["first_seen_ts"] == min(times[name]), name

    sequences = [
        (row["user_id"], [
            (items[index]["item_id"], ordinal)
            for index, ordinal in zip(row["item_index"], row["session_ordinal"], strict=True)
        ])
        for row in shop.rows(SEQUENCES)
    ]  # fmt: skip
    assert sorted(sequences) == sorted(expected_sequences(expected).items())
