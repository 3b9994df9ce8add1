"""`jobs score`: lists for every user, the same as a model gives when asked, in one commit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import functions as F

from jobs import cli as jobs_cli
from jobs.audit import suite as audit_suite
from jobs.core import crash_points
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import AuditFailed
from jobs.core.source_file import load_source
from jobs.core.tables import ITEM_ATTRIBUTES, LISTS, RECOMMENDATIONS, RUNS
from jobs.lake import filesystem
from jobs.lake.context import Context, checked_batch
from jobs.lake.delta import Lake
from jobs.pipeline import published
from jobs.recommend import rule_checks
from jobs.recommend import score as score_job
from jobs.recommend.checks import recommendations_hold
from models.networks.baselines import Popularity
from models.networks.methods import config
from models.networks.saved_model import Stored, load
from models.networks.scoring import best
from models.registry import tracking
from models.serving.answer import recommend
from tests.jobs.audit.test_batch_checks import spoiled
from tests.jobs.audit.test_suite import named
from tests.jobs.recommend.test_lists import BROKEN as BROKEN_WORTH
from tests.jobs.recommend.test_lists import good as good_worth
from tests.support.gold_world import rows_of
from tests.support.recorded import World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def registered(world: World) -> dict[str, str]:
    """Method -> version. The challenger is the winner of three."""
    for method in ("personal_top", "gru4rec+st", "sessionrec-sasrec"):
        world.train(method, "--comparison", "lists", "--target", "next_session")
    for command in ("compare", "register"):
        status, done, _, err = world.run(
            command, "--source", str(world.source), "--comparison", "lists", "--json"
        )
        assert status == 0 and done is not None, err
    return {one["method"]: str(one["version"]) for one in done["versions"]}


def lists_of(world: World) -> pd.DataFrame:
    table = DeltaTable(RECOMMENDATIONS.path(str(world.lake), "toy"))
    return table.to_pyarrow_table().to_pandas()


def score(world: World, *words: str) -> tuple[int, dict[str, Any] | None, str, str]:
    return world.run("score", "--source", str(world.source), "--json", *words)


def test_best_is_a_stable_sort() -> None:
    dice = np.random.default_rng(3)
    for _ in range(200):
        scores = torch.tensor(dice.integers(-2, 3, (4, int(dice.integers(1, 12)))) / 2)
        k = int(dice.integers(1, 14))
        place, score = best(scores, k)
        value, order = torch.sort(scores, dim=1, descending=True, stable=True)
        assert torch.equal(place, order[:, :k]) and torch.equal(score, value[:, :k])


@pytest.mark.parametrize("method", ["personal_top", "gru4rec+st", "sessionrec-sasrec"])
def test_lists_are_those_of_the_model(
    world: World, registered: dict[str, str], method: str
) -> None:
    status, done, said, err = score(world, "--model-version", registered[method], "--k", "7")
    assert status == 0 and done is not None, said + err
    found = lists_of(world)
    mine = found[found.model_version == registered[method]].sort_values("user_id")
    assert done["tables"]["gold.recommendations"]["rows"] == len(found)
    sequences = DeltaTable(str(world.lake / "toy/gold/sequences")).to_pyarrow_table().to_pandas()
    assert list(mine.user_id) == sorted(sequences.user_id)
    items = DeltaTable(str(world.lake / "toy/gold/items")).to_pyarrow_table().to_pandas()
    names = dict(zip(items.item_index, items.item_id, strict=True))
    events = sequences.explode(["item_index", "event_ts", "session_ordinal", "feedback"])
    frame = pd.DataFrame(
        {"user_id": events.user_id, "item_id": events.item_index.map(names),
         "event_ts": pd.to_datetime(events.event_ts, utc=True)}
    )  # fmt: skip
    client, _ = tracking.connect("toy")
    run_id = client.get_model_version("toy", registered[method]).run_id
    with tracking.downloaded(client, run_id, "trained") as folder:
        asked = recommend(load(folder), frame, k=7).sort_values("user_id")
    for ours, theirs in zip(mine["items"], asked["items"], strict=True):
        assert [one["item_id"] for one in ours] == [one["item_id"] for one in theirs]
        assert np.allclose([one["score"] for one in ours], [one["score"] for one in theirs])


def test_one_commit_that_is_not_made_twice_and_old_versions_go(
    world: World, registered: dict[str, str]
) -> None:
    versions = registered["personal_top"], registered["gru4rec+st"]
    client, _ = tracking.connect("toy")
    client.set_registered_model_alias("toy", "night", versions[0])
    client.set_registered_model_alias("toy", "challenger", versions[1])
    assert score(world, "--alias", "night", "--k", "5")[0] == 0
    assert score(world, "--alias", "challenger", "--k", "5")[0] == 0
    table = DeltaTable(RECOMMENDATIONS.path(str(world.lake), "toy"))
    users = len(lists_of(world)) // 2
    assert lists_of(world).groupby("model_version").size().to_dict() == dict.fromkeys(
        versions, users
    ), "both have an alias"
    before = table.version()
    status, done, said, _ = score(world, "--alias", "challenger", "--k", "5")
    assert status == 0 and done is not None and "these lists are there already" in said
    table.update_incremental()
    assert table.version() == before
    assert score(world, "--alias", "challenger", "--k", "6")[0] == 0, "longer lists are others"
    client.delete_registered_model_alias("toy", "night")
    assert score(world, "--alias", "challenger", "--k", "5")[0] == 0
    left = lists_of(world)
    assert left.groupby("model_version").size().to_dict() == {versions[1]: users}
    runs = DeltaTable(RUNS.path(str(world.lake), "toy")).to_pyarrow_table().to_pylist()
    last = max((run for run in runs if run["job"] == "score"), key=lambda run: run["started_ts"])
    assert last["files"] == [f"models:/toy/{versions[1]}"] and last["outcome"] == "ok"
    assert dict(last["tables_in"]) == {"gold.sequences": 0}


def test_what_cannot_be_scored_is_told(world: World, registered: dict[str, str]) -> None:
    del registered
    status, _, _, err = score(world, "--alias", "champion")
    assert status == 1 and "has no alias 'champion'; it has challenger (version" in err
    status, _, _, err = score(world, "--model-version", "99")
    assert status == 1 and "has no version 99; it has 1, 2, 3" in err
    status, _, _, err = score(world, "--alias", "challenger", "--k", "0")
    assert status == 1 and "--k 0" in err


@pytest.mark.long
def test_killed_anywhere_and_run_again(world: World, registered: dict[str, str]) -> None:
    words = [
        sys.executable, "-m", "jobs", "score", "--source", str(world.source),
        "--model-version", registered["personal_top"],
    ]  # fmt: skip
    for number, point in enumerate(crash_points.SCORING, 3):
        env = dict(os.environ, SESSIONMILL_CRASH_AT=point)
        k = ["--k", str(number)]
        done = subprocess.run([*words, *k], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert score(world, "--model-version", registered["personal_top"], *k)[0] == 0
        found = lists_of(world)
        mine = found[found.model_version == registered["personal_top"]]
        assert mine.user_id.is_unique and set(mine["items"].map(len)) == {number}


BROKEN: dict[str, Any] = {
    "user_and_model_are_key": lambda rows: [*rows, rows[-1]],
    "lists_are_not_empty": lambda rows: [rows[0], rows[1] | {"items": []}],
    "items_are_distinct": lambda rows: [rows[0] | {"items": [rows[0]["items"][0]] * 2}, rows[1]],
    "items_are_named": lambda rows: [
        rows[0] | {"items": [{"item_id": None, "score": 1.0}]}, rows[1]
    ],
    "scores_are_finite": lambda rows: [
        rows[0] | {"items": [{"item_id": "a", "score": float("inf")}]}, rows[1]
    ],
    "scores_fall": lambda rows: [rows[0] | {"items": rows[0]["items"][::-1]}, rows[1]],
}  # fmt: skip


def test_broken_lists_are_refused_and_named(spark: Any, tmp_path: Path) -> None:
    schema = arrow_schema(RECOMMENDATIONS.columns)
    now = pd.Timestamp("2024-01-01", tz="UTC")
    items = [{"item_id": "a", "score": 2.0}, {"item_id": "b", "score": 1.0}]
    good = [
        {"user_id": user, "model_name": "m", "model_version": "1", "created_ts": now,
         "items": items}
        for user in ("u", "v")
    ]  # fmt: skip
    suite = audit_suite.suite(None, RECOMMENDATIONS)  # type: ignore[arg-type]
    checks = [one for one in suite if one.condition or one.unique]
    assert set(BROKEN) == {one.name for one in checks}
    of_rules = set(rule_checks.CHECKS)  # (test_rules.py breaks these)
    assert set(BROKEN) | set(BATCH_BROKEN) | of_rules == {one.name for one in suite}
    for name, spoil in {"nothing": list, **BROKEN}.items():
        path = str(tmp_path / f"{name}.parquet")
        filesystem.write_parquet(path, pa.Table.from_pylist(spoil(good), schema=schema))
        [held] = recommendations_hold(path)
        assert held["holds"] == (name == "nothing"), name
        assert held["broken"] == ([] if name == "nothing" else [name])
        rows = spark.read.schema(RECOMMENDATIONS.ddl).parquet(path)
        frame = audit_suite.broken(rows, RECOMMENDATIONS.key, checks)
        told = {one.name for one in checks if frame.where(one.name).count()}
        assert told == (set() if name == "nothing" else {name}), name


BATCH_BROKEN: dict[str, Any] = {
    "items_are_known": lambda rows: rows[0]["items"][0].update(item_id="a stranger"),
    "lists_are_whole": lambda rows: rows[0]["items"].pop(),
    "users_balance": lambda rows: rows.pop(),
}


def audited(world: World, spark: Any, version: str, k: int) -> dict[str, set[str]]:
    """What an audit names of the lists of a version, by how they were broken."""
    lake = Lake(lambda: spark, str(world.lake), "toy")
    context = Context(load_source(str(world.source)), lake, None, checked_batch(None))
    candidate = score_job.compute(context, model_version=int(version), k=k)
    score_job.audit(context, candidate)
    made = next(
        path for path in candidate.manifest(score_job.ScoreManifest).made if "/lists-" in path
    )
    told = {}
    for name, spoil in BATCH_BROKEN.items():
        with spoiled([made], spoil), pytest.raises(AuditFailed) as raised:
            score_job.audit(context, candidate)
        told[name] = named(raised.value)
    candidate.remove()
    return told


def test_lists_that_miss_an_item_or_a_user_are_refused_and_named(
    world: World, registered: dict[str, str], spark: Any
) -> None:
    found = audited(world, spark, registered["personal_top"], 9)
    assert found == {name: {name} for name in BATCH_BROKEN}


def test_published_lists_are_held_against_the_users_that_were_scored(
    world: World, registered: dict[str, str], spark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registered["personal_top"]
    assert score(world, "--model-version", version, "--k", "4")[0] == 0
    lake = Lake(lambda: spark, str(world.lake), "toy")
    context = Context(load_source(str(world.source)), lake, None, checked_batch(None))
    rows = lake.read(RECOMMENDATIONS).where(f"model_version = '{version}'")
    user = rows.first()["user_id"]
    mine = f"user_id = '{user}'"
    strange = F.transform("items", lambda x: x.withField("item_id", F.lit("a stranger")))
    short = F.when(F.expr(mine), F.slice("items", 1, 3)).otherwise(F.col("items"))
    for change, broken in (
        (rows, set()), (rows.where(f"NOT {mine}"), {"users_balance"}),
        (rows.withColumn("items", short), {"lists_are_whole"}),
        (rows.withColumn("items", strange), {"items_are_known"}),
    ):  # fmt: skip
        facts = published.list_facts(context, change)
        assert set(facts.held) == {*BATCH_BROKEN, *rule_checks.CHECKS} and facts.unknown == {}
        assert {name for name, holds in facts.held.items() if not holds} == broken
    monkeypatch.setattr(published, "_scored_from", lambda _: {})
    facts = published.list_facts(context, rows)
    assert facts.held == {"items_are_known": True}
    why = f"model version {version}: no finished run of score in ops.runs names it"
    assert facts.unknown == dict.fromkeys(published.OF_LISTS, why)


def test_rows_of_what_lists_were_worth_are_judged_alike_by_spark(spark: Any) -> None:
    """`jobs validate` asks Spark what the night asks DataFusion (tests of test_lists.py)."""
    checks = [one for one in audit_suite.suite(None, LISTS) if one.condition]  # type: ignore[arg-type]
    for name, broken in {"nothing": {}, **BROKEN_WORTH}.items():
        rows = pa.Table.from_pylist([good_worth(**broken)], arrow_schema(LISTS.columns))
        frame = audit_suite.broken(spark.createDataFrame(rows), LISTS.key, checks)
        told = {one.name for one in checks if frame.where(one.name).count()}
        assert told == ({name} if broken else set()), name


RULED = """
[items]
landing = "items.csv"
format = "csv"
id = "id"
categories = ["shelf"]
[serving]
where = "item_id <> 'i03'"
exclude_seen_days = {days}
max_per_category = 2
category = "shelf"
block_list = "blocked.txt"
"""


def test_lists_by_rules_are_full_keep_them_and_are_made_anew_where_they_change(
    world: World, registered: dict[str, str], spark: Any
) -> None:
    """(The planted log has 15 items of five shelves, and no half day of a user has more than 4.)"""
    version, source = registered["gru4rec+st"], world.root / "ruled.toml"
    shelf = {f"i{number:02d}": f"shelf {number % 5}" for number in range(15)}
    rows = [
        (item, pd.Timestamp("2020-01-01", tz="UTC"), [("shelf", one)])
        for item, one in shelf.items()
    ]
    schema = arrow_schema(ITEM_ATTRIBUTES.columns)
    columns = [
        pa.array(one, kind.type) for one, kind in zip(zip(*rows, strict=True), schema, strict=True)
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    write_deltalake(ITEM_ATTRIBUTES.path(str(world.lake), "toy"), table, mode="overwrite")
    (world.root / "blocked.txt").write_text("i04\nunheard of\n")
    source.write_text(world.source.read_text() + RULED.format(days=0.5))
    words = ["score", "--source", str(source), "--json", "--model-version", version, "--k", "6"]
    assert score(world, "--model-version", version, "--k", "6")[0] == 0
    plain = lists_of(world)

    status, done, said, err = world.run(*words)
    assert status == 0 and done is not None, said + err
    told = done["tables"]["gold.recommendations"]["rules"]
    assert (told["where"], told["block_list"], told["short_users"]) == (1, 1, 0)
    assert "1 of 2 ids in serving.block_list are not in gold.items" in said
    sequences = DeltaTable(str(world.lake / "toy/gold/sequences")).to_pyarrow_table().to_pandas()
    items = DeltaTable(str(world.lake / "toy/gold/items")).to_pyarrow_table().to_pandas()
    names = dict(zip(items.item_index, items.item_id, strict=True))
    newest = max(one.max() for one in sequences.event_ts)
    found = lists_of(world)
    mine = found[found.model_version == version].set_index("user_id")["items"]
    for user, index, when in zip(
        sequences.user_id, sequences.item_index, sequences.event_ts, strict=True
    ):
        late = {names[i] for i, t in zip(index, when, strict=True) if newest - t <= DAY_NS / 2}
        given = [one["item_id"] for one in mine[user]]
        assert len(given) == 6 and not set(given) & ({"i03", "i04"} | late)
        assert max(pd.Series(given).map(shelf).value_counts()) <= 2

    assert "these lists are there already" in world.run(*words)[2]
    source.write_text(world.source.read_text() + RULED.format(days=0.25))
    assert "these lists are there already" not in world.run(*words)[2]
    (world.root / "blocked.txt").write_text("i05\n")
    assert "these lists are there already" not in world.run(*words)[2]
    assert {"i05"}.isdisjoint(
        one["item_id"] for row in lists_of(world).query("model_version == @version")["items"]
        for one in row
    )  # fmt: skip
    served_alike(world, source, version, sequences, names)

    context = Context(
        load_source(str(source)), Lake(lambda: spark, str(world.lake), "toy"), None, "test"
    )
    lists = context.lake.read(RECOMMENDATIONS).where(f"model_version = '{version}'")
    assert published.list_facts(context, lists).held == dict.fromkeys(
        ("items_are_known", *published.OF_LISTS), True
    )
    strange = F.transform("items", lambda x: x.withField("item_id", F.lit("i05")))
    facts = published.list_facts(context, lists.withColumn("items", F.slice(strange, 1, 1)))
    broken = {name for name, holds in facts.held.items() if not holds}
    assert broken == {"items_are_allowed", "seen_items_are_left_out"}, "(some had it that day)"
    (world.root / "blocked.txt").unlink()
    status, _, _, err = world.run(*words)
    assert status == 1 and "serving.block_list" in err
    facts = published.list_facts(context, lists)
    assert "serving.block_list" in facts.unknown["items_are_allowed"]

    status, _, said, _ = score(world, "--model-version", version, "--k", "6")
    assert status == 0 and "these lists are there already" not in said
    before, after = (
        {row.user_id: (list(row["items"]), row.rules) for _, row in one.iterrows()
         if row.model_version == version}
        for one in (plain, lists_of(world))
    )  # fmt: skip
    assert before == after, "without rules, as before"


DAY_NS = pd.Timedelta(days=1)


def served_alike(
    world: World, source: Path, version: str, sequences: pd.DataFrame, names: dict[int, str]
) -> None:
    """A registered model that is given the rules as a text makes the lists that are published."""
    done = jobs_cli.main(["rules", "--source", str(source)])
    assert done == 0
    text = (world.lake / "toy/_serving/rules.json").read_text()
    model = mlflow.pyfunc.load_model(f"models:/toy/{version}")
    events = sequences.explode(["item_index", "event_ts"])
    frame = pd.DataFrame(
        {"user_id": events.user_id, "item_id": events.item_index.map(names),
         "event_ts": pd.to_datetime(events.event_ts, utc=True)}
    )  # fmt: skip
    asked = model.predict(frame, params={"k": 6, "rules": text}).set_index("user_id")["items"]
    ours = lists_of(world).query("model_version == @version").set_index("user_id")["items"]
    for user, given in ours.items():
        assert [one["item_id"] for one in asked[user]] == [one["item_id"] for one in given]
    with pytest.raises(ValueError, match="'allow' is not known"):
        model.predict(frame, params={"rules": '{"allow": []}'})


def test_who_has_seen_all_gets_no_list(
    world: World, registered: dict[str, str], spark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(The last test of these: it registers another challenger.)"""
    del registered
    world.train("pop", "--comparison", "unseen", "--repeat-policy", "exclude_seen")
    for command in ("compare", "register"):
        status, done, _, err = world.run(
            command, "--source", str(world.source), "--comparison", "unseen", "--json"
        )
        assert status == 0 and done is not None, err
    words = ["--model-version", str(done["versions"][0]["version"]), "--k", "1000"]
    items = DeltaTable(str(world.lake / "toy/gold/items")).to_pyarrow_table().to_pandas()
    names = dict(zip(items.item_index, items.item_id, strict=True))
    sequences = DeltaTable(str(world.lake / "toy/gold/sequences"))
    rows = sequences.to_pyarrow_table()
    users = rows.num_rows
    status, _, said, err = score(world, *words)
    assert status == 0 and f"{users} users have seen every item and get no list" in said, err
    assert not len(lists_of(world).query("model_version == @words[1]"))

    first = rows.slice(0, 1).to_pylist()[0]
    for name, value in first.items():
        if isinstance(value, list):
            first[name] = value[:3]
    first |= {"n_events": 3, "n_sessions": len(set(first["session_ordinal"]))}
    changed = pa.concat_tables([pa.Table.from_pylist([first], schema=rows.schema), rows.slice(1)])
    write_deltalake(sequences, changed, mode="overwrite")
    for told in (f"{users - 1} users have seen every item", "these lists are there already"):
        status, _, said, err = score(world, *words)
        assert status == 0 and told in said, said + err
    [mine] = lists_of(world).query("model_version == @words[1]").to_dict("records")
    assert mine["user_id"] == first["user_id"]
    given = {one["item_id"] for one in mine["items"]}
    unseen = set(items.item_id) - {names[index] for index in first["item_index"]}
    assert given == unseen

    # Where what was seen is left out a list can be too short, too: for fewer items than are left,
    # and for all of them.
    monkeypatch.setattr(score_job, "_longest", lambda *_: None)  # as if no lists were there
    for k in (3, len(unseen) + 1):
        found = audited(world, spark, words[1], k)
        assert found == {name: {name} for name in BATCH_BROKEN}


@pytest.mark.parametrize(("size", "longest"), [(5, 3), (3, 3), (2, 2)])
def test_how_long_a_list_without_what_was_seen_can_be(
    monkeypatch: pytest.MonkeyPatch, size: int, longest: int
) -> None:
    """By it lists are known that are there already."""
    rows = rows_of([(1, 1, 1), (2, 2, 1), (1, 3, 1)], [(n, n, 1) for n in (1, 2, 3, 3)])
    monkeypatch.setattr(score_job, "_asked", lambda *_: (["a", "b"], rows))
    made = config("pop")
    made = replace(made, model=replace(made.model, repeat_policy="exclude_seen"))
    pop = Popularity(5, made.model)
    stored = Stored(pop, made, list("vwxyz"), pop.count, {})
    assert score_job._possible(None, stored, 0, size, None) == longest  # type: ignore[arg-type]
