"""`[items]`: catalogues in three formats, their history, their mistakes, and their table."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.core.errors import SchemaError, SourceError
from jobs.core.source_file import load_source
from jobs.core.source_log import ItemsPart
from jobs.core.tables import ITEM_ATTRIBUTES, ITEMS
from jobs.gold.item_attributes import ALWAYS, History, changes, read, rows_of, snapshots
from tests.support.spark_tools import CLICKS, Workshop

PART: dict[str, Any] = {
    "landing": "x", "format": "csv", "id": "sku", "categories": ["brand", "aisle"],
    "numbers": ["price"],
}  # fmt: skip


def part_of(**other: Any) -> ItemsPart:
    return ItemsPart.model_validate(PART | other)


def at(day: int) -> datetime:
    return datetime(2024, 5, day, tzinfo=UTC)


def by_index(shop: Workshop) -> list[dict[str, Any]]:
    return sorted(shop.rows(ITEMS), key=lambda row: row["item_index"])


def test_three_formats_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'price,sku,brand,aisle,more\n1.50,007,"X, Y",,1\n,-9223372036854775808,Z,3,\n2,,Z,3,\n'
    )
    (tmp_path / "a.jsonl").write_text(
        '{"sku": "007", "brand": "X, Y", "price": 1.50}\n'
        '{"sku": "-9223372036854775808", "brand": "Z", "aisle": "3"}\n'
    )
    ids = ["007", "-9223372036854775808"]
    pq.write_table(
        pa.table({"sku": ids, "brand": ["X, Y", "Z"], "aisle": [None, 3], "price": [1.5, None]}),
        tmp_path / "a.parquet",
    )
    wanted = {"007": {"brand": "X, Y", "price": 1.5}, ids[1]: {"brand": "Z", "aisle": "3"}}
    for form in ("csv", "jsonl", "parquet"):
        found, again, without = rows_of(part_of(format=form), [str(tmp_path / f"a.{form}")])
        for one in found.values():
            if "price" in one:
                one["price"] = float(one["price"])  # type: ignore[assignment]
        assert found == wanted and (again, without) == (0, form == "csv"), form


def test_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "shop.csv"
    file.write_text('sku,title\n1,"Milk, fresh"\n2,\n3,Bread\n')
    part = ItemsPart(landing="x", format="csv", id="sku", texts=["title"])
    found, *_ = rows_of(part, [str(file)])
    assert found == {"1": {"title": "Milk, fresh"}, "2": {}, "3": {"title": "Bread"}}
    with pytest.raises(
        ValueError, match="named twice: use a column as id, category, number or text"
    ):
        ItemsPart(landing="x", format="csv", id="sku", texts=["title"], categories=["title"])


def test_of_two_rows_of_an_item_the_last_counts_and_one_without_an_id_does_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.csv").write_text("sku,brand,aisle,price\n1,X,,\n1,Y,,\n,Z,,\n,Z,,\n")
    assert rows_of(part_of(), [str(tmp_path / "a.csv")]) == ({"1": {"brand": "Y"}}, 1, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sku,brand,price\n1,X,2\n", "column 'aisle' of \\[items\\] is not there"),
        (
            "sku,brand,aisle,price\n1,X,,2\n2,X,,cheap\n",
            "price = 'cheap' is not a number \\(1 such",
        ),
        ("sku,brand,aisle,price\n1,X\n", "cannot be read as items.format = csv"),
        ("", "Empty CSV file. Correct items.format or items.delimiter"),
        ("sku;brand;aisle;price\n1;X;;\n", "Correct the name or items.delimiter"),
    ],
)
def test_a_broken_catalogue_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(text)
    with pytest.raises(SchemaError, match=says) as error:
        read(part_of(), str(file))
    assert str(file) in str(error.value)


def test_ids_are_never_floating_point_numbers(tmp_path: Path) -> None:
    table = pa.table({"sku": [1.0], "brand": ["X"], "aisle": ["1"], "price": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match=r"items\.id = 'sku' holds floating-point numbers"):
        read(part_of(format="parquet"), str(tmp_path / "a.parquet"))


def test_which_files_are_of_which_day(tmp_path: Path) -> None:
    for name in ("2024-05-03", "2024-05-01", "2024-05-02", "none"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "items.csv").touch()
    part = part_of(landing=f"{tmp_path}/{{day}}/*.csv")
    days = [since for since, _ in snapshots(part, None)]
    assert days == [at(2), at(3), at(4)], "known from the end of their day on"
    assert [since for since, _ in snapshots(part, date(2024, 5, 2))] == [at(3), at(4)]
    assert snapshots(part, date(2024, 5, 9)) == []
    named = part_of(landing=f"{tmp_path}/items-{{day:%Y%m%d}}.csv")
    (tmp_path / "items-20240507.csv").touch()
    (tmp_path / "items-2024.csv").touch()
    assert [since for since, _ in snapshots(named, None)] == [at(8)]
    whole = part_of(landing=f"{tmp_path}/items-*.csv")
    assert [(s, len(paths)) for s, paths in snapshots(whole, date(2024, 5, 1))] == [(at(2), 2)]
    assert [since for since, _ in snapshots(whole, None)] == [None]
    with pytest.raises(SourceError, match="matches no file"):
        snapshots(part_of(landing=f"{tmp_path}/nothing.csv"), None)


def test_an_undated_catalogue_holds_for_always_until_it_says_otherwise() -> None:
    known: History = {}
    assert changes(known, {"a": {"k": "1"}}, at(2), dated=False)[0] == [("a", ALWAYS, {"k": "1"})]
    assert changes(known, {"a": {"k": "1"}}, at(3), dated=False) == ([], 0)
    assert changes(known, {"a": {"k": "2"}}, at(4), dated=False)[0] == [("a", at(4), {"k": "2"})]
    assert changes(known, {"a": {"k": "3"}}, at(4), dated=False) == ([], 1), "said of, not hidden"
    assert changes(known, {"b": {}}, at(5), dated=False)[0] == [("b", ALWAYS, {})]


def state(known: History, item: str, when: datetime) -> dict[str, str] | None:
    before = [values for since, values in known.get(item, []) if since <= when]
    return before[-1] if before else None


DAYS = st.lists(
    st.dictionaries(st.sampled_from("ab"), st.fixed_dictionaries({"k": st.sampled_from("xy")})),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(days=DAYS, order=st.randoms(use_true_random=False))
def test_the_order_in_which_days_are_read_changes_nothing(days: Any, order: Any) -> None:
    """Read with `--day`, in any order: at every day what the newest catalogue by then said."""
    known: History = {}
    number = list(range(len(days)))
    order.shuffle(number)
    for first in number:
        for later in range(first, len(days)):  # a day brings the days after it along
            changes(known, days[later], at(later + 2), dated=True)
    for item in "ab":
        said = None
        for day, catalogue in enumerate(days):
            said = catalogue.get(item, said)
            assert state(known, item, at(day + 2)) == said


def test_a_source_file_with_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(CLICKS + '[items]\nlanding = "x"\nformat = "csv"\nid = "sku"\n')
    with pytest.raises(SourceError, match="name the catalogue's columns under categories"):
        load_source(str(file))
    file.write_text(
        CLICKS + '[items]\nlanding = "x"\nformat = "csv"\nid = "sku"\ncategory = ["brand"]\n'
    )
    with pytest.raises(SourceError, match=r"items\.category is not a field: did you mean 'categ"):
        load_source(str(file))
    file.write_text(
        CLICKS + '[items]\nlanding = "x"\nformat = "csv"\nid = "sku"\nnumbers = ["sku"]\n'
    )
    with pytest.raises(SourceError, match="'sku' is named twice"):
        load_source(str(file))


@pytest.mark.slow
def test_the_table(spark: Any, tmp_path: Path) -> None:
    toml = CLICKS + (
        '[items]\nlanding = "{landing}/../shop/{day}.csv"\nformat = "csv"\nid = "sku"\n'
        'categories = ["brand"]\nnumbers = ["price"]\n'
    )
    shop = Workshop(spark, tmp_path, toml)
    shop.land("log.csv", "user,item,ts\nu,1,1714521600\nu,2,1714521700\n")
    result = shop.run(day="2024-05-01")
    assert "has matched no file so far" in " ".join(result.notes)
    (tmp_path / "shop").mkdir()
    first = tmp_path / "shop" / "2024-05-01.csv"
    first.write_text("sku,brand,price\n,X,5\n")
    result = shop.run(day="2024-05-01")
    assert "of the files it matched none has a row with sku" in " ".join(result.notes)
    assert "1 rows of " in " ".join(result.notes)
    first.write_text("sku,brand,price\n1,X,5\n3,Y,\n")
    shop.run(day="2024-05-01")
    assert shop.rows(ITEM_ATTRIBUTES) == [
        {"item_id": "1", "known_from": at(2), "attributes": [("brand", "X"), ("price", "5")]},
        {"item_id": "3", "known_from": at(2), "attributes": [("brand", "Y")]},
    ]
    never = {"item_id": "3", "item_index": 3, "first_seen_ts": None, "event_count": 0}
    assert by_index(shop)[2:] == [never], "the catalogue has it, and nothing happened"
    versions = shop.version(ITEM_ATTRIBUTES), shop.version(ITEMS)
    shop.run(day="2024-05-01")
    shop.run(day="2024-05-02")  # no catalogue that day
    assert versions == (shop.version(ITEM_ATTRIBUTES), shop.version(ITEMS)), "nothing is new"
    (tmp_path / "shop" / "2024-05-03.csv").write_text("sku,brand,price\n1,X,6\n3,Y,\n")
    result = shop.run(day="2024-05-03")
    assert "no file" not in " ".join(result.notes)
    assert result.tables["gold.item_attributes"]["rows"] == 3
    first.write_text("sku,brand,price\n1,Z,5\n3,Y,\n")
    result = shop.run(day="2024-05-01")
    assert "1 items differ from what was read of the same day" in " ".join(result.notes)
    assert result.tables["gold.item_attributes"]["rows"] == 3
    (tmp_path / "shop" / "2024-05-04.csv").write_text("sku,brand,price\n5,Y,\n4,Y,\n")
    shop.land("more.csv", "user,item,ts\nu,3,1714780800\nu,5,1714780900\nu,6,1714780900\n")
    shop.run(day="2024-05-04")
    seen = datetime(2024, 5, 4, tzinfo=UTC)
    assert by_index(shop)[2:] == [
        {"item_id": "3", "item_index": 3, "first_seen_ts": seen, "event_count": 1},
        {
            "item_id": "5",
            "item_index": 4,
            "first_seen_ts": seen + timedelta(seconds=100),
            "event_count": 1,
        },
        {
            "item_id": "6",
            "item_index": 5,
            "first_seen_ts": seen + timedelta(seconds=100),
            "event_count": 1,
        },
        {"item_id": "4", "item_index": 6, "first_seen_ts": None, "event_count": 0},
    ]
    before = by_index(shop)
    shop.table(ITEMS).delete("item_id in ('3', '4')")
    shop.run(day="2024-05-05")
    assert by_index(shop) == before, "what others deleted is there again, by its number"
