"""`[exposures]`: a second file of what was shown, joined to the lines of the log."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bronze.exposures import chosen
from jobs.core.errors import SchemaError, SourceError
from jobs.core.source_events import ExposuresPart
from jobs.core.source_file import load_source
from jobs.core.tables import EVENTS, ITEMS, SEQUENCES
from tests.support.spark_tools import CLICKS, Workshop

PART = """
[exposures]
landing = "{landing}/../shown/*"
format = "FORMAT"
item_id = "product"
match = { store = "shop", week = "week" }
prominence = { place = ["window", "shelf"], mailer = ["front"] }
most = 2
"""
LOG = """user,item,ts,store,week
u,1,1714521600,007,1
u,2,1714521700,007,1
v,1,1714521600,8,1
w,3,1714521600,,1
w,x,soon,007,1
"""
SHOWN = [
    {"product": "5", "shop": "007", "week": 1, "place": "none", "mailer": "front"},
    {"product": "6", "shop": "007", "week": 1, "place": "shelf", "mailer": "none"},
    {"product": "7", "shop": "007", "week": 1, "place": "window", "mailer": "none"},
    {"product": "5", "shop": "007", "week": 1, "place": "shelf", "mailer": "front"},
    {"product": "9", "shop": "007", "week": 2, "place": "window", "mailer": "front"},
    {"product": None, "shop": "8", "week": 1, "place": "window", "mailer": None},
]


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"shown.{form}"
    if form == "csv":
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        file.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    elif form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize(
    "form", ["csv", *(pytest.param(one, marks=pytest.mark.long) for one in ("jsonl", "parquet"))]
)
@pytest.mark.long
def test_lines_take_what_their_columns_match(spark: Any, tmp_path: Path, form: str) -> None:
    shop = Workshop(spark, tmp_path, CLICKS + PART.replace("FORMAT", form))
    write(tmp_path / "shown", form, SHOWN)
    shop.land("log.csv", LOG)
    result = shop.run()
    assert "exposures: 2 of 4 lines match" in " ".join(result.notes)
    assert "exposures: 1 of 6 rows lack one of product, shop, week" in " ".join(result.notes)
    found = {(row["user_id"], row["item_id"]): row for row in shop.rows(EVENTS)}
    listed = {key: row["exposed_with"] for key, row in found.items()}
    # 7 stood in the window; 5 (of its two rows the better) and 6 on a shelf, 5 in the mailer too.
    assert listed == {("u", "1"): ["7", "5"], ("u", "2"): ["7", "5"], ("v", "1"): None,
                      ("w", "3"): None}  # fmt: skip
    assert {row["item_id"]: row["event_count"] for row in shop.rows(ITEMS)} == {
        "1": 2, "2": 1, "3": 1, "5": 0, "7": 0
    }  # fmt: skip
    index = {row["item_id"]: row["item_index"] for row in shop.rows(ITEMS)}
    shown = {row["user_id"]: row["exposed_items"] for row in shop.rows(SEQUENCES)}
    assert shown["u"] == [[index["7"], index["5"]]] * 2 and shown["v"] == [[]]

    plain = Workshop(spark, tmp_path / "plain", CLICKS)
    plain.land("log.csv", LOG)
    plain.run("ingest")
    assert {row["event_id"] for row in plain.rows(EVENTS)} == {
        row["event_id"] for row in found.values()
    }, "an event is the same event, whatever was shown with it"
    write(tmp_path / "shown", form, [row | {"product": "99"} for row in SHOWN])
    shop.land("again.csv", LOG)
    again = shop.run()
    assert (again.events_new, again.duplicates) == (0, 4)
    assert "exposures: 3 of 4" in " ".join(again.notes)
    assert {(r["user_id"], r["item_id"]): r["exposed_with"] for r in shop.rows(EVENTS)} == listed


@pytest.mark.long
def test_a_reject_that_comes_good_takes_what_was_shown(spark: Any, tmp_path: Path) -> None:
    toml = CLICKS + PART.replace("FORMAT", "csv") + '[quality]\non_exceed = "warn"\n'
    shop = Workshop(spark, tmp_path, toml.replace('"ts"', '"ts"\nvalue = "week"'))
    write(tmp_path / "shown", "csv", [row | {"week": "one"} for row in [*SHOWN[:4], SHOWN[5]]])
    shop.land("log.csv", "user,item,ts,store,week\nu,1,1714521600,007,one\n")
    assert shop.run().rejects == {"bad_value": 1}
    shop.describe(toml)
    notes = " ".join(shop.run("replay-rejects").notes)
    assert "exposures: 1 of 1 lines match" in notes
    assert "exposures: 1 of 5 rows lack one of product, shop, week" in notes
    assert [row["exposed_with"] for row in shop.rows(EVENTS)] == [["7", "5"]]


def test_the_most_prominent_stay(spark: Any) -> None:
    """Against the plain rule, on chance rows: none that is left out would have come before one
    that is kept; which of equals stay differs between matches, and never between runs."""
    dice = np.random.default_rng(7)
    places, pages = ["a", "b", "c", "z"], ["p", "q", "z"]
    rows = [
        {"item": str(dice.integers(40)), "key": str(dice.integers(12)),
         "place": places[dice.integers(4)], "page": pages[dice.integers(3)]}
        for _ in range(2_000)
    ]  # fmt: skip
    part = ExposuresPart.model_validate(
        {"landing": "x", "format": "csv", "item_id": "item", "match": {"key": "key"}, "most": 9,
         "prominence": {"place": ["a", "b", "c"], "page": ["p", "q"]}}
    )  # fmt: skip
    frame = spark.createDataFrame(rows)
    kept = {json.loads(row["link"])[0]: row["shown"] for row in chosen(frame, part).collect()}
    again = chosen(frame.repartition(7), part).collect()
    assert kept == {json.loads(row["link"])[0]: row["shown"] for row in again}
    best: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for row in rows:
        place = (places.index(row["place"]), pages.index(row["page"]))
        best[row["key"]][row["item"]] = min(best[row["key"]].get(row["item"], place), place)
    assert set(kept) == set(best)
    ties = set()
    for key, items in kept.items():
        order = sorted(best[key].values())
        assert len(items) == len(set(items)) == min(9, len(best[key]))
        assert [best[key][item] for item in items] == order[: len(items)]
        ties.add(tuple(item for item in items if best[key][item] == (0, 0))[:2])
    assert len(ties) > 3
    few = chosen(frame, part, spark.createDataFrame([{"link": '["3"]'}])).collect()
    assert [json.loads(row["link"]) for row in few] == [["3"]]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"product"', '"sku"', r"column 'sku' of \[exposures\] is not there: it has product, shop"),
        (
            '"shop"',
            '"price"',
            r"column 'price' of \[exposures\] is double, and is compared as text",
        ),
        ("shown/*", "nowhere/*", r"exposures.landing = .*nowhere/\*' matches no file"),
        ('store = "shop"', 'branch = "shop"', "no column 'branch', which exposures.match names"),
    ],
)
def test_what_is_not_as_described_is_named(
    spark: Any, tmp_path: Path, old: str, new: str, says: str
) -> None:
    toml = CLICKS + PART.replace("FORMAT", "parquet")
    assert old in toml
    shop = Workshop(spark, tmp_path, toml.replace(old, new))
    write(tmp_path / "shown", "parquet", [row | {"price": 1.5} for row in SHOWN])
    shop.land("log.csv", LOG)
    with pytest.raises((SchemaError, SourceError), match=says):
        shop.run("ingest")
    assert shop.rows(EVENTS) == []


def test_files_that_disagree_about_their_columns_are_told(spark: Any, tmp_path: Path) -> None:
    from jobs.cli import REMEDIES

    shop = Workshop(spark, tmp_path, CLICKS + PART.replace("FORMAT", "csv"))
    write(tmp_path / "shown", "csv", SHOWN)
    (tmp_path / "shown" / "turned.csv").write_text("shop,product,week,place,mailer\n007,1,1,,\n")
    shop.land("log.csv", LOG)
    with pytest.raises(Exception, match="CSV header does not conform") as error:
        shop.run("ingest")
    [remedy] = [said for words, said in REMEDIES.items() if words in str(error.value)]
    assert "files of [exposures] do not all have the same columns" in remedy
    assert shop.rows(EVENTS) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('{ store = "shop", week = "week" }', "{}", "exposures.match"),
        ("most = 2", "most = 0", "exposures.most = 0"),
        ("most = 2", "mots = 2", "exposures.mots is not a field: did you mean 'most'"),
        ("[time]", 'exposed_with = "shown"\n[time]', "both say what was shown: leave one"),
        ("[time]", "[time]", ""),
    ],
)
def test_a_source_file_with_mistakes(tmp_path: Path, old: str, new: str, says: str) -> None:
    toml = CLICKS + PART.replace("FORMAT", "csv")
    assert old in toml
    file = tmp_path / "s.toml"
    file.write_text(toml.replace(old, new))
    if says:
        with pytest.raises(SourceError, match=says):
            load_source(str(file))
    else:
        assert load_source(str(file)).mapped()["link_2"] == "week"
