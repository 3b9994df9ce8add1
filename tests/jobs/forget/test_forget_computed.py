"""People are forgotten where ids are computed, and where one line has events of several people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.core.tables import EVENTS, FILES, FILTERED, REJECTS
from jobs.forget.forget import forget
from tests.jobs.forget.test_forget import key, where
from tests.support.spark_tools import Workshop

assert key is not None  # (the fixture)

ORDERS = """
[source]
name = "clicks"
landing = "{landing}/*"
format = "jsonl"
explode = "lines"
keep = "coalesce(lines.sku, '') <> 'test'"
keep_filtered = true

[columns]
user_id = { sql = "lower(trim(lines.mail))" }
item_id = "lines.sku"
event_ts = "at"

[time]
unit = "s"

[quality]
max_reject_share = 0.9
"""
T = 1_714_521_600
ANN, BOB = " Ann@Shop.example", "bob@shop.example"


def order(second: int, *lines: tuple[str, str | None]) -> dict[str, Any]:
    return {
        "at": T + second,
        "lines": [{"mail": mail, "sku": sku, "n": 1.50} for mail, sku in lines],
    }


LINES = [
    order(1, (ANN, "i1"), (BOB, "i2"), (ANN, "i3")),
    order(2, (ANN, "i4")),
    order(3, (BOB, None), (ANN, "i5")),  # Bob's is a reject, whose line has Ann, too
    order(4, (BOB, None)),
    order(5, (BOB, "test"), (ANN, "i6")),
    order(6, (ANN, "test")),
    order(7, (BOB, "test")),
]
NULLED = {0: [0, 2], 2: [1], 4: [1]}


def after() -> list[dict[str, Any]]:
    """The lines without Ann."""
    left = []
    for at, line in enumerate(LINES):
        lines = [
            None if place in NULLED.get(at, []) else one for place, one in enumerate(line["lines"])
        ]
        if at not in (1, 5):
            left.append(line | {"lines": lines})
    return left


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("jsonl", marks=pytest.mark.long),
        pytest.param("parquet", marks=pytest.mark.long),
    ],
)
def test_single_elements_of_a_line_are_forgotten(
    spark: Any, tmp_path: Path, key: None, form: str
) -> None:
    shop = Workshop(spark, tmp_path, ORDERS.replace("jsonl", form))
    path = shop.landing / "a"
    if form == "jsonl":
        shop.land("a", "".join(json.dumps(line).replace("1.5", "1.50") + "\n" for line in LINES))
    else:
        pq.write_table(pa.Table.from_pylist(LINES), path)
    result = shop.run()
    assert (result.events_new, result.rejects, result.filtered) == (
        6,
        {"missing_item_id": 2},
        {"keep": 3},
    )
    done = forget(shop.context(), "ann@shop.example")
    assert (done["events"], done["landing_lines"]) == (5, 5)
    # Stored lines are kept whole: those that name Ann go.
    assert [row["line"] for row in shop.rows(REJECTS)] == [4]
    assert [row["line"] for row in shop.rows(FILTERED)] == [7]
    if form == "jsonl":
        assert path.read_text() == "".join(
            json.dumps(line).replace("1.5", "1.50") + "\n" for line in after()
        )
    else:
        assert pq.read_table(path).to_pylist() == after()
    assert not [file for file in where("Ann", shop.lake_root) if "/_delta_log/" not in file]
    assert [row["lines"] for row in shop.rows(FILES)] == [5]
    events = shop.rows(EVENTS)
    assert [row["user_id"] for row in events] == [BOB]
    assert shop.run().read == 0
    # Read again, and delivered again with all people: what is left is as it was, Ann stays away.
    shop.run(options={"reload": True})
    assert shop.rows(EVENTS) == events
    shop.land("b", "".join(json.dumps(line) + "\n" for line in LINES)) if form == "jsonl" else (
        pq.write_table(pa.Table.from_pylist(LINES), shop.landing / "b")
    )
    again = shop.run()
    assert (again.read, again.events_new, again.duplicates) == (5, 0, 1)
    assert shop.rows(EVENTS) == events


HASHED = ORDERS + "\n[privacy]\nhash_user_id = true\n"


@pytest.mark.long
def test_hashed_ids_of_expressions_are_nowhere_and_are_forgotten(
    spark: Any, tmp_path: Path, key: None
) -> None:
    shop = Workshop(spark, tmp_path, HASHED)
    shop.land(
        "a", "".join(json.dumps(line) + "\n" for line in LINES) + '{"mail": "ann@shop.example"\n'
    )
    result = shop.run()
    assert result.rejects == {"missing_item_id": 2, "unparsable": 1}
    assert where("Ann", shop.lake_root) == where("bob", shop.lake_root) == []
    assert where("ann@shop.example", shop.lake_root) == []
    # A second chance by what is kept: the columns that do not name the user.
    shop.describe(
        HASHED.replace(
            'item_id = "lines.sku"', """item_id = { sql = "coalesce(lines.sku, 'x')" }"""
        )
    )
    replayed = shop.run("replay-rejects")
    assert (replayed.events_new, replayed.rejects) == (2, {"unparsable": 1})
    users = {row["user_id"] for row in shop.rows(EVENTS)}
    assert len(users) == 2 and all(one.startswith("u-") for one in users)
    shop.describe(HASHED)
    done = forget(shop.context(), "ann@shop.example")
    assert (done["events"], done["rejects"]) == (5, 1)
    assert {row["line"] for row in shop.rows(FILTERED)} == {5, 7}
    assert len({row["user_id"] for row in shop.rows(EVENTS)}) == 1
