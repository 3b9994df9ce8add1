"""`[serving]`: what it resolves to, what its audit refuses, and how its mistakes are reported."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import SettingsError, SourceError
from jobs.core.source_file import load_source
from jobs.core.tables import ITEM_ATTRIBUTES
from jobs.lake.context import Context
from jobs.lake.delta import Lake
from jobs.recommend import rule_checks
from jobs.recommend.rules import PLACE, export, item_table, possible, resolve, satisfying
from models.networks.baselines import Popularity
from models.networks.methods import config
from models.networks.saved_model import Stored
from models.serving.rules import Rules, of_text
from tests.support.gold_world import DAY, SECOND, Event, rows_of, write_gold
from tests.support.recorded import SOURCE

USERS: dict[str, list[Event]] = {
    "ann": [("a", DAY, 1), ("b", 5 * DAY, 2)],
    "bob": [("c", 9 * DAY, 1), ("d", 10 * DAY, 2, "exposed")],
    "cat": [("f", 1, 1)],
}
ITEMS = ["a", "b", "c", "d", "e", "f"]
SAID = [
    ("a", 1, {"in_stock": "true", "Brand": "X", "price": "9", "item_id": "another"}),
    ("b", 1, {"in_stock": "true", "Brand": "Y", "price": "10"}),
    ("c", 1, {"in_stock": "true", "Brand": "X"}),
    ("c", 2, {"in_stock": "false", "Brand": "Y", "price": "11"}),
    ("d", 1, {"in_stock": "true"}),
    ("a stranger", 1, {"in_stock": "true"}),
]
CATALOGUE = """
[items]
landing = "items.csv"
format = "csv"
id = "id"
categories = ["in_stock", "Brand", "with blank"]
numbers = ["price"]
"""


def no_jvm() -> Any:
    raise AssertionError("rules need no JVM")


def world(root: Path, serving: str) -> Context:
    """A lake with a catalogue, and a source file with these rules."""
    write_gold(root / "lake", "toy", USERS, ITEMS)
    rows = [
        (item, datetime(2024, 1, day, tzinfo=UTC), list(told.items())) for item, day, told in SAID
    ]
    schema = arrow_schema(ITEM_ATTRIBUTES.columns)
    columns = [
        pa.array(one, field.type)
        for one, field in zip(zip(*rows, strict=True), schema, strict=True)
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    write_deltalake(ITEM_ATTRIBUTES.path(str(root / "lake"), "toy"), table, mode="overwrite")
    (root / "toy.toml").write_text(SOURCE + CATALOGUE + "[serving]\n" + serving)
    source = load_source(str(root / "toy.toml"))
    return Context(source, Lake(no_jvm, str(root / "lake"), "toy"), None, "test")


def allowed(context: Context) -> list[str]:
    found = resolve(context, ITEMS, 0)
    assert found is not None
    return [item for item, given in zip(ITEMS, found.rules.allowed, strict=True) if given]


@pytest.mark.parametrize(
    ("where", "items"),
    [
        ("in_stock = 'true' and Brand <> 'X'", "b"),  # (of d no brand is known)
        ("in_stock = 'true'", "abd"),
        ("Brand = 'Y'", "bc"),  # (the newest row of c counts)
        ("price < 10.5", "ab"),  # (a number, not a text)
        ("event_count > 0 and item_id <> 'a' -- popular ones", "bcdf"),
        ("in_stock is null", "ef"),
        ('"with blank" is null', "abcdef"),
    ],
)
def test_a_condition_is_on_items_and_what_is_said_of_them(
    tmp_path: Path, where: str, items: str
) -> None:
    context = world(tmp_path, f"where = '''{where}'''")
    assert allowed(context) == list(items)
    table = item_table(context)
    assert sorted(satisfying(table, where, "IS NOT TRUE").to_pylist()) == sorted(
        set(ITEMS) - set(items)
    )


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("colour = 'red'", ["No field named colour", "in_stock", "Brand", "price", "item_id"]),
        ("brand = 'X'", ["No field named brand", "Brand", "case sensitive"]),
        ("price <", ["SQL", "Correct it"]),
        ("price", ["Correct it"]),
        ("price < 'cheap'", ["cheap"]),
        ("true) union select (true", ["Correct it"]),
        ("item_id = 'no such item'", ["leaves none of the 6 items"]),
    ],
)
def test_a_condition_that_cannot_be_is_reported_by_name(
    tmp_path: Path, where: str, words: list[str]
) -> None:
    context = world(tmp_path, f"where = '''{where}'''")
    with pytest.raises(SettingsError) as raised:
        resolve(context, ITEMS, 0)
    said = str(raised.value)
    assert all(one in said for one in ["serving.where", repr(where), *words]), said


@pytest.mark.parametrize(
    ("serving", "words"),
    [
        ("where = 3", ["serving.where = 3", "string"]),
        ('were = "true"', ["serving.were", "did you mean 'where'"]),
        ("exclude_seen_days = 0", ["serving.exclude_seen_days = 0", "greater than 0"]),
        ('exclude_seen_days = "week"', ["serving.exclude_seen_days = 'week'"]),
        ("max_per_category = 0", ["serving.max_per_category = 0", "greater than or equal to 1"]),
        ("max_per_category = 2", ["max_per_category = 2 needs category"]),
        ('category = "Brand"', ["category = 'Brand' needs max_per_category"]),
        (
            'category = "shelf"\nmax_per_category = 2',
            ["serving.category = 'shelf'", "items.categories", "Brand"],
        ),
    ],
)
def test_rules_that_cannot_be_are_reported_with_key_and_remedy(
    tmp_path: Path, serving: str, words: list[str]
) -> None:
    with pytest.raises(SourceError) as raised:
        world(tmp_path, serving)
    assert all(one in str(raised.value) for one in ["toy.toml", *words]), raised.value


def test_a_block_list_is_a_file_of_ids(tmp_path: Path) -> None:
    file = tmp_path / "blocked.txt"
    file.write_bytes("\ufeffa\r\n\r\nd\nd\nunheard of\n b".encode())
    context = world(tmp_path, f'block_list = "{file}"')
    assert allowed(context) == ["b", "c", "e", "f"]
    found = resolve(context, ITEMS, 0)
    assert found is not None and found.removed == {"block_list": 2}
    assert found.notes == ["2 of 4 ids in serving.block_list are not in gold.items"]
    file.unlink()
    with pytest.raises(SettingsError, match=r"serving.block_list = .*one item id a line"):
        resolve(context, ITEMS, 0)


def test_what_lists_are_made_by_has_a_name(tmp_path: Path) -> None:
    """By it a changed rule is noticed, and an equal one written otherwise is not."""
    file = tmp_path / "blocked.txt"
    file.write_text("a\n")
    names = {}
    for serving in (
        "where = \"item_id <> 'a'\"", "where = \"not item_id = 'a'\"", f'block_list = "{file}"',
        "where = \"item_id <> 'b'\"", "exclude_seen_days = 1", "exclude_seen_days = 2",
        'max_per_category = 1\ncategory = "Brand"', 'max_per_category = 2\ncategory = "Brand"',
        'max_per_category = 2\ncategory = "in_stock"',
    ):  # fmt: skip
        found = resolve(world(tmp_path, serving), ITEMS, 0)
        assert found is not None
        names[serving] = found.digest
    same = list(names.values())[:3]
    assert len(set(same)) == 1 and len(set(names.values())) == len(names) - 2
    assert resolve(world(tmp_path, ""), ITEMS, 0) is None


RULES = """
where = "item_id <> 'e'"
exclude_seen_days = 1
max_per_category = 1
category = "in_stock"
"""
LISTS = {"ann": ["b", "f", "c"], "bob": ["a", "f"]}
BROKEN = {
    "none": ({}, set()),
    "where": ({"ann": ["e"]}, {"items_are_allowed"}),
    "blocked": ({"ann": ["x"]}, {"items_are_allowed"}),
    "seen": ({"bob": ["f", "d"]}, {"seen_items_are_left_out"}),
    "seen a day ago": ({"bob": ["c"]}, {"seen_items_are_left_out"}),
    "category": ({"ann": ["a", "b"]}, {"categories_are_bounded"}),
    "all": ({"ann": ["a", "b", "e"], "bob": ["c"]}, set(rule_checks.CHECKS)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_planted_list_that_breaks_a_rule_is_refused(tmp_path: Path, name: str) -> None:
    planted, broken = BROKEN[name]
    (tmp_path / "blocked.txt").write_text("x\n")
    context = world(tmp_path, RULES + f'block_list = "{tmp_path}/blocked.txt"')
    lists = LISTS | planted
    users, items = pa.array(list(lists)), pa.array(list(lists.values()), pa.list_(pa.string()))
    held = rule_checks.rules_held(context, 0, users, items)
    assert set(held) == set(rule_checks.CHECKS)
    assert {check for check, holds in held.items() if not holds} == broken


def test_how_long_a_list_can_be_is_counted_as_an_oracle_counts() -> None:
    dice = np.random.default_rng(11)
    made = config("pop")
    for _ in range(200):
        size = int(dice.integers(1, 12))
        told = [
            [
                (int(dice.integers(1, size + 1)), int(one), 1)
                for one in sorted(dice.integers(0, 9, n))
            ]
            for n in dice.integers(0, 6, 3)
        ]
        rows, all_seen = rows_of(*told), bool(dice.random() < 0.3)
        rules = Rules(
            dice.random(size) < 0.7, int(dice.integers(1, 9)) * SECOND, 8 * SECOND,
            int(dice.integers(0, 3)), dice.integers(-1, 3, size),
        )  # fmt: skip
        pop = Popularity(size, made.model)
        stored = Stored(pop, made, [str(one) for one in range(size)], pop.count, {})
        assert rules.seen_us is not None and rules.category is not None
        want = []
        for events in told:
            gone = {
                i - 1 for i, s, _ in events if all_seen or s * SECOND >= 8 * SECOND - rules.seen_us
            }
            left = [one for one in range(size) if rules.allowed[one] and one not in gone]
            count: dict[int, int] = {}
            for one in left:
                count[int(rules.category[one])] = count.get(int(rules.category[one]), 0) + 1
            want.append(sum(
                min(many, rules.most) if rules.most and which >= 0 else many
                for which, many in count.items()
            ))  # fmt: skip
        assert possible(stored, rows, rules, all_seen).tolist() == want


def test_rules_for_a_machine_without_tables_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text("a\n")
    context = world(tmp_path, RULES + f'block_list = "{tmp_path}/blocked.txt"')
    told = export(context)
    assert (told["items"], told["allowed"]) == (6, 4)
    text = (tmp_path / "lake/toy" / "/".join(PLACE)).read_text()
    assert json.loads(text)["as_of"] == "1970-01-11T00:00:00+00:00"
    known = ITEMS[1:]  # a model knows some
    found = resolve(context, known, 0)
    pop = Popularity(len(known), config("pop").model)
    served = of_text(text, Stored(pop, config("pop"), known, pop.count, {}).lookup)
    assert found is not None
    ours = found.rules
    assert served.allowed.tolist() == ours.allowed.tolist() == [True, True, True, False, True]
    assert (served.seen_us, served.now_us, served.most) == (ours.seen_us, ours.now_us, ours.most)
    assert served.category is not None and ours.category is not None
    assert served.category.tolist() == [0, 1, 0, -1, -1] == ours.category.tolist()
    with pytest.raises(SettingsError, match=r"\[serving\] of toy has no rules"):
        export(world(tmp_path, ""))
