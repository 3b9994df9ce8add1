"""Items that only the catalogue knows, from the recipe to the lists that users get."""

from __future__ import annotations

import pytest
from deltalake import DeltaTable

from tests.models.training.test_refit import command, crown
from tests.support.gold_world import GROUPS, NEW, launches, write_silver
from tests.support.recorded import World

pytestmark = pytest.mark.slow
ITEMS = """
[items]
landing = "none/*.csv"
format = "csv"
id = "sku"
categories = ["group"]
[serving]
where = "event_count = 0"
"""


def test_what_nobody_has_bought_yet_is_on_lists(world: World) -> None:
    write_silver(world.lake, "toy", launches(world.lake, before_the_last=True))
    world.source.write_text(world.source.read_text() + ITEMS)
    made = {}
    for method in ("sasrec+side", "sasrec"):
        world.train(
            method, "--comparison", "c", "--epochs", "6", "--split", "nightly", "--nights", "2"
        )
    command(world, "compare", "--comparison", "c")
    versions = command(world, "register", "--comparison", "c")["versions"]
    for method, number in ((one["method"], one["version"]) for one in versions):
        crown(world, number)
        made[method] = command(world, "refit")
        if method == "sasrec":
            continue
        assert command(world, "verify", "--served")["holds"]
        command(world, "score", "--k", "10")
        path = world.lake / "toy" / "gold" / "recommendations"
        rows = DeltaTable(str(path)).to_pyarrow_table().to_pylist()
        assert rows and all(len(row["items"]) == 10 for row in rows)
        listed = {item["item_id"][3] for row in rows for item in row["items"]}
        assert listed == {"n"}, "the rule leaves what has no event, and these are known"
    assert made["sasrec+side"]["items"] == made["sasrec"]["items"] + GROUPS * NEW
