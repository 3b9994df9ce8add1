"""How much evidence a comparison has: from its trainings, in words and numbers."""

from __future__ import annotations

import numpy as np
import pytest

from models.evaluation.components import components
from models.selection.power import nights_for, sentences
from tests.support.recorded import World

pytestmark = pytest.mark.training


def test_a_pilot_says_what_a_smaller_effect_needs(world: World) -> None:
    for method in ("gru4rec", "gru4rec+st", "pop"):
        for seed in ("0", "1") if method != "pop" else ("0",):
            world.train(method, "--comparison", "pilot", "--seed", seed)
    status, done, said, err = world.run("power", "--source", str(world.source), "--json")
    assert status == 0, said + err
    assert done is not None and done["comparison"] == "pilot"
    [row] = done["methods"]
    assert (row["method"], row["against"], row["seeds"]) == ("gru4rec+st", "gru4rec", [2, 2])
    assert [need["effect_pct"] for need in row["needs"]] == [3, 5, 10]
    for need in row["needs"]:
        enough = row["detectable_pct"] <= need["effect_pct"]
        assert (need["seeds"] == 2) == enough
    assert "gru4rec+st against gru4rec" in said
    assert "% needs" in said and "seeds of each method with these users" in said

    status, compared, said, err = world.run(
        "compare", "--source", str(world.source), "--comparison", "pilot", "--json"
    )
    assert status == 0, said + err
    assert compared is not None
    versus = {one["method"]: one["vs_vanilla_seeds"] for one in compared["methods"]}["gru4rec+st"]
    assert versus["detectable"] == pytest.approx(row["detectable"])
    assert f"a difference below {row['detectable_pct']:.1f} % would probably not have been" in said

    _, against, _, _ = world.run(
        "power", "--source", str(world.source), "--comparison", "pilot", "--methods", "gru4rec",
        "--against", "pop", "--split", "temporal", "--json",
    )  # fmt: skip
    assert against is not None
    [row] = against["methods"]
    assert row["against"] == "pop" and row["seeds"] == [2, 1] and row["sd_seeds"][1] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--methods", "narm"), "has no finished training of 'narm'; it has gru4rec, gru4rec+st"),
        (("--split", "nightly"), "with the split 'nightly' belongs to a comparison"),
        (("--comparison", "pilot", "--split", "last_item"), "has the split 'temporal', not 'last_item'"),
        (("--methods", "pop"), "has no two methods to compare: set --against"),
        (("--comparison", "none"), "--method METHOD --comparison none`"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_said(world: World, given: tuple[str, ...], said: str) -> None:
    status, _, _, err = world.run("power", "--source", str(world.source), *given)
    assert status != 0 and said in err


def test_nights_are_counted_by_what_differs_from_night_to_night() -> None:
    nights = np.array([0.01, 0.03, -0.01, 0.02, 0.0])
    few, many = nights_for(0.03, nights), nights_for(0.005, nights)
    assert few is not None and many is not None and 2 < few < 10 < many < 120
    assert nights_for(0.0005, nights) is None


def test_what_cannot_be_had_is_said() -> None:
    dice = np.random.default_rng(0)
    found = components(dice.random((50, 1)), dice.random((50, 1)))
    row = {
        "detectable": found.detectable(50, 1), "detectable_pct": None, "sd_seeds": None,
        "sd_nights": None, "needs": [{"effect_pct": 3.0, "seeds": None, "users": None}],
    }  # fmt: skip
    assert sentences(row)[1:] == [
        "one training of each: train with --seed 1, too, to know what seeds bring",
        "3 % needs more users with these seeds than can be had",
    ]
