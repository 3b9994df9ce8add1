"""Seeds until a difference is decided: the plan comes first and stays, looks follow from the trainings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from models.core.errors import UserError
from models.experiments import seeds
from models.experiments.grid import Cell
from models.experiments.seeds import Plan, pairs_of, until_decided
from models.registry import tracking
from models.selection.compare import Entry
from tests.support.recorded import World, trained_here

USERS = 200
EFFECTS = {"gru4rec": 0.0, "gru4rec+st": 0.05, "gru4rec+sse": 0.0005, "gru4rec+tsa": -0.05}


def plan_of(**given: Any) -> Plan:
    told: dict[str, Any] = {
        "pairs": (("gru4rec+st", "gru4rec"),), "first_seed": 1, "first": 3, "step": 1, "most": 6,
        "detect_pct": 3.0, "alpha": 0.05, "spending": "obrien-fleming", "trained_by": {},
    }  # fmt: skip
    return Plan(**told | given)


def test_a_plan_says_when_it_looks_and_how_far_is_far() -> None:
    assert plan_of().looks == [3, 4, 5, 6]
    assert plan_of(step=2, most=8).looks == [3, 5, 7, 8]
    assert plan_of(first=5, most=5).looks == [5] and plan_of(first=5, most=5).bounds == [
        pytest.approx(1.959964, abs=1e-6)
    ]
    assert plan_of(first_seed=4).seeds == [4, 5, 6, 7, 8, 9]
    bounds = plan_of().bounds
    assert bounds == sorted(bounds, reverse=True)
    assert f"4 seeds: {bounds[1]:.2f}" in plan_of().in_words()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"first": 1}, "--first 1: must be 2 or more"),
        ({"step": 0}, "--step 0: must be 1 or more"),
        ({"most": 2}, r"--max-seeds 2: must be --first \(3\) or more"),
        ({"alpha": 5.0}, "--alpha 5.0: must be between 0 and 0.5"),
        ({"detect_pct": -1.0}, "--detect -1.0: must be percent"),
    ],
)
def test_a_plan_that_is_none(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(**given).check()


def test_what_is_compared_with_what() -> None:
    names = ["gru4rec", "gru4rec+st", "gru4rec (wide)", "sasrec+fb", "sessionrec-sasrec"]
    assert pairs_of(names, None) == (
        ("gru4rec+st", "gru4rec"), ("gru4rec (wide)", "gru4rec"), ("sessionrec-sasrec", "sasrec+fb"),
    )  # fmt: skip
    assert pairs_of(["pop", "sasrec"], "pop") == (("sasrec", "pop"),)
    with pytest.raises(UserError, match="Add the backbone of a method, or set --against"):
        pairs_of(["sasrec+st", "gru4rec"], None)
    with pytest.raises(UserError, match="--against pop: must be one of --methods, sasrec"):
        pairs_of(["sasrec"], "pop")


class Trained:
    """Trainings that are drawn, in place of trainings: which there are, and what came of them."""

    def __init__(self) -> None:
        self.there: list[tuple[str, int]] = []
        self.until = 1000

    def train(self, *given: Any) -> bool:
        cell = next(one for one in given if isinstance(one, Cell))
        if (cell.name, cell.seed) not in self.there:
            if len(self.there) >= self.until:
                return False
            self.there.append((cell.name, cell.seed))
        return True

    def entries(self, *_: Any) -> list[Entry]:
        users = np.random.default_rng(0).beta(0.3, 3, USERS)
        found = []
        for name, seed in self.there:
            dice = np.random.default_rng([len(name), seed])
            drawn = users + EFFECTS[name] + dice.normal(0, 0.002) + dice.normal(0, 0.01, USERS)
            report = {"method": name, "seed": seed, "mlflow_run_id": ""}
            found.append(Entry(report, {"table_version": 3}, ["u"] * USERS, drawn, {}))
        return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Trained:
    made = Trained()
    monkeypatch.setattr(seeds, "train_cell", made.train)
    monkeypatch.setattr(seeds, "entries", made.entries)
    return made


def decided(world: World, comparison: str, plan: Plan, say: Any = lambda _: None) -> dict[str, Any]:
    cells = [Cell(name, seed) for seed in plan.seeds for name in EFFECTS]
    return until_decided(str(world.source), comparison, plan, cells, [], "", None, say)


PAIRS = tuple((name, "gru4rec") for name in EFFECTS if name != "gru4rec")


def test_what_is_decided_gets_no_more_seeds(world: World, drawn: Trained) -> None:
    plan = plan_of(pairs=PAIRS, detect_pct=0.0, most=8)
    outcome = decided(world, "s1", plan)
    rows = {row["method"]: row for row in outcome["methods"]}
    assert rows["gru4rec+st"]["verdict"] == "better" and rows["gru4rec+tsa"]["verdict"] == "worse"
    assert rows["gru4rec+sse"]["verdict"] == "cannot tell" and rows["gru4rec+sse"]["look"] == 6
    early = rows["gru4rec+st"]
    assert early["look"] < 6 and early["z"] > early["bound"] and early["low"] > 0
    assert early["level"] > 0.95 and early["spent"] < 0.05
    of = {name: sum(one == name for one, _ in drawn.there) for name in EFFECTS}
    assert of == {
        "gru4rec": 8, "gru4rec+sse": 8,
        **{name: rows[name]["seeds"][0] for name in ("gru4rec+st", "gru4rec+tsa")},
    }  # fmt: skip
    # With a gain of interest the third is decided, too.
    other = decided(world, "s2", plan_of(pairs=PAIRS, detect_pct=20.0, most=8))
    row = {row["method"]: row for row in other["methods"]}["gru4rec+sse"]
    assert row["verdict"] == "no gain" and row["look"] < 6 and row["high"] < row["effect"]


def test_it_goes_on_where_it_stopped_and_ends_the_same(world: World, drawn: Trained) -> None:
    plan = plan_of(pairs=PAIRS)
    whole = decided(world, "s3", plan)
    trainings = list(drawn.there)
    drawn.there.clear()
    for until in range(1, len(trainings), 3):
        drawn.until = until
        assert decided(world, "s4", plan)["failed"]
    drawn.until = 1000
    again = decided(world, "s4", plan)
    assert again["methods"] == whole["methods"] and sorted(drawn.there) == sorted(trainings)
    assert decided(world, "s4", plan)["methods"] == whole["methods"], "asked once more"
    # Seeds that are there for another reason are not looked at.
    drawn.there += [("gru4rec+st", seed) for seed in range(50, 60)]
    assert decided(world, "s4", plan)["methods"] == whole["methods"]

    client, experiment = tracking.connect("toy")
    [run] = tracking.runs(client, experiment, kind="seeds", comparison="s4")
    assert json.loads(run.data.tags["plan"]) == json.loads(plan.text)
    looks = client.get_metric_history(run.info.run_id, "low.gru4rec.st against gru4rec")
    assert [one.step for one in looks] == list(range(1, 1 + len(looks)))
    with tracking.downloaded(client, run.info.run_id, "seeds.json") as file:
        assert tracking.read_json(file)["methods"] == whole["methods"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"most": 9}, "with --max-seeds 6; 9 is asked for"),
        ({"alpha": 0.1}, "with --alpha 0.05; 0.1 is asked for"),
        ({"spending": "pocock"}, "with --spending obrien-fleming; pocock"),
        ({"detect_pct": 5.0}, "with --detect 3.0; 5.0"),
        ({"pairs": PAIRS}, "with --methods or --against"),
        ({"trained_by": {"gru4rec": "{}"}}, "with options of `train`"),
    ],
)
def test_a_plan_is_not_changed(
    world: World, drawn: Trained, given: dict[str, Any], said: str
) -> None:
    decided(world, "s5", plan_of())
    before = list(drawn.there)
    with pytest.raises(UserError, match=said):
        decided(world, "s5", plan_of(**given))
    assert drawn.there == before, "nothing was trained"


def test_the_plan_is_there_before_anything_is_trained(world: World, drawn: Trained) -> None:
    drawn.until = 0
    assert decided(world, "s6", plan_of())["failed"]
    with pytest.raises(UserError, match="has a plan already"):
        decided(world, "s6", plan_of(first=4))


def answered(world: World, *words: str) -> tuple[int, dict[str, Any] | None, str, str]:
    return world.run("seeds", "--source", str(world.source), "--json", *words)


@pytest.mark.training
def test_the_command_trains_looks_and_makes_a_table(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = trained_here(monkeypatch)
    results = world.root / "results" / "seeds.json"
    command: Sequence[str] = (
        "--comparison", "c1", "--methods", "pop,gru4rec,gru4rec+st", "--against", "pop",
        "--first", "2", "--max-seeds", "3", "--spending", "pocock", "--results", str(results), "--",
        "--epochs", "2",
    )  # fmt: skip
    status, done, said, err = answered(world, *command)
    assert status == 0 and done is not None, said + err
    rows = {row["method"]: row for row in done["methods"]}
    assert set(rows) == {"gru4rec", "gru4rec+st"} and done["failed"] == []
    for name, row in rows.items():
        assert row["against"] == "pop" and row["seeds"] == [row["look"] + 1, 1]
        assert f"{name} against pop, look {row['look']} of 2" in said
        assert f"the bound is {row['bound']:.2f}" in said
    count = len(trainings)
    assert count == 1 + sum(row["seeds"][0] for row in rows.values())
    status, again, _, err = answered(world, *command)
    assert status == 0 and again is not None and again["methods"] == done["methods"], err
    assert len(trainings) == count

    _, compared, said, _ = world.run(
        "compare", "--source", str(world.source), "--comparison", "c1", "--json"
    )
    assert compared is not None and compared["planned"] is True
    assert "this comparison has a plan" in said

    page = world.root / "results" / "page.md"
    page.write_text("<!-- results/seeds.json -->\n<!-- end -->\n")
    assert world.run("results", str(page))[0] == 0
    text = page.read_text()
    row = rows["gru4rec+st"]
    assert f"| {row['low']:+.4f} to {row['high']:+.4f} |" in text
    assert "python -m models seeds --source" in text and "--spending pocock" in text


@pytest.mark.training
def test_what_was_looked_at_before_gets_no_plan(world: World) -> None:
    for seed in ("1", "2"):
        world.train("gru4rec", "--comparison", "seen", "--seed", seed)
        world.train("gru4rec+st", "--comparison", "seen", "--seed", seed)
    source = str(world.source)
    assert world.run("compare", "--source", source, "--comparison", "seen")[0] == 0
    status, _, _, err = answered(world, "--comparison", "seen", "--methods", "gru4rec,gru4rec+st")
    assert status == 1 and "was compared before" in err and "--first-seed 3" in err
