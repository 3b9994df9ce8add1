"""Many trainings in one command: grids, scaling, what documents say of them.

Each file has an MLflow of its own; methods are tiny.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import pytest

from models.core.errors import UserError
from models.data.splits import users_share
from models.experiments import grid as grids
from models.experiments.grid import methods_of
from models.experiments.scaling import in_words, power_law
from models.networks.methods import SESSION_ENCODERS
from tests.models.networks.test_sessionrec import attributes_table
from tests.support.gold_world import DAY, data_of, ring, write_gold
from tests.support.recorded import World


@pytest.mark.slow
def test_a_grid_goes_on_where_it_stopped_and_makes_the_documents_tables(
    world: World,
) -> None:
    """Of six cells four are there; the others are trained in processes of their own, one of them
    with other settings than its method's."""
    for method, seed in (("pop", 1), ("gru4rec", 1), ("gru4rec", 2), ("gru4rec+st", 1)):
        world.train(method, "--comparison", "c1", "--seed", str(seed))
    results = world.root / "results" / "toy.json"
    status, outcome, said, err = world.run(
        "grid", "--source", str(world.source), "--comparison", "c1", "--seeds", "1,2",
        "--results", str(results), "--methods", "pop,gru4rec,gru4rec+st", "--json",
        "--", "--epochs", "3",
    )  # fmt: skip
    assert status == 0 and outcome is not None, err
    assert said.count("there already") == 4  # pop once: its seed says nothing
    seeds = {row["method"]: row["seeds"] for row in outcome["methods"]}
    assert seeds == {"pop": 1, "gru4rec": 2, "gru4rec+st": 2}
    [encoded] = [row for row in outcome["methods"] if row["method"] == "gru4rec+st"]
    assert encoded["vs_vanilla_seeds"]["seeds"] == [2, 2]
    assert set(encoded["by_target"]) == {"first", "inside"}
    written = json.loads(results.read_text())
    assert len(written["cells"]) == 5 and written["comparison"]["winner"] == outcome["winner"]
    assert all(0 < cell["metrics"]["coverage@10"]["value"] <= 1 for cell in written["cells"])

    document = world.root / "RESULTS.md"
    document.write_text("Before.\n<!-- results/toy.json -->\n<!-- end -->\nAfter.\n")
    for _ in range(2):
        status, done, _, err = world.run("results", str(document), "--json")
        assert status == 0 and done is not None and done["files"] == ["results/toy.json"], err
    text = document.read_text()
    assert text.startswith("Before.\n") and text.endswith("<!-- end -->\nAfter.\n")
    assert text.count("| gru4rec+st | 2 |") == 1 and "first of a session" in text
    assert (world.root / "results" / "toy.svg").read_text().startswith("<?xml")

    # A page in results/ is made of the same files; a short table has what has a backbone.
    page = world.root / "results" / "page.md"
    page.write_text(
        "<!-- results/toy.json -->\n<!-- end -->\n<!-- short results/toy.json -->\n<!-- end -->\n"
    )
    status, done, _, err = world.run("results", str(page), "--json")
    assert status == 0 and done is not None and done["files"] == ["results/toy.json"] * 2, err
    assert "(toy.svg)" in page.read_text()
    versus = encoded["vs_vanilla_seeds"]
    base = next(one for one in outcome["methods"] if one["method"] == "gru4rec")["ndcg@10_mean"]
    short = page.read_text().split("<!-- short")[1]
    assert "| | +st |" in short and f"| gru4rec ({base:.3f}) |" in short
    assert f"{100 * versus['difference'] / base:+.0f} %" in short and "seen from" in short

    def part(name: str, keep: set[str], users: int) -> None:
        # (Its comparison has the methods of the other, too, as grids of one comparison do.)
        outcome = {**written["comparison"], "users": users, "table_id": name}
        cells = [cell for cell in written["cells"] if cell["method"] in keep]
        file = results.with_name(f"toy-{name}.json")
        file.write_text(json.dumps({**written, "comparison": outcome, "cells": cells}))

    # The same from two files, whose lakes had other ids: as one table, best first.
    users = written["comparison"]["users"]
    part("a", {"pop"}, users)
    part("b", {"gru4rec", "gru4rec+st"}, users)
    document.write_text("<!-- results/toy-*.json -->\n<!-- end -->\n")
    status, done, _, err = world.run("results", str(document), "--json")
    assert done is not None and done["files"] == ["results/toy-a.json", "results/toy-b.json"], err

    def tables(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("|")]

    assert tables(document.read_text()) == tables(text)
    assert document.read_text().count(written["machine"]["processor"]) == 1
    elsewhere = {**written["machine"], "processor": "an abacus", "cpu_capability": "BEADS"}
    file = results.with_name("toy-b.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "machine": elsewhere}))
    assert world.run("results", str(document))[0] == 0
    assert written["machine"]["processor"] in document.read_text(), "the machine of toy-a"
    assert " and an abacus (BEADS), " in document.read_text()
    part("b", {"gru4rec", "gru4rec+st"}, users + 1)
    status, _, _, err = world.run("results", str(document))
    assert status == 1 and f"users is {users} and {users + 1}" in err

    missing = world.run("results", "nothing.md")
    assert missing[0] == 1 and "nothing.md is not there" in missing[3]


@pytest.mark.long
def test_a_variant_is_held_against_its_method_as_it_is(world: World) -> None:
    source = str(world.source)
    plain_one = ("train", "--source", source, "--method", "gru4rec", "--comparison", "c9")
    assert world.run(*plain_one, "--seed", "1")[0] == 0
    command = (
        "grid", "--source", source, "--comparison", "c9", "--seeds", "1", "--methods",
        "pop,gru4rec", "--results", str(world.root / "results" / "wide.json"), "--json",
        "--variant", "wide: --dim 24 --epochs 3",
    )  # fmt: skip
    status, outcome, _, err = world.run(*command)
    assert status == 0 and outcome is not None, err
    rows = {row["method"]: row for row in outcome["methods"]}
    assert set(rows) == {"pop", "gru4rec", "gru4rec (wide)"} and not outcome["missing"]
    wide, plain = rows["gru4rec (wide)"], rows["gru4rec"]
    assert wide["num_params"] != plain["num_params"]
    assert wide["vs_vanilla"]["method"] == "gru4rec" and plain["vs_vanilla"] is None
    document = world.root / "WIDE.md"
    document.write_text("<!-- results/wide.json -->\n<!-- end -->\n")
    assert world.run("results", str(document))[0] == 0
    assert "--variant 'wide: --dim 24 --epochs 3'" in document.read_text()
    asked = methods_of("all"), methods_of("all", "next_session")
    assert len(asked[0]) == 33 and set(asked[1]) - set(asked[0]) == {
        "gru4rec+fb", "narm+fb", "sasrec+fb", "bert4rec+fb", "hstu+fb", *SESSION_ENCODERS
    }  # fmt: skip
    for wrong in ("wide", "wide: dim 24", ": --dim 24"):
        status, _, _, err = world.run(*command[:-1], wrong)
        assert status == 1 and f"--variant '{wrong}': write a new name" in err


def test_who_reads_the_catalogue_is_said_and_one_that_says_nothing_is_left_out(
    world: World,
) -> None:
    shop = world.root / "shop.toml"
    shop.write_text(
        world.source.read_text().replace('"toy"', '"shop"')
        + '[items]\nlanding = "x"\nformat = "csv"\nid = "sku"\ncategories = ["brand"]\n'
    )
    write_gold(world.lake, "shop", ring())
    names = [f"i{number:02d}" for number in range(15)]

    def known(since_us: int) -> None:
        attributes_table(world.lake, [(n, since_us, {"brand": n[-1]}) for n in names], "shop")

    def train(method: str, *more: str) -> tuple[dict[str, Any], str]:
        status, done, said, err = world.run(
            "train", "--source", str(shop), "--method", method, "--epochs", "1", "--json",
            "--target", "next_session", *more,
        )  # fmt: skip
        assert status == 0 and done is not None, err
        return done, said

    known(100 * DAY)  # after every event
    blind, said = train("sessionrec-sasrec")
    assert "of none of the 15 items was anything known" in said and not blind["catalogue"]
    without, said = train("sessionrec-sasrec", "--no-side")
    assert "catalogue:" not in said and without["num_params"] == blind["num_params"]
    known(0)
    seeing, said = train("sessionrec-sasrec", "--comparison", "c11")
    assert "something was known of 15 of 15 items" in said and seeing["catalogue"]
    assert seeing["num_params"] > blind["num_params"]
    train("sasrec+fb", "--comparison", "c11")
    status, _, said, err = world.run("compare", "--source", str(shop), "--comparison", "c11")
    assert status == 0, err
    assert "sessionrec-sasrec against sasrec+fb" in said
    note = "not equal in what they know: sessionrec-sasrec read the catalogue"
    assert note in " ".join(said.split())


def test_a_log_without_a_positive_event_is_told_so(world: World) -> None:
    write_gold(
        world.lake,
        "toy",
        {user: [(*one, "negative") for one in told] for user, told in ring(4).items()},  # type: ignore[misc]
    )
    for method, target in (("sessionrec-gru4rec", "next_session"), ("gru4rec", "next_item")):
        status, _, _, err = world.run(
            "train", "--source", str(world.source), "--method", method, "--target", target,
            "--split", "last_session",
        )  # fmt: skip
        assert status == 1 and "None of them is positive: look at [feedback]" in err, err
    write_gold(world.lake, "toy", ring())


def test_exposures_that_are_events_are_told_to_who_reads_them_as_events(world: World) -> None:
    wall = world.root / "wall.toml"
    wall.write_text(world.source.read_text().replace('"toy"', '"wall"'))
    told = {
        user: [(*one, "exposed") if one[2] % 2 else one for one in t] for user, t in ring().items()
    }
    write_gold(world.lake, "wall", told)  # type: ignore[arg-type]
    for method, says in (("gru4rec+fb", True), ("gru4rec", False), ("sessionrec-gru4rec", False)):
        status, _, said, err = world.run(
            "train", "--source", str(wall), "--method", method, "--epochs", "1",
            "--target", "next_session" if method.startswith("session") else "next_item",
        )  # fmt: skip
        assert status == 0, err
        assert ("of these events are exposures themselves" in said) == says, method


def test_a_grid_of_unknown_methods_or_seeds_is_refused_before_it_starts(world: World) -> None:
    command = ("grid", "--source", str(world.source), "--comparison", "no", "--methods")
    status, _, _, err = world.run(*command, "sasrec,lstm")
    assert status == 1 and "unknown method 'lstm'" in err
    status, _, _, err = world.run(*command, "pop", "--seeds", "one")
    assert status == 1 and "--seeds one" in err


@pytest.mark.long
def test_a_cell_trained_otherwise_is_not_taken_for_another(world: World) -> None:
    results = world.root / "results" / "otherwise.json"
    command = (
        "grid", "--source", str(world.source), "--comparison", "otherwise", "--methods",
        "pop,gru4rec", "--seeds", "1", "--results", str(results), "--json", "--",
    )  # fmt: skip
    assert world.run(*command, "--epochs", "1", "--threads", "1")[0] == 0
    status, _, said, _ = world.run(*command, "--threads", "2", "--epochs", "1")  # the same
    assert status == 0 and said.count("there already") == 2
    before = results.read_text()
    status, _, _, err = world.run(*command, "--epochs", "2")
    assert status == 1 and results.read_text() == before
    assert 'trained with {"epochs": 1}. You gave {"epochs": 2}' in err


@pytest.mark.slow
def test_a_grid_with_a_cell_that_failed_has_failed(world: World) -> None:
    status, done, _, err = world.run(
        "grid", "--source", str(world.source), "--comparison", "half", "--methods", "pop,sasrec",
        "--seeds", "1", "--json", "--", "--heads", "3",
    )  # fmt: skip
    assert status == 1 and done is not None and done["failed"] == ["sasrec, seed 1"]
    assert "1 of the trainings failed, sasrec, seed 1" in err
    status, _, _, err = world.run(
        "scaling", "--source", str(world.source), "--comparison", "none", "--method", "pop",
        "--results", "none.json",
    )  # fmt: skip
    assert status == 1 and "--method pop: a baseline has no width" in err


def lines(exponent: float, bend: float = 0.0, noise: float = 0.002) -> list[dict[str, float]]:
    """loss = 5 x^-b, five sizes over two decades, three trainings each."""
    rng = np.random.default_rng(1)
    x = np.repeat(np.geomspace(1e4, 1e6, 5), 3)
    far = np.log(x / 1e5)
    loss = 5 * np.exp(-exponent * far + bend * far**2 + rng.normal(0, noise, len(x)))
    return [{"n": a, "loss": b} for a, b in zip(x, loss, strict=True)]


def test_a_power_law_is_found_with_its_interval_and_a_bend_is_told() -> None:
    fit = power_law(lines(0.1), "n")
    assert fit["low"] < 0.1 < fit["high"] and fit["high"] - fit["low"] < 0.005
    assert fit["r2"] > 0.99 and fit["loss_there"] == pytest.approx(5, rel=0.01)
    assert fit["bend"]["low"] < 0 < fit["bend"]["high"]
    bent = power_law(lines(0.1, bend=0.02), "n")
    assert bent["bend"]["low"] > 0
    assert "flattens towards more data" in in_words({"fits": {"data": bent}})
    flat = power_law(lines(0.0, noise=0.05), "n")
    assert flat["low"] < 0 < flat["high"]
    with pytest.raises(UserError, match="2 different n finished"):
        power_law(lines(0.1)[:6], "n")


def test_shares_of_the_users_are_nested_and_keep_the_vocabulary(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", ring(users=200))
    data = data_of(tmp_path)
    parts = [users_share(data.training, data.sequences.user_id, s) for s in (0.25, 0.5, 1.0)]
    quarter, half, whole = (set(part.user.tolist()) for part in parts)
    assert quarter < half < whole and 30 < len(quarter) < 70 and 75 < len(half) < 125
    assert all(np.array_equal(part.vocabulary, data.training.vocabulary) for part in parts)
    first = parts[0]
    for place, user in enumerate(first.user.tolist()):
        [there] = np.flatnonzero(data.training.user == user)
        ours, all_of = first.rows, data.training.rows
        mine = slice(ours.start[place], ours.start[place + 1])
        full = slice(all_of.start[there], all_of.start[there + 1])
        assert np.array_equal(ours.item[mine], all_of.item[full])
        assert np.array_equal(ours.ordinal[mine], all_of.ordinal[full])
    assert list(first.counts)[-1] == "a share of 0.25 of the users"
    with pytest.raises(UserError, match=r"0 user\(s\) left"):
        users_share(data.training, data.sequences.user_id, 1e-9)


@pytest.mark.long
def test_scaling_trains_what_is_missing_and_is_told_in_the_document(world: World) -> None:
    results = world.root / "results" / "law.json"
    command = (
        "scaling", "--source", str(world.source), "--comparison", "law", "--method", "gru4rec",
        "--widths", "4,8,16", "--shares", "0.3,0.6", "--seeds", "1,2", "--one-seed-from", "5",
        "--results", str(results), "--json", "--", "--epochs", "2", "--threads", "1",
    )  # fmt: skip
    status, done, said, err = world.run(*command)
    assert status == 0 and done is not None, err
    assert said.count("there already") == 0
    points = done["points"]
    assert [p["dim"] for p in points] == [4, 4, 8, 16, 16, 16, 16]
    assert [p["share"] for p in points] == [1, 1, 1, 1, 0.3, 0.3, 0.6]
    assert [p["seed"] for p in points] == [1, 2, 1, 1, 1, 2, 1], "4 < 5 and 16 x .3 < 5"
    events = [p["events"] for p in points]
    assert events[4] == events[5] < events[6] < events[0] and len(set(events[:4])) == 1
    assert all(0 < p["loss"] < 5 for p in points) and done["missing"] == 0
    assert done["fits"]["data"]["points"] == 4
    status, again, said, _ = world.run(*command)
    assert status == 0 and again is not None and said.count("there already") == 7
    assert again["fits"] == done["fits"] and again["points"] == points
    document = world.root / "LAW.md"
    document.write_text("<!-- results/law.json -->\n<!-- end -->\n")
    assert world.run("results", str(document))[0] == 0
    text = document.read_text()
    assert "loss ~ parameters^-" in text and "python -m models scaling --source" in text
    assert text.count("| 16 |") == 3 and "--one-seed-from 5" in text


def test_a_cell_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Who waits says so, and goes on when the other has ended, or all that have inherited its lock."""
    path, said, order = tmp_path / "cells" / "one.lock", Queue[str](), list[str]()

    def other(name: str) -> None:
        with grids._alone(path, said.put):
            order.append(name)

    with grids._alone(path, said.put) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
        others = [Thread(target=other, args=(name,)) for name in ("one", "another")]
        for each in others:
            each.start()
        for _ in others:
            assert "waiting until it ends" in said.get(timeout=30)
        order.append("first")
    assert order == ["first"], "the process that inherited the lock still has it"
    child.kill()
    child.wait()
    for each in others:
        each.join(30)
    assert order[0] == "first" and sorted(order[1:]) == ["another", "one"]
    assert not path.exists()
